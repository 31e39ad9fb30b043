"""Two small tasks in English and Chinese, and a careless teacher: what R1's chain needs, in small.

`WordedSums` has a verifier and a language that the chain of thought should keep to; `Backwards`
stands for what no verifier judges (writing, answering) and is graded. Both are raw text, short
enough for a model over bytes, and carry `meta["language"]`, "en" or "zh", for
`rewards.language.language_consistency`. Held-out questions are the same in both languages.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from grpo.data.procedural import Draft, Procedural, integers, wrong_last_digit
from grpo.data.sources import ProblemSource, r1_form
from rewards.api import Problem

LANGUAGES = ("en", "zh")

_ASKED_SUM = {"en": "add {numbers}=", "zh": "求和 {numbers}="}
_STEP = {"en": " and {number} is {total}", "zh": "加{number}得{total}"}
_ASKED_BACKWARDS = {"en": "flip {text}=", "zh": "倒写 {text}="}
_FROM_THE_END = {"en": ("from the end ", " then "), "zh": ("从后", "再")}


@dataclasses.dataclass(kw_only=True)
class Bilingual(Procedural):
    """A task that is asked, and thought about, in one of several languages.

    Attributes:
      languages: drawn from these: "en", "zh".
    """

    languages: tuple[str, ...] = LANGUAGES
    raw: bool = True

    def draw_language(self, rng: np.random.Generator) -> str:
        """One of `languages`."""
        if not self.languages or set(self.languages) - set(LANGUAGES):
            raise ValueError(f"languages are drawn from {LANGUAGES}, got {self.languages}")
        return self.languages[int(rng.integers(len(self.languages)))]


@dataclasses.dataclass(kw_only=True)
class WordedSums(Bilingual):
    """ "add 3 4 2=" or "求和 3 4 2=": a sum whose chain of thought is in words.

    `<think>3 and 4 is 7 and 2 is 9</think><answer>9</answer>`, or
    `<think>3加4得7加2得9</think><answer>9</answer>`. Four numbers up to 6 take at most 15 bytes to
    ask and 71 to work out.

    Attributes:
      min_terms: fewest numbers, 2 or more.
      max_terms: most numbers.
      high: numbers are 1..high.
    """

    min_terms: int = 3
    max_terms: int = 4
    high: int = 6

    def draw(self, rng: np.random.Generator) -> Draft:
        if not 2 <= self.min_terms <= self.max_terms or self.high < 1:
            raise ValueError(f"need 2 <= min_terms <= max_terms and high >= 1: {self}")
        language = self.draw_language(rng)
        terms = int(rng.integers(self.min_terms, self.max_terms + 1))
        numbers = integers(rng, 1, self.high, terms)
        steps = len(numbers) - 1
        return Draft(
            key=tuple(sorted(numbers)),
            question=_ASKED_SUM[language].format(numbers=" ".join(map(str, numbers))),
            reference=sum(numbers),
            gold=str(sum(numbers)),
            thought=_chain(numbers, _running_totals(numbers), [language] * steps),
            meta={"language": language},
        )


@dataclasses.dataclass(kw_only=True)
class Backwards(Bilingual):
    """ "flip abcd=" or "倒写 abcd=": letters from last to first, for `rewards.sequences`.

    `<think>from the end d then c then b then a</think><answer>dcba</answer>`, or
    `<think>从后d再c再b再a</think><answer>dcba</answer>`. With `letters_share` it is a task with a
    grade: what is right but for one letter is worth most of the points.

    Attributes:
      min_letters: fewest letters, 2 or more.
      max_letters: most letters.
      alphabet: letters are drawn from these, with repetition.
    """

    min_letters: int = 3
    max_letters: int = 4
    alphabet: str = "aeilmnorst"

    def draw(self, rng: np.random.Generator) -> Draft:
        if not 2 <= self.min_letters <= self.max_letters or not self.alphabet:
            raise ValueError(f"need 2 <= min_letters <= max_letters and an alphabet: {self}")
        language = self.draw_language(rng)
        length = int(rng.integers(self.min_letters, self.max_letters + 1))
        text = "".join(self.alphabet[i] for i in integers(rng, 0, len(self.alphabet) - 1, length))
        begin, between = _FROM_THE_END[language]
        return Draft(
            key=tuple(sorted(text)),
            question=_ASKED_BACKWARDS[language].format(text=text),
            reference=text[::-1],
            gold=text[::-1],
            thought=begin + between.join(text[::-1]),
            meta={"language": language},
        )


_SUM = re.compile("(?:add|求和) ([0-9 ]+)=")


@dataclasses.dataclass(kw_only=True)
class CarelessSums:
    """The problems of `WordedSums`, worked as carelessly as text off the web: for a base model.

    Each fault is drawn for itself, so some completions have several; `meta` says which ("slipped",
    "mixed", "loose"). `reference` and `gold` stay true.

    Attributes:
      source: of problems of `WordedSums`.
      slip_rate: share of chains with a running total that ends in a wrong digit, from which the
        chain goes on to a wrong answer.
      mix_rate: share of chains with at least one step in the other language, each pattern of steps
        as likely.
      loose_rate: share without think tags: `r1_format` fails, `numeric_answer` still reads them.
      seed: decides which, and how.
    """

    source: ProblemSource
    slip_rate: float = 0.3
    mix_rate: float = 0.3
    loose_rate: float = 0.3
    seed: int = 0

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Problem:
        rates = {n: getattr(self, n) for n in ("slip_rate", "mix_rate", "loose_rate")}
        for name, rate in rates.items():
            if not 0.0 <= rate <= 1.0:
                raise ValueError(f"{name} should be between 0 and 1, got {rate}")
        problem = self.source[i]
        numbers = _asked_numbers(problem)
        # The 2 keeps this stream apart from the source's own, which starts from (seed, i).
        rng = np.random.default_rng([self.seed, i, 2])
        slipped, mixed, loose = (bool(rng.random() < rate) for rate in rates.values())
        totals = _slipped_totals(numbers, rng) if slipped else _running_totals(numbers)
        own = problem.meta["language"]
        languages = _mixed(own, len(totals), rng) if mixed else [own] * len(totals)
        thought, answer = _chain(numbers, totals, languages), str(totals[-1])
        worked = f"{thought}<answer>{answer}</answer>" if loose else r1_form(thought, answer)
        faults = {"slipped": slipped, "mixed": mixed, "loose": loose}
        return dataclasses.replace(problem, meta={**problem.meta, "worked": worked, **faults})


def _chain(numbers: Sequence[int], totals: Sequence[int], languages: Sequence[str]) -> str:
    """ "3 and 4 is 7 and 2 is 9", each step in its own language."""
    steps = [
        _STEP[language].format(number=number, total=total)
        for number, total, language in zip(numbers[1:], totals, languages, strict=True)
    ]
    return str(numbers[0]) + "".join(steps)


def _running_totals(numbers: Sequence[int]) -> list[int]:
    """Of the first two numbers, the first three, and so on."""
    return [sum(numbers[: k + 1]) for k in range(1, len(numbers))]


def _slipped_totals(numbers: Sequence[int], rng: np.random.Generator) -> list[int]:
    """The same with one wrong last digit, and what follows from it."""
    totals = _running_totals(numbers)
    at = int(rng.integers(len(totals)))
    error = wrong_last_digit(totals[at], rng) - totals[at]
    return totals[:at] + [total + error for total in totals[at:]]


def _mixed(own: str, steps: int, rng: np.random.Generator) -> list[str]:
    """A language for each step; not all are `own`."""
    [other] = set(LANGUAGES) - {own}
    pattern = int(rng.integers(1, 2**steps))
    return [other if pattern >> k & 1 else own for k in range(steps)]


def _asked_numbers(problem: Problem) -> list[int]:
    found = _SUM.search(problem.prompt or problem.messages[-1]["content"])
    if found is None or problem.meta.get("language") not in LANGUAGES:
        raise ValueError(f"problem {problem.uid!r} is not one of WordedSums")
    return [int(number) for number in found[1].split()]
