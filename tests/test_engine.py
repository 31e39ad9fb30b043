"""The rollout engine: what it samples, when it stops, and what must not matter to either."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from toy_model import ARCH, ToyTokenizer, mesh_of, toy_params

from grpo.batch import RowShape, Sample, pack
from grpo.engine import engine as engine_module
from grpo.engine.engine import Begun, Engine, Request, buckets, shared_slots
from grpo.engine.placement import Queue
from grpo.engine.programs import Slots, _guess
from grpo.engine.sampling import inverse_cdf, sample_token
from grpo.model.decoder import to_decode
from grpo.model.logprobs import completion_logprobs
from grpo.model.params import Params, decode_table, param_table
from grpo.sharding import DECODE_RULES, param_shardings
from grpo.structs import Completion

MAX_PROMPT, MAX_NEW = 6, 12
TOKENIZER = ToyTokenizer()

# ---- one token -------------------------------------------------------------------------------


@functools.cache
def compiled_inverse_cdf():
    return jax.jit(inverse_cdf)


def draw(probability_V: np.ndarray, uniform_B: np.ndarray) -> np.ndarray:
    rows_BV = np.broadcast_to(probability_V, (len(uniform_B), len(probability_V)))
    return np.asarray(compiled_inverse_cdf()(rows_BV, uniform_B))


def test_frequencies_are_the_probabilities():
    probability_V = np.array([0.3, 0.0, 0.02, 0.18, 0.25, 0.05, 0.2], np.float32)
    uniform_B = np.random.default_rng(0).random(20_000, np.float32)
    count_V = np.bincount(draw(probability_V, uniform_B), minlength=7)
    possible = probability_V > 0
    expected = probability_V[possible] * len(uniform_B)
    chi_square = ((count_V[possible] - expected) ** 2 / expected).sum()
    assert chi_square < 20.5  # 99.9 % of chi-square with 5 degrees of freedom
    assert count_V[~possible] == 0


def ulps_around(values: np.ndarray) -> np.ndarray:
    """The values and their nearest neighbours in float32, eight on each side."""
    bits = values.astype(np.float32).view(np.int32)
    near = bits[:, None] + np.arange(-8, 9, dtype=np.int32)
    return near.clip(0).view(np.float32).reshape(-1)


@pytest.mark.parametrize("V", [5, 128, 300, 1000])
def test_an_impossible_token_is_never_drawn(V):
    """Goals at and around every edge of the cumulated probabilities, where rounding decides."""
    rng = np.random.default_rng(V)
    nearly_one = np.nextafter(1, 0, dtype=np.float32)
    for kind in ["first half", "last token", "block ends", *["sparse, block starts empty"] * 8]:
        probability_V = rng.random(V).astype(np.float32) ** 4 + np.float32(1e-3)
        if kind == "first half":
            probability_V[V // 2 :] = 0
        elif kind == "last token":
            probability_V[:-1] = 0
        elif kind == "block ends":
            probability_V[(np.arange(V) + 2) % 128 > 1] = 0
            probability_V[2] = 0.1
        else:
            probability_V[rng.random(V) < 0.6] = 0
            probability_V[0::128] = 0
            probability_V[2] = 0.1
        probability_V /= probability_V.sum()
        edges = np.cumsum(probability_V.astype(np.float64))
        tries = [ulps_around(edges), np.array([0.0, nearly_one]), rng.random(100)]
        uniform_B = np.concatenate(tries).astype(np.float32)
        token_B = draw(probability_V, np.where(uniform_B < 1, uniform_B, nearly_one))
        assert token_B.min() >= 0 and token_B.max() < V, kind
        assert (probability_V[token_B] > 0).all(), kind


def test_zero_gives_the_first_and_nearly_one_the_last_possible_token():
    probability_V = np.zeros(300, np.float32)
    probability_V[[130, 131, 257]] = 0.25, 0.5, 0.25
    uniform_B = np.array([0, 0.249, 0.251, 0.749, 0.751, np.nextafter(1, 0, dtype=np.float32)])
    assert draw(probability_V, uniform_B.astype(np.float32)).tolist() == [
        130, 130, 131, 131, 257, 257,
    ]  # fmt: skip


def test_greedy_ignores_the_random_number():
    logits_BV = jnp.array([[0, 3, 1], [2, 0, 1]], jnp.float32)
    for uniform in (0.0, 0.99):
        token_B, logprob_B = sample_token(
            logits_BV, jnp.full(2, uniform), jnp.float32(1), greedy=True
        )
        assert token_B.tolist() == [1, 0]
        np.testing.assert_allclose(
            logprob_B, np.asarray(jax.nn.log_softmax(logits_BV))[[0, 1], [1, 0]], atol=1e-6
        )


# ---- whole rollouts --------------------------------------------------------------------------


@functools.cache
def mesh(devices: int) -> Mesh:
    return mesh_of(data=4, tensor=2) if devices == 8 else mesh_of()


@functools.cache
def decode_weights(devices: int) -> Params:
    to_form = partial(to_decode, arch=ARCH, dtype="float32")
    shardings = param_shardings(
        decode_table(param_table(ARCH), ARCH.num_layers), mesh(devices), DECODE_RULES
    )
    return jax.jit(to_form, out_shardings=shardings)(toy_params())


@functools.cache
def engine(
    slots: int = 8,
    dispatch: int = 5,
    devices: int = 1,
    stops: tuple[str, ...] = (),
    shared: int = 1,
    tail: int = 0,
    drafts: int = 0,
    goes_on: bool = False,
):
    """An engine, compiled once for all tests that want it; `shared` slots have a prompt."""
    with jax.set_mesh(mesh(devices)):
        return Engine(
            ARCH,
            TOKENIZER,
            mesh(devices),
            max_prompt=MAX_PROMPT,
            max_new=MAX_NEW,
            slots=slots,
            slots_per_prompt=shared,
            tokens_per_dispatch=dispatch,
            dtype="float32",
            stop_strings=stops,
            tail_slots=tail,
            draft_tokens=drafts,
            goes_on=goes_on,
        )


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 30, length).tolist() for length in (1, 6, 3, 4, 2, 6, 5)]


REQUESTS = [Request(prompt, stream, 3) for stream, prompt in enumerate(prompts())]

Samples = dict[tuple[int, int], Completion]


def sample(
    which: Engine,
    requests: Sequence[Request] = REQUESTS,
    *,
    temperature: float = 0.8,
    seed: int = 0,
) -> Samples:
    """Everything the engine yields, by (stream, sample)."""
    devices = which.mesh.size
    with jax.set_mesh(which.mesh):
        done = list(
            which.run(
                decode_weights(devices), requests, jax.random.key(seed), temperature=temperature
            )
        )
    named = {(requests[c.problem].stream, c.sample): c for c in done}
    assert len(named) == len(done) == sum(request.num_samples for request in requests)
    return named


@pytest.fixture(scope="module")
def base() -> Samples:
    return sample(engine())


def assert_same(got: Samples, expected: Samples) -> None:
    assert got.keys() == expected.keys()
    for name, completion in got.items():
        assert completion.tokens == expected[name].tokens, name
        assert completion.finish == expected[name].finish, name
        np.testing.assert_allclose(completion.logprobs, expected[name].logprobs, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_and_trainer_agree_on_every_token(temperature):
    """The property that the ratio of the loss stands on; in float32 it is an equality."""
    samples = list(sample(engine(), temperature=temperature).values())
    length = MAX_PROMPT + MAX_NEW
    rows = [
        Sample(group=c.problem, prompt=REQUESTS[c.problem].prompt, completion=c.tokens)
        for c in samples
    ]
    batch = pack(rows, RowShape(len(rows), 4 * length, 4 * MAX_NEW))
    settings: dict[str, Any] = {"dtype": "float32", "remat": "none", "chunk": MAX_NEW}
    logprobs_RC, _ = trainer_logprobs(temperature, **settings)(toy_params(), batch.microbatches[0])
    for completion, (row, start) in zip(samples, batch.places, strict=True):
        expected_C = np.asarray(logprobs_RC)[row, start : start + len(completion.tokens)]
        np.testing.assert_allclose(completion.logprobs, expected_C, rtol=0, atol=1e-5)


def trainer_logprobs(temperature: float, **settings: Any):
    return jax.jit(
        lambda params, batch: completion_logprobs(
            params, ARCH, batch, temperature=temperature, **settings
        )
    )


@pytest.mark.parametrize(
    "slots, dispatch, devices, shared",
    [(1, 3, 1, 1), (4, 1, 1, 2), (21, 16, 1, 3), (24, 16, 1, 8), (8, 5, 8, 1), (8, 5, 8, 2)],
)
def test_topology_does_not_change_a_sample(base, slots, dispatch, devices, shared):
    """Neither do the slots it may run in, those that share its prompt, the tokens a dispatch, or
    the mesh."""
    assert_same(sample(engine(slots, dispatch, devices, (), shared)), base)


def test_looking_at_less_of_the_cache_does_not_change_a_sample(base, monkeypatch):
    monkeypatch.setattr(engine_module, "_SHORTEST", 2)
    which = engine.__wrapped__(8, 2, 1, (), 2)
    assert which._views == (2, 4, 8, 12) and which._prompt_lengths == (2, 4, 6)
    with jax.set_mesh(which.mesh):
        which.compile(decode_weights(1))
        programs = which.num_compiled()
        assert programs == 2 + len(which._views) + len(which._prompt_lengths)
        assert programs == len(which.programs(decode_weights(1)))  # which a plan compiles
    assert_same(sample(which), base)
    assert which.num_compiled() == programs


@pytest.mark.parametrize(
    "shared, tail, drafts, devices", [(2, 2, 0, 1), (1, 4, 3, 1), (2, 4, 2, 8)]
)
@pytest.mark.parametrize("temperature", [0.8, 0.0])
def test_the_tail_gets_the_same_samples(base, shared, tail, drafts, devices, temperature):
    which = engine(8, 5, devices, (), shared, tail, drafts)
    expected = base if temperature else sample(engine(), temperature=0.0)
    assert_same(sample(which, temperature=temperature), expected)


def test_guesses_are_what_followed_the_last_two_tokens():
    def guess(prompt: list[int], written: list[int]) -> list[int]:
        history_BC = np.full((1, 8), -1, np.int32)
        history_BC[0, : len(written)] = written
        state: dict[str, Any] = {
            "prompts": [],
            "prompt_len_P": np.array([len(prompt) - 1]),
            "prompt_PQ": np.array([prompt + [-1] * (6 - len(prompt))]),
            "cache": [],
            "token_B": np.array([written[-1]]),
            "written_B": np.array([len(written)]),
            "history_BC": history_BC,
            "key_B2": None,
            "active_B": None,
        }
        return _guess(Slots(**jax.tree.map(jnp.asarray, state)), 2)[0].tolist()

    assert guess([1, 2, 3, 4], [9, 1, 2]) == [3, 4]  # from the prompt
    assert guess([1, 2, 3, 4], [1, 2, 7, 8, 1, 2]) == [7, 8]  # the completion comes first
    assert guess([5], [1, 2, 3, 1, 2, 4, 1, 2]) == [4, 1]  # the last time counts
    assert guess([1, 2], [9, 1, 2])[0] == -1  # nothing known to follow
    assert guess([1, 2, 3], [1]) == guess([1, 2, 3], [4, 5]) == [-1, -1]


def test_good_guesses_save_passes():
    """A text that repeats itself: greedy completions of this model do."""
    plain, guessing = engine(8, 5, 1, (), 1, 4), engine(8, 5, 1, (), 1, 4, 3)
    few = REQUESTS[:1]
    assert_same(sample(guessing, few, temperature=0.0), sample(plain, few, temperature=0.0))
    assert guessing.stats.passes < plain.stats.passes


def test_buckets_double_up_to_the_longest():
    assert buckets(10) == (10,) and buckets(64) == (64,)
    assert buckets(300) == (64, 128, 256, 300)


@pytest.mark.parametrize(
    "slots, ways, group_size, completions, shared",
    [(16, 1, 8, 16, 8), (16, 1, 8, 128, 2), (12, 1, 8, 12, 6), (8, 8, 8, 8, 1), (64, 2, 8, 128, 2)],
)
def test_slots_share_a_prompt_where_a_group_runs_at_once(
    slots, ways, group_size, completions, shared
):
    assert shared_slots(slots, ways, group_size, completions) == shared


# ---- the queue ---------------------------------------------------------------------------------


def test_a_queue_fills_places_in_order_and_helps_the_longest():
    queue = Queue([3, 5], places=2, slots_per_place=2)
    busy = [False] * 4
    first = queue.place(busy, at_least=1)
    assert first.prompts == [(0, 0), (1, 1)]
    assert first.samples == {0: (0, 0), 1: (0, 1), 2: (1, 0), 3: (1, 1)}
    assert queue.left() == 4
    # Slot 0 goes on with its prompt; slot 1 is not free.
    assert queue.place([False, True, True, True], 1).samples == {0: (0, 2)}
    # The first prompt has nothing left: its place waits for both slots, then helps the other.
    assert not queue.place([False, True, True, True], 1).samples
    last = queue.place([False, False, True, True], 1)
    assert last.prompts == [(0, 1)] and last.samples == {0: (1, 2), 1: (1, 3)}
    assert queue.place([True, True, True, False], 1).samples == {3: (1, 4)}
    assert queue.left() == 0


def test_a_queue_waits_for_enough_free_slots_unless_all_are():
    queue = Queue([8], places=1, slots_per_place=4)
    queue.place([False] * 4, 4)
    assert not queue.place([False, True, True, True], 2).samples and queue.left() == 4
    assert len(queue.place([False, False, True, True], 2).samples) == 2
    assert len(queue.place([False] * 4, 9).samples) == 2


def test_a_queue_begins_every_sample_exactly_once():
    rng = np.random.default_rng(0)
    for _ in range(30):
        wanted = rng.integers(0, 6, rng.integers(1, 8)).tolist()
        places, per_place = int(rng.integers(1, 4)), int(rng.integers(1, 4))
        queue, begun = Queue(wanted, places, per_place), []
        busy, stored = [False] * (places * per_place), {}
        while queue.left():
            placed = queue.place(busy, int(rng.integers(1, 4)))
            for place, request in placed.prompts:
                assert not any(busy[place * per_place : (place + 1) * per_place])
                stored[place] = request
            for slot, (request, number) in placed.samples.items():
                assert not busy[slot] and stored[slot // per_place] == request
                busy[slot] = True
                begun.append((request, number))
            busy = [b and rng.random() < 0.5 for b in busy]
        assert sorted(begun) == [(r, n) for r, count in enumerate(wanted) for n in range(count)]


def test_company_does_not_change_a_sample(base):
    """Neither the order of the requests, nor which others there are."""
    assert_same(sample(engine(), REQUESTS[::-1]), base)
    few = sample(engine(), REQUESTS[4:6])
    assert_same(few, {name: base[name] for name in few})


def test_samples_differ_by_number_stream_and_key(base):
    prompt = REQUESTS[1].prompt
    twins = sample(engine(), [Request(prompt, 1, 3), Request(prompt, 99, 3)])
    assert_same(
        {n: c for n, c in twins.items() if n[0] == 1}, {(1, i): base[1, i] for i in range(3)}
    )
    assert len({c.tokens for c in twins.values()}) == 6
    other = sample(engine(), seed=1)
    assert all(other[name].tokens != base[name].tokens for name in base)


def test_greedy_takes_the_likeliest_token_and_reports_its_probability():
    samples = sample(engine(), temperature=0.0)
    assert all(samples[p, 0].tokens == samples[p, g].tokens for p, g in samples)
    logprobs = np.concatenate([c.logprobs for c in samples.values()])
    assert (logprobs > -np.log(ARCH.vocab_size)).all()  # the likeliest beats an even share


def test_completions_end_for_the_reason_they_give(base):
    assert {c.finish for c in base.values()} == {"eos", "length"}
    last = set()
    for completion in base.values():
        *body, end = completion.tokens
        assert len(completion.logprobs) == len(completion.tokens) <= MAX_NEW
        assert not set(body) & set(TOKENIZER.eos_ids)
        if completion.finish == "eos":
            assert end in TOKENIZER.eos_ids  # stopping is an action, and is there to be trained
            last.add(end)
        else:
            assert end not in TOKENIZER.eos_ids and len(completion.tokens) == MAX_NEW
    assert last == {30, 31}  # both stop tokens stop


def cut(completion: Completion, stops: tuple[str, ...]) -> tuple[tuple[int, ...], str]:
    """Where a completion must end: the shortest prefix whose text holds a stop string."""
    for end in range(1, len(completion.tokens) + 1):
        text = TOKENIZER.decode(completion.tokens[:end])
        if any(stop in text for stop in stops) and completion.tokens[end - 1] < 30:
            return completion.tokens[:end], "stop"
    return completion.tokens, completion.finish


def stop_strings(samples: Samples) -> tuple[str, str]:
    """Text over three tokens of one sample, and the first letter of another's two-letter token."""
    long = next(c.tokens for c in samples.values() if len(c.tokens) == MAX_NEW)
    across = TOKENIZER.decode(long[4:7])
    inside = {26: "a", 27: "c", 28: "e", 29: "g"}
    pair = next(t for c in samples.values() for t in c.tokens if t in inside and t not in long)
    return across, inside[pair]


