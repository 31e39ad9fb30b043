"""Problems made by rule: as many as wanted, each a pure function of (seed, index).

Training and held-out problems never overlap, whatever their seeds and sizes. What a question is
about, without its order where order does not matter, is hashed; one tenth of the hashes is held
out, and a draw that falls on the wrong side is drawn again. So `MaxOf(held_out=True)` asks about
no set of numbers that `MaxOf()` asks about, not even in another order.

Within one source a question may come up again: small tasks have few of them.
"""

import abc
import dataclasses
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from grpo.data.sources import ProblemSource, PromptForm, r1_form
from rewards.api import Problem

_MAX_DRAWS = 10_000
_NUMBER_ONLY = "{question} Answer with the number only."
_TAGGED = "{question} Put the answer inside <answer></answer> tags."


@dataclasses.dataclass(frozen=True)
class Draft:
    """One drawn question.

    Attributes:
      key: what the question is about, equal for questions that must not be split between
        training and held-out; it does not depend on wording.
      question: its text.
      reference: what a reward compares with.
      gold: a right final answer.
      thought: a chain of thought that leads to it.
      meta: what else the problem should carry.
    """

    key: tuple[Any, ...]
    question: str
    reference: Any
    gold: str
    thought: str
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(kw_only=True)
class Procedural(PromptForm, abc.ABC):
    """A source of drawn problems; a subclass says how one is drawn.

    Every problem carries `meta["worked"]`, a right completion in R1 form.

    Attributes:
      size: how many problems.
      seed: another seed gives other problems.
      held_out: ask only held-out questions; otherwise only training questions.
    """

    size: int = 10_000
    seed: int = 0
    held_out: bool = False
    system: str | None = ""  # a default system message would only cost tokens

    @abc.abstractmethod
    def draw(self, rng: np.random.Generator) -> Draft:
        """A random question."""

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Problem:
        if not 0 <= i < self.size:
            raise IndexError(f"problem {i} of a source of {self.size}")
        draft = self._draft(np.random.default_rng([self.seed, i]))
        task = type(self).__name__
        part = "held_out" if self.held_out else "train"
        return Problem(
            uid=f"{task}/{part}/{self.seed}/{i}",
            reference=draft.reference,
            gold=draft.gold,
            meta={"task": task, **draft.meta, "worked": r1_form(draft.thought, draft.gold)},
            **self.ask(draft.question),
        )

    def _draft(self, rng: np.random.Generator) -> Draft:
        for _ in range(_MAX_DRAWS):
            draft = self.draw(rng)
            if is_held_out(draft.key) == self.held_out:
                return draft
        raise ValueError(
            f"{_MAX_DRAWS} draws of {self} gave no question with held_out={self.held_out}: "
            "the task has too few different questions; make it larger"
        )


def is_held_out(key: tuple[Any, ...]) -> bool:
    """Whether questions about `key` belong to the held-out tenth."""
    return zlib.crc32(repr(key).encode()) % 10 == 0


@dataclasses.dataclass(kw_only=True)
class Arithmetic(Procedural):
    """ "What is 7 + 8 - 3?"

    Attributes:
      terms: how many numbers.
      digits: of every number, without leading zeros.
      operators: drawn from these: "+", "-" and "*". Products do not mix with the others in
        longer chains, so that working from left to right is right.
    """

    terms: int = 2
    digits: int = 1
    operators: str = "+"
    question_template: str = _NUMBER_ONLY

    def draw(self, rng: np.random.Generator) -> Draft:
        self._check()
        numbers = integers(rng, 10 ** (self.digits - 1), 10**self.digits - 1, self.terms)
        operators = [
            self.operators[i] for i in integers(rng, 0, len(self.operators) - 1, self.terms - 1)
        ]
        asked, steps, total = str(numbers[0]), [], numbers[0]
        for operator, number in zip(operators, numbers[1:], strict=True):
            asked += f" {operator} {number}"
            before, total = total, _apply(total, operator, number)
            steps.append(f"{before}{operator}{number}={total}")
        return Draft(
            key=(sorted(numbers), sorted(operators)),
            question=f"What is {asked}?",
            reference=total,
            gold=str(total),
            thought=" ".join(steps),
        )

    def _check(self) -> None:
        if self.terms < 2 or self.digits < 1 or not self.operators:
            raise ValueError(f"need terms >= 2, digits >= 1 and an operator: {self}")
        if set(self.operators) - set("+-*"):
            raise ValueError(f'operators are drawn from "+-*", got {self.operators!r}')
        if self.terms > 2 and "*" in self.operators and set(self.operators) != {"*"}:
            raise ValueError(f"{self.operators!r} mixes products and sums in {self.terms} terms")


