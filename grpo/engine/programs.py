"""What the engine runs on the devices: four programs over one state, each of a fixed shape."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding

from grpo.engine.sampling import Filters, sample_token
from grpo.model.arch import Arch
from grpo.model.decoder import KV, decode_step, empty_cache, prefill
from grpo.model.params import Params
from grpo.sharding import DECODE_RULES, replicated, shard, spec


class Slots(struct.PyTreeNode):
    """Device state: P prompts and B = P * G slots; slots p * G to (p + 1) * G decode prompt p.

    The last token of a prompt is no part of its cache: it is the first each slot feeds itself.
    """

    prompts: list[KV]  # [P, K, Q, H] a layer, each prompt stored once for its G slots
    prompt_len_P: jax.Array  # tokens in the prompt's cache
    cache: list[KV]  # [B, K, C, H] a layer: what each slot has fed itself
    token_B: jax.Array  # the last token, whose successor is sampled next
    written_B: jax.Array  # tokens sampled so far, which is where `token_B` goes in the cache
    key_B2: jax.Array  # random key data of the sample
    active_B: jax.Array


class Start(struct.PyTreeNode):
    """Samples that begin: row b of each array is slot b."""

    take_B: np.ndarray  # this slot gets a new sample
    token_B: np.ndarray  # the prompt's last token
    stream_B: np.ndarray
    sample_B: np.ndarray


_Carry = tuple[Any, Slots, jax.Array, jax.Array]  # of the decode loop


class Programs:
    """The compiled side of an engine.

    Args:
      arch: shape of the model.
      mesh: devices; prompts and their slots are split over its batch axes.
      num_prompts: P.
      slots_per_prompt: G.
      max_prompt: longest prompt, tokens.
      max_new: longest completion, tokens.
      num_tokens: sampled a dispatch, at most.
      stop_ids: tokens that end a completion.
      dtype: of the cache.
    """

    def __init__(
        self,
        arch: Arch,
        mesh: Mesh,
        *,
        num_prompts: int,
        slots_per_prompt: int,
        max_prompt: int,
        max_new: int,
        num_tokens: int,
        stop_ids: tuple[int, ...],
        dtype: str,
    ):
        make = partial(
            _empty,
            arch=arch,
            num_prompts=num_prompts,
            slots=num_prompts * slots_per_prompt,
            max_prompt=max_prompt,
            max_new=max_new,
            dtype=dtype,
        )
        # Said outright: a layout left to the compiler differs between two programs that hand the
        # slots to one another, and each difference is one more program.
        with jax.set_mesh(mesh):
            layout = _layout(jax.eval_shape(make), mesh)
        everywhere = replicated(mesh)
        self.empty = jax.jit(make, out_shardings=layout)
        self.admit = jax.jit(
            partial(_admit, arch=arch), donate_argnames="slots", out_shardings=layout
        )
        # A partial of its own: engines would share, and count, one cache of programs otherwise.
        self.start = jax.jit(partial(_start), donate_argnames="slots", out_shardings=layout)
        self.decode = jax.jit(
            partial(_decode, arch=arch, num_tokens=num_tokens, max_new=max_new, stop_ids=stop_ids),
            donate_argnames="slots",
            static_argnames=("view", "greedy"),
            out_shardings=(layout, everywhere, everywhere),
        )

    def num_compiled(self) -> int:
        """How many there are by now."""
        programs: Any = (self.empty, self.admit, self.start, self.decode)
        return sum(program._cache_size() for program in programs)


def _empty(
    *, arch: Arch, num_prompts: int, slots: int, max_prompt: int, max_new: int, dtype: str
) -> Slots:
    def zeros(rows: int, dtype: Any) -> jax.Array:
        return shard(jnp.zeros(rows, dtype), "batch")

    return Slots(
        prompts=empty_cache(arch, num_prompts, max_prompt, dtype),
        prompt_len_P=zeros(num_prompts, jnp.int32),
        cache=empty_cache(arch, slots, max_new, dtype),
        token_B=zeros(slots, jnp.int32),
        written_B=zeros(slots, jnp.int32),
        key_B2=shard(jnp.zeros((slots, 2), jnp.uint32), "batch", None),
        active_B=zeros(slots, jnp.bool_),
    )


def _layout(slots: Slots, mesh: Mesh) -> Slots:
    """Every array split by prompts or slots, caches also by key/value heads."""

    def split(*axes: str | None) -> NamedSharding:
        return NamedSharding(mesh, spec(axes, DECODE_RULES))

    kv = split("batch", "kv_heads", None, None)
    caches = {
        "prompts": jax.tree.map(lambda _: kv, slots.prompts),
        "cache": jax.tree.map(lambda _: kv, slots.cache),
    }
    rest = jax.tree.map(lambda _: split("batch"), slots.replace(prompts=[], cache=[]))
    return rest.replace(**caches)


def _admit(
    weights: Params,
    slots: Slots,
    tokens_RQ: jax.Array,
    prompt_len_R: jax.Array,
    prompt_R: jax.Array,
    *,
    arch: Arch,
) -> Slots:
    """Reads prompts and stores their keys and values; row r becomes prompt `prompt_R[r]`.

    A row whose number is P or more is padding, and goes nowhere.
    """
    width = tokens_RQ.shape[1]

    def put(cache_PKQH: jax.Array, new_RKQH: jax.Array) -> jax.Array:
        return cache_PKQH.at[prompt_R, :, :width].set(
            new_RKQH.astype(cache_PKQH.dtype), mode="drop"
        )

    return slots.replace(
        prompts=jax.tree.map(put, slots.prompts, prefill(weights, arch, tokens_RQ)),
        prompt_len_P=slots.prompt_len_P.at[prompt_R].set(prompt_len_R, mode="drop"),
    )


def _start(slots: Slots, start: Start, key: jax.Array) -> Slots:
    """Each taken slot begins a sample of its prompt."""

    def own_key(stream: Any, sample: Any) -> jax.Array:
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, stream), sample))

    new_key_B2 = jax.vmap(own_key)(start.stream_B, start.sample_B)
    return slots.replace(
        token_B=jnp.where(start.take_B, start.token_B, slots.token_B),
        written_B=jnp.where(start.take_B, 0, slots.written_B),
        key_B2=jnp.where(start.take_B[:, None], new_key_B2, slots.key_B2),
        active_B=slots.active_B | start.take_B,
    )


def _decode(
    weights: Params,
    slots: Slots,
    halted_B: jax.Array,
    stop_at: jax.Array,
    temperature: jax.Array,
    filters: Filters | None,
    *,
    arch: Arch,
    num_tokens: int,
    max_new: int,
    stop_ids: tuple[int, ...],
    view: int,
    greedy: bool,
) -> tuple[Slots, jax.Array, jax.Array]:
    """Up to `num_tokens` tokens for every active slot; ends early once `stop_at` slots are idle.

    Attention looks at the first `view` places of each slot's cache, so that its cost follows what
    is written, not what might be; no active slot may write beyond them.

    Returns the slots, the tokens [N, B] (-1 where a slot was idle) and their log-probabilities.
    """
    B = slots.token_B.shape[0]
    slots = slots.replace(active_B=slots.active_B & ~halted_B)
    whole, stops = slots.cache, jnp.asarray(stop_ids, jnp.int32)
    seen = jax.tree.map(lambda a: a[:, :, :view], whole)

    def draw(key_2: jax.Array, written: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key_2), written))

    def body(carry: _Carry) -> _Carry:
        i, s, tokens_NB, logprobs_NB = carry
        logits_B1V, cache = decode_step(
            weights, arch, s.prompts, s.prompt_len_P, s.cache, s.token_B[:, None], s.written_B
        )
        uniform_B = jax.vmap(draw)(s.key_B2, s.written_B)
        token_B, logprob_B = sample_token(
            logits_B1V[:, 0], uniform_B, temperature, greedy=greedy, filters=filters
        )
        written_B = s.written_B + s.active_B
        ended_B = jnp.isin(token_B, stops) | (written_B >= max_new)
        tokens_NB = tokens_NB.at[i].set(jnp.where(s.active_B, token_B, -1))
        logprobs_NB = logprobs_NB.at[i].set(jnp.where(s.active_B, logprob_B, 0.0))
        s = s.replace(
            cache=cache,
            token_B=jnp.where(s.active_B, token_B, s.token_B),
            written_B=written_B,
            active_B=s.active_B & ~ended_B,
        )
        return i + 1, s, tokens_NB, logprobs_NB

    def more(carry: _Carry) -> jax.Array:
        i, s, _, _ = carry
        return (i < num_tokens) & (jnp.sum(~s.active_B) < stop_at)

    N = num_tokens
    start = (0, slots.replace(cache=seen), jnp.full((N, B), -1, jnp.int32), jnp.zeros((N, B)))
    _, slots, tokens_NB, logprobs_NB = jax.lax.while_loop(more, body, start)
    if view < max_new:
        slots = slots.replace(
            cache=jax.tree.map(lambda a, new: a.at[:, :, :view].set(new), whole, slots.cache)
        )
    return slots, tokens_NB, logprobs_NB
