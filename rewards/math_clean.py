"""Takes off what only typesets or introduces an answer, in linear time."""

import re

_UNICODE = {
    "\u2212": "-", "\u2013": "-", "\u00d7": r"\times ", "\u00f7": r"\div ", "\u00b7": r"\cdot ",
    "\u22c5": r"\cdot ", "\u03c0": r"\pi ", "\u03b8": r"\theta ", "\u221e": r"\infty ",
    "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\neq ", "\u00b0": r"^\circ ",
    "\u222a": r"\cup ", "\u2208": r"\in ", "\u2205": r"\emptyset ", "\u00b1": r"\pm ",
    "\u221a": r"\sqrt ", "\u00b2": "^{2}", "\u00b3": "^{3}", "\u00a0": " ", "\u2009": r"\,",
    "\u202f": r"\,", "\u20ac": " EUR ", "\u00a3": " GBP ", "\u2018": "'", "\u2019": "'",
}  # fmt: skip
_TRANSLATE = str.maketrans(_UNICODE)
_SPACING = re.compile(
    r"\\(?:left|right|bigl|bigr|Bigl|Bigr|big|Big|displaystyle|textstyle|quad|qquad|limits)"
    r"(?![A-Za-z])|(?<!\\)\\[!;: ()\[\]]|~"
)
_THOUSANDS = re.compile(
    r"(?<![0-9.])[0-9]{1,3}(?:(?:\{,\}|,?\\[!,] ?)[0-9]{3})+(?![0-9])", re.ASCII
)
_SPACES = re.compile(r"-?[0-9]{1,3}(?: [0-9]{3})+", re.ASCII)
_NOT_DIGITS = re.compile(r"[^0-9]+", re.ASCII)
_LEAD = re.compile(
    r"(?:so,? |thus,? |therefore,? |hence,? )?(?:the )?(?:final |correct )?answer(?: is|:|=)\s*:?",
    re.ASCII | re.IGNORECASE,
)
_SPELLINGS = (
    (r"\dfrac", r"\frac"),
    (r"\tfrac", r"\frac"),
    (r"\cfrac", r"\frac"),
    (r"\,", " "),
    (r"\mathbb{R}", r"\R "),
)
_UNION = re.compile(r"(?<=[)\]])\s{0,3}U\s{0,3}(?=[(\[])")
_PAIRS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"))


def clean(text: str) -> str:
    """The answer without what only typesets it: delimiters, spacing commands, a full stop.

    Texts that are equal afterwards are the same answer.
    """
    if not text.isascii():
        text = text.translate(_TRANSLATE)
    text = _unwrap(text.strip())
    if "\\" in text or "~" in text or "{,}" in text:
        text = _THOUSANDS.sub(lambda match: _NOT_DIGITS.sub("", match.group()), text)
        text = _SPACING.sub(" ", text)
        for old, new in _SPELLINGS:
            text = text.replace(old, new)
        text = text.strip()
    if " " in text and _SPACES.fullmatch(text):
        text = text.replace(" ", "")
    return _UNION.sub(r"\\cup ", text) if "U" in text else text


def _unwrap(text: str) -> str:
    for _ in range(4):
        before = text
        for opening, closing in _PAIRS:
            if text.startswith(opening) and text.endswith(closing):
                inside = text[len(opening) : -len(closing)]
                if len(text) >= len(opening + closing) and opening not in inside.replace(r"\$", ""):
                    text = inside.strip()
        if text.endswith((".", ",")) and not text.endswith(("..", ",.")):
            text = text[:-1].rstrip()
        if text[:1] in "aAcCfFhHsStT=":
            text = _LEAD.sub("", text, count=1).lstrip() if _LEAD.match(text) else text
            text = text.removeprefix("=").lstrip()
        if text == before:
            break
    return text
