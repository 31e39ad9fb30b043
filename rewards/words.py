"""Splitting a completion into words, for rewards that look at how it is written."""

import re

MAX_TEXT = 100_000  # characters looked at, so that no text takes long

_TAG = re.compile(r"</?[A-Za-z]{1,20}>")
_COMMAND = re.compile(r"\\[A-Za-z]+")
# Scripts written without spaces: a character is counted as a word.
_ALONE = "\u3005\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_ALONE}]|(?:(?![{_ALONE}])\w)+")


_WORD_OR_LINE = re.compile(rf"\n|{_WORD.pattern}")


def words(text: str) -> list[str]:
    """The words of a text in order, without tags such as `<think>`.

    A Han character or a kana is a word by itself. Only the first 100,000 characters are read.
    """
    return _WORD.findall(_TAG.sub(" ", text[:MAX_TEXT]))


def words_and_lines(text: str) -> list[str]:
    r"""The same, without LaTeX commands and with "\n" where a line ends."""
    return _WORD_OR_LINE.findall(_COMMAND.sub(" ", _TAG.sub(" ", text[:MAX_TEXT])))