@dataclasses.dataclass(kw_only=True)
class Countdown(Procedural):
    """Make a target from numbers, each used once; always possible.

    `gold` is one expression of many that are right.

    Attributes:
      numbers: how many, 2 or more.
      high: numbers are 1..high.
      max_target: targets are 1..max_target.
    """

    numbers: int = 3
    high: int = 15
    max_target: int = 100
    question_template: str = _TAGGED

    def draw(self, rng: np.random.Generator) -> Draft:
        if self.numbers < 2 or self.high < 2 or self.max_target < 1:
            raise ValueError(f"need numbers >= 2, high >= 2 and max_target >= 1: {self}")
        for _ in range(_MAX_DRAWS):
            numbers = integers(rng, 1, self.high, self.numbers)
            target, gold, steps = _combine(rng, numbers)
            if 1 <= target <= self.max_target and target not in numbers:
                break
        else:
            raise ValueError(f"{_MAX_DRAWS} draws gave no target up to {self.max_target}: {self}")
        listed = ", ".join(map(str, numbers))
        return Draft(
            key=(sorted(numbers), target),
            question=(
                f"Using each of the numbers {listed} exactly once, with + - * / and brackets, "
                f"write an expression that equals {target}."
            ),
            reference={"numbers": numbers, "target": target},
            gold=gold,
            thought=" ".join(steps),
        )


@dataclasses.dataclass(kw_only=True)
class MaxOf(Procedural):
    """ "Which number is the largest: 12, 45, 3?"

    Attributes:
      count: how many different numbers.
      high: numbers are 1..high.
    """

    count: int = 3
    high: int = 99
    question_template: str = _NUMBER_ONLY

    def draw(self, rng: np.random.Generator) -> Draft:
        numbers = _different(rng, self.count, self.high)
        steps, largest = [], numbers[0]
        for number in numbers[1:]:
            steps.append(f"{largest}{'>' if largest > number else '<'}{number}")
            largest = max(largest, number)
        return Draft(
            key=tuple(sorted(numbers)),
            question=f"Which number is the largest: {', '.join(map(str, numbers))}?",
            reference=largest,
            gold=str(largest),
            thought=" ".join(steps),
        )


@dataclasses.dataclass(kw_only=True)
class SortNumbers(Procedural):
    """Put numbers in rising order; the reference is the sorted list.

    Attributes:
      count: how many different numbers.
      high: numbers are 1..high.
    """

    count: int = 3
    high: int = 99
    question_template: str = _TAGGED

    def draw(self, rng: np.random.Generator) -> Draft:
        numbers = _different(rng, self.count, self.high)
        ordered = sorted(numbers)
        left, steps = list(numbers), []
        for number in ordered[:-1]:
            steps.append(f"smallest of {', '.join(map(str, left))} is {number}.")
            left.remove(number)
        return Draft(
            key=tuple(ordered),
            question=f"Sort from smallest to largest: {', '.join(map(str, numbers))}.",
            reference=ordered,
            gold=", ".join(map(str, ordered)),
            thought=" ".join(steps),
        )


@dataclasses.dataclass(kw_only=True)
class LetterCount(Procedural):
    """How often a letter occurs in a few words; now and then it does not.

    Attributes:
      words: how many words; with one, nearly every answer is 1 and guessing pays.
    """

    words: int = 3
    question_template: str = _NUMBER_ONLY

    def draw(self, rng: np.random.Generator) -> Draft:
        words = _words(rng, self.words)
        letters = "aeilnorst" if rng.random() < 0.2 else "".join(words)
        letter = letters[int(rng.integers(len(letters)))]
        total, steps = 0, []
        for word in words:
            total += word.count(letter)
            steps.append(f"{'-'.join(word)}: {total}.")
        return Draft(
            key=(sorted(words), letter),
            question=f'How many times does the letter "{letter}" occur in "{" ".join(words)}"?',
            reference=total,
            gold=str(total),
            thought=" ".join(steps),
        )


