"""Prints how far the decoder is from the reference implementation, family by family.

    python -m tools.parity [MODEL ...]

For each tiny model of tests/golden/families.json: the largest difference of a logit from what
`transformers` gives, in the train form (rows padded left, right, and not) and in the decode form
(prefill, then a few tokens at a time); and the largest difference of the sampler's log-probs, as
the engine gives them, from the trainer's. All in float32.
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo.batch import RowShape, Sample, pack, unpack
from grpo.engine.engine import Engine, Request
from grpo.model.arch import Arch
from grpo.model.decoder import decode_step, empty_cache, head, hidden_states, prefill, to_decode
from grpo.model.files.weights import load_weights, read_arch
from grpo.model.logprobs import completion_logprobs
from grpo.model.masks import capped
from grpo.model.params import Params
from grpo.sharding import make_mesh
from tools import tiny_models
from tools.bench import IdTokenizer

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
MODELS: dict[str, Any] = json.loads((GOLDEN / "families.json").read_text())["models"]
ROWS = [np.array(row, np.int32) for row in tiny_models.TOKENS]
FED = 6  # of each row, behind its prompt

# Compiling is most of the time here, and half of that the optimiser's.
QUICK_COMPILE: dict[str, Any] = {"xla_backend_optimization_level": 0}
_jit = partial(jax.jit, static_argnums=1, compiler_options=QUICK_COMPILE)


def load(name: str, folder: Path) -> tuple[Arch, Params]:
    """A tiny model, read as any folder is."""
    tiny_models.write_folder(folder, **MODELS[name])
    arch = read_arch(folder)
    return arch, load_weights(folder, arch)


def golden(name: str) -> list[np.ndarray]:
    """Logits [T, V] of each row, by the reference implementation."""
    with np.load(GOLDEN / "families.npz") as arrays:
        return [arrays[f"{name}_{number}"] for number in range(len(ROWS))]


@_jit
def _train_logits(
    params: Params,
    arch: Arch,
    tokens_RT: jax.Array,
    positions_RT: jax.Array,
    groups_RT: jax.Array,
) -> jax.Array:
    hidden_RTD = hidden_states(
        params, arch, tokens_RT, positions_RT, groups_RT, groups_RT, dtype="float32", remat="none"
    )
    return capped(hidden_RTD @ head(params), arch.logit_cap)


def train_logits(arch: Arch, params: Params) -> dict[str, np.ndarray]:
    """Logits [T, V] of the rows in the train form, by how they were padded."""
    long, short = map(len, ROWS)
    places = {"none": (ROWS[0], 0), "left": (ROWS[1], long - short), "right": (ROWS[1], 0)}
    tokens_RT, positions_RT, groups_RT = np.zeros((3, 3, long), np.int32)
    for row, (tokens, start) in enumerate(places.values()):
        there = slice(start, start + len(tokens))
        tokens_RT[row, there], groups_RT[row, there] = tokens, 1
        positions_RT[row, there] = np.arange(len(tokens))
    logits_RTV = np.asarray(_train_logits(params, arch, tokens_RT, positions_RT, groups_RT))
    return {
        name: logits_RTV[row, start : start + len(tokens)]
        for row, (name, (tokens, start)) in enumerate(places.items())
    }


@_jit
def _decode_logits(
    params: Params,
    arch: Arch,
    prompts_BQ: jax.Array,
    prompt_len_B: jax.Array,
    fed_nBT: jax.Array,
) -> jax.Array:
    weights = to_decode(params, arch, "float32")
    n, B, T = fed_nBT.shape
    prompts = prefill(weights, arch, prompts_BQ)
    # Ones, not zeros: the part of the cache that is not written yet must not matter.
    cache = jax.tree.map(jnp.ones_like, empty_cache(arch, B, n * T, "float32", at_once=T))

    def step(cache: Any, xs: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        written_B = jnp.full(B, xs[0] * T)
        logits_BTV, cache = decode_step(
            weights, arch, prompts, prompt_len_B, cache, xs[1], written_B, n * T
        )
        return cache, logits_BTV

    return jax.lax.scan(step, cache, (jnp.arange(n), fed_nBT))[1]


def decode_logits(arch: Arch, params: Params) -> np.ndarray:
    """Logits [2, FED, V] of the last tokens of both rows, fed two at a time behind a prefill."""
    prompt_len_B = np.array([len(row) - FED for row in ROWS])
    prompts_BQ = np.full((2, prompt_len_B.max()), 13)
    for row, length in enumerate(prompt_len_B):
        prompts_BQ[row, :length] = ROWS[row][:length]
    fed_BC = np.stack([row[-FED:] for row in ROWS])
    fed_nBT = np.moveaxis(fed_BC.reshape(2, -1, 2), 1, 0)
    out_nBTV = np.asarray(_decode_logits(params, arch, prompts_BQ, prompt_len_B, fed_nBT))
    return np.moveaxis(out_nBTV, 0, 1).reshape(2, FED, -1)


def sampler_gap(arch: Arch, params: Params) -> float:
    """Largest |log-prob of the engine - log-prob of the trainer|, nats, over sampled tokens."""
    mesh = make_mesh(-1, 1, 1)
    devices = jax.device_count()
    engine = Engine(
        arch,
        IdTokenizer(arch.vocab_size, eos_ids=(2,)),
        mesh,
        max_prompt=8,
        max_new=12,
        slots=2 * devices,
        slots_per_prompt=2,
        tokens_per_dispatch=12,
        dtype="float32",
    )
    prompts = [row[:length].tolist() for row in ROWS for length in (7, 2)]
    requests = [Request(prompt, number, 4) for number, prompt in enumerate(prompts)]
    with jax.set_mesh(mesh):
        weights = jax.jit(partial(to_decode, arch=arch, dtype="float32"))(params)
        completions = list(engine.run(weights, requests, jax.random.key(0), temperature=0.8))
    samples = [Sample(c.problem, prompts[c.problem], c.tokens) for c in completions]
    packed = pack(samples, RowShape(rows=2, tokens=64, completion_tokens=48))
    settings: Any = {"temperature": 0.8, "dtype": "float32", "remat": "none", "chunk": 16}
    score = jax.jit(lambda params, batch: completion_logprobs(params, arch, batch, **settings)[0])
    logprobs_RC = np.concatenate([score(params, batch) for batch in packed.microbatches])
    scored = unpack(logprobs_RC, packed, samples)
    return max(
        float(np.abs(np.asarray(completion.logprobs) - logprobs).max())
        for completion, logprobs in zip(completions, scored, strict=True)
    )


def errors(name: str, folder: Path) -> dict[str, float]:
    """The largest differences of one tiny model."""
    arch, params = load(name, folder)
    long, short = golden(name)
    train, decode = train_logits(arch, params), decode_logits(arch, params)
    expected = {"none": long, "left": short, "right": short}
    return {
        "prefill": max(float(np.abs(train[k] - expected[k]).max()) for k in expected),
        "decode": max(
            float(np.abs(decode[row] - rows[-FED:]).max()) for row, rows in enumerate([long, short])
        ),
        "gap": sampler_gap(arch, params),
    }


def main(names: list[str]) -> None:
    """Prints the table."""
    print(f"{'model':<12} {'type':<12} {'prefill':>9} {'decode':>9} {'gap, nats':>9}")
    for name in names or sorted(MODELS):
        with tempfile.TemporaryDirectory() as folder:
            worst = errors(name, Path(folder))
        kind = MODELS[name]["config"]["model_type"]
        figures = " ".join(f"{worst[column]:9.1e}" for column in ("prefill", "decode", "gap"))
        print(f"{name:<12} {kind:<12} {figures}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
