"""Every family against `transformers`: tiny models, and the configs of published ones."""

import functools
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo.model.arch import Arch
from grpo.model.decoder import (
    capped,
    decode_step,
    empty_cache,
    head,
    hidden_states,
    layers_of,
    prefill,
    to_decode,
)
from grpo.model.families import arch_from_hf
from grpo.model.params import Params
from grpo.model.rope import frequencies
from grpo.model.weights import load_weights, read_arch
from tools import tiny_models

GOLDEN = Path(__file__).parent / "golden"
FILE = json.loads((GOLDEN / "families.json").read_text())
MODELS: dict[str, Any] = FILE["models"]
ROWS = [np.array(row, np.int32) for row in tiny_models.TOKENS]
LONG, SHORT = map(len, ROWS)

# Compiling is most of the time here, and half of that the optimiser's.
jit = partial(jax.jit, static_argnums=1, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def golden(name: str) -> list[np.ndarray]:
    with np.load(GOLDEN / "families.npz") as arrays:
        return [arrays[f"{name}_{number}"] for number in range(len(ROWS))]


@pytest.fixture(params=sorted(MODELS))
def model(request, tmp_path) -> tuple[str, Arch, Params]:
    """One tiny model: its name, what we read of its folder, its weights."""
    folder = tiny_models.write_folder(tmp_path, **MODELS[request.param])
    arch = read_arch(folder)
    return request.param, arch, load_weights(folder, arch)


@jit
def train_logits(params, arch, tokens_RT, positions_RT, groups_RT):
    hidden_RTD = hidden_states(
        params, arch, tokens_RT, positions_RT, groups_RT, groups_RT, dtype="float32", remat="none"
    )
    return capped(hidden_RTD @ head(params), arch.logit_cap)


def padded_rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, positions and groups: the long row, the short one padded left, and right."""
    tokens, positions, groups = np.zeros((3, 3, LONG), np.int32)
    for row, (start, values) in enumerate([(0, ROWS[0]), (LONG - SHORT, ROWS[1]), (0, ROWS[1])]):
        there = slice(start, start + len(values))
        tokens[row, there], positions[row, there] = values, np.arange(len(values))
        groups[row, there] = 1
    return tokens, positions, groups


@jit
def decode_logits(params, arch, prompts_BQ, prompt_len_B, fed_nBT):
    """Logits [n, B, T, V] of feeding T tokens at a time behind the prompts."""
    weights = to_decode(params, arch, "float32")
    n, B, T = fed_nBT.shape
    prompts = prefill(weights, arch, prompts_BQ)
    # Ones, not zeros: the part of the cache that is not written yet must not matter.
    cache = jax.tree.map(jnp.ones_like, empty_cache(arch, B, n * T, "float32"))

    def step(cache, xs):
        number, fed_BT = xs
        written_B = jnp.full(B, number * T)
        logits_BTV, cache = decode_step(
            weights, arch, prompts, prompt_len_B, cache, fed_BT, written_B
        )
        return cache, logits_BTV

    return jax.lax.scan(step, cache, (jnp.arange(n), fed_nBT))[1]


def test_logits_are_those_of_transformers(model):
    """Train form with left, right and no padding; prefill and decode; 1e-4 in float32.

    The two forms also agree with each other to 1e-5, which is what the sampler-trainer gap is.
    """
    name, arch, params = model
    long, short = golden(name)
    got_RTV = np.asarray(train_logits(params, arch, *padded_rows()))
    for got, expected in [
        (got_RTV[0], long),
        (got_RTV[1, LONG - SHORT :], short),
        (got_RTV[2, :SHORT], short),
    ]:
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(got_RTV[1, LONG - SHORT :], got_RTV[2, :SHORT], rtol=0, atol=1e-5)

    # Prompts of 5 and 1 tokens, then the other 6 of each row, two at a time.
    prompt_len_B, fed_BC = np.array([LONG - 6, SHORT - 6]), np.stack([r[-6:] for r in ROWS])
    prompts_BQ = np.where(np.arange(LONG - 6) < prompt_len_B[:, None], got_prompts(), 13)
    fed_nBT = np.moveaxis(fed_BC.reshape(2, 3, 2), 1, 0)
    out_nBTV = np.asarray(decode_logits(params, arch, prompts_BQ, prompt_len_B, fed_nBT))
    out_BCV = np.moveaxis(out_nBTV, 0, 1).reshape(2, 6, -1)
    for row, expected in enumerate([long, short]):
        np.testing.assert_allclose(out_BCV[row], expected[-6:], rtol=0, atol=1e-4)
    np.testing.assert_allclose(out_BCV[0], got_RTV[0, -6:], rtol=0, atol=1e-5)


def got_prompts() -> np.ndarray:
    """The first tokens of both rows, as many as the longer prompt has."""
    return np.stack([row[: LONG - 6] for row in ROWS])


def test_what_a_family_departs_in_matters():
    """Each trait of each tiny model changes its golden logits: none is switched off there."""
    for plain, other in [("smollm2", "smollm3"), ("llama3", "mistral")]:
        assert np.abs(golden(plain)[0] - golden(other)[0]).max() > 0.1
    for name, values in {"gemma2": 5.0}.items():
        assert np.abs(golden(name)[0]).max() < values


@pytest.mark.parametrize("rope", FILE["ropes"], ids=lambda rope: rope["config"]["rope_parameters"])
def test_rotary_frequencies_are_those_of_transformers(rope):
    config = {
        **MODELS["llama2"]["config"],
        **rope["config"],
        "num_key_value_heads": 2,
    }
    arch = arch_from_hf(config)
    got_h = frequencies(arch.rope_theta, arch.rope_scaling, arch.head_width)
    np.testing.assert_allclose(got_h, rope["frequencies"], rtol=3e-7)
    assert layers_of(arch)[0].gain == pytest.approx(rope["gain"], rel=1e-7)
