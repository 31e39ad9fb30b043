"""Held-out numbers from a solved matrix made by hand; the same evaluation gives the same."""

import itertools
import json
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from grpo.config import EvalConfig, RewardConfig
from grpo.data.procedural import DigitChain
from grpo.data.tokenizer import ByteTokenizer
from grpo.held_out import Evaluator, held_out_metrics
from grpo.scoring import Scorer
from grpo.structs import LENGTH, Completion


def test_pass_at_k_is_the_mean_over_problems():
    solved_PG = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
    report = held_out_metrics(solved_PG)
    assert report["eval/problems"] == 4
    assert report["eval/pass_at_1"] == pytest.approx((1 / 4 + 1 / 2 + 0 + 1) / 4)
    # Of the 6 pairs of samples, 3 hold the one right answer, and 5 one of the two.
    assert report["eval/pass_at_2"] == pytest.approx((3 / 6 + 5 / 6 + 0 + 1) / 4)
    assert report["eval/pass_at_4"] == pytest.approx(3 / 4)
    assert report["eval/pass_at_1_low"] < report["eval/pass_at_1"] < report["eval/pass_at_1_high"]


@pytest.mark.parametrize("G, ks", [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_which_k_are_reported(G, ks):
    report = held_out_metrics(np.ones((2, G), bool))
    names = {name for name in report if not name.endswith(("_low", "_high"))}
    assert names == {"eval/problems", *(f"eval/pass_at_{k}" for k in ks)}
    assert all(report[f"eval/pass_at_{k}"] == 1.0 for k in ks)


class FakeEngine:
    """Writes a digit that depends on the key, the prompt's stream and the sample; no model."""

    tokenizer = ByteTokenizer()

    def __init__(self) -> None:
        self.stats = SimpleNamespace(tokens=0, seconds=1.0, slot_steps=1)

    def run(self, weights, requests, key, *, temperature):
        for p, request in enumerate(requests):
            for g in range(request.num_samples):
                own = jax.random.fold_in(jax.random.fold_in(key, request.stream), g)
                digit = b"0123456789"[int(jax.random.randint(own, (), 0, weights["digits"]))]
                yield Completion(p, g, (digit,), np.zeros(1, np.float32), LENGTH)


@pytest.fixture(scope="module")
def scorer():
    def small(completion, problem):
        return float(completion in "012")

    with Scorer(RewardConfig(functions=((1.0, small),), workers=1)) as scorer:
        yield scorer


def evaluator_with(scorer, answer_of=None, seed=0) -> Evaluator:
    config = EvalConfig(every=1, num_problems=5, num_samples=4, answer_of=answer_of)
    engine: Any = FakeEngine()
    return Evaluator(engine, scorer, DigitChain(size=20, held_out=True), config, 1.0, seed)


def without_time(report):
    return {name: value for name, value in report.items() if not name.startswith("time/")}


def test_the_same_weights_get_the_same_numbers_at_any_step(scorer, tmp_path):
    first = evaluator_with(scorer)({"digits": 5}, 0, tmp_path)
    second = evaluator_with(scorer)({"digits": 5}, 7, tmp_path)
    assert without_time(first) == without_time(second) and 0 < first["eval/pass_at_1"] < 1
    texts = [
        [json.loads(line)["completion"] for line in path.read_text().splitlines()]
        for path in (tmp_path / "step_000000.jsonl", tmp_path / "step_000007.jsonl")
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 20 and len(set(texts[0])) > 1


def test_an_evaluation_that_is_repeated_replaces_its_file(scorer, tmp_path):
    for _ in range(2):
        evaluator_with(scorer)({"digits": 5}, 3, tmp_path)
    assert len((tmp_path / "step_000003.jsonl").read_text().splitlines()) == 20


def test_another_seed_and_other_weights_get_others(scorer):
    reports = [
        evaluator_with(scorer, seed=seed)({"digits": digits}, 0)
        for seed, digits in [(0, 5), (1, 5), (0, 10)]
    ]
    assert all(a["eval/pass_at_1"] != b["eval/pass_at_1"] for a, b in itertools.pairwise(reports))


def test_the_majority_vote(scorer):
    evaluator = evaluator_with(scorer, answer_of=lambda text: text or None)
    solved_PG = np.array([[0, 1, 0, 1], [1, 0, 0, 0]], bool)
    texts = [b"7", b"1", b"7", b"2", b"1", b"3", b"4", b"5"]
    #        wrong 7 wins over 1 and 2; then four answers tie, one of them right
    rollout: Any = SimpleNamespace(
        completions=[SimpleNamespace(tokens=tuple(text)) for text in texts],
        group_size=4,
        problems=[None, None],
    )
    assert evaluator._majority(rollout, solved_PG) == pytest.approx((0 + 1 / 4) / 2)
    report = evaluator({"digits": 5}, 0)
    assert 0 <= report["eval/maj_at_4"] <= 1
    assert "eval/maj_at_4" not in evaluator_with(scorer)({"digits": 5}, 0)


def test_fewer_problems_than_asked_for_are_all_used(scorer):
    config = EvalConfig(every=1, num_problems=99, num_samples=2)
    engine: Any = FakeEngine()
    source = DigitChain(size=3, held_out=True)
    assert Evaluator(engine, scorer, source, config, 1.0, 0)({"digits": 5}, 0)["eval/problems"] == 3