@pytest.mark.parametrize("dispatch", [1, 16])
def test_stop_strings_end_at_the_token_that_completes_them(base, dispatch):
    stops = stop_strings(base)
    assert len(stops[0]) >= 3
    expected = {name: cut(completion, stops) for name, completion in base.items()}
    got = sample(engine(8, dispatch, 1, stops))
    assert {name: (c.tokens, c.finish) for name, c in got.items()} == expected
    shortened = [name for name in base if len(expected[name][0]) < len(base[name].tokens)]
    assert len(shortened) >= 3
    for name, completion in got.items():
        length = len(completion.tokens)
        np.testing.assert_allclose(completion.logprobs, base[name].logprobs[:length], atol=1e-5)


def test_one_stop_string_may_lie_across_tokens(base):
    across = stop_strings(base)[0]
    hit = [c for c in base.values() if cut(c, (across,))[1] == "stop"]
    assert hit
    for completion in hit:
        end = len(cut(completion, (across,))[0])
        assert across not in TOKENIZER.decode(completion.tokens[end - 1 : end])


# ---- programs --------------------------------------------------------------------------------


def test_nothing_compiles_after_warm_up():
    """Counted by jax itself, so that no program can be forgotten; new prompts, keys and orders."""
    which = engine()
    few = REQUESTS[:1]
    for requests, temperature in itertools.product((REQUESTS, few), (0.8, 0.0)):
        sample(which, requests, temperature=temperature)
    programs, compiled = which.num_compiled(), []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for seed, requests in enumerate((REQUESTS, few, REQUESTS[::-1], REQUESTS[2:4])):
            for temperature in (0.8, 1.3, 0.0):
                sample(which, requests, temperature=temperature, seed=seed)
        assert which.num_compiled() == programs and not compiled
        jax.jit(lambda x: x + seed)(1.0)
        assert compiled  # the listener listens
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_the_cache_is_written_in_place():
    """Donated and aliased: a second cache would halve the number of slots that fit."""
    which = engine()
    with jax.set_mesh(which.mesh):
        slots = which._programs.empty()
        arguments = (decode_weights(1), slots, np.zeros(8, bool), np.int32(8), np.float32(1), None)
        compiled = which._programs.decode.lower(*arguments, view=MAX_NEW, greedy=False).compile()
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((slots.prompts, slots.cache)))
    expected = 2 * 2 * 8 * (MAX_PROMPT + MAX_NEW) * ARCH.num_kv_heads * ARCH.head_width * 4
    assert cache_bytes == expected
    assert compiled.memory_analysis().alias_size_in_bytes >= cache_bytes


