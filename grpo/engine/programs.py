"""What the engine runs on the devices: a few programs over one state, each of fixed shapes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding

from grpo.engine.sampling import Filters, sample_token
from grpo.model.arch import Arch
from grpo.model.decoder import (
    Cache,
    Stored,
    decode_step,
    empty_cache,
    prefill,
    routes,
    stored_like,
)
from grpo.model.params import Params
from grpo.sharding import DECODE_RULES, fitted, propagated, replicated, shard, specs_of


class Slots(struct.PyTreeNode):
    """Device state: P prompts and B = P * G slots; slots p * G to (p + 1) * G decode prompt p.

    The last token of a prompt is no part of its cache: it is the first each slot feeds itself.
    """

    prompts: list[Cache]  # [P, K, S, H] a layer, S <= Q: each prompt's last S tokens, once for all
    prompt_len_P: jax.Array  # tokens in the prompt's cache
    prompt_PQ: jax.Array  # the tokens themselves, -1 behind the last
    cache: list[Cache]  # [B, K, S, H] a layer: what each slot has fed itself; S <= C
    token_B: jax.Array  # the last token, whose successor is sampled next
    written_B: jax.Array  # tokens sampled so far, which is where `token_B` goes in the cache
    history_BC: jax.Array  # what each slot has sampled, -1 behind the last
    key_B2: jax.Array  # random key data of the sample
    active_B: jax.Array


class Start(struct.PyTreeNode):
    """Samples that begin: row b of each array is slot b."""

    take_B: np.ndarray  # this slot gets a new sample
    token_B: np.ndarray  # the prompt's last token
    stream_B: np.ndarray
    sample_B: np.ndarray


_Carry = tuple[Slots, jax.Array, jax.Array, jax.Array]  # of the decode loop


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
      at_once: tokens a slot is fed at a time, at most: guesses and the token before them, or those
        of a completion already begun.
      dtype: of the cache; "int8" quantises it.
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
        at_once: int,
        dtype: str,
    ):
        make = partial(
            _empty,
            arch=arch,
            num_prompts=num_prompts,
            slots=num_prompts * slots_per_prompt,
            max_prompt=max_prompt,
            max_new=max_new,
            at_once=at_once,
            dtype=dtype,
        )
        # Said outright: a layout left to the compiler differs between two programs that hand the
        # slots to one another, and each difference is one more program.
        like = jax.eval_shape(make)
        layout, everywhere = _layout(like, mesh), replicated(mesh)
        self._layout, self.slots = layout, abstract(like, layout)

        def program(function: Callable[..., Any], out: Any, **settings: Any) -> Any:
            """Jitted; each is a function of its own, so that engines share no cache of programs."""
            return jax.jit(propagated(function, specs_of(out)), out_shardings=out, **settings)

        updates: Any = {"donate_argnames": "slots"}
        self.empty = program(make, layout)
        self.admit = program(partial(_admit, arch=arch), layout, **updates)
        self.start = program(_start, layout, **updates)
        self.replay = program(partial(_replay, arch=arch, chunk=at_once), layout, **updates)
        reported = (everywhere,) * 3 + ((everywhere,) if arch.experts else (None,))
        self.decode = program(
            partial(_decode, arch=arch, num_tokens=num_tokens, max_new=max_new, stop_ids=stop_ids),
            (layout, *reported),
            static_argnames=("view", "greedy", "drafts"),
            **updates,
        )
        self.compact = program(_compact, layout)
        self.routes = program(partial(_routes, arch=arch), everywhere, static_argnames="what")

    def compacted(self, keep: int) -> Slots:
        """Shapes and shardings of `keep` slots with a prompt each."""
        chosen = jax.ShapeDtypeStruct((keep,), jnp.int32)
        like = jax.eval_shape(_compact, self.slots, chosen, chosen)
        return abstract(like, self._layout)

    def num_compiled(self) -> int:
        """How many there are by now."""
        programs: Any = (
            self.empty,
            self.admit,
            self.start,
            self.replay,
            self.decode,
            self.compact,
            self.routes,
        )
        return sum(program._cache_size() for program in programs)


def abstract(like: Any, shardings: Any) -> Any:
    """Shapes of a tree, with shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        like,
        shardings,
    )


