"""The rewards that read answers and forms: golden answers and the order of merit.

Hostile text is for tests/test_audit.py, where every shipped reward goes through the audit.
"""

import functools
import math
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest

from rewards.answers import (
    exact_answer,
    gsm8k_answer,
    last_number,
    last_number_text,
    numeric_answer,
    parse_number,
    tagged_answer,
)
from rewards.api import Problem, Reward, Status, component_names, last_tag, score_inline
from rewards.arithmetic import arithmetic
from rewards.countdown import countdown
from rewards.formats import answer_text, r1_format, r1_format_lenient
from rewards.hostile import hostile_texts
from rewards.sequences import letters_answer, list_answer


def asked(reference: Any) -> Problem:
    return Problem("p", prompt="?", reference=reference)


def boxed(answer: str) -> str:
    return f"<think>so</think>\n<answer>{answer}</answer>"


# Each reward with a reference, a right and a wrong answer to it.
SHIPPED: dict[Reward, tuple[Any, str, str]] = {
    r1_format: (None, "1", ""),
    r1_format_lenient: (None, "1", ""),
    exact_answer: ("New York", "new  york", "York"),
    numeric_answer: (18, "18", "19"),
    last_number: (18, "18", "19"),
    gsm8k_answer: ("18", "18", "19"),
    countdown: ({"numbers": [3, 4, 2], "target": 14}, "3*4+2", "3*4-2"),
    letters_answer: ("cat", "c-a-t", "c-a-r"),
    list_answer: ([3, 10, 20], "3, 10, 20", "10, 20, 3"),
}
TRUTH = [reward for reward in SHIPPED if reward not in (r1_format, r1_format_lenient)]

HOSTILE = list(hostile_texts())


@pytest.mark.parametrize("extract", [tagged_answer, last_number_text, answer_text])
def test_extractors_take_any_string_quickly(extract):
    for text in HOSTILE:
        started = time.thread_time()
        assert isinstance(extract(text), str | None)
        assert time.thread_time() - started < 0.1, text[:80]


@pytest.mark.parametrize("reward", TRUTH, ids=lambda reward: reward.__name__)
def test_order_of_merit(reward):
    """Right and well formed >= right but badly formed > wrong >= silent, format points or not."""
    reference, right, wrong = SHIPPED[reward]
    ranked = [boxed(right), f"<answer>{right}</answer> there", boxed(wrong), "", " "]
    assert [reward(text, asked(reference)) for text in ranked] == [1, 1, 0, 0, 0]
    for form in (r1_format, r1_format_lenient):
        merits = [
            reward(text, asked(reference)) + 0.1 * form(text, asked(reference)) for text in ranked
        ]
        assert merits == sorted(merits, reverse=True) and merits[1] > merits[2]


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        ("<think>a</think><answer>b</answer>", 1, 1),
        (" \n<think>a\n</think>\n\n<answer>b</answer>\n", 1, 1),
        ("<think>a < b</think> <answer><b>x</b></answer>", 1, 1),
        ("Well, <think>a</think><answer>b</answer>", 0, 1),
        ("<think>a</think> so <answer>b</answer>", 0, 1),
        ("<think>a</think><answer>b</answer>.", 0, 1),
        ("<think>a</think><answer> </answer>", 0, 0.75),
        ("<think></think><answer>b</answer>", 0, 0.75),
        ("<think>a<answer>b</answer>", 0, 0.75),
        ("<answer>b</answer>", 0, 0.5),
        ("<think>a</think>", 0, 0.5),
        ("<think>a<think>b</think><answer>c</answer>", 0, 0.5),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0, 0.5),
        ("<think>a<answer>b</answer></think>", 0, 0.5),
        ("<answer>b</answer><think>a</think>", 0, 0.5),
        ("</think><think></answer><answer>", 0, 0.5),
        ("<Think>a</Think><Answer>b</Answer>", 0, 0),
        ("b", 0, 0),
    ],
)
def test_formats(text, strict, lenient):
    assert r1_format(text, asked(None)) == strict
    assert r1_format_lenient(text, asked(None)) == lenient


def test_a_prompt_may_have_opened_the_think_block():
    rest = "a</think><answer>b</answer>"
    assert r1_format(rest, asked(None)) == 0
    assert r1_format(rest, asked(None), prefix="<think>\n") == 1
    assert r1_format_lenient(rest, asked(None), prefix="<think>\n") == 1


