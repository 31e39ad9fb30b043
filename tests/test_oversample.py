"""Over-sampling: what a step takes, what it leaves, and that stopping changes nothing."""

import functools
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from logged_rows import stop_after, timeless
from tiny_experiment import get_config
from toy_model import ToyTokenizer

from grpo import carry, loss
from grpo.build import build
from grpo.carry import Carried, Group, first_complete, fresh, nothing, resumed, stored
from grpo.config import Config
from grpo.engine.engine import Begun, EngineStats
from grpo.rollout import stream
from grpo.structs import Completion, Scores
from grpo.train import train
from rewards.api import Problem

pytestmark = pytest.mark.usefixtures("compiled_once")

# ---- a step, without a model -------------------------------------------------------------------


class Script:
    """An engine whose samples end in a given order; asked with `enough` after each of `reads`."""

    tokenizer = ToyTokenizer()

    def __init__(
        self, ends: list[list[tuple[int, int]]], begun: list[tuple[int, int]] | None = None
    ):
        self.reads, self.stats = ends, EngineStats()
        self.begun = begun or []
        self.unfinished: dict[tuple[int, int], Begun] = {}
        self.requests: list[Any] = []

    def run(self, weights, requests, key, *, temperature, enough):
        self.requests = list(requests)
        ended = set()
        for read in self.reads:
            if enough():
                break
            for n, sample in read:
                before = requests[n].begun.get(sample, Begun((), np.zeros(0, np.float32)))
                tokens = (*before.tokens, 7)
                logprobs = np.append(before.logprobs, np.float32(-0.5))
                ended.add((n, sample))
                yield Completion(n, sample, tokens, logprobs, "eos")
        left = [name for name in self.begun if name not in ended]
        self.unfinished = {name: Begun((5, 6), np.array([-1, -2], np.float32)) for name in left}


class Judge:
    """Counts what is judged; every completion gets its problem's number."""

    def __init__(self) -> None:
        self.judged: list[str] = []

    def submit(self, text, problem, facts):
        self.judged.append(problem.uid)
        future: Future = Future()
        future.set_result(float(problem.uid))
        return future

    def collect(self, futures):
        reward_PG = np.array([[f.result() for f in group] for group in futures], np.float32)
        return Scores(reward_PG, np.ones_like(reward_PG, bool), {"r": reward_PG}, {"r": 1.0}, {})


PROBLEMS = [Problem(uid=str(n), prompt="a", reference=None) for n in range(10)]


def step(script: Any, groups: list[Group], wanted: int):
    judge: Any = Judge()
    found = first_complete(
        script, judge, {}, PROBLEMS, groups, wanted, jax.random.key(0), temperature=1.0
    )
    return *found, judge


def test_the_first_complete_groups_train_and_the_others_are_left():
    """Groups 2 and 0 are complete first; 1 ends in the same dispatch as 0, a moment too late."""
    groups = [fresh(problem, 2) for problem in (4, 5, 6, 7)]
    reads = [[(2, 0), (3, 1)], [(2, 1), (1, 0), (0, 1)], [(0, 0), (1, 1)], [(3, 0)]]
    script = Script(reads, begun=[(3, 0)])
    (rollout, scores, metrics), trained, left, judge = step(script, groups, wanted=2)
    assert [p.uid for p in rollout.problems] == ["4", "6"]  # as asked, not as ended
    assert [(c.problem, c.sample) for c in rollout.completions] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert scores.reward_PG.tolist() == [[4, 4], [6, 6]]
    assert [group.problem for group in trained] == [4, 6]
    assert sorted(judge.judged) == ["4", "4", "6", "6"]  # what does not train is not judged
    assert [(group.problem, group.late, group.finish) for group in left] == [
        (5, 1, ["eos", "eos"]), (7, 1, ["", "eos"]),
    ]  # fmt: skip
    assert left[0].complete and left[1].written[0].tokens == (5, 6)
    assert metrics["groups/carried"] == 0 and metrics["rollout/carried_tokens_share"] == 0