@dataclasses.dataclass(kw_only=True)
class LastLetters(Procedural):
    """Join the last letters of words.

    Attributes:
      words: how many words.
    """

    words: int = 2
    question_template: str = _TAGGED

    def draw(self, rng: np.random.Generator) -> Draft:
        words = _words(rng, self.words)
        joined = "".join(word[-1] for word in words)
        return Draft(
            key=tuple(sorted(words)),
            question=f'Join the last letters of the words "{" ".join(words)}".',
            reference=joined,
            gold=joined,
            thought=" ".join(f"{word} ends in {word[-1]}." for word in words),
        )


@dataclasses.dataclass(kw_only=True)
class SpellBackwards(Procedural):
    """Spell words backwards, the last word first.

    Attributes:
      words: how many words. With one there are only as many questions as words.
    """

    words: int = 1
    question_template: str = _TAGGED

    def draw(self, rng: np.random.Generator) -> Draft:
        text = " ".join(_words(rng, self.words))
        return Draft(
            key=tuple(sorted(text.split())),
            question=f'Spell "{text}" backwards.',
            reference=text[::-1],
            gold=text[::-1],
            thought=f"{'-'.join(text)} reversed is {'-'.join(text[::-1])}.",
        )


@dataclasses.dataclass(kw_only=True)
class DigitChain(Procedural):
    """The task of the tiny from-scratch run: "3+8+5+9=", asked as raw text.

    The chain of thought keeps a running total:
    `<think>3+8=11 11+5=16 16+9=25</think><answer>25</answer>`.

    Attributes:
      min_terms: fewest numbers, 2 or more.
      max_terms: most numbers.
      high: numbers are 1..high.
    """

    min_terms: int = 2
    max_terms: int = 4
    high: int = 9
    raw: bool = True

    def draw(self, rng: np.random.Generator) -> Draft:
        if not 2 <= self.min_terms <= self.max_terms or self.high < 1:
            raise ValueError(f"need 2 <= min_terms <= max_terms and high >= 1: {self}")
        terms = int(rng.integers(self.min_terms, self.max_terms + 1))
        numbers = integers(rng, 1, self.high, terms)
        total, steps = numbers[0], []
        for number in numbers[1:]:
            steps.append(f"{total}+{number}={total + number}")
            total += number
        return Draft(
            key=tuple(sorted(numbers)),
            question="+".join(map(str, numbers)) + "=",
            reference=total,
            gold=str(total),
            thought=" ".join(steps),
        )


_STEP = re.compile(r"(-?\d+)([+-])(\d+)=(-?\d+)")


@dataclasses.dataclass(kw_only=True)
class ImperfectTeacher(abc.ABC):
    """The problems of a source, some of them worked wrongly, for a cold start that RL surpasses.

    `reference` and `gold` stay true; `meta["slipped"]` says which worked completions are wrong.

    Attributes:
      source: of problems with meta["worked"].
      slip_rate: share of completions that are wrong, 0..1.
      seed: decides which, and how.
    """

    source: ProblemSource
    slip_rate: float = 0.3
    seed: int = 0

    @abc.abstractmethod
    def slip(self, problem: Problem, rng: np.random.Generator) -> str:
        """A worked completion of `problem` that is wrong.

        Raises:
          ValueError: it is not a problem that this teacher knows.
        """

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Problem:
        if not 0.0 <= self.slip_rate <= 1.0:
            raise ValueError(f"slip_rate should be between 0 and 1, got {self.slip_rate}")
        problem = self.source[i]
        # The 1 keeps this stream apart from the source's own, which starts from (seed, i).
        rng = np.random.default_rng([self.seed, i, 1])
        slipped = bool(rng.random() < self.slip_rate)
        wrong = self.slip(problem, rng)  # always: a problem it does not know is an error at once
        worked = wrong if slipped else problem.meta["worked"]
        return dataclasses.replace(
            problem, meta={**problem.meta, "worked": worked, "slipped": slipped}
        )