@pytest.mark.parametrize(
    ("text", "one", "last"),
    [
        ("<answer>1</answer>", "1", "1"),
        ("<answer></answer>", "", ""),
        ("<answer>1</answer> <answer>2</answer>", None, "2"),
        ("<answer>1</answer> <answer>2", None, "1"),
        ("<answer>1<answer>2</answer>", None, "2"),
        ("<answer>1</answer></answer>", None, "1"),
        ("</answer><answer>", None, None),
        ("<answer>1", None, None),
        ("1</answer>", None, None),
    ],
)
def test_tags(text, one, last):
    assert answer_text(text) == one
    assert last_tag(text, "answer") == last


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        (" 18. ", 18),
        ("+18", 18),
        ("-18", -18),
        ("\u221218", -18),
        ("$18.00", 18),
        ("-$18", -18),
        ("$-18", -18),
        ("$18$", 18),
        ("1,234,567", 1234567),
        ("1,234.5", Fraction(2469, 2)),
        (".5", Fraction(1, 2)),
        ("50%", 50),
        ("50%.", 50),
        ("3/6", Fraction(1, 2)),
        ("-0", 0),
        ("007", 7),
        ("9007199254740993", 2**53 + 1),
        ("1" + "0" * 90, 10**90),
        ("12,34", None),
        ("1,2345", None),
        (",123", None),
        ("1/0", None),
        ("1/-2", None),
        ("1e3", None),
        ("1_000", None),
        ("0x10", None),
        ("nan", None),
        ("18 dollars", None),
        ("17 18", None),
        ("1.2.3", None),
        ("--1", None),
        ("\u0661\u0662", None),
        ("\uff11", None),
        ("1" * 101, None),
        ("", None),
        ("$", None),
        (".", None),
    ],
)
def test_numbers(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("so 17, no, 18", "18"),
        ("The answer is 18.", "18"),
        ("it is **1,234**!", "1234"),
        ("5-3", "3"),
        ("x = -3", "-3"),
        ("costs -$3.50", "-7/2"),
        ("1, 2,3", "3"),
        ("1,2,3", "3"),
        ("so .5", "1/2"),
        ("and...18", "18"),
        ("\\boxed{18}", "18"),
        ("18kg", "18"),
        ("18 in 2e9", None),
        ("room B12", None),
        ("none", None),
        ("1" * 200, None),
        ("18" + " " * 9_000, "18"),
        ("18" + " " * 10_000, None),
    ],
)
def test_last_number(text, value):
    assert last_number_text(text) == value


@pytest.mark.parametrize(
    ("reward", "reference", "text", "value"),
    [
        (exact_answer, "Paris", boxed(" paris\n"), 1),
        (exact_answer, "a b", boxed("a\t b"), 1),
        (exact_answer, "a b", boxed("ab"), 0),
        (exact_answer, 5, boxed("5"), 1),
        (exact_answer, "Paris", "Paris", 0),
        (numeric_answer, "1,234", boxed("$1234.0"), 1),
        (numeric_answer, 0.1, boxed("0.10"), 1),
        (numeric_answer, 0.1, boxed("1/10"), 1),
        (numeric_answer, 2**53, boxed(str(2**53 + 1)), 0),
        (numeric_answer, 10**80, boxed("1" + "0" * 81), 0),
        (numeric_answer, 1, "1", 0),
        (numeric_answer, 1, "<answer>2</answer><answer>1</answer>", 0),
        (last_number, 18, "17 and 18", 1),
        (last_number, 17, "17 and 18", 0),
        (gsm8k_answer, 18, "3*6\n#### 18", 1),
        (gsm8k_answer, 18, "#### 17\n#### $18.00\nbye", 1),
        (gsm8k_answer, 18, "18", 0),
        (gsm8k_answer, 18, "<answer>17</answer>\n#### 18", 0),
        (gsm8k_answer, 18, "<answer>17</answer><answer>18</answer>\n#### 18", 0),
        (letters_answer, "e-l-p-p-a", boxed("elppa"), 1),
        (letters_answer, "nk", boxed('"N", "K".'), 1),
        (letters_answer, "nk", boxed("n k x"), 0),
        (letters_answer, "nk", boxed("n+k"), 0),
        (list_answer, ["a", "b"], boxed("['A', \"b\"]"), 1),
        (list_answer, ["a", "b"], boxed("a b"), 1),
        (list_answer, ["a", "b"], boxed("b a"), 0),
        (list_answer, ["a", "b"], boxed("a, b, b"), 0),
        (list_answer, [-1, 2.5], boxed("(-1, 2.50)"), 1),
        (list_answer, ["new york", "rome"], boxed("New York, Rome"), 1),
        (list_answer, [], boxed("[]"), 1),
    ],
)
def test_answers(reward, reference, text, value):
    assert reward(text, asked(reference)) == value


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("3*4+2", 1),
        ("(2 + 3 * 4) = 14", 1),
        ("2+4\u00d73", 1),
        ("4*3--2", 1),
        ("3*4+2 = 15", 0),
        ("3*4+2 = 14 = 14", 0),
        ("3*4+2=", 0),
        ("14 = 3*4+2", 0),
        ("3*4+2+0", 0),
        ("4+4*2+2", 0),
        ("12+2", 0),
        ("14", 0),
        ("7*2", 0),
        ("3*4", 0),
        ("34//2-3", 0),
        ("3*4+2#", 0),
        ("3.0*4+2", 0),
        ("2 + 3 * 4 is it", 0),
        ("3*4+2" + " " * 300, 0),
    ],
)
def test_countdown(answer, value):
    problem = asked({"numbers": [3, 4, 2], "target": 14})
    assert countdown(boxed(answer), problem) == value


