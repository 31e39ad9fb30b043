"""A tokenizer out: as the files of a Hugging Face folder, or as the metadata of a .gguf file."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.data.splits import SPLITS, make_core, split_name
from grpo.data.tokenizer import BYTES_FIELD, ByteTokenizer, HfTokenizer, Tokenizer

if TYPE_CHECKING:
    import gguf
    import tokenizers

# What a folder may hold of a tokenizer, whoever made it.
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # token types of GGUF


def write_tokenizer(folder: Path, tokenizer: Tokenizer, files: Path | None) -> None:
    """Writes tokenizer.json and what belongs to it into `folder`.

    Args:
      folder: exists.
      tokenizer: what the model was trained with.
      files: the Hugging Face folder it was read from, whose files are copied as they are; else
        they are made.
    """
    if files is not None and files.is_dir():
        for name in _FILES:
            if (files / name).is_file():
                shutil.copyfile(files / name, folder / name)
        return
    core, names = _core(tokenizer)
    core.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": tokenizer.adds_bos,
        **names,
    }
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if tokenizer.chat_template is not None:
        template = folder / "chat_template.jinja"
        template.write_text(tokenizer.chat_template, encoding="utf-8")


def add_to_gguf(
    writer: "gguf.GGUFWriter", tokenizer: Tokenizer, files: Path | None, rows: int
) -> None:
    """Adds the metadata of a tokenizer to a .gguf file that is being written.

    Args:
      writer: before its header is written.
      tokenizer: what the model was trained with.
      files: the .gguf file it was read from, whose metadata is copied as it is; else it is made.
      rows: of the embedding, which may be more than the tokenizer has tokens.

    Raises:
      ValueError: a tokenizer that cannot be named in GGUF; says what to do.
    """
    if files is not None and files.is_file():
        _copy_fields(writer, files)
        return
    core, _ = _core(tokenizer)
    if isinstance(tokenizer, ByteTokenizer):
        writer.add_string(BYTES_FIELD, "bytes")
        split: str | None = "gpt-2"  # without merges, how a text is cut makes no difference
    else:
        split = split_name(core)
    if split is None:
        raise ValueError(
            "this tokenizer is not byte-level BPE with one of the splits "
            f"{', '.join(SPLITS)}: export a folder instead, and turn that into GGUF with "
            "convert_hf_to_gguf.py of llama.cpp"
        )
    state = json.loads(core.to_str())
    tokens, kinds = _token_list(state, rows)
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    # llama.cpp wants merges, GGUF no empty list: this one joins what no text holds.
    writer.add_token_merges(merges or [f"{tokens[-2]} {tokens[-1]}"])
    writer.add_eos_token_id(tokenizer.eos_ids[0])
    if len(tokenizer.eos_ids) > 1:
        writer.add_eot_token_id(tokenizer.eos_ids[1])
    writer.add_pad_token_id(tokenizer.pad_id)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    unknown = tokenizer.template_variables.get("unk_token")
    if unknown in tokens:
        writer.add_unk_token_id(tokens.index(unknown))
    writer.add_add_bos_token(tokenizer.adds_bos)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _core(tokenizer: Tokenizer) -> tuple["tokenizers.Tokenizer", dict[str, str]]:
    """The tokenizer as `tokenizers` has it, and its special tokens by name."""
    if isinstance(tokenizer, HfTokenizer):
        told = tokenizer.template_variables  # and switches, which are no tokens
        return tokenizer.core, {name: v for name, v in told.items() if isinstance(v, str)}
    if isinstance(tokenizer, ByteTokenizer):
        return byte_core(), {"pad_token": "<pad>", "eos_token": "<eos>"}
    raise TypeError(f"cannot write a tokenizer of type {type(tokenizer).__name__}")


def byte_core() -> "tokenizers.Tokenizer":
    """`ByteTokenizer` for `tokenizers`: byte-level BPE without any merge.

    Ids are the same, with one exception that cannot be had otherwise: `<pad>` and `<eos>`, spelled
    out in a text, become the special tokens here.
    """
    from tokenizers import AddedToken

    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    core = make_core(SPLITS["gpt-2"], vocab, [])
    core.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<pad>", "<eos>")]
    )
    return core


def _byte_characters() -> Iterator[str]:
    """The printable character that byte-level tokenizers write for each byte, as GPT-2 chose them.

    Printable Latin-1 stands for itself, the others for U+0100 and on, in their order.
    """
    shifted = 0
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            yield chr(byte)
        else:
            yield chr(256 + shifted)
            shifted += 1


def _token_list(state: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embedding; those without a token are named [PADn]."""
    by_id = {i: (token, _NORMAL) for token, i in state["model"]["vocab"].items()}
    for added in state["added_tokens"]:
        by_id[added["id"]] = (added["content"], _CONTROL if added["special"] else _USER_DEFINED)
    if max(by_id) >= rows:
        raise ValueError(f"the tokenizer has id {max(by_id)}, the embedding only {rows} rows")
    listed = [by_id.get(i, (f"[PAD{i}]", _UNUSED)) for i in range(rows)]
    return [token for token, _ in listed], [kind for _, kind in listed]


def _copy_fields(writer: "gguf.GGUFWriter", source: Path) -> None:
    from gguf import GGUFReader, GGUFValueType

    for name, field in GGUFReader(source).fields.items():
        if name.startswith("tokenizer."):
            kind = field.types[0]
            inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=inner)
