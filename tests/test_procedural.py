"""Procedural problems: right by independent computation, split by content, pure in the index."""

import dataclasses
import re
from collections.abc import Callable

import pytest

from grpo.data.procedural import (
    Arithmetic,
    Countdown,
    DigitChain,
    LastLetters,
    LetterCount,
    MaxOf,
    OneLiners,
    Procedural,
    SlippedChains,
    SlippedPrograms,
    SortNumbers,
    SpellBackwards,
)
from rewards.api import Problem

TASKS: list[Procedural] = [
    Arithmetic(terms=3, digits=2, operators="+-"),
    Arithmetic(operators="*"),
    Countdown(),
    Countdown(numbers=4),
    MaxOf(),
    SortNumbers(count=4),
    LetterCount(),
    LastLetters(words=3),
    SpellBackwards(),
    DigitChain(),
    OneLiners(),
]
every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)


def question(problem: Problem) -> str:
    return problem.prompt or problem.messages[-1]["content"]


def quoted(problem: Problem) -> list[str]:
    return re.findall('"([^"]*)"', question(problem))


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def evaluate(expression: str) -> float:
    assert re.fullmatch(r"[\d+*/() -]+", expression)
    return eval(expression)


ONE_LINERS: dict[str, Callable[[tuple[int, int]], int]] = {
    "a": lambda pair: pair[0],
    "b": lambda pair: pair[1],
    "max(a,b)": max,
    "min(a,b)": min,
    "a+b": sum,
}


def give(body: str, pair: tuple[int, int]) -> int:
    """What the function of this body gives."""
    return ONE_LINERS[body](pair)


def one_liner(text: str) -> str:
    """The one body that gives the examples in "f(3,4)=7 f(1,5)=6;"."""
    shown = re.findall(r"f\((\d+),(\d+)\)=(-?\d+)", text)
    (body,) = [
        body
        for body in ONE_LINERS
        if all(give(body, (int(a), int(b))) == int(c) for a, b, c in shown)
    ]
    return body


def expected_answer(problem: Problem) -> str:
    """Solves a problem from its question alone."""
    text = question(problem)
    match problem.meta["task"]:
        case "Arithmetic":
            return str(evaluate(text.removeprefix("What is ").split("?")[0]))
        case "DigitChain":
            return str(evaluate(text.removesuffix("=")))
        case "MaxOf":
            return str(max(numbers(text)))
        case "OneLiners":
            return f"f=lambda a,b:{one_liner(text)}"
        case "SortNumbers":
            return ", ".join(map(str, sorted(numbers(text))))
        case "LetterCount":
            letter, words = quoted(problem)
            return str(sum(other == letter for other in words))
        case "LastLetters":
            return "".join(word[-1] for word in quoted(problem)[0].split())
        case "SpellBackwards":
            return "".join(reversed(quoted(problem)[0]))
    raise AssertionError(problem.meta["task"])


@pytest.mark.parametrize(
    "task", [t for t in TASKS if not isinstance(t, Countdown)], ids=lambda t: type(t).__name__
)
def test_gold_is_right(task):
    for i in range(200):
        problem = task[i]
        assert problem.gold == expected_answer(problem)
        assert problem.meta["worked"].endswith(f"</think><answer>{problem.gold}</answer>")


@pytest.mark.parametrize("count", [2, 3, 4])
def test_countdown_is_solvable_with_each_number_once(count):
    task = Countdown(numbers=count, max_target=50)
    for i in range(200):
        problem = task[i]
        gold = problem.gold or ""
        literals = numbers(gold)
        assert evaluate(gold) == problem.reference["target"] <= 50
        assert sorted(literals) == sorted(problem.reference["numbers"])
        assert numbers(question(problem)) == [
            *problem.reference["numbers"],
            problem.reference["target"],
        ]


@every_task
def test_every_step_of_a_worked_sum_is_true(task):
    for i in range(50):
        for left, right in re.findall(r"([\d+*/-]+)=(-?\d+)", task[i].meta["worked"]):
            assert evaluate(left) == int(right)


@every_task
def test_problem_is_a_function_of_seed_and_index(task):
    again = dataclasses.replace(task, size=5)
    assert [again[4], again[0]] == [task[4], task[0]]
    assert len({task[i].uid for i in range(50)}) == 50
    other = dataclasses.replace(task, seed=1)
    assert [question(other[i]) for i in range(20)] != [question(task[i]) for i in range(20)]
    with pytest.raises(IndexError, match="problem 5 of a source of 5"):
        again[5]


def content(problem: Problem) -> tuple[str, ...]:
    """What a question is about, whatever the order of its words and numbers."""
    return tuple(sorted(re.findall(r"equals \d+|f\(.*?\)=\S+|\w+|[-+*]", question(problem))))


@every_task
def test_held_out_questions_are_never_trained_on(task):
    held_out = dataclasses.replace(task, held_out=True, seed=7)
    trained = {content(task[i]) for i in range(400)}
    assert trained.isdisjoint(content(held_out[i]) for i in range(400))