def _empty(
    *,
    arch: Arch,
    num_prompts: int,
    slots: int,
    max_prompt: int,
    max_new: int,
    at_once: int,
    dtype: str,
) -> Slots:
    def zeros(rows: int, dtype: Any) -> jax.Array:
        return shard(jnp.zeros(rows, dtype), "batch")

    return Slots(
        prompts=empty_cache(arch, num_prompts, max_prompt, dtype),
        prompt_len_P=zeros(num_prompts, jnp.int32),
        prompt_PQ=shard(jnp.full((num_prompts, max_prompt), -1, jnp.int32), "batch", None),
        cache=empty_cache(arch, slots, max_new, dtype, at_once=at_once),
        token_B=zeros(slots, jnp.int32),
        written_B=zeros(slots, jnp.int32),
        history_BC=shard(jnp.full((slots, max_new), -1, jnp.int32), "batch", None),
        key_B2=shard(jnp.zeros((slots, 2), jnp.uint32), "batch", None),
        active_B=zeros(slots, jnp.bool_),
    )


def _layout(slots: Slots, mesh: Mesh) -> Slots:
    """Every array split by prompts or slots, caches also by key/value heads."""

    def split(array: Any, *axes: str | None) -> NamedSharding:
        return NamedSharding(mesh, fitted(axes, array.shape, mesh, DECODE_RULES))

    def heads(cache: list[Cache]) -> Any:
        return jax.tree.map(lambda kv: split(kv, "batch", "kv_heads", None, None), cache)

    rest = jax.tree.map(lambda a: split(a, "batch"), slots.replace(prompts=[], cache=[]))
    return rest.replace(prompts=heads(slots.prompts), cache=heads(slots.cache))


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

    def last(new_RKQH: jax.Array, kept: int) -> jax.Array:
        """The last `kept` tokens of each prompt; the first of the array, where it has fewer."""
        if kept == width:
            return new_RKQH
        cut = partial(jax.lax.dynamic_slice_in_dim, slice_size=kept, axis=1)
        return jax.vmap(cut)(new_RKQH, jnp.maximum(prompt_len_R - kept, 0))

    def put_array(a_PKQH: jax.Array, new_RKQH: jax.Array) -> jax.Array:
        kept = min(a_PKQH.shape[2], width)
        return a_PKQH.at[prompt_R, :, :kept].set(last(new_RKQH, kept), mode="drop")

    def put(cache_PKQH: Stored, new_RKQH: Any) -> Stored:
        return jax.tree.map(put_array, cache_PKQH, stored_like(cache_PKQH, new_RKQH))

    known_RQ = jnp.arange(slots.prompt_PQ.shape[1]) <= prompt_len_R[:, None]
    padded_RQ = jnp.pad(tokens_RQ, ((0, 0), (0, known_RQ.shape[1] - width)))
    return slots.replace(
        prompt_PQ=slots.prompt_PQ.at[prompt_R].set(jnp.where(known_RQ, padded_RQ, -1), mode="drop"),
        prompts=[
            tuple(map(put, stored, new))
            for stored, new in zip(slots.prompts, prefill(weights, arch, tokens_RQ), strict=True)
        ],
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
        history_BC=jnp.where(start.take_B[:, None], -1, slots.history_BC),
        key_B2=jnp.where(start.take_B[:, None], new_key_B2, slots.key_B2),
        active_B=slots.active_B | start.take_B,
    )


