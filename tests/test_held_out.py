"""Held-out numbers from a solved matrix made by hand; the same evaluation gives the same."""

import dataclasses
import itertools
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from toy_model import ARCH, ToyTokenizer, mesh_of, toy_params

from grpo.config import EvalConfig, RewardConfig
from grpo.data.procedural import DigitChain
from grpo.data.tokenizer import ByteTokenizer
from grpo.engine.engine import Engine, EngineStats
from grpo.measure.held_out import (
    Evaluator,
    component_metrics,
    filters_of,
    held_out_metrics,
    majority_values,
)
from grpo.model.decoder import to_decode
from grpo.model.params import decode_table, param_table
from grpo.scoring import Scorer
from grpo.sharding import DECODE_RULES, param_shardings
from grpo.structs import LENGTH, Completion, Scores
from rewards.api import Problem


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


def test_each_reward_is_reported_over_what_could_be_judged():
    scores = Scores(
        reward_PG=np.zeros((2, 2), "f4"),  # not looked at
        valid_PG=np.array([[1, 1], [1, 0]], bool),
        components={
            "right": np.array([[1, 0], [0.5, 1]], "f4"),
            "form": np.array([[1, 1], [0.25, 1]], "f4"),
        },
        weights={"right": 1.0, "form": 0.1},
        statuses={},
    )
    assert component_metrics(scores) == {
        "eval/component/right": pytest.approx((1 + 0 + 0.5) / 3),
        "eval/full/right": pytest.approx(1 / 3),
        "eval/component/form": pytest.approx((1 + 1 + 0.25) / 3),
        "eval/full/form": pytest.approx(2 / 3),
    }
    nothing = dataclasses.replace(scores, valid_PG=np.zeros((2, 2), bool))
    assert set(component_metrics(nothing).values()) == {0.0}


class FakeEngine:
    """Writes a digit that depends on the key, the prompt's stream and the sample; no model."""

    tokenizer = ByteTokenizer()

    def __init__(self) -> None:
        self.stats = EngineStats()

    def run(self, weights, requests, key, *, temperature, filters=None):
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
    texts = [b"7", b"1", b"7", b"2", b"1", b"3", b"4", b""]
    rollout: Any = SimpleNamespace(
        completions=[SimpleNamespace(tokens=tuple(text)) for text in texts], group_size=4
    )
    answers_PG = evaluator.answers_PG(rollout)
    assert answers_PG == [["7", "1", "7", "2"], ["1", "3", "4", None]]
    solved_PG = np.array([[0, 1, 0, 1], [1, 0, 0, 0]], bool)
    # Wrong 7 wins over 1 and 2; then three answers tie, one of them right.
    assert majority_values(answers_PG, solved_PG, 4) == [0.0, pytest.approx(1 / 3)]
    assert majority_values(answers_PG, solved_PG, 1) == [0.5, 0.25]
    report = evaluator({"digits": 5}, 0)
    low, high = report["eval/maj_at_4_low"], report["eval/maj_at_4_high"]
    assert 0 <= low <= report["eval/maj_at_4"] <= high <= 1
    plain = evaluator_with(scorer)({"digits": 5}, 0)
    assert not any(name.startswith("eval/maj_at") for name in plain)


def test_what_an_evaluation_reports(scorer):
    report = evaluator_with(scorer)({"digits": 5}, 0)
    assert report["eval/tokens"] == 5 * 4  # every completion is one digit
    assert report["eval/full/small"] == report["eval/pass_at_1"] == report["eval/component/small"]


def test_fewer_problems_than_asked_for_are_all_used(scorer):
    config = EvalConfig(every=1, num_problems=99, num_samples=2)
    engine: Any = FakeEngine()
    source = DigitChain(size=3, held_out=True)
    assert Evaluator(engine, scorer, source, config, 1.0, 0)({"digits": 5}, 0)["eval/problems"] == 3


# ---- Temperature and filters -------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, None),
        ({"top_k": 5}, (5, 1.0, 0.0)),
        ({"top_p": 0.9}, (0, np.float32(0.9), 0.0)),
        ({"min_p": 0.1, "top_k": 3}, (3, 1.0, np.float32(0.1))),
    ],
)
def test_filters_are_made_only_where_one_is_on(changes, expected):
    filters = filters_of(EvalConfig(**changes))
    assert filters == expected
    if filters is not None:  # of one type in every evaluation, or each would be compiled anew
        assert [value.dtype for value in filters] == [np.int32, np.float32, np.float32]


