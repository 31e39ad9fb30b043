"""Whether a completion stays in one language.

A small detector of our own, so that a reward needs no model and gives the same answer for ever:
scripts are told apart by code points, languages of one script by their commonest function words,
a line or a few at a time. That is right for reasoning text and coarse for single words: a French
noun in an English line passes.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Iterator

from rewards.api import BadReference, Problem
from rewards.words import words_and_lines

# Code points of the scripts that belong to one language here, or to the group of LATIN below.
_SCRIPTS = {
    "latin": "A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff",
    "greek": "\u0370-\u03ff\u1f00-\u1fff",
    "cyrillic": "\u0400-\u052f",
    "hebrew": "\u0590-\u05ff",
    "arabic": "\u0600-\u065f\u066e-\u06ef\u06fa-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufeff",
    "devanagari": "\u0900-\u0965\u0970-\u097f",
    "bengali": "\u0980-\u09e5\u09f0-\u09ff",
    "tamil": "\u0b80-\u0be5",
    "thai": "\u0e00-\u0e4f",
    "hangul": "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af",
    "kana": "\u3040-\u30ff",
    "han": "\u3005\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff",
}
_OF_CHARACTER = re.compile("|".join(f"(?P<{name}>[{span}])" for name, span in _SCRIPTS.items()))

_LANGUAGES = {
    "ar": "arabic",
    "bn": "bengali",
    "de": "latin",
    "el": "greek",
    "en": "latin",
    "es": "latin",
    "fr": "latin",
    "he": "hebrew",
    "hi": "devanagari",
    "it": "latin",
    "ja": "kana",
    "ko": "hangul",
    "nl": "latin",
    "pl": "latin",
    "pt": "latin",
    "ru": "cyrillic",
    "ta": "tamil",
    "th": "thai",
    "tr": "latin",
    "vi": "latin",
    "zh": "han",
}
# The commonest function words, without those of one letter: a formula has them too.
_FUNCTION_WORDS = {
    language: frozenset(listed.split())
    for language, listed in {
        "de": "der die das und ist nicht ein eine einen zu den dem mit auf für von wir sich auch "
        "es im dass wenn aber oder also dann nun sind hat haben wird werden kann sei daher wie",
        "en": "the of and is to in that it for with as this are be we not so if then which from by "
        "but or an can have has will should let now where since because there they i'm what",
        "es": "el la los las de que y es en un una por con para no se del al lo como pero más si "
        "entonces tenemos son está este esta porque cuando hay así ahora también donde su",
        "fr": "le la les des de et est un une dans pour que qui nous ce pas sur avec donc il elle "
        "du au aux par mais ou si alors sont cette comme on peut plus car ainsi ces être",
        "it": "il lo la gli le di che è un una per con non si del della dei delle ma se come "
        "anche sono questo questa quindi allora abbiamo nel nella più perché ora dove poi",
        "nl": "de het een en van is dat niet te op zijn voor met we die er maar om als dan ook "
        "aan bij dus nu kan wordt hebben heeft deze dit want naar waar uit moet worden",
        "pl": "nie się jest na że do to jak ale po za od przez co tak więc czy być są dla ten "
        "tego jego oraz gdy teraz mamy można który która które przy tym jeśli lub",
        "pt": "de que não uma um para com os as do da em no na por mais se como mas foi ele são "
        "então temos isso esta este ao dos das ou quando agora também onde porque ser",
        "tr": "ve bir bu için ile da de ne var olarak daha çok gibi sonra kadar ama ise olan "
        "değil şimdi eğer her olur şu o zaman ancak veya göre",
        "vi": "và là của có không cho với một các được trong này đó để ta nếu thì khi từ vậy "
        "nên những người đã sẽ bằng vì như ra vào số",
    }.items()
}
_LANGUAGES_OF: dict[str, list[str]] = {}
for _language, _listed in _FUNCTION_WORDS.items():
    for _word in _listed:
        _LANGUAGES_OF.setdefault(_word, []).append(_language)
_MIN_BLOCK = 6  # words; shorter lines are judged with the next ones
_CLEARLY = 2  # function words by which another language must lead to take a block


@dataclasses.dataclass(frozen=True)
class LanguageShare:
    """Share of a completion's words that are in the language; 0.0 if it has no words.

    Numbers, symbols, single letters and LaTeX commands are not words here, nor are tags: a formula
    is in every language. Of Han characters and kana each counts as one.

    Attributes:
      language: two letters: ar bn de el en es fr he hi it ja ko nl pl pt ru ta th tr vi zh.

    Raises:
      ValueError: a language that is not in this list.

    Source: the language consistency reward of arXiv:2501.12948: the proportion of target language
      words in the chain of thought.
    """

    language: str

    def __post_init__(self) -> None:
        if self.language not in _LANGUAGES:
            known = ", ".join(sorted(_LANGUAGES))
            raise ValueError(f"no language {self.language!r}; there are {known}")

    def __call__(self, completion: str, problem: Problem) -> float:
        del problem
        return _share(completion, self.language)


def language_consistency(completion: str, problem: Problem) -> float:
    """Share of the words of the chain of thought that are in `problem.meta["language"]`.

    The chain of thought is what stands before `</think>`; where that tag is missing it is all of
    the completion, so that leaving the tag out hides nothing. The answer behind it is not judged:
    it may have to be a name, a program or a translation. Words are those of `LanguageShare`, which
    judges whole completions in one language.

    Raises:
      BadReference: the problem names no language, or one that `LanguageShare` does not know.

    Source: arXiv:2501.12948, section 2.3.2: the proportion of target language words in the chain
      of thought, added to the reward for the answer.
    """
    language = problem.meta.get("language")
    if language not in _LANGUAGES:
        known = ", ".join(sorted(_LANGUAGES))
        raise BadReference(f"meta['language'] is {language!r}; it must be one of {known}")
    return _share(completion.partition("</think>")[0], language)


def _share(text: str, language: str) -> float:
    matching = total = 0
    for found, scripts in _blocks(text):
        total += len(found)
        matching += _matching(found, scripts, language)
    return matching / total if total else 0.0


def _blocks(completion: str) -> Iterator[tuple[list[str], list[str]]]:
    """The words whose language can be told, with their scripts, a line or a few at a time."""
    found: list[str] = []
    scripts: list[str] = []
    for word in words_and_lines(completion):
        if word == "\n":
            if len(found) >= _MIN_BLOCK:
                yield found, scripts
                found, scripts = [], []
        elif (script := _script(word)) and (len(word) > 1 or script in ("han", "kana")):
            found.append(word)
            scripts.append(script)
    if found:
        yield found, scripts


@functools.lru_cache(maxsize=10_000)
def _script(word: str) -> str | None:
    """The script of a word's first letter; None for a number."""
    match = _OF_CHARACTER.search(word[:100])
    return match.lastgroup if match else None


def _matching(found: list[str], scripts: list[str], language: str) -> int:
    """How many words of one block are in the language."""
    script = _LANGUAGES[language]
    if language == "ja":  # kanji are Japanese next to kana, and Chinese alone
        return sum(s in ("han", "kana") for s in scripts) if "kana" in scripts else 0
    if language == "zh" and "kana" in scripts:
        return 0
    count = scripts.count(script)
    if script != "latin" or not count:
        return count
    hits = collections.Counter(
        name for word in found for name in _LANGUAGES_OF.get(word.casefold(), ())
    )
    return 0 if max(hits.values(), default=0) >= hits[language] + _CLEARLY else count