class SlippedChains(ImperfectTeacher):
    """One running total ends in a wrong digit, and the chain goes on rightly from there.

    For problems worked in steps like "3+8=11": `DigitChain`, or `Arithmetic` of sums.
    """

    def slip(self, problem: Problem, rng: np.random.Generator) -> str:
        steps = [match.groups() for match in _STEP.finditer(problem.meta.get("worked", ""))]
        if not steps:
            raise ValueError(f'problem {problem.uid!r} has no steps like "3+8=11" to slip in')
        return _slip(steps, rng)


# What `OneLiners` asks for: as Python, and how to work it out.
_ONE_LINERS: dict[str, Callable[[int, int], int]] = {
    "a": lambda a, b: a,
    "b": lambda a, b: b,
    "max(a,b)": max,
    "min(a,b)": min,
    "a+b": lambda a, b: a + b,
}
_TELLING = ((2, 7), (9, 4), (5, 5))  # no two of them agree on all of these


@dataclasses.dataclass(kw_only=True)
class OneLiners(Procedural):
    """Find a function of two numbers by what it gives, asked as raw text: "f(3,4)=7 f(5,1)=6;".

    The answer is a program for `rewards.code_tests`, "f=lambda a,b:a+b". Its tests are the examples
    shown, and others, so that a program that only knows the examples fails. The chain of thought
    says of each example how its arguments compare and which of them was given, or "+" for neither:
    `<think>3<4:+ 5>1:+</think>`.

    Attributes:
      examples: how many are shown; they leave one function of the family.
      high: arguments are 1..high.
    """

    examples: int = 2
    high: int = 9
    raw: bool = True

    def draw(self, rng: np.random.Generator) -> Draft:
        if self.examples < 1 or self.high < 3:
            raise ValueError(f"need examples >= 1 and high >= 3: {self}")
        bodies = list(_ONE_LINERS)
        body = bodies[int(rng.integers(len(bodies)))]
        for _ in range(_MAX_DRAWS):
            shown = [tuple(integers(rng, 1, self.high, 2)) for _ in range(self.examples)]
            if all(not _fits(other, body, shown) for other in bodies if other != body):
                break
        else:
            raise ValueError(f"{self.examples} examples do not single a function out: {self}")
        return Draft(
            key=(body, sorted(shown)),
            question=" ".join(f"f({a},{b})={_ONE_LINERS[body](a, b)}" for a, b in shown) + ";",
            reference={
                "asserts": [
                    f"assert f({a},{b}) == {_ONE_LINERS[body](a, b)}"
                    for a, b in (*shown, *_TELLING)
                ]
            },
            gold=_one_liner(body),
            thought=_worked_out(body, shown),
        )


class SlippedPrograms(ImperfectTeacher):
    """Another function of the family is worked out and given; for the problems of `OneLiners`."""

    def slip(self, problem: Problem, rng: np.random.Generator) -> str:
        shown = [(int(a), int(b)) for a, b in _EXAMPLE.findall(problem.prompt)]
        others = [body for body in _ONE_LINERS if _one_liner(body) != problem.gold]
        if not shown or len(others) == len(_ONE_LINERS):
            raise ValueError(f"problem {problem.uid!r} is not one of OneLiners asked as raw text")
        body = others[int(rng.integers(len(others)))]
        return r1_form(_worked_out(body, shown), _one_liner(body))


_EXAMPLE = re.compile(r"f\((\d+),(\d+)\)=")


def _one_liner(body: str) -> str:
    return f"f=lambda a,b:{body}"


def _fits(body: str, other: str, shown: Sequence[tuple[int, ...]]) -> bool:
    """Whether two functions agree on all of these arguments."""
    return all(_ONE_LINERS[body](a, b) == _ONE_LINERS[other](a, b) for a, b in shown)


