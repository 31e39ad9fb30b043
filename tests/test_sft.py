"""The cold start learns from completions, and only from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo.data.procedural import DigitChain
from grpo.data.tokenizer import ByteTokenizer
from grpo.loss import sft_loss
from grpo.stages.sft import worked_rows
from rewards.api import Problem

EOS = ByteTokenizer().eos_ids[0]


def two_rows():
    problems = [
        Problem("a", prompt="1+2=", meta={"worked": "3"}),
        Problem("b", prompt="9=", meta={"worked": "nine"}),
    ]
    return worked_rows(ByteTokenizer(), problems, max_prompt=6, max_new=7)


def test_the_tokens_that_train_are_the_completion_and_its_stop_token():
    rows = two_rows()
    wanted = [[*b"3", EOS], [*b"nine", EOS]]
    for r, tokens in enumerate(wanted):
        assert rows.tokens_RT[r][rows.targets_RC[r]][rows.mask_RC[r]].tolist() == tokens
    assert rows.mask_RC.sum() == 7


def test_no_gradient_comes_from_elsewhere():
    rows = two_rows()
    logprobs_RC = jnp.full(rows.mask_RC.shape, -2.0)
    num_tokens = jnp.float32(rows.mask_RC.sum())

    def loss(logprobs_RC):
        return sft_loss(logprobs_RC, jnp.zeros_like(logprobs_RC), rows, num_tokens)[0]

    assert loss(logprobs_RC) == pytest.approx(2.0)  # mean nats a token, whatever the padding
    wanted_RC = np.where(rows.mask_RC, -1 / 7, 0.0)
    np.testing.assert_allclose(jax.grad(loss)(logprobs_RC), wanted_RC, rtol=1e-6)


def test_a_problem_without_a_worked_completion_is_named():
    with pytest.raises(ValueError, match=r"'x' has no meta\['worked'\]"):
        worked_rows(ByteTokenizer(), [Problem("x", prompt="?")], max_prompt=6, max_new=7)


def test_what_does_not_fit_is_refused_rather_than_cut():
    problem = DigitChain(size=1)[0]
    with pytest.raises(ValueError, match=r"DigitChain/train/0/0.*at most 20 .* and 5 .* fit"):
        worked_rows(ByteTokenizer(), [problem], max_prompt=20, max_new=5)
