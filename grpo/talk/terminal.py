"""A completion on its way to a terminal: tokens to text, thoughts apart from what is said."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from grpo.data.tokenizer import Tokenizer
from grpo.report import visible

OPEN, CLOSE = "<think>", "</think>"
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class Piece(NamedTuple):
    """Some text, all of it thought or all of it said."""

    text: str
    thought: bool


class TextStream:
    """Text of tokens that arrive bit by bit; half a character waits for its other half."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._given = ""

    def add(self, tokens: Sequence[int]) -> str:
        """What these tokens add to the text, as far as it is certain."""
        self._tokens += tokens
        text = self._tokenizer.decode(self._tokens)
        # Bytes of an unfinished character decode to U+FFFD until the last of them is there.
        return self._beyond(text.rstrip("\ufffd"))

    def end(self) -> str:
        """What is left when no more tokens come."""
        return self._beyond(self._tokenizer.decode(self._tokens))

    def _beyond(self, text: str) -> str:
        if not text.startswith(self._given):  # wait, rather than say something else than before
            return ""
        new = text[len(self._given) :]
        self._given = text
        return new


class ThoughtStream:
    """Splits text at `<think>` and `</think>`, wherever it is cut; the tags count as thought.

    Args:
      thinking: the prompt has opened a thought already.
    """

    def __init__(self, thinking: bool = False):
        self._thinking = thinking
        self._held = ""  # may be the beginning of a tag

    def add(self, text: str) -> Iterator[Piece]:
        """The pieces that are certain with `text` behind what came before."""
        rest = self._held + text
        while True:
            tag = CLOSE if self._thinking else OPEN
            before, found, after = rest.partition(tag)
            if not found:
                break
            if self._thinking:
                yield Piece(before + tag, True)
            else:
                yield from self._piece(before)
                yield Piece(tag, True)
            self._thinking = not self._thinking
            rest = after
        held = max((n for n in range(len(tag)) if rest.endswith(tag[:n])), default=0)
        self._held = rest[len(rest) - held :]
        yield from self._piece(rest[: len(rest) - held])

    def end(self) -> Iterator[Piece]:
        """What was held back."""
        rest, self._held = self._held, ""
        yield from self._piece(rest)

    def _piece(self, text: str) -> Iterator[Piece]:
        if text:
            yield Piece(text, self._thinking)


def opens_thought(prompt: str) -> bool:
    """Whether a prompt, as some chat templates write it, ends within a thought."""
    return prompt.rfind(OPEN) > prompt.rfind(CLOSE)


def shown(piece: Piece, colour: bool) -> str:
    """A piece for the terminal, thoughts dim; nothing in it can command the terminal."""
    text = visible(piece.text.replace("\t", "    "))
    return f"{_DIM}{text}{_PLAIN}" if piece.thought and colour else text
