"""Accuracy against tokens: points by hand, what is judged and kept, and what is shown."""

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from grpo.config import EvalConfig, RewardConfig
from grpo.data.tokenizer import ByteTokenizer
from grpo.engine.engine import EngineStats
from grpo.measure import compute_curves
from grpo.measure.compute_curves import Point, curves_table, draw_curves, measure, sampling_curves
from grpo.measure.forcing import EXTENDED, FORCED, BudgetSettings, Draft
from grpo.measure.held_out import Evaluator
from grpo.scoring import Scorer
from grpo.structs import LENGTH, Completion, Rollout
from rewards.api import Problem

BYTES = ByteTokenizer()


def rollout_of(*texts: str) -> Rollout:
    """Two problems; the texts of the first come first."""
    G = len(texts) // 2
    return Rollout(
        problems=[Problem(uid=f"p{n}", prompt=f"{n}?", reference=str(n)) for n in range(2)],
        prompts=[BYTES.encode(f"{n}?") for n in range(2)],
        completions=[
            Completion(b // G, b % G, tuple(text.encode()), np.zeros(len(text), "f4"), LENGTH)
            for b, text in enumerate(texts)
        ],
        group_size=G,
    )


def test_k_samples_cost_k_completions():
    rollout = rollout_of("a", "aaa", "a", "aaa", "aa", "aa", "aa", "aa")  # 2 tokens on average
    solved_PG = np.array([[1, 0, 0, 1], [0, 0, 0, 1]], bool)
    answers_PG: list[list[str | None]] = [["7", "3", "3", "7"], ["1", "1", None, "2"]]
    curves = sampling_curves(rollout, solved_PG, answers_PG)
    assert list(curves) == ["majority", "best_of"]
    for points in curves.values():
        assert [(p.setting, p.tokens) for p in points] == [(1, 2.0), (2, 4.0), (4, 8.0)]
        assert all(p.low <= p.accuracy <= p.high for p in points)
    # Pairs of the first problem: 73 73 77 33 37 37 -> .5 .5 1 0 .5 .5; of the second, where None
    # has no vote: 11 1- 12 1- 12 -2 -> 0 0 .5 0 .5 1.
    assert [p.accuracy for p in curves["majority"]] == pytest.approx(
        [(0.5 + 0.25) / 2, (3 / 6 + 2 / 6) / 2, (0.5 + 0) / 2]
    )
    assert [p.accuracy for p in curves["best_of"]] == pytest.approx(
        [(0.5 + 0.25) / 2, (5 / 6 + 3 / 6) / 2, 1.0]
    )
    assert list(sampling_curves(rollout, solved_PG, None)) == ["best_of"]


# ---- A whole measurement -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def scorer():
    def right(completion, problem):
        return float(completion.endswith(f"|{problem.reference}"))

    with Scorer(RewardConfig(functions=((1.0, right),), workers=1)) as scorer:
        yield scorer


def forcer_with(scorer: Scorer, held: dict[tuple[str, int], list[str]]) -> Any:
    """A forcer that knows what comes out."""
    engine: Any = SimpleNamespace(tokenizer=BYTES, stats=EngineStats())
    config = EvalConfig(num_samples=2, answer_of=lambda text: text[-1:] or None)
    evaluator = Evaluator(engine, scorer, [Problem(uid="p0", prompt="0?")], config, 1.0, 0)

    class KnownForcer:
        settings = BudgetSettings((2, 4))

        def __call__(self, weights: Any, rollout: Rollout) -> Any:
            return {
                setting: [Draft(tuple(text.encode()), LENGTH, 0, True) for text in texts]
                for setting, texts in held.items()
            }

    forcer: Any = KnownForcer()
    forcer.evaluator = evaluator
    return forcer


HELD = {
    (FORCED, 2): ["ab|0", "cd|1", "e|1", "f|1"],
    (FORCED, 4): ["abxy|0", "cdxy|0", "e|1", "f|2"],
    (EXTENDED, 2): ["ab|0", "cd|1", "e|1", "f|1"],
    (EXTENDED, 4): ["abWab|1", "cdxy|0", "eW|1", "fW|1"],
}


@pytest.fixture(scope="module")
def measured(scorer, tmp_path_factory):
    """The curves and rows of `HELD`, and how often a completion was judged."""
    rollout = rollout_of("ab|0", "cdxy|0", "e|1", "f|2")
    futures = [
        [scorer.submit(text, rollout.problems[p], {}) for text in texts]
        for p, texts in enumerate([["ab|0", "cdxy|0"], ["e|1", "f|2"]])
    ]
    scores, path = scorer.collect(futures), tmp_path_factory.mktemp("budget") / "after.jsonl"
    judged, judge = [], compute_curves.judge

    def counted(scorer, tokenizer, completion, problem):
        judged.append((problem.uid, tokenizer.decode(completion.tokens)))
        return judge(scorer, tokenizer, completion, problem)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compute_curves, "judge", counted)
        for _ in range(2):  # the second takes the place of the first
            judged.clear()
            curves = measure(forcer_with(scorer, HELD), {}, rollout, scores, 7, path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return SimpleNamespace(curves=curves, rows=rows, judged=judged)


def test_every_method_has_its_curve(measured):
    got = {
        method: [(p.setting, p.tokens, p.accuracy) for p in points]
        for method, points in measured.curves.items()
    }
    assert got == {
        "majority": [(1, 4.0, 0.75), (2, 8.0, 0.75)],
        "best_of": [(1, 4.0, 0.75), (2, 8.0, 1.0)],
        "forced": [(2, 3.5, 0.75), (4, 4.5, 0.75)],
        "extended": [(2, 3.5, 0.75), (4, 5.25, 0.75)],
    }


def test_every_completion_is_kept_with_its_score(measured):
    rows = measured.rows
    assert len(rows) == 4 * 4
    for row in rows:
        p, g = int(row["uid"][1:]), row["sample"]
        text = HELD[row["method"], row["budget"]][2 * p + g]
        assert (row["completion"], row["step"]) == (text, 7)
        assert row["length_tokens"] == len(text)
        assert row["scores"]["right"] == float(text.endswith(f"|{p}"))


def test_what_settings_have_in_common_is_judged_once(measured):
    texts = {(f"p{b // 2}", text) for texts in HELD.values() for b, text in enumerate(texts)}
    assert sorted(measured.judged) == sorted(texts) and len(texts) < 16


# ---- What is shown -----------------------------------------------------------------------------

CURVES = {
    "majority": [Point(1, 31.24, 0.5, 0.4, 0.6), Point(2, 62.48, 0.625, 0.5, 0.75)],
    "forced": [Point(8, 14.0, 0.25, 0.2, 0.3)],
}
BETTER = {
    "majority": [Point(1, 20.0, 0.75, 0.7, 0.8), Point(2, 40.0, 0.875, 0.8, 0.9)],
    "forced": [Point(8, 12.0, 1.0, 1.0, 1.0)],
}


def test_the_table_sets_models_side_by_side():
    lines = [line.split() for line in curves_table({"before": CURVES, "after": BETTER}).split("\n")]
    assert lines[0] == ["method", "setting", "before", "after"]
    assert lines[1] == "majority k=1 0.500 [0.400, 0.600] 31.2 0.750 [0.700, 0.800] 20.0".split()
    assert [line[:2] for line in lines[1:-1]] == [
        ["majority", "k=1"],
        ["majority", "k=2"],
        ["forced", "B=8"],
    ]
    assert lines[3][2:] == "0.250 [0.200, 0.300] 14.0 1.000 [1.000, 1.000] 12.0".split()


@pytest.mark.parametrize("models", [{"initial": CURVES}, {"before": CURVES, "after": BETTER}])
def test_the_picture_is_drawn(tmp_path, models):
    draw_curves(tmp_path / "budget.png", models)
    picture = imread(tmp_path / "budget.png")
    assert picture.shape[0] > 500 and picture.shape[1] > 800
    assert 0.5 < picture[..., :3].mean() < 0.999  # neither blank nor black


def test_what_is_written(tmp_path, scorer, capsys):
    forcer = forcer_with(scorer, {})
    compute_curves.write_curves(tmp_path, {"before": CURVES, "after": BETTER}, forcer, 40)
    report = json.loads((tmp_path / "budget.json").read_text())
    assert (report["step"], report["problems"], report["samples"]) == (40, 1, 2)
    assert report["settings"]["budget"] == [2, 4]
    assert report["settings"]["force_answer"] == "</think><answer>"
    assert list(report["models"]) == ["before", "after"]
    point = report["models"]["after"]["majority"][1]
    assert point == {"setting": 2, "tokens": 40.0, "accuracy": 0.875, "low": 0.8, "high": 0.9}
    assert all(math.isfinite(value) for value in point.values())
    out = capsys.readouterr().out
    assert "budget.png" in out and "k=2" in out and (tmp_path / "budget.png").is_file()
