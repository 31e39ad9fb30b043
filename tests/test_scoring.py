"""From judgements to `Scores`, and the refusals that protect a run from its rewards."""

import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest

from grpo.config import RewardConfig
from grpo.data.procedural import DigitChain
from grpo.rollout import judge
from grpo.scoring import RewardFailure, Scorer, check_gold
from grpo.structs import Completion
from rewards.answers import numeric_answer
from rewards.api import Problem, Score

PROBLEM = Problem("p", prompt="?", reference=7, gold="7")


def scorer_of(*functions, **settings) -> Scorer:
    defaults = {"workers": 1, "deadline_s": 5.0}
    return Scorer(RewardConfig(functions=functions, **{**defaults, **settings}))


def collected(scorer, texts_PG, problem=PROBLEM):
    return scorer.collect(
        [[scorer.submit(text, problem, {}) for text in group] for group in texts_PG]
    )


# Made by functions, so that a worker gets them by value and need not import this file.


def length_reward():
    def length(completion, problem):
        return min(len(completion), 10) / 10

    return length


def told_reward():
    """Does what the completion says."""

    def told(completion, problem):
        if completion == "raise":
            raise RuntimeError("a bug")
        if completion == "hang":
            time.sleep(60)
        return float(completion == "right")

    return told


def test_without_rewards_all_are_valid_and_none_is_right():
    with scorer_of() as scorer:
        scores = collected(scorer, [["7", "8", ""], ["7", "8", ""]])
        assert scores.valid_PG.all() and scores.valid_PG.shape == (2, 3)
        assert not scores.reward_PG.any() and not scorer.solved_PG(scores).any()
        assert scores.components == {} and scorer.metrics(scores) == {}


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    with scorer_of((1.0, told_reward()), (0.5, length_reward()), deadline_s=0.5) as scorer:
        yield scorer


def test_rewards_are_weighted_and_added(scorer):
    scores = collected(scorer, [["right", "12345678"], ["", "right"]])
    np.testing.assert_allclose(scores.reward_PG, [[1.25, 0.4], [0.0, 1.25]])
    assert scores.valid_PG.all()
    np.testing.assert_allclose(scores.components["length"], [[0.5, 0.8], [0.0, 0.5]])
    assert scores.statuses["told"] == ["ok"] * 4
    assert scorer.solved_PG(scores).tolist() == [[True, False], [False, True]]
    metrics = scorer.metrics(scores)
    ours = {name: n for name, n in metrics.items() if not name.startswith("reward/pool/")}
    assert ours == pytest.approx(
        {
            "reward/mean": (1.25 + 0.4 + 1.25) / 4,
            "reward/solved": 0.5,
            "reward/failure_rate": 0.0,
            "reward/timeout_rate": 0.0,
            "reward/component/told": 0.5,
            "reward/component/length": 0.45,
        }
    )


def test_a_verdict_that_does_not_come_in_time_masks_its_row():
    never: Future[list[Score]] = Future()
    with scorer_of((1.0, told_reward()), wait_s=0.05) as scorer:
        judged = scorer.submit("right", PROBLEM, {})
        judged.result(60)
        scores = scorer.collect([[judged, never]])
    assert scores.statuses["told"] == ["ok", "lost"]
    assert scores.valid_PG.tolist() == [[True, False]] and scores.reward_PG.tolist() == [[1, 0]]
    assert never.cancelled()


def test_a_judgement_that_cannot_be_had_is_an_error_where_all_wait_for_it(scorer):
    """Not where the completion is handed over, in the middle of a rollout."""
    tokenizer = SimpleNamespace(decode=lambda tokens: "right")
    completion = Completion(0, 0, (1,), np.zeros(1, np.float32), "eos")
    unsendable = Problem("p", prompt="?", reference=threading.Lock())
    future = judge(scorer, tokenizer, completion, unsendable)
    with pytest.raises(TypeError, match="problem 'p' cannot be sent to a reward worker"):
        scorer.collect([[future]])


