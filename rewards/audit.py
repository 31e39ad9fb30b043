"""Tries to break a reward, as a policy would.

  python -m rewards.audit my_rewards:palindrome --problems problems.jsonl
  python -m rewards.audit my_rewards:politeness --problems problems.jsonl --style

Rows of the file: {"prompt", "reference", "gold"}; `gold` is the text of a right answer, and
`--gold_format` says how a completion gives it. Each check is one line, with what it found; the exit
status is 1 if one failed. `--style` is for rewards that look only at how a completion is written,
such as its format: they need no gold answers.
"""

import argparse
import collections
import dataclasses
import pathlib
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence

from rewards.api import Batched, Reward, Row, Score, Status, score_inline
from rewards.hostile import hostile_texts, tricks
from rewards.loading import problem_of, read_rows, start_pool
from rewards.pool import RewardPool

GOLD_FORMAT = "<think>so</think>\n<answer>{gold}</answer>"

_RIGHT = 1.0 - 1e-6
_SAME = 1e-9
_MAX_GOLDS = 64  # problems whose answers are tried
_MAX_TRICKED = 8
_SHOWN = 5

Scorer = Callable[[Sequence[Row]], list[Score]]


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
      check: what was checked.
      passed: None for a remark: something to know, which may be as intended.
      tried: how many completions or comparisons.
      faults: one line for each that failed.
    """

    check: str
    passed: bool | None
    tried: int
    faults: Sequence[str] = ()

    def __str__(self) -> str:
        mark = {True: "ok  ", False: "FAIL", None: "note"}[self.passed]
        lines = [f"{mark} {self.check} ({self.tried} tried, {len(self.faults)} found)"]
        lines += [f"       {fault}" for fault in self.faults[:_SHOWN]]
        if len(self.faults) > _SHOWN:
            lines.append(f"       and {len(self.faults) - _SHOWN} more")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True, eq=False)
class _Case:
    """One completion to try: `kind` groups what one check looks at."""

    kind: str
    name: str
    row: Row


def audit(
    scorer: Scorer,
    rows: Sequence[Row],
    *,
    gold_format: str = GOLD_FORMAT,
    style: bool = False,
    max_ms: float = 100.0,
) -> list[Finding]:
    """Runs every check.

    Args:
      scorer: scores rows (completion, problem, facts), in their order.
      rows: the problems; their completions are not looked at.
      gold_format: a right completion, with {gold} for the answer.
      style: the reward looks at how a completion is written, not at the answer.
      max_ms: milliseconds that a call may take on hostile text.

    Raises:
      ValueError: too few problems, or gold answers, to try anything.
    """
    golden = [row for row in rows if row[1].gold is not None]
    if not rows or (not style and len({row[1].gold for row in golden}) < 3):
        raise ValueError("an audit needs problems with three different gold answers, or --style")
    cases = list(_hostile(rows, golden))
    if not style:
        cases += [*_golds(golden, gold_format), *_tricks(golden, gold_format)]
    cases += _merits(golden or rows, gold_format)
    scores = scorer([case.row for case in cases])
    shuffled = random.Random(0).sample(range(len(cases)), len(cases))
    again = dict(zip(shuffled, scorer([cases[i].row for i in shuffled]), strict=True))

    found = dict(zip(cases, scores, strict=True))
    findings = [
        _ends_well(found),
        _repeats(cases, scores, [again[i] for i in range(len(cases))]),
        _fast(cases, scores, [again[i] for i in range(len(cases))], max_ms),
    ]
    if style:
        return [*findings, _silence_is_no_style(found)]
    return [
        *findings,
        _paid("right answers are paid", found, "gold", wanted=True),
        _paid("answers to other problems are not", found, "shuffled", wanted=False),
        _hostile_unpaid(found),
        _paid("tricks are not paid", found, "trick", wanted=False),
        dataclasses.replace(
            _paid("what depends on your rules", found, "rule", wanted=False), passed=None
        ),
        _order_of_merit(found),
    ]


def _row(completion: str, row: Row) -> Row:
    """The problem of `row` with another completion, its length estimated."""
    facts = {"length_tokens": len(completion) // 4 + 1, "finish_reason": "eos", **row[2]}
    return completion, row[1], facts


def _hostile(rows: Sequence[Row], golden: Sequence[Row]) -> Iterator[_Case]:
    """Every hostile text, on two problems that have no right answer in common."""
    first = (golden or rows)[0]
    second = next((row for row in golden if row[1].gold != first[1].gold), None)
    for number, text in enumerate(hostile_texts()):
        for row in [first] if second is None else [first, second]:
            yield _Case("hostile", str(number), _row(text, row))


def _golds(golden: Sequence[Row], form: str) -> Iterator[_Case]:
    for number, row in enumerate(golden[:_MAX_GOLDS]):
        yield _Case("gold", "gold", _row(_filled(form, row[1].gold), row))
        wrong = _others(golden, number, 1)[0]
        yield _Case("shuffled", f"{wrong!r:.40}", _row(_filled(form, wrong), row))


def _tricks(golden: Sequence[Row], form: str) -> Iterator[_Case]:
    for number, row in enumerate(golden[:_MAX_TRICKED]):
        problem = row[1]
        prompt = problem.prompt or "\n".join(turn["content"] for turn in problem.messages)
        for trick in tricks(str(problem.gold), _others(golden, number, 3), form, prompt):
            kind = "trick" if trick.forbidden else "rule"
            yield _Case(kind, trick.name, _row(trick.text, row))


def _merits(rows: Sequence[Row], form: str) -> Iterator[_Case]:
    """Four completions a problem, best first."""
    for number, row in enumerate(rows[:_MAX_TRICKED]):
        gold = row[1].gold
        right = _filled(form, "1" if gold is None else gold)
        wrong = right if gold is None else _filled(form, _others(rows, number, 1)[0])
        for name, text in (
            ("right", right),
            ("right, badly formed", f"{right} there."),
            ("wrong", wrong),
            ("silent", ""),
        ):
            yield _Case(f"merit {number}", name, _row(text, row))


def _filled(form: str, answer: str | None) -> str:
    return form.replace("{gold}", str(answer))


def _others(rows: Sequence[Row], number: int, count: int) -> list[str]:
    """Other problems' gold answers, the next ones first; at least one, the last repeated."""
    mine = rows[number][1].gold
    following = [rows[(number + step) % len(rows)][1].gold for step in range(1, len(rows))]
    others = list(dict.fromkeys(gold for gold in following if gold not in (None, mine)))[:count]
    others = [str(gold) for gold in others] or ["another"]
    return others + others[-1:] * (count - len(others))