def test_a_prompt_is_stored_once_for_the_slots_that_share_it():
    which = engine(8, 5, 1, (), 4)
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(which._programs.empty().prompts))
    assert stored == 2 * 2 * 2 * MAX_PROMPT * ARCH.num_kv_heads * ARCH.head_width * 4


def test_stats_count_the_tokens(base):
    which = engine()
    samples = sample(which)
    stats = which.stats
    assert stats.tokens == sum(len(c.tokens) for c in samples.values())
    assert stats.tokens <= stats.slot_steps
    # Each prompt is read once, or once more where a refill parts a group.
    once = sum(len(request.prompt) for request in REQUESTS)
    assert once <= stats.prompt_tokens < 3 * once
    assert 0 <= stats.idle_s <= stats.seconds


@pytest.mark.parametrize("length", [0, MAX_PROMPT + 1])
def test_a_prompt_that_does_not_fit_is_an_error(length):
    with pytest.raises(ValueError, match=f"a prompt of {length} tokens; between 1 and 6"):
        sample(engine(), [Request([1] * length, 0, 1)])


def test_settings_that_cannot_work_are_errors():
    with pytest.raises(ValueError, match=r"sample.slots \(6\) must be a multiple of .* = 4"):
        engine(slots=6, devices=8)
    with pytest.raises(
        ValueError, match=r"60 \+ .* 12\) = 72|= 72 exceeds the model's 64 positions"
    ):
        Engine(
            ARCH,
            TOKENIZER,
            mesh(1),
            max_prompt=60,
            max_new=MAX_NEW,
            slots=8,
            tokens_per_dispatch=5,
            dtype="float32",
        )