def _replay(
    weights: Params,
    slots: Slots,
    begun_BC: jax.Array,
    begun_B: jax.Array,
    *,
    arch: Arch,
    chunk: int,
) -> Slots:
    """Slots that have just started go on with what was written before.

    Feeds the prompt's last token and all but the last of `begun_BC` through the model, `chunk`
    tokens of every slot at a time and nothing sampled; the last one is fed by the next decode.
    What a chunk writes behind a slot's own tokens is never looked at: decoding writes over it.

    Args:
      weights: the decode form.
      slots: those of `begun_B` > 0 as `_start` leaves them.
      begun_BC: their tokens, -1 behind the last.
      begun_B: how many; 0 leaves a slot as it is.
      arch: shape of the model.
      chunk: tokens fed at a time.
    """
    C, take_B = begun_BC.shape[1], begun_B > 0
    fed_BC = jnp.concatenate([slots.token_B[:, None], jnp.maximum(begun_BC[:, :-1], 0)], axis=1)
    fed_BC = jnp.pad(fed_BC, ((0, 0), (0, -C % chunk)))

    def more(carry: tuple[jax.Array, list[Cache]]) -> jax.Array:
        return carry[0] < begun_B.max()

    def body(carry: tuple[jax.Array, list[Cache]]) -> tuple[jax.Array, list[Cache]]:
        fed, cache = carry
        fed_BT = jax.lax.dynamic_slice_in_dim(fed_BC, fed, chunk, axis=1)
        place_B = jnp.where(fed < begun_B, fed, C)  # C is nowhere
        _, cache = decode_step(
            weights, arch, slots.prompts, slots.prompt_len_P, cache, fed_BT, place_B, C
        )
        return fed + chunk, cache

    _, cache = jax.lax.while_loop(more, body, (jnp.zeros((), jnp.int32), slots.cache))
    last_B = jnp.take_along_axis(begun_BC, jnp.maximum(begun_B - 1, 0)[:, None], axis=1)[:, 0]
    return slots.replace(
        cache=cache,
        token_B=jnp.where(take_B, last_B, slots.token_B),
        written_B=jnp.where(take_B, begun_B, slots.written_B),
        history_BC=jnp.where(take_B[:, None], begun_BC, slots.history_BC),
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
    drafts: int = 0,
) -> tuple[Slots, jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Up to `num_tokens` tokens for every active slot; ends early once `stop_at` slots are idle.

    Attention looks at the first `view` slots of each cache, all of one that is no longer, so that
    its cost follows what is written, not what might be; no active slot may write beyond them.

    With `drafts`, each pass also feeds so many tokens that may follow, and keeps those that would
    have been sampled: every position has its own random number, so what is sampled is the same
    token by token, in fewer passes where the guesses are good.

    Returns the slots, the tokens [N, B] (-1 where there are no more), their log-probabilities, the
    number of passes through the model, and the experts [B, N, L, k] of the token before each.
    """
    B, N, T = slots.token_B.shape[0], num_tokens, 1 + drafts
    slots = slots.replace(active_B=slots.active_B & ~halted_B)
    whole, stops = slots.cache, jnp.asarray(stop_ids, jnp.int32)
    seen = jax.tree.map(lambda a: a[:, :, :view], whole)
    before_B, rows_B1, ahead_T = slots.written_B, jnp.arange(B)[:, None], jnp.arange(T)

    def draw(key_2: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key_2), position))

    def body(carry: _Carry) -> _Carry:
        s, tokens_NB, logprobs_NB, passes = carry
        fed_BT = jnp.concatenate([s.token_B[:, None], _guess(s, drafts)], axis=1)
        fed = jnp.maximum(fed_BT, 0), s.written_B, view
        logits_BTV, cache = decode_step(weights, arch, s.prompts, s.prompt_len_P, s.cache, *fed)
        place_BT = s.written_B[:, None] + ahead_T
        uniform_BT = jax.vmap(jax.vmap(draw, (None, 0)))(s.key_B2, place_BT)
        token_BT, logprob_BT = jax.tree.map(
            lambda x: x.reshape(B, T),
            sample_token(
                logits_BTV.reshape(B * T, -1),
                uniform_BT.reshape(-1),
                temperature,
                greedy=greedy,
                filters=filters,
            ),
        )
        ends_BT = jnp.isin(token_BT, stops) | (place_BT + 1 >= max_new)
        # A token counts if all that was fed before it is what was sampled, and none of it ended.
        goes_on_BT = (token_BT[:, :-1] == fed_BT[:, 1:]) & ~ends_BT[:, :-1]
        counts_BT = jnp.cumprod(jnp.pad(goes_on_BT, ((0, 0), (1, 0)), constant_values=True), axis=1)
        counts_BT = (counts_BT > 0) & s.active_B[:, None]
        new_B = counts_BT.sum(axis=1)
        last_B1 = jnp.maximum(new_B - 1, 0)[:, None]
        slot_BT = jnp.where(counts_BT, place_BT - before_B[:, None], N)  # N is nowhere
        tokens_NB = tokens_NB.at[slot_BT, rows_B1].set(token_BT, mode="drop")
        logprobs_NB = logprobs_NB.at[slot_BT, rows_B1].set(logprob_BT, mode="drop")
        history_BC = s.history_BC.at[rows_B1, jnp.where(counts_BT, place_BT, max_new)].set(
            token_BT, mode="drop"
        )
        token_B = jnp.take_along_axis(token_BT, last_B1, axis=1)[:, 0]
        s = s.replace(
            cache=cache,
            token_B=jnp.where(s.active_B, token_B, s.token_B),
            written_B=s.written_B + new_B,
            history_BC=history_BC,
            active_B=s.active_B & ~jnp.take_along_axis(ends_BT, last_B1, axis=1)[:, 0],
        )
        return s, tokens_NB, logprobs_NB, passes + 1

    def more(carry: _Carry) -> jax.Array:
        s = carry[0]
        room = jnp.max(s.written_B - before_B) + T <= N
        return room & (jnp.sum(~s.active_B) < stop_at)

    nothing_NB = jnp.full((N, B), -1, jnp.int32)
    start = (slots.replace(cache=seen), nothing_NB, jnp.zeros((N, B)), jnp.zeros((), jnp.int32))
    slots, tokens_NB, logprobs_NB, passes = jax.lax.while_loop(more, body, start)
    routes_BNLk = None
    if arch.experts:
        routes_BNLk = routes(arch, slots.cache, rows_B1, before_B[:, None] + jnp.arange(N))

    def put_back(a: jax.Array, new: jax.Array) -> jax.Array:
        return a.at[:, :, :view].set(new) if view < a.shape[2] else new

    slots = slots.replace(cache=jax.tree.map(put_back, whole, slots.cache))
    return slots, tokens_NB, logprobs_NB, passes, routes_BNLk


def _routes(slots: Slots, row_R: jax.Array, *, arch: Arch, what: str) -> jax.Array:
    """The experts [R, S, L, k] that tokens went to which were read, not sampled.

    `what` is "prompts" or, for slots that went on with what they had begun, "cache".
    """
    cache = getattr(slots, what)
    place_1S = jnp.arange(cache[-1][-1].shape[2])[None]
    return routes(arch, cache, row_R[:, None], place_1S)


def _guess(slots: Slots, count: int) -> jax.Array:
    """The tokens [B, count] that followed the last two when they last stood together; -1: none.

    Looks at the completion first, then at the prompt: what is repeated is mostly near.
    """
    B, C = slots.history_BC.shape
    if not count:
        return jnp.zeros((B, 0), jnp.int32)
    G = B // slots.prompt_PQ.shape[0]
    text_BS = jnp.concatenate([jnp.repeat(slots.prompt_PQ, G, axis=0), slots.history_BC], axis=1)
    Q, S = text_BS.shape[1] - C, text_BS.shape[1]
    before_B1 = jnp.take_along_axis(text_BS, Q + slots.written_B[:, None] - 2, axis=1)
    pair_BS = (text_BS[:, :-1] == before_B1) & (text_BS[:, 1:] == slots.token_B[:, None])
    # Not the pair itself, and only where there are two tokens of the completion.
    earlier_BS = jnp.arange(S - 1) < Q + slots.written_B[:, None] - 2
    found_BS = pair_BS & earlier_BS & (slots.written_B[:, None] >= 2)
    place_B = S - 2 - jnp.argmax(found_BS[:, ::-1], axis=1)
    next_BT = jnp.minimum(place_B[:, None] + 2 + jnp.arange(count), S - 1)
    guess_BT = jnp.take_along_axis(text_BS, next_BT, axis=1)
    return jnp.where(found_BS.any(axis=1)[:, None], guess_BT, -1)


def _compact(slots: Slots, keep_S: jax.Array, busy_S: jax.Array) -> Slots:
    """The slots `keep_S`, each with its prompt to itself; those that are not busy are idle."""
    G = slots.token_B.shape[0] // slots.prompt_len_P.shape[0]

    def of_prompt(array: jax.Array) -> jax.Array:
        return array[keep_S // G]

    def of_slot(array: jax.Array) -> jax.Array:
        return array[keep_S]

    return Slots(
        prompts=jax.tree.map(of_prompt, slots.prompts),
        prompt_len_P=of_prompt(slots.prompt_len_P),
        prompt_PQ=of_prompt(slots.prompt_PQ),
        cache=jax.tree.map(of_slot, slots.cache),
        token_B=of_slot(slots.token_B),
        written_B=of_slot(slots.written_B),
        history_BC=of_slot(slots.history_BC),
        key_B2=of_slot(slots.key_B2),
        active_B=of_slot(slots.active_B) & busy_S,
    )