def _shown(case: _Case, score: Score) -> str:
    completion, problem, _ = case.row
    text = completion if len(completion) <= 80 else f"{completion[:60]}…[{len(completion)} chars]"
    said = f"{score.value:g} {score.status} {score.detail}".rstrip()
    return f"{case.name}: problem {problem.uid!r}: {said} for {text!r}"


def _ends_well(found: dict[_Case, Score]) -> Finding:
    faults = [_shown(case, s) for case, s in found.items() if s.status is not Status.OK]
    return Finding("every completion gets a value in time", not faults, len(found), faults)


def _repeats(cases: Sequence[_Case], first: Sequence[Score], again: Sequence[Score]) -> Finding:
    faults = [
        f"{_shown(case, a)}, and then {b.value:g} {b.status}"
        for case, a, b in zip(cases, first, again, strict=True)
        if abs(a.value - b.value) > _SAME
    ]
    return Finding("the same completion gets the same value", not faults, len(cases), faults)


def _fast(
    cases: Sequence[_Case], first: Sequence[Score], again: Sequence[Score], max_ms: float
) -> Finding:
    """Takes the faster of two calls: a busy machine, or an import, slows one of them."""
    times = [1_000 * min(a.seconds, b.seconds) for a, b in zip(first, again, strict=True)]
    faults = [
        f"{ms:.0f} ms: {_shown(case, score)}"
        for case, score, ms in zip(cases, first, times, strict=True)
        if ms > max_ms
    ]
    check = f"no call takes over {max_ms:g} ms; the middle one took {statistics.median(times):.3f}"
    return Finding(check, not faults, len(cases), faults)