# ---- going on with what was begun ----------------------------------------------------------------


def split(samples: Samples, seed: int = 0) -> list[Request]:
    """REQUESTS as if another rollout had written a part of each sample, or all, or nothing."""
    rng, requests = np.random.default_rng(seed), []
    for request in REQUESTS:
        begun, done = {}, []
        for number in range(request.num_samples):
            completion = samples[request.stream, number]
            count = int(rng.integers(0, len(completion.tokens) + 1))
            if count == len(completion.tokens):
                done.append(number)
            elif count:
                begun[number] = Begun(completion.tokens[:count], completion.logprobs[:count])
        requests.append(dataclasses.replace(request, begun=begun, done=done))
    return requests


def rest(which: Engine, requests: Sequence[Request], **settings: Any) -> Samples:
    """What the engine yields of samples that are not done, by (stream, sample)."""
    with jax.set_mesh(which.mesh):
        found = list(
            which.run(
                decode_weights(which.mesh.size),
                requests,
                jax.random.key(0),
                temperature=0.8,
                **settings,
            )
        )
    return {(requests[c.problem].stream, c.sample): c for c in found}


@pytest.mark.parametrize(
    "slots, dispatch, devices, shared, tail, drafts",
    [(8, 5, 1, 1, 0, 0), (4, 1, 1, 2, 0, 0), (8, 5, 8, 2, 0, 0), (8, 5, 1, 1, 4, 3)],
)
def test_what_was_begun_goes_on_as_if_it_had_never_stopped(
    base, slots, dispatch, devices, shared, tail, drafts, monkeypatch
):
    """Reading three to five tokens at a time, so that most samples need several chunks."""
    monkeypatch.setattr(engine_module, "_REPLAY_TOKENS", 3 * slots)
    which = engine.__wrapped__(slots, dispatch, devices, (), shared, tail, drafts, True)
    requests = split(base)
    done = {(r.stream, number) for r in requests for number in r.done}
    assert len(done) >= 2 and sum(len(r.begun) for r in requests) >= 10
    got = rest(which, requests)
    assert_same(got, {name: c for name, c in base.items() if name not in done})
    for request in requests:  # what was handed in comes back bit by bit
        for number, begun in request.begun.items():
            np.testing.assert_array_equal(
                got[request.stream, number].logprobs[: len(begun.tokens)], begun.logprobs
            )
    written = sum(len(b.tokens) for r in requests for b in r.begun.values())
    assert which.stats.tokens == sum(len(c.tokens) for c in got.values()) - written
    assert not which.unfinished


