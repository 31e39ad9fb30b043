"""The rollout engine: a fixed number of slots, refilled as completions end.

Three programs with fixed shapes: `_prefill` reads prompts (each once, however many samples it
has), `_insert` copies their keys and values into free slots, `_decode` samples up to N tokens for
every live slot in one dispatch. The host keeps a queue of (prompt, sample) and hands out each
completion the moment its slot ends, so that scoring runs while the rest still decode.

A sample depends on its key, its prompt's stream and its sample number only: never on the slot it
ran in, on what else was running, or on the mesh.
"""

import collections
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding

from grpo.data.tokenizer import Tokenizer
from grpo.engine.sampling import sample_token
from grpo.model.arch import Arch
from grpo.model.decoder import KV, decode_step, empty_cache, prefill
from grpo.model.params import Params
from grpo.sharding import DECODE_RULES, batch_ways, replicated, shard, spec
from grpo.structs import EOS, LENGTH, STOP, Completion

_REFILL_SHARE = 8  # refill once 1/8 of the slots are idle: fewer, larger prefills


@dataclasses.dataclass(frozen=True)
class Request:
    """Samples wanted of one prompt. `stream` names the prompt to the random numbers (uint32)."""

    prompt: Sequence[int]
    stream: int
    num_samples: int


class Slots(struct.PyTreeNode):
    """Device state of the slots; the key/value cache is the bulk of it, updated in place."""

    cache: list[KV]
    token_B: jax.Array  # the last token, whose successor is sampled next
    position_B: jax.Array  # where that token stands
    key_B2: jax.Array  # random key data of the sample
    written_B: jax.Array  # tokens sampled so far
    active_B: jax.Array


class Fill(struct.PyTreeNode):
    """What goes into which slot: row b of each array is slot b."""

    take_B: np.ndarray  # this slot gets a new sample
    source_B: np.ndarray  # row of the prefill it starts from
    prompt_len_B: np.ndarray
    last_token_B: np.ndarray  # the prompt's last token: its successor is sampled first
    stream_B: np.ndarray
    sample_B: np.ndarray


_Carry = tuple[Any, Slots, jax.Array, jax.Array]  # of the decode loop


@dataclasses.dataclass
class EngineStats:
    """What a rollout cost. Occupancy is the share of slot-steps that sampled a wanted token."""

    tokens: int = 0
    prompt_tokens: int = 0
    slot_steps: int = 0
    seconds: float = 0.0


def _empty_slots(*, arch: Arch, slots: int, length: int, dtype: str) -> Slots:
    def per_slot(dtype: Any) -> jax.Array:
        return shard(jnp.zeros(slots, dtype), "batch")

    return Slots(
        cache=empty_cache(arch, slots, length, dtype),
        token_B=per_slot(jnp.int32),
        position_B=per_slot(jnp.int32),
        key_B2=shard(jnp.zeros((slots, 2), jnp.uint32), "batch", None),
        written_B=per_slot(jnp.int32),
        active_B=per_slot(jnp.bool_),
    )


def _slot_shardings(slots: Slots, mesh: Mesh) -> Slots:
    """Every array split by slots, the cache also by key/value heads."""

    def split(*axes: str | None) -> NamedSharding:
        return NamedSharding(mesh, spec(axes, DECODE_RULES))

    cache = jax.tree.map(lambda _: split("batch", None, "kv_heads", None), slots.cache)
    rest = jax.tree.map(lambda _: split("batch"), slots.replace(cache=[]))
    return rest.replace(cache=cache)


def _prefill(weights: Params, tokens_RQ: jax.Array, *, arch: Arch) -> list[KV]:
    return prefill(weights, arch, tokens_RQ)