class Recorder(FakeEngine):
    """Remembers what it was asked with."""

    def run(self, weights, requests, key, *, temperature, filters=None):
        self.asked = temperature, filters
        return super().run(weights, requests, key, temperature=temperature)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, (0.7, None)),
        ({"temperature": 0.2}, (0.2, None)),
        ({"temperature": 0.0, "top_k": 2}, (0.0, None)),  # the likeliest passes every filter
        ({"top_k": 2}, (0.7, (2, 1.0, 0.0))),
    ],
)
def test_the_engine_gets_the_evaluations_own_numbers(scorer, changes, expected):
    engine: Any = Recorder()
    config = EvalConfig(num_problems=2, num_samples=2, **changes)
    Evaluator(engine, scorer, DigitChain(size=2, held_out=True), config, 0.7, 0)({"digits": 5}, 0)
    assert engine.asked == expected


@pytest.fixture(scope="module")
def toy(scorer):
    """Evaluates the toy model as a config says; gives its completions, problem by problem."""
    mesh = mesh_of()
    shardings = param_shardings(
        decode_table(param_table(ARCH), ARCH.num_layers), mesh, DECODE_RULES
    )
    with jax.set_mesh(mesh):
        to_form = partial(to_decode, arch=ARCH, dtype="float32")
        weights = jax.jit(to_form, out_shardings=shardings)(toy_params())
        engine = Engine(
            ARCH,
            ToyTokenizer(),
            mesh,
            max_prompt=4,
            max_new=8,
            slots=8,
            tokens_per_dispatch=8,
            dtype="float32",
        )
    source = [Problem(uid=str(n), prompt=text) for n, text in enumerate(["abc", "zxy"])]

    def evaluate(folder: Path, **changes: Any) -> tuple[list[list[str]], dict[str, float]]:
        config = EvalConfig(num_problems=2, num_samples=8, **changes)
        with jax.set_mesh(mesh):
            report = Evaluator(engine, scorer, source, config, 1.0, 0)(weights, 0, folder)
        lines = (folder / "step_000000.jsonl").read_text().splitlines()
        texts = [json.loads(line)["completion"] for line in lines]
        return [texts[:8], texts[8:]], report

    def num_compiled() -> int:
        return engine.num_compiled()

    return SimpleNamespace(evaluate=evaluate, num_compiled=num_compiled)


def test_filters_restrict_what_is_sampled(toy, tmp_path):
    free, _ = toy.evaluate(tmp_path / "free")
    greedy, _ = toy.evaluate(tmp_path / "greedy", temperature=0.0)
    assert all(len(set(texts)) > 4 for texts in free)
    assert all(len(set(texts)) == 1 for texts in greedy)
    # Each leaves the likeliest alone.
    narrow: list[dict[str, Any]] = [{"top_k": 1}, {"top_p": 1e-3}, {"min_p": 1.0}]
    for number, changes in enumerate(narrow):
        assert toy.evaluate(tmp_path / str(number), **changes)[0] == greedy
    compiled = toy.num_compiled()
    pairs, _ = toy.evaluate(tmp_path / "pairs", top_k=2)
    assert all(len(set(texts)) > 1 for texts in pairs)
    assert all(len({text[:1] for text in texts}) <= 2 for texts in pairs)  # of two first tokens
    assert any(len({text[:1] for text in texts}) > 2 for texts in free)
    wide, _ = toy.evaluate(tmp_path / "wide", top_k=32, min_p=1e-9)
    assert wide == free  # nothing is forbidden, and the random numbers are the same
    assert toy.num_compiled() == compiled  # the numbers are arguments of one program


def test_a_filtered_evaluation_is_paired_too(toy, tmp_path):
    first = toy.evaluate(tmp_path / "a", top_p=0.8, temperature=0.5)
    second = toy.evaluate(tmp_path / "b", top_p=0.8, temperature=0.5)
    assert first[0] == second[0] and without_time(first[1]) == without_time(second[1])
