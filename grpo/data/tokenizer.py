"""Text to token ids and back: a model's own tokenizer, or plain bytes.

Token ids are the truth of a run and text is a view of them, so `encode` never adds a token that
the text does not spell: what goes before a prompt is decided in one place, `grpo.data.prompts`.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from grpo.data.splits import SPLITS, Split, make_core

if TYPE_CHECKING:
    import tokenizers

BYTES_FIELD = "grpo.tokenizer"  # of GGUF files of our own, "bytes": ids are those of ByteTokenizer


class Tokenizer(Protocol):
    """What the rest of the program knows of a tokenizer.

    Attributes:
      vocab_size: one more than the largest id. A model's embedding may be padded beyond it.
      eos_ids: every id that ends a completion; the tokenizer's own end token comes first.
      pad_id: fills unused slots. It may be a stop token too: masks come from lengths.
      bos_id: the token that opens a text, if there is one.
      adds_bos: whether this model expects every text to begin with `bos_id`.
      chat_template: Jinja source that renders messages, or None for a base model.
      template_variables: what a chat template is told besides the messages: special tokens by
        their names ("bos_token", ...) and switches ("enable_thinking").
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_ids(self) -> tuple[int, ...]: ...

    @property
    def pad_id(self) -> int: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def adds_bos(self) -> bool: ...

    @property
    def chat_template(self) -> str | None: ...

    @property
    def template_variables(self) -> Mapping[str, Any]: ...

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing added. A special token spelled out in it becomes its id."""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, then PAD and EOS: for tests and models trained from scratch.

    Text never spells a special token here; skipping them or not only decides whether decoding
    shows `<pad>` and `<eos>`.
    """

    vocab_size: int = 258
    eos_ids: tuple[int, ...] = (257,)
    pad_id: int = 256
    bos_id: int | None = None
    adds_bos: bool = False
    chat_template: str | None = None
    template_variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def encode(self, text: str) -> list[int]:
        # A lone surrogate, as JSON's "\ud800" gives, has no UTF-8 form: it becomes "?".
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        special = {self.pad_id: b"<pad>", self.eos_ids[0]: b"<eos>"}
        parts = []
        for i in ids:
            if 0 <= i < 256:
                parts.append(bytes([i]))
            elif i not in special:
                raise ValueError(
                    f"token id {i} is outside the byte vocabulary of {self.vocab_size}"
                )
            elif not skip_special:
                parts.append(special[i])
        return b"".join(parts).decode("utf-8", errors="replace")


