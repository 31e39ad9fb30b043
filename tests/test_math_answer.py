"""The math verifier: its corpus, its references, its verdicts, and what hostile text does to it."""

import ast
import functools
import json
import pickle
import random
import time
from concurrent.futures import wait
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from rewards.api import BadReference, Problem, Status, Verdict, judge
from rewards.formats import r1_format
from rewards.hostile import hostile_texts
from rewards.math_answer import Outcome, check_reference, math_answer
from rewards.math_clean import clean
from rewards.math_exact import is_literal
from rewards.math_expression import symbols
from rewards.math_syntax import Group, Named, Relation, Scalar, Words, read
from rewards.pool import RewardPool

math_verify = pytest.importorskip("math_verify", reason='needs pip install "grpo[math]"')
sympy = pytest.importorskip("sympy")
math_symbolic = pytest.importorskip("rewards.math_symbolic")

HERE = Path(__file__).parent
CORPUS = [
    json.loads(line) for line in (HERE / "corpus" / "math_answers.jsonl").read_text().splitlines()
]
DATA = HERE.parent.parent / "shared" / "data"  # not part of the repository
bare = functools.partial(math_answer, form="bare")


def asked(reference: Any) -> Problem:
    return Problem("p", prompt="?", reference=reference)


def tagged(answer: str) -> str:
    return f"<think>so</think>\n<answer>{answer}</answer>"


@pytest.mark.parametrize("part", ["seen", "unseen"])
def test_corpus(part):
    """No wrong answer accepted, at most 3 % of the right ones rejected; "unseen" is held out."""
    rows = [row for row in CORPUS if row["part"] == part]
    accepted, rejected = [], []
    for row in rows:
        verdict = math_answer(row["text"], asked(row["reference"]), form=row["form"])
        if verdict and not row["right"]:
            accepted.append(row)
        if not verdict and row["right"]:
            rejected.append((row, verdict.reason))
    assert not accepted
    assert len(rejected) <= 0.03 * sum(row["right"] for row in rows), rejected


def test_the_corpus_is_large_and_a_third_of_it_held_out():
    assert len(CORPUS) >= 400
    assert len({(row["text"], row["reference"], row["form"]) for row in CORPUS}) == len(CORPUS)
    held_out = sum(row["part"] == "unseen" for row in CORPUS)
    assert held_out >= len(CORPUS) / 3
    assert not [row for row in CORPUS if check_reference(row["reference"])]


# What Math-Verify 0.9.0 takes for equal, or may take where it simplifies or rounds.
_NOT_EQUAL = [
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
    ("e^{-100}", "e^{-200}"),
    ("10^{-400}", "10^{-401}"),
    ("0.0000001", "0.0000002"),
    ("9007199254740993", "9007199254740992"),
    ("204_5", "204_6"),
    (r"1,2,\ldots,n", r"1,3,5"),
    ("17=42", "42"),
    ("1=2=3", "3"),
    (r"1*\pi if 0==0 else 0", "0"),
    ("[1,2,7", "7"),
    (r"\boxed{1} and \boxed{2}", "1,2"),
    ("7,7,7,7", "7"),
    ("4", r"4\sqrt{2}"),
    ("3x-y+13=0", "3x+4y+14=0"),
    ("n=2,3,4", "n=1,2,3"),
    (r"1-\frac{1}{e}", r"1+\frac{1}{e}"),
    ("N", "n"),
    (r"e^{\pi\sqrt{163}}", "262537412640768744"),
    (r"\sqrt{2}+10^{-30}", r"\sqrt{2}"),
    (r"\pi", r"\frac{245850922}{78256779}"),
    (r"x+10^{-20}", "x"),
    ("|x|", "x"),
    (r"\sqrt{x^2}", "x"),
]


@pytest.mark.parametrize(("said", "reference"), _NOT_EQUAL)
def test_precision_and_fragments(said, reference):
    if check_reference(reference) is None:
        assert bare(said, asked(reference)) == 0


