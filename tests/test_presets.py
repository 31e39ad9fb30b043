"""Every preset: what it sets, that it fits together, and that it learns."""

import inspect
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from packed import batch_of
from tiny_experiment import get_config

from grpo import advantage, loss, presets
from grpo.advantage import penalised
from grpo.config import AlgoConfig, Config, bind, validate
from grpo.structs import Scores, Totals

# What a preset leaves to the run; `minibatches` too, unless the ratio is its point.
OF_THE_RUN = {"problems_per_step", "group_size", "minibatches", "passes", "microbatch_tokens"}

# All that differs from the defaults of AlgoConfig. A changed line is a changed algorithm.
CHOICES: dict[str, dict[str, Any]] = {
    "grpo": {"aggregate": loss.by_sequence, "clip_high": 0.2, "kl_coef": 0.04},
    "r1_zero": {
        "aggregate": loss.by_sequence,
        "clip_low": 1.0,
        "clip_high": 10.0,
        "kl_coef": 0.001,
        "ref_every": 400,
    },
    "dr_grpo": {
        "advantage": advantage.dr_grpo,
        "aggregate": loss.by_length,
        "clip_high": 0.2,
    },
    "dapo": {"minibatches": 4, "dynamic_rounds": 9, "overlong_buffer_tokens": 9},  # 48 // 5
    "gspo": {
        "minibatches": 4,
        "objective": loss.gspo,
        "aggregate": loss.by_sequence,
        "clip_low": 3e-4,
        "clip_high": 4e-4,
    },
    "gmpo": {
        "minibatches": 4,
        "objective": loss.gmpo,
        "aggregate": loss.by_sequence,
        "clip_low": 0.4,
        "clip_high": 0.4,
    },
    "cispo": {"minibatches": 4, "objective": loss.cispo, "clip_high": 4.0},
    "sapo": {"minibatches": 4, "objective": loss.sapo, "aggregate": loss.by_sequence},
    "rloo": {
        "advantage": advantage.rloo,
        "objective": loss.policy_gradient,
        "aggregate": loss.by_length,
        "kl_in_reward": True,
        "kl_coef": 0.03,
    },
    "reinforce_pp": {
        "minibatches": 4,
        "advantage": advantage.reinforce_pp,
        "clip_high": 0.2,
        "kl": loss.k2,
        "kl_coef": 1e-3,
    },
    "maxrl": {"advantage": advantage.maxrl, "objective": loss.policy_gradient},
    "pass_at_k": {
        "advantage": advantage.pass_at_k,
        "objective": loss.policy_gradient,
        "pass_k": 2,
    },
    "gdpo": {"minibatches": 4, "advantage": advantage.gdpo},
}


def of_the_run(**changes: Any) -> Config:
    config = get_config()
    config.algo = AlgoConfig(problems_per_step=4, group_size=4, **changes)
    return config


def test_the_table_has_every_preset():
    assert list(CHOICES) == presets.names()


@pytest.mark.parametrize("name", CHOICES)
def test_a_preset_sets_this_and_nothing_else(name):
    config, expected = of_the_run(), of_the_run()
    presets.apply(config, name)
    for field, value in CHOICES[name].items():
        setattr(expected.algo, field, value)
    assert config.algo == expected.algo
    validate(config)
    source = inspect.getdoc(getattr(presets, name))
    assert source and "Source: " in source and "arXiv:" in source


@pytest.mark.parametrize("name", CHOICES)
def test_nothing_is_left_of_another_preset(name):
    """What differs between two algorithms must not depend on which was named first."""
    direct = of_the_run(minibatches=2)
    presets.apply(direct, name)
    for other in CHOICES:
        config = of_the_run(minibatches=2)
        config.algo.entropy_coef, config.algo.correction = 0.5, loss.icepop
        presets.apply(config, other)
        presets.apply(config, name)
        assert config.algo == direct.algo
    assert direct.algo.minibatches == 2  # several updates already: as the experiment says


def test_the_numbers_of_the_run_are_left_alone():
    config = of_the_run(minibatches=2, passes=3, microbatch_tokens=99)
    for name in CHOICES:
        presets.apply(config, name)
        assert {f: getattr(config.algo, f) for f in OF_THE_RUN} == {
            "problems_per_step": 4,
            "group_size": 4,
            "minibatches": 2,
            "passes": 3,
            "microbatch_tokens": 99,
        }


@pytest.mark.parametrize("name", ["dappo", "apply", "names", "AlgoConfig", "_fresh", ""])
def test_what_is_no_preset_is_answered_with_those_that_are(name):
    with pytest.raises(ValueError, match=r"\['cispo', 'dapo', 'dr_grpo', 'gdpo'") as refused:
        presets.apply(Config(), name)
    if name == "dappo":
        assert str(refused.value).endswith("Did you mean 'dapo'?")


# ---- they learn ------------------------------------------------------------------------------

P, G, V = 8, 16, 4  # problems, completions of each, tokens; completions of at most two tokens
STEPS, LEARNING_RATE = 30, 0.1


