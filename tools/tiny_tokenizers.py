"""Tiny tokenizers with each family's special tokens and chat template, for golden prompts.

What a template renders does not depend on the vocabulary, so a handful of merges will do. Needs
`tokenizers` only: the reference implementation and ours are given the same folders.
"""

import dataclasses
import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

TEMPLATES = Path(__file__).parent.parent / "tests" / "golden" / "chat_templates"


@dataclasses.dataclass(frozen=True)
class Family:
    """What a model folder says of its tokenizer, beyond the vocabulary."""

    template: str  # a file in TEMPLATES
    bos: str | None
    eos: str
    others: tuple[str, ...] = ()  # further special tokens
    adds_bos: bool | None = None
    sentencepiece: bool = False  # pieces of text with bytes to fall back on, instead of bytes


_TURNS = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>")
_HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>")
_CHATML = ("<|im_start|>", "<|endoftext|>")

FAMILIES = {
    "llama2": Family("llama2", "<s>", "</s>", adds_bos=True, sentencepiece=True),
    "llama3_1": Family("llama3_1", "<|begin_of_text|>", "<|eot_id|>", _HEADERS),
    "llama3_2": Family("llama3_2", "<|begin_of_text|>", "<|eot_id|>", _HEADERS),
    "smollm2": Family("smollm2", "<|im_start|>", "<|im_end|>", ("<|endoftext|>",), False),
    "smollm3": Family("smollm3", None, "<|im_end|>", (*_CHATML, "<|begin_of_text|>")),
    "qwen2_5": Family("qwen2_5", None, "<|im_end|>", _CHATML, False),
    "qwen3": Family("qwen3", None, "<|im_end|>", _CHATML, False),
    "qwen3_instruct_2507": Family("qwen3_instruct_2507", None, "<|im_end|>", _CHATML, False),
    "deepseek_r1_distill": Family(
        "deepseek_r1_distill",
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        ("<｜User｜>", "<｜Assistant｜>"),
        True,
    ),
    "mistral": Family(
        "mistral", "<s>", "</s>", ("[INST]", "[/INST]"), adds_bos=True, sentencepiece=True
    ),
    "gemma2": Family("gemma", "<bos>", "<eos>", _TURNS, True, sentencepiece=True),
    "gemma3": Family("gemma3", "<bos>", "<eos>", _TURNS, True, sentencepiece=True),
}

_SYSTEM = {"role": "system", "content": "Answer with the number only."}
_ASKED = {"role": "user", "content": "What is 17 + 25?"}
_ODD = {"role": "user", "content": "  is 2 < 3 & \"3\" > '2'? é漢🙂\n\ttwo  spaces \n"}
_ANSWER = {"role": "assistant", "content": "<think>\n17 + 25 = 42\n</think>\n\n42"}

CONVERSATIONS = {
    "asked": (_ASKED,),
    "with system": (_SYSTEM, _ASKED),
    "empty system": ({"role": "system", "content": ""}, _ASKED),
    "odd characters": (_ODD,),
    "second turn": (_ASKED, _ANSWER, _ODD),
}


def write_folder(folder: Path, family: Family) -> Path:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    folder.mkdir(parents=True, exist_ok=True)
    core = _sentencepiece() if family.sentencepiece else _byte_level()
    special = [t for t in (family.bos, family.eos, *family.others) if t is not None]
    added = [tokenizers.AddedToken(t, special=True, normalized=False) for t in special]
    # "<think>" is a token of the newer models, and no special one: decoding shows it.
    core.add_special_tokens(added)
    core.add_tokens([tokenizers.AddedToken("<think>", special=False, normalized=False)])
    core.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": family.bos,
        "eos_token": family.eos,
        "add_bos_token": family.adds_bos,
        "clean_up_tokenization_spaces": False,
    }
    written = {name: value for name, value in config.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(written), encoding="utf-8")
    template = (TEMPLATES / f"{family.template}.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def _byte_level() -> tokenizers.Tokenizer:
    """256 bytes and some merges of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("u", "s"), ("us", "er"), ("e", "r"), ("1", "7")]
    merges.sort(key=lambda pair: len(pair[0] + pair[1]))
    vocab = {piece: i for i, piece in enumerate([*alphabet, *(a + b for a, b in merges)])}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return core


def _sentencepiece() -> tokenizers.Tokenizer:
    """Letters, a few longer pieces, and a token a byte for everything else."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [chr(c) for c in range(33, 127)] + ["th", "the", "▁the", "in", "er"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("i", "n"), ("e", "r")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    core = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return core