@pytest.mark.parametrize(
    ("completion", "reference", "form", "reason", "extracted"),
    [
        (tagged("1/2"), "0.5", "r1", "correct", "1/2"),
        (tagged(r"so \boxed{x=3}."), 3, "r1", "correct", "x=3"),
        (tagged("4"), "3", "r1", "wrong: another number", "4"),
        (tagged("1+2"), "3", "r1", "wrong: not worked out", "1+2"),
        (tagged("3 kg"), "3 grams", "r1", "wrong: kg, not g", "3 kg"),
        (tagged("(1,2)"), "[1,2]", "r1", "wrong: a tuple or open interval where", "(1,2)"),
        (tagged("1,2"), "1,2,3", "r1", "wrong: 2 items, the reference has 3", "1,2"),
        (tagged("y=3"), "x=3", "r1", "wrong: the value of y, not of x", "y=3"),
        (tagged("3 ??"), "3", "r1", "unparsable prediction", "3 ??"),
        (tagged("x=3=3"), "3", "r1", "unparsable prediction: a chain of relations", "x=3=3"),
        (tagged("9^{9^{9^9}}"), "3", "r1", "unparsable prediction: a power too big", "9^{9^{9^9}}"),
        (tagged(" "), "3", "r1", "no answer: empty", None),
        (tagged("3" * 1001), "3", "r1", "no answer: over 1000 characters", None),
        ("3", "3", "r1", "no answer: not one answer block", None),
        (tagged("3") + tagged("3"), "3", "r1", "no answer: not one answer block", None),
        (tagged(r"\boxed{3"), "3", "r1", "no answer: a box that is not closed", None),
        (tagged("3") + r"\boxed{4}", "3", "r1", "no answer: a box outside", None),
        ("<think>" + tagged("3") + "</think>", "3", "r1", "no answer: the answer block is", None),
        (r"<think>\boxed{3}", "3", "boxed", "no answer: still thinking", None),
        (r"\boxed{1+\boxed{3}}", "3", "boxed", "no answer: a box within a box", None),
        ("#### 3\n#### 3", "3", "gsm8k", "no answer: not one ####", None),
    ],
)
def test_verdicts_say_why(completion, reference, form, reason, extracted):
    verdict = math_answer(completion, asked(reference), form=form)
    assert verdict.reason.startswith(reason)
    assert verdict.extracted == extracted
    assert verdict.reason.partition(":")[0] in list(Outcome)
    assert (verdict == 1.0) is (verdict.reason == Outcome.CORRECT)
    copy = pickle.loads(pickle.dumps(verdict))
    assert type(copy) is Verdict and copy == verdict and copy.reason == verdict.reason


def test_order_of_merit():
    """Right and well formed >= right but badly formed > wrong >= silent."""
    ranked = [tagged("18"), "<answer>18</answer> there", tagged("19"), "", " "]
    assert [math_answer(text, asked("18")) for text in ranked] == [1, 1, 0, 0, 0]
    merits = [math_answer(t, asked("18")) + 0.1 * r1_format(t, asked("18")) for t in ranked]
    assert merits == sorted(merits, reverse=True) and merits[1] > merits[2]


@pytest.mark.parametrize("reference", [18, 18.0, Fraction(18), "18", r"\boxed{18}", "$18$", "18."])
def test_references(reference):
    assert check_reference(reference) is None
    assert bare("18", asked(reference)) == 1


@pytest.mark.parametrize(
    "reference",
    [
        "",
        " ",
        None,
        True,
        [18],
        float("nan"),
        r"\left( 3, \frac{\pi}{2} \right",
        r"1,2,\ldots,n",
        r"\frac{1}{",
        "1" * 1001,
        "10^{10^6}",
        "10^{10^{10^{10}}}",
        "18 or so",
        "x=1=2",
        "\x00",
        "(" * 500,
    ],
)
def test_bad_references_are_reported_and_their_rows_are_invalid(reference):
    problem = check_reference(reference)
    assert problem is not None and len(problem) < 300
    with pytest.raises(BadReference):
        bare("18", asked(reference))
    score = judge(bare, "18", asked(reference))
    assert (score.value, score.valid, score.status) == (0.0, False, Status.BAD_REFERENCE)


def test_an_unknown_form_is_our_bug():
    with pytest.raises(ValueError, match="form is one of"):
        math_answer("1", asked("1"), form="xml")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("18", Scalar),
        ("east", Words),
        ("(1,2]", Group),
        ("x=5", Named),
        ("5=x", Named),
        ("x>5", Named),
        ("2x+y=5", Relation),
        (r"1 \pm \sqrt{2}", Group),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", Group),
    ],
)
def test_kinds(text, kind):
    assert type(read(clean(text))) is kind


