"""The rollout engine: a fixed number of slots, refilled as completions end.

The device state is P prompts with G slots each (`grpo.engine.programs`): a prompt is read once,
stored once and, at every token, looked at once for all its slots. The host keeps what is still to
be sampled. It reads a dispatch's tokens while the next one runs, hands out each completion the
moment it sees its end, so that scoring runs while the rest still decode, and gives free slots
further samples of their prompt, or a prompt whose slots are all free another one.

A sample depends on its key, its prompt's stream and its sample number only: never on the slot it
ran in, on what else was running, or on the mesh. One that was begun in an earlier rollout goes on
as if it had never stopped: its tokens are read again, with the weights of now.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpo.data.tokenizer import Tokenizer
from grpo.engine.placement import Queue
from grpo.engine.programs import Programs, Slots, Start
from grpo.engine.sampling import Filters
from grpo.model.arch import Arch
from grpo.model.params import Params
from grpo.sharding import batch_ways
from grpo.structs import EOS, LENGTH, STOP, Completion, Program

_REFILL_SHARE = 8  # refill once 1/8 of the slots are idle: fewer, larger prefills
_BUSY_TOKENS = 512  # of a prefill
_REPLAY_TOKENS = 512  # of one pass over completions begun earlier, all slots together
_SHORTEST = 64  # of the lengths that prompts and views come in: 64, 128, 256 ...


class Begun(NamedTuple):
    """A completion so far: its tokens, and float32 nats of each from the sampler of its time."""

    tokens: tuple[int, ...]
    logprobs: np.ndarray


@dataclasses.dataclass(frozen=True)
class Request:
    """Samples wanted of one prompt.

    Attributes:
      prompt: token ids.
      stream: names the prompt to the random numbers (uint32).
      num_samples: they are numbered from 0.
      done: samples that are there already, and not sampled.
      begun: sample -> what it has written, for those that go on.
    """

    prompt: Sequence[int]
    stream: int
    num_samples: int
    done: Collection[int] = ()
    begun: Mapping[int, Begun] = dataclasses.field(default_factory=dict)

    @property
    def wanted(self) -> list[int]:
        """The samples to be sampled, those begun first: they are nearest to their ends."""
        open_ = [sample for sample in range(self.num_samples) if sample not in self.done]
        return sorted(open_, key=lambda sample: sample not in self.begun)


@dataclasses.dataclass
class EngineStats:
    """What a rollout cost.

    Attributes:
      tokens: sampled in this rollout and wanted.
      prompt_tokens: read.
      passes: through the model, to decode.
      slot_steps: slots x passes; `tokens` over this is the occupancy (above 1 where good guesses
        give several tokens a pass).
      seconds: from the first request to the last completion.
      idle_s: of them the devices had nothing to do, at most.
    """

    tokens: int = 0
    prompt_tokens: int = 0
    passes: int = 0
    slot_steps: int = 0
    seconds: float = 0.0
    idle_s: float = 0.0


@dataclasses.dataclass
class _Running:
    """Host side of a busy slot."""

    request: int
    sample: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    routes: list["_Routes"] = dataclasses.field(default_factory=list)  # of the tokens before each
    begun: int = 0  # of its tokens are from an earlier rollout
    done: bool = False

    def sampled(self) -> int:
        return len(self.tokens) - self.begun


@dataclasses.dataclass
class _Dispatch:
    """A decode on its way: its results, and whose tokens they are."""

    tokens_NB: jax.Array
    logprobs_NB: jax.Array
    passes: jax.Array
    routes_BNLk: jax.Array | None
    owners: list[_Running | None]


def _begin(request: int, sample: int, begun: dict[tuple[int, int], Begun]) -> _Running:
    """The owner of a slot, with what it wrote before taken out of `begun`."""
    so_far = begun.pop((request, sample), None)
    if so_far is None:
        return _Running(request, sample)
    written = list(so_far.tokens)
    return _Running(request, sample, written, so_far.logprobs.tolist(), begun=len(written))


class _Routes(NamedTuple):
    """Experts that `length` tokens in a row went to; perhaps still on the devices."""

    array_RSLk: Any
    row: int
    length: int


def _joined(pieces: Sequence[_Routes]) -> np.ndarray | None:
    """[n, L, k] of all of them; None if there are none."""
    parts = [np.asarray(piece.array_RSLk)[piece.row, : piece.length] for piece in pieces]
    return np.concatenate(parts) if parts else None


def _so_far(owner: _Running) -> Begun:
    return Begun(tuple(owner.tokens), np.array(owner.logprobs, np.float32))


def _is_ready(dispatch: _Dispatch) -> bool:
    array: Any = dispatch.tokens_NB  # the type of an array does not tell of it
    return array.is_ready()


def shared_slots(slots: int, ways: int, group_size: int, completions: int) -> int:
    """How many slots share a stored prompt.

    A whole group where all completions of a rollout run at once. Where they do not, a quarter of
    it: slots that share a prompt wait for one another when it changes, and a group's first
    finished slots can then go on with its next samples. Whatever divides the slots evenly.
    """
    wanted = group_size if slots >= completions else max(1, group_size // 4)
    fitting = [g for g in range(1, wanted + 1) if slots % (g * ways) == 0]
    return max(fitting, default=1)


def buckets(longest: int) -> tuple[int, ...]:
    """Lengths that a compiled program exists for: 64, 128, 256 and so on, and the longest."""
    shorter = []
    length = _SHORTEST
    while length < longest:
        shorter.append(length)
        length *= 2
    return (*shorter, longest)


class Engine:
    """Samples completions with one set of compiled programs.

    Args:
      arch: shape of the model.
      tokenizer: says which ids stop a completion, and reads text for stop strings.
      mesh: devices; slots are split over its batch axes.
      max_prompt: longest prompt, tokens.
      max_new: longest completion, tokens; longer ones are cut off and say so.
      slots: completions decoded side by side.
      slots_per_prompt: of them share a stored prompt; see `shared_slots`.
      tokens_per_dispatch: tokens sampled before the host looks again.
      dtype: of the cache; "int8" quantises it.
      stop_strings: texts that end a completion; the token that completes one is its last.
      tail_slots: once nothing is queued and no more completions than this are left, they go on by
        themselves in a smaller state; 0: never.
      draft_tokens: guessed ahead there, from what the text repeats; fewer than a dispatch has.
      goes_on: requests may hold completions begun in an earlier rollout; `compile` then makes the
        program that reads them, many tokens at a time. Without, it is as slow as sampling them.
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
        slots_per_prompt: int = 1,
        tokens_per_dispatch: int,
        dtype: str,
        stop_strings: tuple[str, ...] = (),
        tail_slots: int = 0,
        draft_tokens: int = 0,
        goes_on: bool = False,
    ):
        ways = batch_ways(mesh)
        if tail_slots % ways or tail_slots > slots // 2:
            raise ValueError(
                f"sample.tail_slots ({tail_slots}) must be a multiple of data x fsdp = {ways}, and "
                f"at most half of sample.slots ({slots})"
            )
        if draft_tokens >= tokens_per_dispatch or (draft_tokens and not tail_slots):
            raise ValueError(
                f"sample.draft_tokens ({draft_tokens}) must be below sample.tokens_per_dispatch "
                f"({tokens_per_dispatch}), and needs sample.tail_slots"
            )
        if slots % (ways * slots_per_prompt):
            raise ValueError(
                f"sample.slots ({slots}) must be a multiple of data x fsdp = {ways} times "
                f"sample.slots_per_prompt = {slots_per_prompt}, so that every device gets the same "
                "number"
            )
        if max_prompt + max_new > arch.max_positions:
            raise ValueError(
                f"max_prompt_tokens ({max_prompt}) + max_new_tokens ({max_new}) = "
                f"{max_prompt + max_new} exceeds the model's {arch.max_positions} positions"
            )
        self.arch, self.tokenizer, self.mesh = arch, tokenizer, mesh
        self.max_prompt, self.max_new, self.num_slots = max_prompt, max_new, slots
        self.slots_per_prompt, self.num_prompts = slots_per_prompt, slots // slots_per_prompt
        self.tokens_per_dispatch = tokens_per_dispatch
        self.stop_strings, self.goes_on = stop_strings, goes_on
        self.tail_slots, self.draft_tokens = tail_slots, draft_tokens
        # A token is at least a byte, so a stop string lies within this many last tokens; the
        # margin is for a character split over tokens.
        self._stop_window = max((len(s.encode()) for s in stop_strings), default=0) + 4
        self._threshold = max(1, slots // _REFILL_SHARE)
        # One width serves the first prefills of a rollout and every refill: a few prompts, but
        # tokens enough to keep the matrix products busy.
        few = max(self.num_prompts // _REFILL_SHARE, math.ceil(_BUSY_TOKENS / max_prompt))
        self._prefill_rows = min(self.num_prompts, few)
        self._prompt_lengths, self._views = buckets(max_prompt), buckets(max_new)
        replayed = max(tokens_per_dispatch, _REPLAY_TOKENS // slots) if goes_on else 1
        self.at_once = min(max_new, max(1 + draft_tokens, replayed))
        self.stats = EngineStats()
        self.unfinished: dict[tuple[int, int], Begun] = {}
        self._heard: Callable[[int, int, Sequence[int]], None] | None = None
        self._prompt_routes: dict[int, _Routes] = {}  # of each request whose prompt was read
        self._programs = Programs(
            arch,
            mesh,
            num_prompts=self.num_prompts,
            slots_per_prompt=slots_per_prompt,
            max_prompt=max_prompt,
            max_new=max_new,
            num_tokens=tokens_per_dispatch,
            stop_ids=tuple(tokenizer.eos_ids),
            at_once=self.at_once,
            dtype=dtype,
        )

    def compile(self, weights: Params) -> None:
        """Compiles every program that sampling at a positive temperature uses, largest first.

        Whatever does not fit is then known before anything has been computed; and no later rollout
        waits for a compiler.
        """
        slots = self._programs.empty()
        for view in reversed(self._views):
            slots, *_ = self._decode(weights, slots, np.ones(self.num_slots, bool), view, 1.0)
        if self.tail_slots:
            nobody = [None] * self.num_slots
            for view in reversed(self._views):
                tail, running = self._compact(slots, nobody)
                self._decode(weights, tail, np.ones(len(running), bool), view, 1.0)
        R = self._prefill_rows
        for length in reversed(self._prompt_lengths):
            nowhere_R = np.full(R, self.num_prompts, np.int32)
            tokens_RQ = np.zeros((R, length), np.int32)
            slots = self._programs.admit(
                weights, slots, tokens_RQ, np.zeros(R, np.int32), nowhere_R
            )
        if self.arch.experts:
            self._programs.routes(slots, np.zeros(R, np.int32), what="prompts")
        slots = self._programs.start(slots, self._nobody(), jax.random.key(0))
        if self.goes_on:
            slots = self._replay(weights, slots, {})
        jax.block_until_ready(slots)

    def programs(self, weights: Params) -> list[Program]:
        """What `compile` compiles, each kind's largest first, for abstract weights."""
        own, B = self._programs, self.num_slots
        programs = [Program("empty cache", own.empty, ())]
        programs += [self._decode_program(weights, own.slots, v) for v in reversed(self._views)]
        if self.tail_slots:
            keep_S = jax.ShapeDtypeStruct((self.tail_slots,), jnp.int32)
            busy_S = jax.ShapeDtypeStruct((self.tail_slots,), jnp.bool_)
            tail = own.compacted(self.tail_slots)
            programs.append(Program("tail", own.compact, (own.slots, keep_S, busy_S)))
            programs += [self._decode_program(weights, tail, v) for v in reversed(self._views)]
        number_R = jax.ShapeDtypeStruct((self._prefill_rows,), jnp.int32)
        for length in reversed(self._prompt_lengths):
            tokens_RQ = jax.ShapeDtypeStruct((self._prefill_rows, length), jnp.int32)
            arguments = (weights, own.slots, tokens_RQ, number_R, number_R)
            programs.append(Program("prefill", own.admit, arguments))
        nobody = jax.eval_shape(self._nobody)
        key = jax.eval_shape(lambda: jax.random.key(0))
        programs.append(Program("insert", own.start, (own.slots, nobody, key)))
        if self.goes_on:
            begun_BC = jax.ShapeDtypeStruct((B, self.max_new), jnp.int32)
            begun_B = jax.ShapeDtypeStruct((B,), jnp.int32)
            programs.append(Program("replay", own.replay, (weights, own.slots, begun_BC, begun_B)))
        return programs

    def _decode_program(self, weights: Params, slots: Slots, view: int) -> Program:
        B = len(slots.token_B)
        arguments = (
            weights,
            slots,
            jax.ShapeDtypeStruct((B,), jnp.bool_),
            jax.ShapeDtypeStruct((), jnp.int32),
            jax.ShapeDtypeStruct((), jnp.float32),
            None,
        )
        whole = self.num_slots == B
        drafts = 0 if whole else self.draft_tokens
        static = {"view": view, "greedy": False, "drafts": drafts}
        kind = "decode" if whole else "tail decode"
        return Program(kind, self._programs.decode, arguments, static)

    def num_compiled(self) -> int:
        """Programs compiled so far; constant once every shape has been seen."""
        return self._programs.num_compiled()

    def run(
        self,
        weights: Params,
        requests: Sequence[Request],
        key: jax.Array,
        *,
        temperature: float,
        filters: Filters | None = None,
        enough: Callable[[], bool] = lambda: False,
        heard: Callable[[int, int, Sequence[int]], None] | None = None,
    ) -> Iterator[Completion]:
        """Yields every completion as it ends, in no particular order.

        Args:
          weights: the decode form.
          requests: prompts, and how many samples of each.
          key: of this rollout; two requests with the same stream get the same random numbers.
          temperature: divides the logits; 0 takes the likeliest token.
          filters: of the tokens that may be drawn.
          enough: looked at after each dispatch, when what ended in it has been handed out; True
            ends the rollout. The dispatch that is then on its way is still read, since the devices
            compute it anyway, so a few more completions may come. What has not ended is in
            `unfinished` afterwards: (number of the request, sample) -> tokens and log-probs so
            far. Where dispatches end decides, not when, so equal rollouts stop equally.
          heard: told of every dispatch what it added to each completion: (number of the request,
            sample, tokens).
        """
        self._check(requests)
        self.stats, self.unfinished, self._heard = EngineStats(), {}, heard
        self._prompt_routes = {}
        stats, started = self.stats, time.monotonic()
        wanted = [request.wanted for request in requests]
        queue = Queue([len(samples) for samples in wanted], self.num_prompts, self.slots_per_prompt)
        begun = {(n, s): b for n, request in enumerate(requests) for s, b in request.begun.items()}
        slots = self._programs.empty()
        running: list[_Running | None] = [None] * self.num_slots
        halted_B = np.zeros(self.num_slots, bool)
        ahead: _Dispatch | None = None
        looked = time.monotonic()
        while (queue.left() or any(running)) and not enough():
            if queue.left():
                placed = queue.place([owner is not None for owner in running], self._threshold)
                new = {
                    slot: _begin(number, wanted[number][nth], begun)
                    for slot, (number, nth) in placed.samples.items()
                }
                if new:
                    slots = self._refill(weights, slots, requests, placed.prompts, new, key)
                for slot, owner in new.items():
                    running[slot], halted_B[slot] = owner, False
            elif self._is_tail(queue, running):
                if ahead is not None:  # who is left is known once everything is read
                    yield from self._read(ahead, running, np.zeros(len(running), bool))
                    ahead = None
                    continue
                slots, running = self._compact(slots, running)
                halted_B = np.zeros(len(running), bool)
            idle = running.count(None)
            # Relative to what idles already: a loop whose exit test is true at entry never moves.
            stop_at = idle + self._threshold if queue.left() else len(running)
            # What the dispatch ahead has written is not known yet.
            dispatches = 1 if ahead is None else 2
            written = max(len(owner.tokens) for owner in running if owner is not None)
            needed = written + dispatches * self.tokens_per_dispatch
            view = next((v for v in self._views if v >= needed), self.max_new)
            if ahead is not None and _is_ready(ahead):
                stats.idle_s += time.monotonic() - looked
            slots, tokens_NB, logprobs_NB, passes, routes_BNLk = self._decode(
                weights, slots, halted_B, view, temperature, filters, stop_at
            )
            behind = ahead
            ahead = _Dispatch(tokens_NB, logprobs_NB, passes, routes_BNLk, list(running))
            halted_B = np.zeros(len(running), bool)
            if behind is not None:
                ended = list(self._read(behind, running, halted_B))
                looked = time.monotonic()
                stats.seconds = looked - started
                yield from ended
        if ahead is not None and any(running):
            yield from list(self._read(ahead, running, halted_B))
        left = [owner for owner in running if owner is not None]
        stats.tokens += sum(owner.sampled() for owner in left)
        self.unfinished = begun | {(o.request, o.sample): _so_far(o) for o in left if o.tokens}
        stats.seconds = time.monotonic() - started

    def _check(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if not 0 < len(request.prompt) <= self.max_prompt:
                raise ValueError(
                    f"a prompt of {len(request.prompt)} tokens; between 1 and {self.max_prompt} "
                    "are allowed (data.max_prompt_tokens)"
                )
            for begun in request.begun.values():
                if not 0 < len(begun.tokens) < self.max_new:
                    raise ValueError(
                        f"a completion goes on behind {len(begun.tokens)} tokens; between 1 and "
                        f"{self.max_new - 1} are allowed (sample.max_new_tokens)"
                    )

    def _decode(
        self,
        weights: Params,
        slots: Slots,
        halted_B: np.ndarray,
        view: int,
        temperature: float,
        filters: Filters | None = None,
        stop_at: int = 0,
    ) -> tuple[Slots, jax.Array, jax.Array, jax.Array, jax.Array | None]:
        return self._programs.decode(
            weights,
            slots,
            halted_B,
            np.int32(min(stop_at, len(halted_B))),
            np.float32(temperature or 1.0),
            filters,
            view=view,
            greedy=temperature == 0,
            drafts=self.draft_tokens if len(halted_B) < self.num_slots else 0,
        )

    def _is_tail(self, queue: Queue, running: Sequence[_Running | None]) -> bool:
        """Few completions are left, and still in the whole state."""
        left = len(running) - running.count(None)
        whole = len(running) == self.num_slots
        return whole and not queue.left() and 0 < left <= self.tail_slots

    def _compact(
        self, slots: Slots, running: Sequence[_Running | None]
    ) -> tuple[Slots, list[_Running | None]]:
        """The busy slots in a state of `tail_slots` slots, and who they are."""
        busy = [slot for slot, owner in enumerate(running) if owner is not None]
        spare = [slot for slot, owner in enumerate(running) if owner is None]
        keep = (busy + spare)[: self.tail_slots]
        busy_S = np.array([running[slot] is not None for slot in keep])
        return (
            self._programs.compact(slots, np.array(keep, np.int32), busy_S),
            [running[slot] for slot in keep],
        )

    def _read(
        self, dispatch: _Dispatch, running: list[_Running | None], halted_B: np.ndarray
    ) -> Iterator[Completion]:
        """Waits for a dispatch; completions that ended in it leave their slots."""
        tokens_NB, logprobs_NB, passes, routes_BNLk = jax.device_get(
            (dispatch.tokens_NB, dispatch.logprobs_NB, dispatch.passes, dispatch.routes_BNLk)
        )
        self.stats.passes += int(passes)
        self.stats.slot_steps += int(passes) * len(dispatch.owners)
        for slot, owner in enumerate(dispatch.owners):
            if owner is None or owner.done:
                continue
            before = len(owner.tokens)
            finish = self._extend(owner, tokens_NB[:, slot], logprobs_NB[:, slot])
            if routes_BNLk is not None:
                owner.routes.append(_Routes(routes_BNLk, slot, len(owner.tokens) - before))
            if self._heard is not None and len(owner.tokens) > before:
                self._heard(owner.request, owner.sample, owner.tokens[before:])
            if finish:
                owner.done = halted_B[slot] = True
                running[slot] = None
                self.stats.tokens += owner.sampled()
                tokens, logprobs = _so_far(owner)
                yield Completion(
                    owner.request,
                    owner.sample,
                    tokens,
                    logprobs,
                    finish,
                    carried=owner.begun,
                    routes=_joined(owner.routes),
                )

    def _refill(
        self,
        weights: Params,
        slots: Slots,
        requests: Sequence[Request],
        prompts: Sequence[tuple[int, int]],
        new: Mapping[int, _Running],
        key: jax.Array,
    ) -> Slots:
        """Puts the owners `new` into their slots; prompts new to their place are read first."""
        R = self._prefill_rows
        for first in range(0, len(prompts), R):
            slots = self._admit(weights, slots, requests, prompts[first : first + R])
        start = self._nobody()
        for slot, owner in new.items():
            start.take_B[slot] = True
            start.token_B[slot] = requests[owner.request].prompt[-1]
            start.stream_B[slot] = requests[owner.request].stream
            start.sample_B[slot] = owner.sample
            if self.arch.experts:
                owner.routes.append(self._prompt_routes[owner.request])
        slots = self._programs.start(slots, start, key)
        begun = {slot: owner for slot, owner in new.items() if owner.begun}
        return self._replay(weights, slots, begun) if begun else slots

    def _replay(self, weights: Params, slots: Slots, begun: Mapping[int, _Running]) -> Slots:
        """Reads what the owners of these slots, just started, had written before."""
        begun_BC = np.full((self.num_slots, self.max_new), -1, np.int32)
        begun_B = np.zeros(self.num_slots, np.int32)
        for slot, owner in begun.items():
            begun_BC[slot, : owner.begun], begun_B[slot] = owner.tokens, owner.begun
        slots = self._programs.replay(weights, slots, begun_BC, begun_B)
        if self.arch.experts:
            owners, R = list(begun.items()), self._prefill_rows
            for first in range(0, max(len(owners), 1), R):
                some = owners[first : first + R]
                slot_R = np.zeros(R, np.int32)
                slot_R[: len(some)] = [slot for slot, _ in some]
                routes_RSLk = self._programs.routes(slots, slot_R, what="cache")
                for row, (_, owner) in enumerate(some):
                    owner.routes.append(_Routes(routes_RSLk, row, owner.begun))
        return slots

    def _admit(
        self,
        weights: Params,
        slots: Slots,
        requests: Sequence[Request],
        prompts: Sequence[tuple[int, int]],
    ) -> Slots:
        """Reads the prompts of (place, request) pairs, no more than a prefill has rows."""
        longest = max(len(requests[number].prompt) for _, number in prompts)
        length = next(bucket for bucket in self._prompt_lengths if bucket >= longest)
        R = self._prefill_rows
        tokens_RQ = np.zeros((R, length), np.int32)
        prompt_len_R = np.zeros(R, np.int32)
        place_R = np.full(R, self.num_prompts, np.int32)  # nowhere, unless taken
        for row, (place, number) in enumerate(prompts):
            prompt = requests[number].prompt
            tokens_RQ[row, : len(prompt)] = prompt
            prompt_len_R[row], place_R[row] = len(prompt) - 1, place
            self.stats.prompt_tokens += len(prompt)
        slots = self._programs.admit(weights, slots, tokens_RQ, prompt_len_R, place_R)
        if self.arch.experts:
            routes_RQLk = self._programs.routes(slots, place_R, what="prompts")
            for row, (_, number) in enumerate(prompts):
                self._prompt_routes[number] = _Routes(routes_RQLk, row, int(prompt_len_R[row]))
        return slots

    def _nobody(self) -> Start:
        B = self.num_slots
        return Start(
            take_B=np.zeros(B, bool),
            token_B=np.zeros(B, np.int32),
            stream_B=np.zeros(B, np.uint32),
            sample_B=np.zeros(B, np.int32),
        )

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
