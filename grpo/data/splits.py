"""How byte-level BPE tokenizers cut a text before they merge, by the names llama.cpp gives them.

A .gguf file only names its split; tokenizer.json spells it out. Only what is here can be turned
from one into the other: a split that is guessed gives wrong ids.
"""

import dataclasses
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class Split:
    """What a name stands for.

    Attributes:
      regex: cuts the text; None: the one that GPT-2 uses.
      single_digits: no two digits stay together, before the regex.
      nfc: the text is brought to Unicode's NFC first.
      ignore_merges: a piece that is in the vocabulary is one token, whatever the merges say.
    """

    regex: str | None = None
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False


SPLITS = {
    "gpt-2": Split(),
    "smollm": Split(single_digits=True),
    "qwen2": Split(_WORDS.replace("DIGITS", r"\p{N}"), nfc=True),
    "llama-bpe": Split(_WORDS.replace("DIGITS", r"\p{N}{1,3}"), ignore_merges=True),
}


def make_core(
    split: Split, vocab: dict[str, int], merges: list[tuple[str, str]]
) -> "tokenizers.Tokenizer":
    """A byte-level BPE tokenizer; special tokens are still to be added."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Core

    core = Core(models.BPE(vocab=vocab, merges=merges, ignore_merges=split.ignore_merges))
    steps: list[Any] = []
    if split.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if split.regex is not None:
        steps.append(pre_tokenizers.Split(Regex(split.regex), behavior="isolated"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.regex is None)
    core.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level]) if steps else byte_level
    if split.nfc:
        core.normalizer = normalizers.NFC()
    core.decoder = decoders.ByteLevel()
    return core


def split_name(core: "tokenizers.Tokenizer") -> str | None:
    """Which of `SPLITS` this byte-level BPE tokenizer uses; None: none of them."""
    wanted = _shape(core)
    return next(
        (n for n, s in SPLITS.items() if _shape(make_core(s, {"a": 0}, [])) == wanted), None
    )


def _shape(core: "tokenizers.Tokenizer") -> dict[str, Any]:
    """All that decides how text is cut, without what only concerns offsets."""
    state = json.loads(core.to_str())
    splitter = state["pre_tokenizer"] or {}
    steps = splitter.get("pretokenizers", [splitter])
    return {
        "kind": state["model"]["type"],
        "ignore_merges": bool(state["model"].get("ignore_merges")),
        "normalizer": state["normalizer"],
        "steps": [{k: v for k, v in step.items() if k != "trim_offsets"} for step in steps],
    }
