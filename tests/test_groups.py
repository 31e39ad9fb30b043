"""Which groups a step learns from: those that teach something, in the order they were drawn."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from grpo.advantage import has_signal
from grpo.groups import fill_groups, flat_metrics
from grpo.structs import Completion, Rollout, Scores
from rewards.api import Problem

G = 2
USEFUL, RIGHT, WRONG = (1.0, 0.0), (1.0, 1.0), (0.0, 0.0)


def groups_of(rewards: Sequence[tuple[float, float]], names: Iterator[int]) -> tuple:
    """A rollout and scores; whatever belongs to group "n" says so."""
    uids = [next(names) for _ in rewards]
    reward_PG = np.array(rewards, np.float32)
    rollout = Rollout(
        problems=[Problem(str(uid), prompt="?") for uid in uids],
        prompts=[[uid] for uid in uids],
        completions=[
            Completion(p, g, (uid, g), np.zeros(2, np.float32), "eos")
            for p, uid in enumerate(uids)
            for g in range(G)
        ],
        group_size=G,
    )
    scores = Scores(
        reward_PG=reward_PG,
        valid_PG=np.ones_like(reward_PG, bool),
        components={"verifier": reward_PG, "uid": np.array([[uid] * G for uid in uids], "f4")},
        weights={"verifier": 1.0, "uid": 0.0},
        statuses={"verifier": [f"{uid} {g}" for uid in uids for g in range(G)]},
    )
    return rollout, scores


@dataclasses.dataclass
class Script:
    """An `Ask` that hands out groups written beforehand, the next so many each time."""

    rewards: Iterator[tuple[float, float]]
    names: Iterator[int] = dataclasses.field(default_factory=itertools.count)
    calls: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    def __call__(self, count: int, number: int) -> tuple[Rollout, Scores, dict[str, float]]:
        self.calls.append((count, number))
        rollout, scores = groups_of([next(self.rewards) for _ in range(count)], self.names)
        return rollout, scores, {"time/sample_s": 1.5, "rollout/truncated": float(number)}


def filled(rewards: Sequence[tuple[float, float]], wanted: int, rounds: int) -> tuple:
    script = Script(iter(rewards))
    rollout, scores, metrics = fill_groups(script, wanted, rounds)
    return script, rollout, scores, metrics


def kept(rollout: Rollout, scores: Scores) -> list[int]:
    """The names of the groups, found to be the same wherever they are written."""
    uids = [int(problem.uid) for problem in rollout.problems]
    assert rollout.prompts == [[uid] for uid in uids]
    found = [(c.problem, c.sample, c.tokens) for c in rollout.completions]
    assert found == [(p, g, (uid, g)) for p, uid in enumerate(uids) for g in range(G)]
    assert scores.statuses["verifier"] == [f"{uid} {g}" for uid in uids for g in range(G)]
    assert scores.components["uid"].tolist() == [[uid] * G for uid in uids]
    np.testing.assert_array_equal(scores.components["verifier"], scores.reward_PG)
    assert scores.reward_PG.shape == scores.valid_PG.shape == (len(uids), G)
    return uids


def test_without_further_rounds_the_draw_is_taken_as_it_is():
    script, rollout, scores, metrics = filled([WRONG, USEFUL, RIGHT, WRONG], 4, 0)
    assert script.calls == [(4, 0)]
    assert kept(rollout, scores) == [0, 1, 2, 3]
    assert metrics == {
        "time/sample_s": 1.5,
        "rollout/truncated": 0.0,
        "groups/asked": 4.0,
        "groups/useful_share": 0.25,
        "groups/all_right": 0.25,
        "groups/all_wrong": 0.5,
        "groups/signal": 0.25,
    }


def test_a_draw_that_is_all_useful_is_enough():
    script, rollout, scores, metrics = filled([USEFUL] * 3, 3, 9)
    assert script.calls == [(3, 0)] and kept(rollout, scores) == [0, 1, 2]
    assert metrics["groups/asked"] == 3 and metrics["groups/signal"] == 1


def test_the_first_useful_groups_are_kept_in_the_order_they_were_drawn():
    """2 of 4 are useful, so 4 are drawn for the 2 that are missing, and 3 of those are useful."""
    rewards = [WRONG, USEFUL, RIGHT, USEFUL, USEFUL, WRONG, USEFUL, USEFUL]
    script, rollout, scores, metrics = filled(rewards, 4, 9)
    assert script.calls == [(4, 0), (4, 1)]
    assert kept(rollout, scores) == [1, 3, 4, 6]
    assert has_signal(scores.reward_PG, scores.valid_PG).all()
    assert metrics["groups/asked"] == 8 and metrics["groups/signal"] == 1
    assert metrics["groups/useful_share"] == 5 / 8
    assert metrics["groups/all_right"] == 1 / 8 and metrics["groups/all_wrong"] == 2 / 8
    assert metrics["time/sample_s"] == 3.0  # of both rounds
    assert metrics["rollout/truncated"] == 0.0  # of the first


def test_flat_groups_fill_up_when_the_rounds_are_spent():
    """The first of them, in the order they were drawn among the useful ones."""
    rewards = [WRONG, RIGHT, USEFUL, WRONG, *[WRONG] * 4, USEFUL, *[WRONG] * 3]
    script, rollout, scores, metrics = filled(rewards, 4, 2)
    # 1 of 4 useful: 3 missing at that rate would take 12, but no round is larger than the first.
    assert script.calls == [(4, 0), (4, 1), (4, 2)]
    assert kept(rollout, scores) == [0, 1, 2, 8]
    assert metrics["groups/asked"] == 12 and metrics["groups/signal"] == 0.5
    assert metrics["groups/useful_share"] == 2 / 12


def test_a_round_is_as_large_as_the_useful_share_asks_for():
    """3 of 4 are useful: the one that is missing is worth two problems."""
    script, rollout, scores, _ = filled([USEFUL] * 3 + [WRONG, WRONG, USEFUL], 4, 9)
    assert script.calls == [(4, 0), (2, 1)]
    assert kept(rollout, scores) == [0, 1, 2, 5]


def test_nothing_useful_at_all_is_the_first_draw():
    script, rollout, scores, metrics = filled([WRONG] * 12, 3, 3)
    assert len(script.calls) == 4 and kept(rollout, scores) == [0, 1, 2]
    assert metrics["groups/signal"] == 0 and metrics["groups/all_wrong"] == 1


@pytest.mark.parametrize("seed", range(5))
def test_any_script_fills_the_batch(seed):
    rng = np.random.default_rng(seed)
    rewards = [(USEFUL, RIGHT, WRONG)[i] for i in rng.integers(0, 3, 60)]
    wanted, rounds = 6, int(rng.integers(0, 4))
    script, rollout, scores, metrics = filled(rewards, wanted, rounds)
    asked = sum(count for count, _ in script.calls)
    assert metrics["groups/asked"] == asked and len(script.calls) <= rounds + 1
    assert all(1 <= count <= wanted for count, _ in script.calls)
    useful = [i for i in range(asked) if rewards[i] == USEFUL]
    names = kept(rollout, scores)
    assert len(names) == wanted and names == sorted(names)
    if len(useful) >= wanted:
        assert names == useful[:wanted]
    else:
        assert set(useful) <= set(names) and len(script.calls) == rounds + 1


def test_flat_groups_are_told_apart_by_the_verifier():
    """Flat is said of the reward, right of the first component; a group that failed is neither."""
    _, scores = groups_of([WRONG, RIGHT, USEFUL, RIGHT], itertools.count())
    verifier_PG = np.array([[0, 0], [1, 1], [1, 1], [1, 1]], np.float32)
    valid_PG = np.array([[True, True], [True, True], [True, True], [False, False]])
    scores = dataclasses.replace(
        scores, valid_PG=valid_PG, components={"verifier": verifier_PG, "uid": verifier_PG}
    )
    assert flat_metrics(scores) == {"groups/all_right": 0.25, "groups/all_wrong": 0.25}
    # One of two verifiers failed: the other completion alone is a flat group.
    valid_PG = np.array([[True, False]] * 4)
    scores = dataclasses.replace(scores, valid_PG=valid_PG)
    assert flat_metrics(scores) == {"groups/all_right": 0.75, "groups/all_wrong": 0.25}