@dataclasses.dataclass(frozen=True)
class HfTokenizer:
    """A `tokenizers.Tokenizer` with what a model's other files say about its special tokens."""

    core: "tokenizers.Tokenizer"
    vocab_size: int
    eos_ids: tuple[int, ...]
    pad_id: int
    bos_id: int | None = None
    adds_bos: bool = False
    chat_template: str | None = None
    template_variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def encode(self, text: str) -> list[int]:
        return list(self.core.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self.core.decode([int(i) for i in ids], skip_special_tokens=skip_special)


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer of `source`: "bytes", a model folder in Hugging Face layout, or a .gguf file.

    Raises:
      FileNotFoundError: nothing is at that path.
      ValueError: something is there, but no tokenizer that can be built from it.
    """
    if source == "bytes":
        return ByteTokenizer()
    path = Path(source).expanduser()
    if path.is_dir():
        return tokenizer_from_folder(path)
    if not path.exists():
        raise FileNotFoundError(
            f'no tokenizer at {path}: give "bytes", a folder with tokenizer.json, or a .gguf file'
        )
    if path.suffix != ".gguf":
        raise ValueError(f"{path} is neither a folder nor a .gguf file")
    return tokenizer_from_gguf(path)


def tokenizer_from_folder(folder: Path) -> HfTokenizer:
    """Reads tokenizer.json, tokenizer_config.json, generation_config.json and the chat template.

    Raises:
      FileNotFoundError: no tokenizer.json.
      ValueError: the folder does not say which token ends a completion.
    """
    from tokenizers import Tokenizer as Core

    if not (folder / "tokenizer.json").exists():
        raise FileNotFoundError(_no_tokenizer_json(folder))
    core = Core.from_file(str(folder / "tokenizer.json"))
    core.no_truncation()  # some files ship with a length limit or padding switched on
    core.no_padding()
    config = _read_json(folder / "tokenizer_config.json")
    generation = _read_json(folder / "generation_config.json") or _read_json(folder / "config.json")
    names = _special_tokens(config)

    eos_ids = _unique(
        [core.token_to_id(names.get("eos_token", "")), generation.get("eos_token_id")]
    )
    if not eos_ids:
        raise ValueError(
            f"{folder} names no end-of-text token: set eos_token in tokenizer_config.json "
            "or eos_token_id in generation_config.json"
        )
    bos_id = _first(core.token_to_id(names.get("bos_token", "")))
    pad_id = _first(
        core.token_to_id(names.get("pad_token", "")), generation.get("pad_token_id"), eos_ids[0]
    )
    assert pad_id is not None
    return HfTokenizer(
        core=core,
        vocab_size=_vocab_size(core),
        eos_ids=eos_ids,
        pad_id=pad_id,
        bos_id=bos_id,
        adds_bos=bos_id is not None and _adds_bos(core, config, bos_id),
        chat_template=_chat_template(folder, config),
        template_variables=names,
    )


def tokenizer_from_gguf(path: Path) -> Tokenizer:
    """Builds the tokenizer from the metadata of a .gguf file.

    Raises:
      ValueError: a kind of tokenizer other than byte-level BPE with one of `SPLITS`. Splits
        differ by model in ways that metadata only names, so guessing one would give wrong ids.
    """
    from gguf import GGUFReader

    fields = {
        name: field.contents()
        for name, field in GGUFReader(path).fields.items()
        if name.startswith("tokenizer.") or name == BYTES_FIELD
    }
    if fields.get(BYTES_FIELD) == "bytes":
        return ByteTokenizer()
    kind, split = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in SPLITS:
        raise ValueError(
            f"{path} has tokenizer.ggml.model={kind!r}, tokenizer.ggml.pre={split!r}; only "
            f"'gpt2' with one of {', '.join(map(repr, SPLITS))} can be built from GGUF. Put the "
            "model's own tokenizer.json into a folder and give that folder as the tokenizer"
        )
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    kinds, merges = fields["tokenizer.ggml.token_type"], fields["tokenizer.ggml.merges"]
    core = _bpe(SPLITS[split], tokens, kinds, merges)
    ids = {
        name: fields.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items()
    }
    eos_ids = _unique([ids["eos"], fields.get("tokenizer.ggml.eot_token_id")])
    if not eos_ids:
        raise ValueError(f"{path} has no tokenizer.ggml.eos_token_id")
    pad_id = eos_ids[0] if ids["pad"] is None else ids["pad"]
    return HfTokenizer(
        core=core,
        vocab_size=len(tokens),
        eos_ids=eos_ids,
        pad_id=pad_id,
        bos_id=ids["bos"],
        adds_bos=bool(fields.get("tokenizer.ggml.add_bos_token", False)),
        chat_template=fields.get("tokenizer.chat_template"),
        template_variables={f"{k}_token": tokens[i] for k, i in ids.items() if i is not None},
    )


def with_thinking(tokenizer: Tokenizer, on: bool) -> Tokenizer:
    """The same tokenizer, its chat template told to ask for a chain of thought or for none.

    Raises:
      ValueError: the template has no such switch.
    """
    if "enable_thinking" not in (tokenizer.chat_template or ""):
        raise ValueError(
            "the chat template of this model has no enable_thinking to switch: leave "
            "model.thinking at its default"
        )
    assert isinstance(tokenizer, HfTokenizer)  # nothing else has a template of its own
    told = {**tokenizer.template_variables, "enable_thinking": on}
    return dataclasses.replace(tokenizer, template_variables=told)


def difference(one: Tokenizer, other: Tokenizer) -> str | None:
    """What stands in the way of reading the ids of `one` as those of `other`; None: nothing.

    Special tokens, the stop tokens above all, must be the same; chat templates need not.
    """
    if type(one) is not type(other):
        return f"a {type(one).__name__} against a {type(other).__name__}"
    if one.vocab_size != other.vocab_size:
        return f"{one.vocab_size} ids against {other.vocab_size}"
    if set(one.eos_ids) != set(other.eos_ids):
        return f"stop ids {sorted(one.eos_ids)} against {sorted(other.eos_ids)}"
    if isinstance(one, HfTokenizer) and isinstance(other, HfTokenizer):
        tokens, others = _token_of_id(one), _token_of_id(other)
        for i in range(one.vocab_size):
            if tokens.get(i) != others.get(i):
                return f"id {i} is {tokens.get(i)!r} against {others.get(i)!r}"
    return None


def _token_of_id(tokenizer: HfTokenizer) -> dict[int, str]:
    return {i: token for token, i in tokenizer.core.get_vocab(with_added_tokens=True).items()}


def _bpe(
    split: Split, tokens: list[str], kinds: list[int], merges: list[str]
) -> "tokenizers.Tokenizer":
    from tokenizers import AddedToken

    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    core = make_core(split, vocab, pairs)
    control, user_defined = 3, 4  # LLAMA_TOKEN_TYPE_CONTROL, LLAMA_TOKEN_TYPE_USER_DEFINED

    def added(wanted: int) -> list[AddedToken]:
        return [
            AddedToken(token, special=wanted == control, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == wanted
        ]

    core.add_special_tokens(added(control))
    core.add_tokens(added(user_defined))
    return core


def _no_tokenizer_json(folder: Path) -> str:
    if (folder / "tokenizer.model").exists():
        return (
            f"{folder} has only a SentencePiece tokenizer.model. Convert it once where "
            "transformers is installed: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes tokenizer.json"
        )
    return f"{folder} has no tokenizer.json"


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`{"eos_token": "</s>", ...}`; a token is written as text or as {"content": text, ...}."""
    names = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if text:
            names[key] = text
    return names


def _adds_bos(core: "tokenizers.Tokenizer", config: Mapping[str, Any], bos_id: int) -> bool:
    """The config's word if it gives one, else what the post-processor of tokenizer.json does."""
    if isinstance(config.get("add_bos_token"), bool):
        return config["add_bos_token"]
    return core.encode("", add_special_tokens=True).ids[:1] == [bos_id]


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else the config's field: one template or a list of named ones."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    field = config.get("chat_template")
    if isinstance(field, list):
        return {entry["name"]: entry["template"] for entry in field}.get("default")
    return field


def _vocab_size(core: "tokenizers.Tokenizer") -> int:
    return max(core.get_vocab(with_added_tokens=True).values()) + 1  # ids may have gaps


def _unique(candidates: Iterable[int | list[int] | None]) -> tuple[int, ...]:
    """The ids in order, lists opened, without absent ones and repetitions."""
    ids: dict[int, None] = {}
    for candidate in candidates:
        for i in candidate if isinstance(candidate, list) else [candidate]:
            if i is not None:
                ids[i] = None
    return tuple(ids)


def _first(*candidates: int | None) -> int | None:
    return next((i for i in candidates if i is not None), None)