def _insert(slots: Slots, prompts: list[KV], fill: Fill, key: jax.Array) -> Slots:
    """Starts new samples: each taken slot gets its prompt's keys and values and its own state."""
    width = prompts[0][0].shape[1]
    take_B111 = fill.take_B[:, None, None, None]

    def copy(cache_BSKH: jax.Array, prompt_RQKH: jax.Array) -> jax.Array:
        new_BQKH = prompt_RQKH[fill.source_B].astype(cache_BSKH.dtype)
        head_BQKH = jnp.where(take_B111, new_BQKH, cache_BSKH[:, :width])
        return jax.lax.dynamic_update_slice(cache_BSKH, head_BQKH, (0, 0, 0, 0))

    def own_key(stream: Any, sample: Any) -> jax.Array:
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, stream), sample))

    new_key_B2 = jax.vmap(own_key)(fill.stream_B, fill.sample_B)
    return Slots(
        cache=jax.tree.map(copy, slots.cache, prompts),
        token_B=jnp.where(fill.take_B, fill.last_token_B, slots.token_B),
        position_B=jnp.where(fill.take_B, fill.prompt_len_B - 1, slots.position_B),
        key_B2=jnp.where(fill.take_B[:, None], new_key_B2, slots.key_B2),
        written_B=jnp.where(fill.take_B, 0, slots.written_B),
        active_B=slots.active_B | fill.take_B,
    )


def _decode(
    weights: Params,
    slots: Slots,
    halted_B: jax.Array,
    stop_at: jax.Array,
    temperature: jax.Array,
    *,
    arch: Arch,
    num_tokens: int,
    max_new: int,
    stop_ids: tuple[int, ...],
    greedy: bool,
) -> tuple[Slots, jax.Array, jax.Array]:
    """Up to `num_tokens` tokens for every active slot; ends early once `stop_at` slots are idle.

    Returns the slots, the tokens [N, B] (-1 where a slot was idle) and their log-probabilities.
    """
    B = slots.token_B.shape[0]
    slots = slots.replace(active_B=slots.active_B & ~halted_B)
    stops = jnp.asarray(stop_ids, jnp.int32)

    def draw(key_2: jax.Array, written: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key_2), written))

    def body(carry: _Carry) -> _Carry:
        i, s, tokens_NB, logprobs_NB = carry
        logits_BV, cache = decode_step(weights, arch, s.cache, s.token_B, s.position_B)
        uniform_B = jax.vmap(draw)(s.key_B2, s.written_B)
        token_B, logprob_B = sample_token(logits_BV, uniform_B, temperature, greedy=greedy)
        written_B = s.written_B + s.active_B
        ended_B = jnp.isin(token_B, stops) | (written_B >= max_new)
        tokens_NB = tokens_NB.at[i].set(jnp.where(s.active_B, token_B, -1))
        logprobs_NB = logprobs_NB.at[i].set(jnp.where(s.active_B, logprob_B, 0.0))
        s = s.replace(
            cache=cache,
            token_B=jnp.where(s.active_B, token_B, s.token_B),
            position_B=s.position_B + s.active_B,
            written_B=written_B,
            active_B=s.active_B & ~ended_B,
        )
        return i + 1, s, tokens_NB, logprobs_NB

    def more(carry: _Carry) -> jax.Array:
        i, s, _, _ = carry
        return (i < num_tokens) & (jnp.sum(~s.active_B) < stop_at)

    start = (0, slots, jnp.full((num_tokens, B), -1, jnp.int32), jnp.zeros((num_tokens, B)))
    _, slots, tokens_NB, logprobs_NB = jax.lax.while_loop(more, body, start)
    return slots, tokens_NB, logprobs_NB


@dataclasses.dataclass
class _Running:
    """Host side of a busy slot."""

    request: int
    sample: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)