def test_the_next_step_goes_on_with_what_was_left():
    done, half = Begun((1, 2), np.array([-1, -2], "f4")), Begun((3,), np.array([-3], "f4"))
    nothing_yet = Begun((), np.zeros(0, np.float32))
    groups = [
        Group(5, [done, done], ["eos", "length"], carried=[2, 2], late=2),
        Group(7, [half, nothing_yet], ["", ""], carried=[1, 0], late=1),
        fresh(8, 2),
    ]
    script = Script([[(1, 0)], [(2, 0)], [(1, 1), (2, 1)]])
    (rollout, _, metrics), _, left, judge = step(script, groups, wanted=2)
    complete, going_on, new = script.requests
    assert complete.wanted == [] and set(complete.done) == {0, 1}
    assert going_on.wanted == [0, 1] and list(going_on.begun) == [0]
    assert going_on.stream == stream(PROBLEMS[7], 1) != stream(PROBLEMS[7])
    assert new.stream == stream(PROBLEMS[8]) and not new.begun
    assert [c.tokens for c in rollout.completions] == [(1, 2), (1, 2), (3, 7), (7,)]
    assert rollout.completions[2].logprobs.tolist() == [-3, -0.5]
    assert [c.finish for c in rollout.completions] == ["eos", "length", "eos", "eos"]
    assert [c.carried for c in rollout.completions] == [2, 2, 1, 0]
    assert judge.judged[:2] == ["5", "5"]  # at once, before anything is sampled
    assert [group.problem for group in left] == [8] and left[0].complete
    assert metrics["groups/carried"] == 2 and metrics["groups/late_steps_max"] == 2
    assert metrics["rollout/carried_tokens_share"] == 5 / 7


def test_enough_complete_groups_need_no_sampling():
    done = Begun((1,), np.array([-1], np.float32))
    groups = [Group(n, [done, done], ["eos", "eos"], [1, 1], late=1) for n in (1, 2)]
    script = Script([[(2, 0)]])
    (rollout, _, metrics), _, left, _ = step(script, [*groups, fresh(3, 2)], wanted=2)
    assert [p.uid for p in rollout.problems] == ["1", "2"]
    assert [group.finish for group in left] == [["", ""]]
    assert metrics["rollout/carried_tokens_share"] == 1


def test_groups_come_back_from_their_arrays():
    rng = np.random.default_rng(0)

    def written(length: int) -> Begun:
        return Begun(
            tuple(rng.integers(0, 30, length).tolist()), rng.normal(size=length).astype(np.float32)
        )

    groups = [
        Group(3, [written(5), written(2)], ["length", ""], [5, 2], late=1),
        Group(0, [written(0), written(4)], ["", "stop"], [0, 4], late=3),
    ]
    arrays = stored(groups, extra=3, group_size=2, max_new=5)
    assert arrays.problem_X.tolist() == [3, 0, -1]
    room = nothing(3, 2, 5)
    assert [(a.shape, a.dtype) for a in arrays] == [(a.shape, a.dtype) for a in room]
    again = resumed(arrays)
    for group, other in zip(again, groups, strict=True):
        assert (group.problem, group.finish, group.late, group.carried) == (
            other.problem, other.finish, other.late, other.carried,
        )  # fmt: skip
        for begun, expected in zip(group.written, other.written, strict=True):
            assert begun.tokens == expected.tokens
            np.testing.assert_array_equal(begun.logprobs, expected.logprobs)
    assert resumed(room) == []


# ---- whole runs --------------------------------------------------------------------------------


def tiny(**changes: Any) -> Config:
    """The tiny experiment, six groups under way for the four that train, fewer slots than those."""
    config = get_config()
    ours: dict[str, Any] = {
        "sft__num_steps": 0,
        "eval__every": 0,
        "algo__oversample": 0.5,
        "sample__tokens_per_dispatch": 4,
        "log__save_every": 50,
        "model__num_layers": 1,
        "mesh__data": 8,
        "mesh__fsdp": 1,
        "mesh__tensor": 1,
    }
    for name, value in {**ours, **changes}.items():
        *path, last = name.split("__")
        setattr(functools.reduce(getattr, path, config), last, value)
    return config