def _worked_out(body: str, shown: Sequence[tuple[int, ...]]) -> str:
    """ "3<4:b 5>1:a" for max(a,b)."""

    def told(a: int, b: int) -> str:
        given = _ONE_LINERS[body](a, b)
        which = "a" if given == a else "b" if given == b else "+"
        return f"{a}{'<' if a < b else '>' if a > b else '='}{b}:{which}"

    return " ".join(told(a, b) for a, b in shown)


def _slip(steps: list[tuple[str, ...]], rng: np.random.Generator) -> str:
    """The worked chain with one wrong digit, carried on to the answer.

    Args:
      steps: (total before, operator, number, total after) of each, as text.
      rng: decides where the slip is, and the digit.
    """
    slip_at = int(rng.integers(len(steps)))
    total, written = int(steps[0][0]), []
    for k, (_, operator, number, _) in enumerate(steps):
        before, total = total, _apply(total, operator, int(number))
        if k == slip_at:
            total = wrong_last_digit(total, rng)
        written.append(f"{before}{operator}{number}={total}")
    return r1_form(" ".join(written), str(total))


def wrong_last_digit(number: int, rng: np.random.Generator) -> int:
    """`number` with another last digit. A negative one is counted down from its ten."""
    digit = number % 10
    return number - digit + (digit + int(rng.integers(1, 10))) % 10


def _apply(left: int, operator: str, right: int) -> int:
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    raise ValueError(f"unknown operator {operator!r}")


def _combine(rng: np.random.Generator, numbers: list[int]) -> tuple[int, str, list[str]]:
    """Joins random pairs by random operators: (value, expression, steps).

    Differences are not negative and quotients are whole, so every step is one a child would write.
    """
    parts = [(number, str(number)) for number in numbers]
    steps = []
    while len(parts) > 1:
        first, second = (int(k) for k in rng.choice(len(parts), 2, replace=False))
        pair = sorted((parts[first], parts[second]), reverse=True)
        (left, left_text), (right, right_text) = pair
        operators = "+-*/" if right and left % right == 0 else "+-*"
        operator = operators[int(rng.integers(len(operators)))]
        value = left // right if operator == "/" else _apply(left, operator, right)
        steps.append(f"{left}{operator}{right}={value}")
        kept = [part for k, part in enumerate(parts) if k not in (first, second)]
        parts = [*kept, (value, f"({left_text}{operator}{right_text})")]
    value, text = parts[0]
    return value, text[1:-1], steps


def integers(rng: np.random.Generator, low: int, high: int, count: int) -> list[int]:
    """`count` integers, low <= n <= high."""
    return [int(n) for n in rng.integers(low, high + 1, count)]


def _different(rng: np.random.Generator, count: int, high: int) -> list[int]:
    """`count` different numbers of 1..high, in random order."""
    if not 2 <= count <= high:
        raise ValueError(f"need 2 <= count <= high, got count {count}, high {high}")
    return [int(n) + 1 for n in rng.choice(high, count, replace=False)]


def _words(rng: np.random.Generator, count: int) -> list[str]:
    """`count` different words."""
    if not 1 <= count <= len(_WORDS):
        raise ValueError(f"need 1 to {len(_WORDS)} words, got {count}")
    return [_WORDS[int(i)] for i in rng.choice(len(_WORDS), count, replace=False)]


_WORDS = tuple(
    """
    apple arrow autumn banana barrel basket beach bell bird blanket bottle branch bread bridge
    brother bucket butter button cabin camera candle carpet castle cheese cherry circle cloud
    coffee copper corner cotton cousin cradle dinner doctor dragon drawer eagle engine evening
    family feather fence finger flower forest friend garden ginger glass grape guitar hammer
    harbour honey horse island jacket jungle kettle kitchen ladder lantern leather lemon letter
    little lizard market meadow melon mirror monkey mountain needle nettle onion orange otter
    oven paper parrot pebble pencil pepper piano pillow planet pocket pony potato puppy rabbit
    ribbon river rocket saddle school shadow silver sister spider spring square stable stone
    street summer sunset table teacher temple thunder ticket tiger tomato tower tractor tunnel
    turtle valley velvet village violin wagon water weather whistle willow window winter wolf
    yellow zebra
    """.split()
)