def token_logprobs(theta: Any, tokens_BC: Any) -> jax.Array:
    """[B, 2]; completions of one token have anything in the second place."""
    first = jax.nn.log_softmax(theta["first"])[tokens_BC[:, 0]]
    second = jax.nn.log_softmax(theta["second"])[tokens_BC[:, 0], tokens_BC[:, 1]]
    return jnp.stack([first, second], axis=1)


def sample(theta: Any, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [B, 2], mask [B, 2]): token 0 in the first place ends the completion."""

    def draw(logits_BV: np.ndarray) -> np.ndarray:
        return np.argmax(logits_BV + rng.gumbel(size=logits_BV.shape), axis=1)

    first_B = draw(np.broadcast_to(theta["first"], (P * G, V)))
    second_B = draw(np.asarray(theta["second"])[first_B])
    return np.stack([first_B, second_B], axis=1), np.stack([first_B >= 0, first_B > 0], axis=1)


def score(tokens_BC: np.ndarray) -> Scores:
    """1 for the one right pair of sixteen, a tenth more for a first token above 1."""
    right_PG = ((tokens_BC[:, 0] == 2) & (tokens_BC[:, 1] == 3)).astype(np.float32).reshape(P, G)
    form_PG = (tokens_BC[:, 0] > 1).astype(np.float32).reshape(P, G)
    return Scores(
        reward_PG=right_PG + np.float32(0.1) * form_PG,
        valid_PG=np.ones((P, G), bool),
        components={"right": right_PG, "form": form_PG},
        weights={"right": 1.0, "form": 0.1},
        statuses={},
    )


def learn(config: Config, seed: int) -> list[float]:
    """Share of right completions at each step: the loop of a run, over a table of logits."""
    algo = config.algo
    estimate = bind(algo.advantage, algo)
    exactly_on_policy = algo.minibatches * algo.passes == 1
    objective = partial(
        loss.grpo_loss,
        objective=bind(algo.objective, algo),
        aggregate=bind(algo.aggregate, algo, config.sample),
        correction=loss.uncorrected if exactly_on_policy else bind(loss.truncated, algo),
        kl=algo.kl,
        kl_coef=0.0 if algo.kl_in_reward else algo.kl_coef,
        entropy_coef=algo.entropy_coef,
        on_policy=exactly_on_policy,
    )
    optimizer = optax.adam(LEARNING_RATE)

    def loss_of(theta: Any, tokens_RGC: Any, batch: Any, totals: Totals) -> jax.Array:
        logprobs = token_logprobs(theta, tokens_RGC.reshape(-1, 2))
        logprobs_RC = logprobs.reshape(batch.mask_RC.shape)
        return objective(logprobs_RC, jnp.zeros_like(logprobs_RC), batch, totals)[0]

    @jax.jit
    def update(theta: Any, state: Any, *args: Any) -> Any:
        changes, state = optimizer.update(jax.grad(loss_of)(theta, *args), state)
        return optax.apply_updates(theta, changes), state

    rng = np.random.default_rng(seed)
    initial = theta = {"first": jnp.zeros(V), "second": jnp.zeros((V, V))}
    state, history = optimizer.init(theta), []
    for _ in range(STEPS):
        tokens_BC, mask_BC = sample(theta, rng)
        logprobs_BC = np.asarray(_table(theta, tokens_BC))
        ref_logprobs_BC = np.asarray(_table(initial, tokens_BC))
        scores = score(tokens_BC)
        history.append(float(scores.components["right"].mean()))
        if algo.kl_in_reward:
            kl_B = ((logprobs_BC - ref_logprobs_BC) * mask_BC).sum(axis=1)
            scores = penalised(scores, kl_B.reshape(P, G), algo.kl_coef)
        batch = batch_of(
            mask_BC.reshape(P, -1),
            sequences_RC=np.tile(np.repeat(np.arange(G), 2), (P, 1)),
            advantage_RC=np.repeat(estimate(scores), 2, axis=1),
            old_logprobs_RC=logprobs_BC.reshape(P, -1),
            sampler_logprobs_RC=logprobs_BC.reshape(P, -1),
            ref_logprobs_RC=ref_logprobs_BC.reshape(P, -1),
        )
        parts = np.split(rng.permutation(P), algo.minibatches)
        for _ in range(algo.passes):
            for part in parts:
                rows = (tokens_BC.reshape(P, G, 2), batch)
                tokens, micro = jax.tree.map(lambda x_R, part=part: x_R[part], rows)
                totals = Totals(micro.mask_RC.sum(), len(part) * G)
                theta, state = update(theta, state, tokens, micro, totals)
    return history


_table = jax.jit(token_logprobs)


@pytest.mark.parametrize("name", CHOICES)
def test_a_preset_learns(name):
    config = of_the_run()
    presets.apply(config, name)
    history = learn(config, seed=0)
    assert np.mean(history[:2]) < 0.15
    assert np.mean(history[-3:]) > 0.8