def run(config: Config, workdir: Path) -> Any:
    return train(config, workdir, baseline=config)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing disturbs: its folder and its final state."""
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, run(tiny(), workdir)


def assert_same_run(workdir: Path, state: Any, straight: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, state, straight[1])
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert timeless(workdir / name) == timeless(straight[0] / name)


def test_a_run_carries_groups_over_and_every_one_trains(straight):
    workdir, state = straight
    metrics, rows = timeless(workdir / "metrics.jsonl"), timeless(workdir / "rollouts.jsonl")
    assert [row["groups/carried"] for row in metrics] == [0, 2, 2, 2]
    assert [row["groups/asked"] for row in metrics] == [6, 4, 4, 4]
    assert int(state.cursor) == 18
    assert metrics[0]["rollout/carried_tokens_share"] == 0
    assert any(row["rollout/carried_tokens_share"] > 0 for row in metrics[1:])
    assert [row["step"] for row in rows] == [s for s in range(4) for _ in range(16)]
    assert len({row["engine/compiled"] for row in metrics}) == 1
    # Of the 18 problems asked 16 trained, and the other two are carried.
    trained = {row["uid"] for row in rows}
    assert len(trained) == 16
    left = resumed(state.carried)
    assert len(left) == 2 and any(begun.tokens for group in left for begun in group.written)


def test_carried_tokens_are_corrected_and_the_others_are_on_policy(straight):
    metrics = timeless(straight[0] / "metrics.jsonl")
    assert all(row["sampler/gap_nats_max"] <= 1e-5 for row in metrics)
    assert metrics[0]["sampler/corrected_share"] == 0
    assert any(row["sampler/corrected_share"] > 0 for row in metrics[1:])  # weights beyond the cap


def test_the_same_run_is_the_same(straight, tmp_path):
    assert_same_run(tmp_path, run(tiny(), tmp_path), straight)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_stopped_and_resumed_ends_as_one_that_never_stopped(
    straight, tmp_path, monkeypatch, steps
):
    """What is carried is in the checkpoint: no token is sampled again, and none is lost."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(steps, patch)
        run(tiny(), tmp_path)
    assert_same_run(tmp_path, run(tiny(), tmp_path), straight)


def test_a_checkpoint_with_room_for_other_groups_is_refused(straight):
    with pytest.raises(ValueError, match=r"carried/.* has shape \(2,.*\) there and \(4,.*\) here"):
        run(tiny(algo__oversample=1.0), straight[0])


def test_with_a_curriculum_the_groups_that_train_are_the_ones_learnt_about(tmp_path):
    state = run(tiny(algo__curriculum=2, num_steps=2), tmp_path)
    assert int(state.cursor) == 2 * (6 + 4)
    assert (state.pass_rates.asked_U > 0).sum() == 8  # and not the two that are carried


@pytest.mark.parametrize("oversample, corrected", [(0.0, False), (0.5, True)])
def test_the_correction_is_on(tmp_path, oversample, corrected, monkeypatch):
    seen = []
    monkeypatch.setattr(loss, "grpo_loss", lambda *_, **settings: seen.append(settings))
    config = tiny(algo__oversample=oversample)
    with ExitStack() as stack:
        built = build(config, tmp_path, stack, baseline=config)
        program: Any = built.update._add
        program.__wrapped__.keywords["objective"]()
    assert seen[0]["on_policy"]
    assert (seen[0]["correction"] is not loss.uncorrected) == corrected
    assert (built.state_like.carried is not None) == corrected


def test_too_few_problems_to_over_sample_are_refused(tmp_path):
    config = tiny(algo__problems_per_step=28, algo__minibatches=1)
    message = r"28 and 14 more \(algo.oversample\), .* has only 40"
    with ExitStack() as stack, pytest.raises(ValueError, match=message):
        build(config, tmp_path, stack, baseline=config)


def test_the_extra_groups_are_a_share_of_those_that_train():
    assert [carry.extra_groups(8, share) for share in (0.25, 0.5, 1.0)] == [2, 4, 8]
    assert isinstance(nothing(2, 2, 3), Carried)