def test_countdown_is_exact_and_counts_repeats():
    assert countdown(boxed("7/3*3"), asked({"numbers": [7, 3, 3], "target": 7})) == 1
    assert countdown(boxed("5+5"), asked({"numbers": [5, 5], "target": 10})) == 1
    assert countdown(boxed("5+5"), asked({"numbers": [5, 5, 5], "target": 10})) == 0


def sums(rng: random.Random, depth: int) -> Iterator[str]:
    if depth == 0 or rng.random() < 0.2:
        yield str(rng.randrange(30))
    elif rng.random() < 0.2:
        yield rng.choice("+-")
        yield from sums(rng, depth - 1)
    else:
        yield from ("(", *sums(rng, depth - 1), rng.choice("+-*/"), *sums(rng, depth - 1), ")")


def test_arithmetic_agrees_with_python():
    rng = random.Random(0)
    checked = 0
    while checked < 300:
        parts = list(sums(rng, 4))
        exact = "".join(f"Fraction({part})" if part.isdigit() else part for part in parts)
        try:
            expected = eval(exact)  # our own text, with exact numbers in it
        except ZeroDivisionError:
            assert arithmetic("".join(parts)) is None
            continue
        text = "".join(parts)
        if len(text) <= 200:
            literals = [int(part) for part in parts if part.isdigit()]
            assert arithmetic(text) == (expected, literals)
            checked += 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "()",
        "1 2",
        "1(2)",
        "1.5",
        "1,2",
        "2**3",
        "7//2",
        "7%2",
        "~1",
        "a",
        "1\n+1",
        "1+",
        "1/0",
        "1/(2-2)",
        "10000000000000",
        "1" * 201,
        "-" * 60 + "1",
        "+".join("1" * 60),
        "0b1",
        "1_0",
    ],
)
def test_arithmetic_refuses(text):
    assert arithmetic(text) is None


def test_votes_are_canonical():
    assert tagged_answer(boxed("$1,234.50")) == tagged_answer(boxed("2469/2")) == "2469/2"
    assert tagged_answer(boxed(" New  York")) == "new york"
    assert tagged_answer(boxed(" ")) is None
    assert tagged_answer("18") is None
    assert last_number_text("it is 18.0") == last_number_text("so 18") == "18"


@pytest.mark.parametrize("reward", [numeric_answer, last_number, gsm8k_answer])
@pytest.mark.parametrize("reference", ["eighteen", None, math.nan])
def test_a_bad_reference_is_a_crash_and_not_a_zero(reward, reference):
    (score,) = score_inline([(1.0, reward)], boxed("1"), asked(reference))
    assert not score.valid and score.status == Status.CRASH and "ValueError" in score.detail


def returns(value: Any) -> Reward:
    return lambda completion, problem: value


@pytest.mark.parametrize("value", [0, 1, True, 0.25, Fraction(1, 3)])
def test_good_values(value):
    (score,) = score_inline([(1.0, returns(value))], "", asked(None))
    assert score.valid and type(score.value) is float and score.value == float(value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.01, 1.01, None, "1", [], 10**400, 1j])
def test_bad_values(value):
    (score,) = score_inline([(1.0, returns(value))], "", asked(None))
    assert (score.value, score.valid, score.status) == (0.0, False, Status.BAD_VALUE)


def test_names_are_unique():
    class Judge:
        def __call__(self, completion: str, problem: Problem) -> float:
            return 0.0

    partial = functools.partial(r1_format, prefix="<think>")
    functions = (r1_format, partial, Judge(), r1_format)
    names = component_names([(1.0, function) for function in functions])
    assert names == ("r1_format", "r1_format_2", "Judge", "r1_format_3")


def test_rewards_need_neither_jax_nor_grpo():
    program = (
        "import importlib, pkgutil, sys, rewards\n"
        "for module in pkgutil.iter_modules(rewards.__path__):\n"
        "    importlib.import_module(f'rewards.{module.name}')\n"
        "assert not {'jax', 'grpo', 'numpy'} & set(sys.modules), sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