def test_a_row_with_one_failed_component_is_invalid_and_in_no_mean(scorer):
    scores = collected(scorer, [["right", "raise"]])
    assert scores.valid_PG.tolist() == [[True, False]]
    assert scores.reward_PG.tolist() == [[1.25, 0.0]]
    assert scores.statuses == {"told": ["ok", "crash"], "length": ["ok", "ok"]}
    metrics = scorer.metrics(scores)
    assert metrics["reward/failure_rate"] == 0.5 and metrics["reward/solved"] == 1.0
    assert metrics["reward/component/length"] == 0.5


def test_a_timeout_is_a_wrong_answer_that_counts(scorer):
    scores = collected(scorer, [["right", "hang"]])
    assert scores.valid_PG.all()
    np.testing.assert_allclose(scores.reward_PG, [[1.25, 0.2]])  # 0 from `told`
    metrics = scorer.metrics(scores)
    assert metrics["reward/timeout_rate"] == 0.5 and metrics["reward/failure_rate"] == 0.0
    assert metrics["reward/pool/timeouts"] == metrics["reward/pool/restarts"] == 1
    assert scorer.metrics(scores)["reward/pool/timeouts"] == 0  # nothing since
    assert metrics["reward/solved"] == 0.5


# ---- Gold answers ------------------------------------------------------------------------------

CHAINS = DigitChain(size=50)
TAGGED = "<answer>{gold}</answer>"


def test_a_verifier_that_fits_its_problems_passes():
    with scorer_of((1.0, numeric_answer), (0.5, length_reward())) as scorer:
        said = check_gold(scorer, CHAINS, TAGGED, 10)
    assert said == "gold check: 10 right answers accepted, wrong ones rejected"


def test_a_verifier_that_rejects_right_answers_is_refused():
    with (
        scorer_of((1.0, numeric_answer)) as scorer,
        pytest.raises(RewardFailure) as refused,
    ):
        check_gold(scorer, CHAINS, "{gold}", 10)  # without the tags it looks for
    message = str(refused.value)
    assert "'numeric_answer' does not fit" in message and "10 of 10 right answers" in message
    assert repr(CHAINS[0].uid) in message and "reward.gold_format" in message
    assert re.search(r"reference \d+, completion '\d+'", message)


def test_a_verifier_that_accepts_wrong_answers_is_refused():
    def anything(completion, problem):
        return 1.0

    with (
        scorer_of((1.0, anything)) as scorer,
        pytest.raises(RewardFailure, match="10 of 10 wrong answers accepted"),
    ):
        check_gold(scorer, CHAINS, TAGGED, 10)


def test_references_that_a_verifier_cannot_read_are_refused():
    problems = [Problem(f"p{i}", prompt="?", reference="seven", gold=str(i)) for i in range(4)]
    with (
        scorer_of((1.0, numeric_answer)) as scorer,
        pytest.raises(RewardFailure, match=r"'p0', reference 'seven'.*'crash'"),
    ):
        check_gold(scorer, problems, TAGGED, 4)


def test_a_few_mislabelled_problems_are_borne():
    problems = [Problem(f"p{i}", prompt="?", reference=i, gold=str(i)) for i in range(19)]
    problems.append(Problem("bad", prompt="?", reference=100, gold="19"))
    with scorer_of((1.0, numeric_answer)) as scorer:
        check_gold(scorer, problems, TAGGED, 20)  # 1 of 20 is 5 %
        with pytest.raises(RewardFailure, match="1 of 10 right answers rejected"):
            check_gold(scorer, problems[10:], TAGGED, 20)


def test_problems_without_a_gold_answer_are_left_out():
    silent = [Problem(f"s{i}", prompt="?", reference=i) for i in range(4)]
    spoken = [Problem(f"g{i}", prompt="?", reference=i, gold=str(i)) for i in range(4)]
    with scorer_of((1.0, numeric_answer)) as scorer:
        assert check_gold(scorer, silent, TAGGED, 4).startswith("gold check: skipped")
        assert check_gold(scorer, silent + spoken, TAGGED, 8).startswith("gold check: 4 right")


def test_one_answer_for_all_problems_leaves_nothing_wrong_to_try():
    problems = [Problem(f"p{i}", prompt="?", reference=1, gold="1") for i in range(3)]
    with scorer_of((1.0, numeric_answer)) as scorer:
        assert "3 right answers accepted" in check_gold(scorer, problems, TAGGED, 3)