@pytest.mark.parametrize("dispatch, tail", [(1, 0), (5, 0), (5, 4)])
def test_a_rollout_that_is_ended_early_can_be_gone_on_with(base, dispatch, tail):
    """Stopped after every few completions: the parts put together are the uninterrupted rollout."""
    which, requests = engine(8, dispatch, 1, (), 1, tail), list(REQUESTS)
    found: Samples = {}
    rollouts = 0
    while len(found) < len(base):
        counted: list[Completion] = []
        rollouts, before = rollouts + 1, len(found)

        def enough(counted=counted):
            return len(counted) >= 4

        with jax.set_mesh(which.mesh):
            for completion in which.run(
                decode_weights(1), requests, jax.random.key(0), temperature=0.8, enough=enough
            ):
                counted.append(completion)
                name = requests[completion.problem].stream, completion.sample
                assert name not in found
                found[name] = completion
        assert len(found) == len(base) or (len(found) >= before + 4 and which.unfinished)
        requests = [
            dataclasses.replace(
                request,
                done=[s for stream, s in found if stream == request.stream],
                begun={s: b for (n, s), b in which.unfinished.items() if n == number},
            )
            for number, request in enumerate(requests)
        ]
    assert rollouts >= 3
    assert_same(found, base)


def test_what_waits_with_its_tokens_is_not_lost(base):
    """More begun samples than slots, and a rollout that ends at once."""
    which, requests = engine(4, 1, 1, (), 2), split(base)
    assert not rest(which, requests, enough=lambda: True)
    expected = {(n, s): b for n, r in enumerate(requests) for s, b in r.begun.items()}
    assert which.unfinished == expected