def _paid(check: str, found: dict[_Case, Score], kind: str, *, wanted: bool) -> Finding:
    asked = {case: score for case, score in found.items() if case.kind == kind}
    faults = [_shown(case, s) for case, s in asked.items() if (s.value >= _RIGHT) is not wanted]
    return Finding(check, not faults, len(asked), faults)


def _hostile_unpaid(found: dict[_Case, Score]) -> Finding:
    """What is paid on two problems with different answers is paid for something else."""
    paid: dict[str, list[tuple[_Case, Score]]] = collections.defaultdict(list)
    for case, score in found.items():
        if case.kind == "hostile":
            paid[case.name].append((case, score))
    faults = [
        _shown(*tries[0])
        for tries in paid.values()
        if len(tries) > 1 and all(score.value >= _RIGHT for _, score in tries)
    ]
    return Finding("hostile texts are not paid", not faults, len(paid), faults)


def _ranked(found: dict[_Case, Score]) -> list[list[tuple[_Case, Score]]]:
    groups: dict[str, list[tuple[_Case, Score]]] = collections.defaultdict(list)
    for case, score in found.items():
        if case.kind.startswith("merit"):
            groups[case.kind].append((case, score))
    return list(groups.values())


def _order_of_merit(found: dict[_Case, Score]) -> Finding:
    """Right >= right but badly formed >= wrong >= silent, and right > wrong."""
    faults = []
    groups = _ranked(found)
    for group in groups:
        values = [score.value for _, score in group]
        if values != sorted(values, reverse=True) or values[0] <= values[2]:
            faults.append(", ".join(f"{case.name} {score.value:g}" for case, score in group))
    return Finding("right >= badly formed >= wrong >= silent", not faults, len(groups), faults)


def _silence_is_no_style(found: dict[_Case, Score]) -> Finding:
    groups = _ranked(found)
    faults = [
        f"silence gets {group[-1][1].value:g}, {_shown(*group[0])}"
        for group in groups
        if group[-1][1].value > group[0][1].value
    ]
    return Finding("silence gets no more than writing", not faults, len(groups), faults)


def inline_scorer(reward: Reward | Batched) -> Scorer:
    """Scores in this process: no deadline, no kill. For tests of rewards that are well known."""
    return lambda rows: [score_inline([(1.0, reward)], *row)[0] for row in rows]


def pool_scorer(pool: RewardPool) -> Scorer:
    """Scores with the pool's first reward."""

    def score(rows: Sequence[Row]) -> list[Score]:
        futures = [pool.submit(*row) for row in rows]
        return [future.result()[0] for future in futures]

    return score


def main(arguments: Sequence[str]) -> None:
    """Prints the findings and exits with 1 if a check failed."""
    parser = argparse.ArgumentParser(
        prog="python -m rewards.audit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("reward", metavar="MODULE_OR_FILE:NAME")
    parser.add_argument("--problems", type=pathlib.Path, required=True)
    parser.add_argument("--gold_format", default=GOLD_FORMAT)
    parser.add_argument("--style", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--deadline_s", type=float, default=2.0)
    parser.add_argument("--max_ms", type=float, default=100.0)
    options = parser.parse_args(arguments)
    if "{gold}" not in options.gold_format:
        raise SystemExit("--gold_format needs {gold} where the answer stands")

    rows: list[Row] = [
        ("", problem_of(row, number), {}) for number, row in enumerate(read_rows(options.problems))
    ]
    try:
        with start_pool([options.reward], options.workers, options.deadline_s) as pool:
            findings = audit(
                pool_scorer(pool),
                rows,
                gold_format=options.gold_format,
                style=options.style,
                max_ms=options.max_ms,
            )
    except ValueError as error:
        raise SystemExit(str(error)) from error
    print("\n".join(map(str, findings)))
    if any(finding.passed is False for finding in findings):
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