def test_the_split_does_not_hang_on_wording_or_order():
    plain, worded = MaxOf(held_out=True), MaxOf(held_out=True, question_template="Hm: {question}")
    assert [p.reference for p in map(plain.__getitem__, range(20))] == [
        p.reference for p in map(worded.__getitem__, range(20))
    ]


def test_a_task_without_held_out_questions_says_so():
    with pytest.raises(ValueError, match="too few different questions"):
        [MaxOf(count=2, high=2, held_out=side)[0] for side in (True, False)]


def test_max_of_is_asked_as_documented():
    problem = MaxOf()[0]
    assert problem.messages[0] == {"role": "system", "content": ""}
    assert re.fullmatch(
        r"Which number is the largest: \d+, \d+, \d+\? Answer with the number only\.",
        problem.messages[1]["content"],
    )


def test_digit_chain_is_raw_text_with_running_totals():
    problem = DigitChain(min_terms=4)[0]
    a, b, c, d = numbers(problem.prompt)
    assert problem.prompt == f"{a}+{b}+{c}+{d}=" and problem.messages == ()
    chain = f"{a}+{b}={a + b} {a + b}+{c}={a + b + c} {a + b + c}+{d}={a + b + c + d}"
    assert problem.meta["worked"] == f"<think>{chain}</think><answer>{a + b + c + d}</answer>"


@pytest.mark.parametrize(
    "task, message",
    [
        (Arithmetic(operators="+%"), "drawn from"),
        (Arithmetic(terms=3, operators="+*"), "mixes products and sums"),
        (Arithmetic(terms=1), "terms >= 2"),
        (Countdown(numbers=1), "numbers >= 2"),
        (MaxOf(count=5, high=4), "count 5, high 4"),
        (DigitChain(min_terms=1), "min_terms"),
        (SpellBackwards(words=0), "words, got 0"),
        (OneLiners(examples=0), "examples >= 1"),
    ],
)
def test_impossible_settings_are_named(task, message):
    with pytest.raises(ValueError, match=message):
        task[0]


@pytest.mark.parametrize("source", [DigitChain(), Arithmetic(terms=4, operators="+-")])
def test_slipped_chains_are_wrong_in_one_step_and_in_the_answer(source):
    slips = SlippedChains(source=source, slip_rate=0.3, seed=0)
    slipped = 0
    for i in range(300):
        problem, true = slips[i], source[i]
        assert (problem.prompt, problem.messages) == (true.prompt, true.messages)
        assert (problem.uid, problem.gold, problem.reference) == (
            true.uid,
            true.gold,
            true.reference,
        )
        worked = problem.meta["worked"]
        steps = re.findall(r"(-?\d+[+-]\d+)=(-?\d+)", worked)
        wrong = sum(evaluate(left) != int(right) for left, right in steps)
        answer = re.search("<answer>(.*)</answer>", worked)
        assert answer and answer[1] == steps[-1][1]
        assert wrong == int(problem.meta["slipped"]) == int(answer[1] != true.gold)
        slipped += wrong
    assert 60 <= slipped <= 120  # 0.3 x 300, three standard deviations of 8 on either side
    assert slips[3] == slips[3]


def test_slips_need_chains_and_a_share():
    with pytest.raises(ValueError, match="no steps"):
        SlippedChains(source=MaxOf(), slip_rate=1.0)[0]
    with pytest.raises(ValueError, match="between 0 and 1"):
        SlippedChains(source=DigitChain(), slip_rate=30)[0]


def test_the_tests_of_a_one_liner_accept_no_other():
    """The two examples, and three more on which no two functions of the family agree."""
    seen = set()
    for i in range(200):
        asserts = OneLiners()[i].reference["asserts"]
        results = [int(line.rpartition("== ")[2]) for line in asserts]
        arguments = [numbers(line)[:2] for line in asserts]
        fitting = [
            body
            for body in ONE_LINERS
            if [give(body, (a, b)) for a, b in arguments[2:]] == results[2:]
        ]
        assert f"f=lambda a,b:{fitting[0]}" == OneLiners()[i].gold and len(fitting) == 1
        seen.add(fitting[0])
    assert seen == set(ONE_LINERS)


def test_slipped_programs_work_another_function_out():
    source = OneLiners()
    slips = SlippedPrograms(source=source, slip_rate=0.3)
    slipped = 0
    for i in range(300):
        problem, true = slips[i], source[i]
        assert dataclasses.replace(problem, meta=true.meta) == true
        worked, answer = problem.meta["worked"], f"<answer>{true.gold}</answer>"
        assert (worked == true.meta["worked"]) is not problem.meta["slipped"]
        assert worked.endswith(answer) is not problem.meta["slipped"]
        body = re.findall(r"lambda a,b:(.*)</answer>", worked)[0]
        for a, sign, b, which in re.findall(r"(\d)([<>=])(\d):([ab+])", worked):
            pair = int(a), int(b)
            assert sign == "<=>"[1 + (pair[0] > pair[1]) - (pair[0] < pair[1])]
            assert give(body, pair) == {"a": pair[0], "b": pair[1], "+": sum(pair)}[which]
        slipped += problem.meta["slipped"]
    assert 60 <= slipped <= 120
    with pytest.raises(ValueError, match="not one of OneLiners"):
        SlippedPrograms(source=MaxOf())[0]