def test_a_replay_is_compiled_beforehand_and_in_place():
    with jax.set_mesh(mesh(1)):
        which = Engine(
            ARCH,
            TOKENIZER,
            mesh(1),
            max_prompt=MAX_PROMPT,
            max_new=MAX_NEW,
            slots=8,
            tokens_per_dispatch=5,
            dtype="float32",
            goes_on=True,
        )
        which.compile(decode_weights(1))
        programs = which.num_compiled()
        assert programs == len(which.programs(decode_weights(1)))
        slots = which._programs.empty()
        arguments = (
            decode_weights(1),
            slots,
            np.zeros((8, MAX_NEW), np.int32),
            np.zeros(8, np.int32),
        )
        compiled = which._programs.replay.lower(*arguments).compile()
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((slots.prompts, slots.cache)))
    memory: Any = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    rest(which, [Request([1, 2], 0, 2, begun={1: Begun((3,), np.zeros(1, np.float32))})])
    assert which.num_compiled() == programs


@pytest.mark.parametrize("length", [0, MAX_NEW])
def test_a_completion_that_cannot_go_on_is_an_error(length):
    begun = {0: Begun((1,) * length, np.zeros(length, np.float32))}
    with pytest.raises(ValueError, match=f"goes on behind {length} tokens; between 1 and 11"):
        rest(engine(), [Request([1, 2], 0, 1, begun=begun)])