class Engine:
    """Samples completions with one set of compiled programs.

    Args:
      arch: shape of the model.
      tokenizer: says which ids stop a completion, and reads text for stop strings.
      mesh: devices; slots are split over its batch axes.
      max_prompt: longest prompt, tokens.
      max_new: longest completion, tokens; longer ones are cut off and say so.
      slots: completions decoded side by side.
      tokens_per_dispatch: tokens sampled before the host looks again.
      dtype: of the cache.
      stop_strings: texts that end a completion; the token that completes one is its last.
    """

    def __init__(
        self,
        arch: Arch,
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        max_prompt: int,
        max_new: int,
        slots: int,
        tokens_per_dispatch: int,
        dtype: str,
        stop_strings: tuple[str, ...] = (),
    ):
        ways = batch_ways(mesh)
        if slots % ways:
            raise ValueError(
                f"sample.slots ({slots}) must be a multiple of data x fsdp = {ways}, "
                "so that every device gets the same number"
            )
        if max_prompt + max_new > arch.max_positions:
            raise ValueError(
                f"max_prompt_tokens ({max_prompt}) + max_new_tokens ({max_new}) = "
                f"{max_prompt + max_new} exceeds the model's {arch.max_positions} positions"
            )
        self.arch, self.tokenizer, self.mesh = arch, tokenizer, mesh
        self.max_prompt, self.max_new, self.num_slots = max_prompt, max_new, slots
        self.tokens_per_dispatch, self.dtype = tokens_per_dispatch, dtype
        self.stop_strings = stop_strings
        # A token is at least a byte, so a stop string lies within this many last tokens; the
        # margin is for a character split over tokens.
        self._stop_window = max((len(s.encode()) for s in stop_strings), default=0) + 4
        # One width serves every refill: a second would be a second program.
        self._prefill_rows = math.ceil(slots / _REFILL_SHARE)
        self.stats = EngineStats()
        decode = partial(
            _decode,
            arch=arch,
            num_tokens=tokens_per_dispatch,
            max_new=max_new,
            stop_ids=tuple(tokenizer.eos_ids),
        )
        empty = partial(
            _empty_slots, arch=arch, slots=slots, length=max_prompt + max_new, dtype=dtype
        )
        # Said outright: a layout left to the compiler differs between two programs that hand the
        # slots to one another, and each difference is one more program.
        with jax.set_mesh(mesh):
            slot_shardings = _slot_shardings(jax.eval_shape(empty), mesh)
        everywhere = replicated(mesh)
        self._empty = jax.jit(empty, out_shardings=slot_shardings)
        prompt_sharding = NamedSharding(mesh, spec((None, None, "kv_heads", None), DECODE_RULES))
        self._prefill = jax.jit(partial(_prefill, arch=arch), out_shardings=prompt_sharding)
        # A partial of its own: engines would share, and count, one cache of programs otherwise.
        self._insert = jax.jit(partial(_insert), donate_argnums=0, out_shardings=slot_shardings)
        self._decode = jax.jit(
            decode,
            donate_argnums=1,
            static_argnames="greedy",
            out_shardings=(slot_shardings, everywhere, everywhere),
        )

    def run(
        self,
        weights: Params,
        requests: Sequence[Request],
        key: jax.Array,
        *,
        temperature: float,
    ) -> Iterator[Completion]:
        """Yields every completion as it ends, in no particular order.

        Args:
          weights: the decode form.
          requests: prompts, and how many samples of each.
          key: of this rollout; two requests with the same stream get the same random numbers.
          temperature: divides the logits; 0 takes the likeliest token.
        """
        for request in requests:
            if not 0 < len(request.prompt) <= self.max_prompt:
                raise ValueError(
                    f"a prompt of {len(request.prompt)} tokens; between 1 and {self.max_prompt} "
                    "are allowed (data.max_prompt_tokens)"
                )
        self.stats = EngineStats()
        started = time.monotonic()
        queue = collections.deque(
            (number, sample)
            for number, request in enumerate(requests)
            for sample in range(request.num_samples)
        )
        slots = self._empty()
        running: list[_Running | None] = [None] * self.num_slots
        halted_B = np.zeros(self.num_slots, bool)
        threshold = max(1, self.num_slots // _REFILL_SHARE)
        while queue or any(running):
            idle = sum(owner is None for owner in running)
            if queue and (idle >= threshold or idle == self.num_slots):
                slots = self._refill(weights, slots, requests, queue, running, halted_B, key)
                idle = sum(owner is None for owner in running)
            # Relative to what idles already: a loop whose exit test is true at entry never moves.
            stop_at = min(idle + threshold, self.num_slots) if queue else self.num_slots
            slots, tokens, logprobs = self._decode(
                weights,
                slots,
                halted_B,
                jnp.int32(stop_at),
                jnp.float32(temperature or 1.0),
                greedy=temperature == 0,
            )
            tokens_NB, logprobs_NB = jax.device_get((tokens, logprobs))
            halted_B = np.zeros(self.num_slots, bool)
            self.stats.slot_steps += int((tokens_NB >= 0).any(axis=1).sum()) * self.num_slots
            for slot, owner in enumerate(running):
                if owner is None:
                    continue
                finish = self._extend(owner, tokens_NB[:, slot], logprobs_NB[:, slot])
                if finish:
                    halted_B[slot] = True
                    running[slot] = None
                    self.stats.tokens += len(owner.tokens)
                    self.stats.seconds = time.monotonic() - started
                    yield Completion(
                        owner.request,
                        owner.sample,
                        tuple(owner.tokens),
                        np.array(owner.logprobs, np.float32),
                        finish,
                    )
        self.stats.seconds = time.monotonic() - started

    def num_compiled(self) -> int:
        """Programs compiled so far; constant once every shape has been seen."""
        programs: Any = (self._empty, self._prefill, self._insert, self._decode)
        return sum(program._cache_size() for program in programs)

    def _refill(
        self,
        weights: Params,
        slots: Slots,
        requests: Sequence[Request],
        queue: collections.deque[tuple[int, int]],
        running: list[_Running | None],
        halted_B: np.ndarray,
        key: jax.Array,
    ) -> Slots:
        """Gives every idle slot the next sample of the queue, a few prompts at a time."""
        free = [slot for slot, owner in enumerate(running) if owner is None]
        while free and queue:
            taken = self._take(queue, len(free))
            placed = dict(zip(free, taken, strict=False))
            free = free[len(taken) :]
            for slot, (number, sample) in placed.items():
                running[slot] = _Running(number, sample)
                halted_B[slot] = False
            tokens_RQ, fill = self._fill(requests, placed)
            slots = self._insert(slots, self._prefill(weights, tokens_RQ), fill, key)
        return slots

    def _take(self, queue: collections.deque[tuple[int, int]], most: int) -> list[tuple[int, int]]:
        """The next samples, at most so many, of as many prompts as one prefill reads."""
        taken: list[tuple[int, int]] = []
        numbers: set[int] = set()
        while queue and len(taken) < most:
            if len(numbers | {queue[0][0]}) > self._prefill_rows:
                break
            taken.append(queue.popleft())
            numbers.add(taken[-1][0])
        return taken

    def _fill(
        self, requests: Sequence[Request], placed: dict[int, tuple[int, int]]
    ) -> tuple[np.ndarray, Fill]:
        """Prompts to prefill, each once, and which of them goes into which slot."""
        B = self.num_slots
        rows = {number: row for row, number in enumerate(sorted({n for n, _ in placed.values()}))}
        tokens_RQ = np.zeros((self._prefill_rows, self.max_prompt), np.int32)
        for number, row in rows.items():
            tokens_RQ[row, : len(requests[number].prompt)] = requests[number].prompt
            self.stats.prompt_tokens += len(requests[number].prompt)
        fill = Fill(
            take_B=np.zeros(B, bool),
            source_B=np.zeros(B, np.int32),
            prompt_len_B=np.ones(B, np.int32),
            last_token_B=np.zeros(B, np.int32),
            stream_B=np.zeros(B, np.uint32),
            sample_B=np.zeros(B, np.int32),
        )
        for slot, (number, sample) in placed.items():
            request = requests[number]
            fill.take_B[slot] = True
            fill.source_B[slot] = rows[number]
            fill.prompt_len_B[slot] = len(request.prompt)
            fill.last_token_B[slot] = request.prompt[-1]
            fill.stream_B[slot] = request.stream
            fill.sample_B[slot] = sample
        return tokens_RQ, fill

    def _extend(self, owner: _Running, tokens_N: np.ndarray, logprobs_N: np.ndarray) -> str:
        """Adds a dispatch's tokens to a completion; why it ended, or "" if it goes on."""
        for token, logprob in zip(tokens_N.tolist(), logprobs_N.tolist(), strict=True):
            if token < 0:
                break
            owner.tokens.append(token)
            owner.logprobs.append(logprob)
            if token in self.tokenizer.eos_ids:
                return EOS
            if self.stop_strings:
                tail = self.tokenizer.decode(owner.tokens[-self._stop_window :])
                if any(text in tail for text in self.stop_strings):
                    return STOP
            if len(owner.tokens) == self.max_new:
                return LENGTH
        return ""