def test_numbers_in_any_spelling():
    rng = random.Random(0)
    for _ in range(300):
        value = Fraction(rng.randrange(-500, 500), rng.choice([1, 2, 3, 4, 5, 7, 8, 12, 25]))
        top, bottom, scale = value.numerator, value.denominator, rng.randrange(1, 9)
        spellings = [
            f"{top}/{bottom}",
            rf"\frac{{{top * scale}}}{{{bottom * scale}}}",
            rf"$\dfrac{{{top}}}{{{bottom}}}$.",
        ]
        whole, rest = divmod(abs(top), bottom)
        if whole and rest:
            spellings.append(f"{'-' if top < 0 else ''}{whole} {rest}/{bottom}")
        if 1000 % bottom == 0:
            spellings.append(f"{float(value):.3f}")
            spellings.append(rf"{top * (1000 // bottom)} \times 10^{{-3}}")
        for said in spellings:
            assert bare(said, asked(str(value))) == 1, (said, value)
            assert bare(said, asked(str(value + Fraction(1, 10**30)))) == 0
            node = read(clean(said))
            assert isinstance(node, Scalar) and is_literal(node.node)


# Each would take for ever, or all memory, if it were worked out.
_BOMBS = [
    "9^{9^{9^{9}}}",
    "(x+1)^{1000}",
    "((x+1)^{50})^{50}",
    "(x+y+z+w)^{40}(x-y)^{40}",
    "(((x+1)^{9}+1)^{9}+1)^{9}",
    "e^{e^{e^{e^{e}}}}",
    "exp(exp(exp(100)))",
    "((3!)!)!!!!",
    r"1000000!\sqrt{2}",
    r"\binom{10^{9}}{5}x",
    r"\binom{x}{100000}",
    r"\sin(10^{100})",
    r"\tan(\tan(\tan(\tan(10^5))))",
    r"\sqrt[10^{-8}]{2}",
    "x^{x^{x^{x}}}",
    "1e999" + "*1e999" * 150,
    "+".join(rf"\sqrt{{{n}}}" for n in range(2, 90)),
    ",".join(rf"\sqrt{{{n}}}" for n in range(2, 42)),
    "*".join(f"(x+{n})" for n in range(100)),
    "(" * 13 + "x" + ")" * 13,
    r"\frac{1}{" * 100,
    "{" * 500,
    "aU" * 400,
    "|" * 500,
    r"\pm" * 300,
    "x_{" * 300,
    r"\text{" * 140,
    r"\begin{pmatrix}" * 60,
    r"\\" * 499,
    "1" + " " * 900 + "1",
    "1{,}234" * 140,
    "9" * 999,
]


@pytest.mark.parametrize("reference", ["18", r"\frac{\sqrt{3}}{3}", "(x+1)^2", "x+y=1", "1,2"])
def test_bombs_are_refused_at_once(reference):
    bare(r"\sqrt{2}", asked(r"\sqrt{3}"))  # imports sympy
    for text in [*_BOMBS, *(tagged(bomb) for bomb in _BOMBS)]:
        for form in ("bare", "r1"):
            started = time.thread_time()
            assert math_answer(text, asked(reference), form=form) == 0
            assert time.thread_time() - started < 0.5, text[:60]


@pytest.mark.parametrize("form", ["r1", "boxed", "gsm8k", "bare"])
def test_any_string_gets_a_verdict_quickly(form):
    for text in hostile_texts():
        started = time.thread_time()
        verdict = math_answer(text, asked("18"), form=form)
        assert type(verdict) is Verdict and verdict in (0.0, 1.0)
        assert time.thread_time() - started < 0.1, text[:60]


_INJECTIONS = [
    "__import__('os').system('touch CANARY')",
    "open('CANARY','w')",
    "exec(\"open('CANARY','w')\")",
    "(lambda: open('CANARY','w'))()",
    "sqrt(__import__('os').system('touch CANARY'))",
    r"\frac{__import__('os').system('touch CANARY')}{2}",
    r"\text{__import__('os').system('touch CANARY')}",
    "[c for c in ().__class__.__base__.__subclasses__()]",
    r"\input{CANARY}",
    r"\write18{touch CANARY}",
    "1;import os;os.system('touch CANARY')",
    "x.__class__.__init__.__globals__",
    "$(touch CANARY)",
    "`touch CANARY`",
]


@pytest.mark.parametrize("reference", ["18", r"\sqrt{2}", "x^2", "(1,2)"])
def test_nothing_a_model_writes_is_run(reference, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in _INJECTIONS:
        for written in (text, tagged(text), rf"\boxed{{{text}}}", f"#### {text}"):
            for form in ("r1", "boxed", "gsm8k", "bare"):
                assert math_answer(written, asked(reference), form=form) == 0
    assert list(tmp_path.iterdir()) == []


def test_no_module_of_the_verifier_evaluates_text():
    forbidden = {"eval", "exec", "compile", "sympify", "parse_expr", "literal_eval", "__import__"}
    for path in (HERE.parent / "rewards").glob("math_*.py"):
        names = {
            getattr(node, "id", getattr(node, "attr", getattr(node, "name", None)))
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Name | ast.Attribute | ast.alias)
        }
        calls = names & forbidden - {"compile"}  # re.compile
        assert not calls, path.name


