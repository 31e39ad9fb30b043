"""The cold start learns from completions, and only from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo.batch import RowShape, Sample, pack, totals
from grpo.data.procedural import DigitChain
from grpo.data.tokenizer import ByteTokenizer
from grpo.loss import sft_loss
from grpo.stages.sft import worked_samples
from rewards.api import Problem

EOS = ByteTokenizer().eos_ids[0]


def two_samples() -> list[Sample]:
    problems = [
        Problem("a", prompt="1+2=", meta={"worked": "3"}),
        Problem("b", prompt="9=", meta={"worked": "nine"}),
    ]
    return worked_samples(ByteTokenizer(), problems, max_prompt=6, max_new=7)


def test_the_tokens_that_train_are_the_completion_and_its_stop_token():
    samples = two_samples()
    assert [s.completion for s in samples] == [[*b"3", EOS], [*b"nine", EOS]]
    assert [s.prompt for s in samples] == [[*b"1+2="], [*b"9="]]
    assert all(s.trains for s in samples) and totals(samples) == (7, 2)
    assert samples[0].group != samples[1].group  # nothing to share


def test_no_gradient_comes_from_elsewhere():
    samples = two_samples()
    [rows] = pack(samples, RowShape(rows=2, tokens=16, completion_tokens=12)).microbatches
    assert rows.mask_RC.sum() == 7
    logprobs_RC = jnp.full(rows.mask_RC.shape, -2.0)

    def loss(logprobs_RC):
        return sft_loss(logprobs_RC, jnp.zeros_like(logprobs_RC), rows, totals(samples))[0]

    assert loss(logprobs_RC) == pytest.approx(2.0)  # mean nats a token, whatever the padding
    wanted_RC = np.where(rows.mask_RC, -1 / 7, 0.0)
    np.testing.assert_allclose(jax.grad(loss)(logprobs_RC), wanted_RC, rtol=1e-6)


def test_a_problem_without_a_worked_completion_is_named():
    with pytest.raises(ValueError, match=r"'x' has no meta\['worked'\]"):
        worked_samples(ByteTokenizer(), [Problem("x", prompt="?")], max_prompt=6, max_new=7)


def test_what_does_not_fit_is_refused_rather_than_cut():
    problem = DigitChain(size=1)[0]
    with pytest.raises(ValueError, match=r"DigitChain/train/0/0.*at most 20 .* and 5 .* fit"):
        worked_samples(ByteTokenizer(), [problem], max_prompt=20, max_new=5)