def test_expressions_are_read_as_math_verify_reads_them():
    """Two parsers that share no code; ours is the stricter one, so it is held to the other's."""
    compared = 0
    for row in CORPUS:
        if row["family"] not in ("radicals", "pi_e_logs"):
            continue
        text = clean(row["reference"])
        answer = read(text)
        if not isinstance(answer, Scalar):
            continue
        known = {name: sympy.Symbol(name, real=True) for name in symbols(answer.node)}
        known |= {"pi": sympy.pi, "e": sympy.E, "i": sympy.I}
        for theirs in math_verify.parse(f"${text}$", fallback_mode="no_fallback")[:1]:
            compared += 1
            assert math_verify.verify(theirs, math_symbolic.build(answer.node, known)), text
    assert compared > 50


def test_mutated_answers_never_crash_it():
    rng = random.Random(0)
    rows = [row for row in CORPUS if row["form"] == "bare"]
    pieces = [
        *r"\frac \sqrt { } ( ) [ ] ^ _ x 2 \pi e i + - * / \sin \log_ ! | \pm , = <".split(),
        *r"\in \cup 1e99 % $ \text{cm} \binom \infty .5 ^\circ or \{ \} \\ & : 3/4 \ln".split(),
    ]
    for _ in range(6_000):
        text, reference = rng.choice(rows)["text"], rng.choice(rows)["reference"]
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice(pieces) + text[at + rng.randrange(3) :]
        assert bare(text, asked(reference)) in (0.0, 1.0)
        check_reference(text)


def test_in_a_pool():
    """Verdicts survive the way back, bombs end by the deadline, bad references are invalid."""
    texts = ["18", "19", "18 ??", "", *_BOMBS]
    with RewardPool([(1.0, bare)], workers=2, deadline_s=2.0) as pool:
        futures = [pool.submit(text, asked("18")) for text in texts]
        futures += [pool.submit(text, asked(r"\sqrt{x^2+1}")) for text in _BOMBS]
        bad = pool.submit("18", asked("18 or so"))
        _, late = wait([*futures, bad], timeout=60)
        assert not late
    scores = [future.result()[0] for future in futures]
    assert all(score.valid for score in scores)
    assert [score.value for score in scores] == [1.0] + [0.0] * (len(scores) - 1)
    assert {score.status for score in scores} <= {Status.OK, Status.TIMEOUT}
    assert (scores[0].reason, scores[0].extracted) == ("correct", "18")
    assert scores[2].reason.startswith(Outcome.UNPARSABLE)
    assert bad.result()[0].status == Status.BAD_REFERENCE and not bad.result()[0].valid


def test_a_pool_without_the_extra_refuses_to_start(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ModuleNotFoundError('math_verify')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match=r'math_answer.*\n[^$]*pip install "grpo\[math\]"'):
        RewardPool([(1.0, math_answer)], workers=1)


def _golds() -> dict[str, list[str]]:
    def rows(name: str) -> list[Any]:
        return [json.loads(line)["answer"] for line in (DATA / name).read_text().splitlines()]

    worked = [*rows("gsm8k/train.jsonl"), *rows("gsm8k/test.jsonl")]
    return {
        "gsm8k": [text.rpartition("####")[2].strip() for text in worked],
        "math500": rows("math/math500.jsonl"),
        "aime24": rows("aime_amc/aime24.jsonl"),
        "amc23": rows("aime_amc/amc23.jsonl"),
    }


@pytest.mark.skipif(not DATA.is_dir(), reason="the data sets are not here")
def test_gold_answers_of_real_data():
    """Each gold answer is right for itself in every form, and wrong for the ones after it."""
    for golds in _golds().values():
        assert not [gold for gold in golds if check_reference(gold)]
        for number, gold in enumerate(golds):
            problem = asked(gold)
            assert math_answer(tagged(gold if isinstance(gold, str) else str(gold)), problem) == 1
            assert math_answer(rf"\boxed{{{gold}}}", problem, form="boxed") == 1
            assert math_answer(f"So.\n#### {gold}", problem, form="gsm8k") == 1
            for other in golds[number + 1 : number + 4]:
                if other != gold and bare(str(other), problem) == 1:
                    assert {str(gold), str(other)} == {"5", "x=5"}  # in MATH-500
