"""Thoughts cut at a budget or drawn out to it: by hand, of a scripted model and of a real one."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from toy_model import ARCH, ToyTokenizer, mesh_of, toy_params

from grpo.config import EvalConfig
from grpo.data.tokenizer import ByteTokenizer
from grpo.engine.engine import Engine
from grpo.measure.forcing import (
    EXTENDED,
    FORCED,
    BudgetSettings,
    Draft,
    Forcer,
    can_extend,
    go_on,
    held_to,
    read_draft,
    thought_length,
    with_drafts,
)
from grpo.measure.held_out import Evaluator
from grpo.model.decoder import to_decode
from grpo.structs import EOS, LENGTH, STOP, Completion, Rollout
from rewards.api import Problem

BYTES, LETTERS = ByteTokenizer(), ToyTokenizer()


# ---- Where a thought ends ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, length",
    [
        ("ab</think>c", 2),
        ("</think>", 0),
        ("ab</think>c</think>", 2),  # the first counts
        ("ab</thin", None),
        ("", None),
        ("é</think>", 2),  # two bytes, one character
    ],
)
def test_tokens_before_the_end_of_a_thought(text, length):
    assert thought_length(BYTES, BYTES.encode(text), "</think>") == length


def test_bytes_that_are_no_text_are_tokens_of_the_thought():
    tokens = [0xC3, ord("a"), 0xE2, 0x82, *b"</think>x"]
    assert thought_length(BYTES, tokens, "</think>") == 4


def test_a_token_that_straddles_the_end_belongs_to_neither_side():
    assert LETTERS.decode([23, 26, 2, 3]) == "xabcd"
    assert thought_length(LETTERS, [23, 26, 2, 3], "bc") == 1
    assert thought_length(LETTERS, [23, 26, 2, 3], "cd") == 2


@pytest.mark.parametrize(
    "text, finish, thought, closed",
    [
        ("ab</think>c<eos>", EOS, 2, True),
        ("ab</think>c", LENGTH, 2, True),  # only the answer was cut off
        ("abc<eos>", EOS, 3, True),  # all of it, but for the stop token
        ("abc", STOP, 3, True),
        ("abc", LENGTH, 3, False),
    ],
)
def test_the_thought_of_a_completion(text, finish, thought, closed):
    tokens = tuple(BYTES.encode(text.removesuffix("<eos>")))
    tokens += BYTES.eos_ids * text.endswith("<eos>")
    assert read_draft(BYTES, tokens, finish, "</think>") == (tokens, finish, thought, closed)


# ---- What a budget does ------------------------------------------------------------------------


def draft(thought: int, closed: bool = True) -> Draft:
    return Draft((0,) * 20, EOS, thought, closed)


@pytest.mark.parametrize(
    "thought, closed, cut, extended",
    [
        (3, True, False, True),
        (4, True, False, False),  # 4 and 1 in its place leave no room within 5
        (5, True, False, False),
        (5, False, True, False),  # as long as the budget, and not at its end
        (6, True, True, False),
        (6, False, True, False),
    ],
)
def test_what_exceeds_a_budget_of_five_and_what_may_be_drawn_out(thought, closed, cut, extended):
    assert draft(thought, closed).exceeds(5) is cut
    assert can_extend(draft(thought, closed), 5, inserted=1) is extended


@pytest.mark.parametrize(
    "budget, extensions, expected",
    [(9, 0, 2), (9, 1, 5), (9, 2, 8), (9, 9, 8), (3, 9, 2), (4, 9, 5), (7, 9, 8), (6, 9, 5)],
)
def test_a_budget_picks_how_often_a_thought_is_drawn_out(budget, extensions, expected):
    chain = [draft(2), draft(5), draft(8)]
    assert held_to(chain, budget, extensions, inserted=1).thought == expected


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"budget": ()}, r"--budget=\(\) must rise from 1"),
        ({"budget": (0, 4)}, "must rise from 1"),
        ({"budget": (8, 4)}, "must rise"),
        ({"budget": (8, 8)}, "must rise"),
        ({"end_of_thought": ""}, "--end_of_thought is empty"),
        ({"force_answer": ""}, "--force_answer is empty"),
        ({"answer_tokens": 0}, "--answer_tokens=0 must be positive"),
        ({"answer_temperature": -1.0}, "--answer_temperature=-1.0 must be 0"),
        ({"answer_temperature": float("nan")}, "--answer_temperature=nan must be 0"),
        ({"extensions": -1}, "--extensions=-1 cannot be negative"),
        ({"extend_with": ""}, "--extend_with is empty; name a text, or set --extensions=0"),
        ({"extend_with": "x</think>"}, "--extend_with='x</think>' closes the thought by itself"),
    ],
)
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(ValueError, match=message):
        BudgetSettings(**{"budget": (4, 8), **changes})


def test_nothing_need_be_inserted_where_nothing_is_drawn_out():
    assert BudgetSettings((4,), extend_with="", extensions=0).extensions == 0


# ---- A scripted model --------------------------------------------------------------------------

# What it writes behind which text; "." is the stop token.
SCRIPT = {
    "Q:abcdefgh": "ij</think>y.",
    "Q:abcdefghijW": "klmnopqrstuvwx",
    "Q:abW": "c</think>z.",
    "Q:abWcW": "d</think>q.",
    "Q:abcd|": "7.",
    "Q:abcdefghijWk|": "88",
}


class ScriptedEngine:
    """Follows `SCRIPT`, and remembers what it was asked."""

    tokenizer = BYTES
    arch = SimpleNamespace(max_positions=64)

    def __init__(self, max_prompt: int = 2, max_new: int = 8):
        self.max_prompt, self.max_new = max_prompt, max_new
        self.asked: list[tuple[str, int, float]] = []

    def run(self, weights, requests, key, *, temperature, filters=None):
        for n, request in reversed(list(enumerate(requests))):
            (sample,) = request.wanted
            text = BYTES.decode(request.prompt)
            assert len(request.prompt) <= self.max_prompt
            self.asked.append((text, sample, temperature))
            written = tokens_of(SCRIPT[text])
            finish = EOS if written[-1] in BYTES.eos_ids else LENGTH
            assert len(written) <= self.max_new
            yield Completion(n, sample, written, np.zeros(len(written), "f4"), finish)


def tokens_of(text: str) -> tuple[int, ...]:
    return tuple(BYTES.encode(text.removesuffix("."))) + BYTES.eos_ids * text.endswith(".")


def text_of(tokens: tuple[int, ...]) -> str:
    return BYTES.decode(tokens, skip_special=False).replace("<eos>", ".")


def scripted(**changes: Any) -> tuple[Forcer, list[ScriptedEngine]]:
    engines: list[Any] = []

    def engine(max_prompt: int, max_new: int) -> Any:
        engines.append(ScriptedEngine(max_prompt, max_new))
        return engines[-1]

    given: dict[str, Any] = {"budget": (4, 12), "force_answer": "|", "answer_tokens": 2}
    settings = BudgetSettings(**given | {"extend_with": "W", "extensions": 2} | changes)
    own: Any = ScriptedEngine()
    scorer: Any = None
    evaluator = Evaluator(own, scorer, [], EvalConfig(num_samples=2), 0.7, 0)
    return Forcer(settings, evaluator, engine), engines


def base_rollout() -> Rollout:
    """One problem, two samples: a short thought, and one that was cut off."""
    texts = [("ab</think>x.", EOS), ("abcdefgh", LENGTH)]
    return Rollout(
        problems=[Problem(uid="q", prompt="Q:")],
        prompts=[BYTES.encode("Q:")],
        completions=[
            Completion(0, g, tokens_of(text), np.zeros(len(tokens_of(text)), "f4"), finish)
            for g, (text, finish) in enumerate(texts)
        ],
        group_size=2,
    )


def test_each_budget_and_method_by_hand():
    forcer, (answering, thinking) = scripted()
    held = forcer({}, base_rollout())
    texts = {setting: [text_of(d.tokens) for d in drafts] for setting, drafts in held.items()}
    assert texts == {
        # The first ended within 4 and stays; the second is cut at 4 tokens and asked.
        (FORCED, 4): ["ab</think>x.", "abcd|7."],
        # The run's own limit was 8: the second goes on, and ends within 12.
        (FORCED, 12): ["ab</think>x.", "abcdefghij</think>y."],
        # Drawn out once, the first has used up 4.
        (EXTENDED, 4): ["abWc</think>z.", "abcd|7."],
        # Twice; the second once, and cut at 12, what was put in included.
        (EXTENDED, 12): ["abWcWd</think>q.", "abcdefghijWk|88"],
    }
    finishes = {setting: [d.finish for d in drafts] for setting, drafts in held.items()}
    assert finishes[FORCED, 4] == [EOS, EOS] and finishes[EXTENDED, 12] == [EOS, LENGTH]
    # What two methods have in common is asked once; answers are greedy, thoughts as sampled.
    assert sorted(answering.asked) == [("Q:abcdefghijWk|", 1, 0.0), ("Q:abcd|", 1, 0.0)]
    assert sorted(thinking.asked) == [
        ("Q:abW", 0, 0.7),
        ("Q:abWcW", 0, 0.7),
        ("Q:abcdefgh", 1, 0.7),
        ("Q:abcdefghijW", 1, 0.7),
    ]


def test_without_extensions_and_within_the_runs_limit_nothing_thinks_on():
    forcer, engines = scripted(budget=(4, 8), extensions=0, answer_temperature=0.3)
    assert len(engines) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCRIPT, "Q:abcdefgh|", "9.")
        held = forcer({}, base_rollout())
    assert set(held) == {(FORCED, 4), (FORCED, 8)}
    assert [text_of(d.tokens) for d in held[FORCED, 8]] == ["ab</think>x.", "abcdefgh|9."]
    assert {temperature for _, _, temperature in engines[0].asked} == {0.3}


def test_a_rollout_takes_drafts():
    drafts = [Draft((1, 2), LENGTH, 1, True), Draft((3,), EOS, 0, True)]
    rollout = with_drafts(base_rollout(), drafts)
    assert [(c.problem, c.sample, c.tokens) for c in rollout.completions] == [
        (0, 0, (1, 2)),
        (0, 1, (3,)),
    ]
    assert [c.finish for c in rollout.completions] == [LENGTH, EOS]
    assert [len(c.logprobs) for c in rollout.completions] == [2, 1]


def test_a_model_with_too_few_positions_is_refused():
    scripted(budget=(30,))  # 2 + 30 to read, 30 + 2 to write: the model's 64
    with pytest.raises(ValueError, match=r"--budget=31 needs 66 positions .* the model has 64; "):
        scripted(budget=(31,))
    with pytest.raises(ValueError, match="--answer_tokens=3"):
        scripted(budget=(30,), answer_tokens=3)
    with pytest.raises(ValueError, match="--budget=60 needs 124"):  # beyond the run's limit
        scripted(budget=(60,), extensions=0)


# ---- A real model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy():
    """Weights of the toy model, its mesh, and an engine of it for every pair of lengths."""
    mesh = mesh_of()
    engines: dict[tuple[int, int], Engine] = {}

    def engine(max_prompt: int, max_new: int) -> Engine:
        if (max_prompt, max_new) not in engines:
            engines[max_prompt, max_new] = Engine(
                ARCH,
                LETTERS,
                mesh,
                max_prompt=max_prompt,
                max_new=max_new,
                slots=4,
                tokens_per_dispatch=4,
                dtype="float32",
            )
        return engines[max_prompt, max_new]

    with jax.set_mesh(mesh):
        weights = jax.jit(partial(to_decode, arch=ARCH, dtype="float32"))(toy_params())
        yield SimpleNamespace(weights=weights, engine=engine)


PROBLEMS = [Problem(uid=str(n), prompt=text) for n, text in enumerate(["abc", "zx"])]


def sampled_by(toy, evaluator: Evaluator) -> Rollout:
    prompts = [LETTERS.encode(problem.prompt) for problem in PROBLEMS]
    rollout = Rollout(PROBLEMS, prompts, [], group_size=3)
    begun: list[tuple[int, tuple[int, ...]]] = [(b, ()) for b in range(6)]
    written = go_on(
        evaluator.engine, toy.weights, rollout, begun, evaluator.key, evaluator.temperature, None
    )
    for b, (tokens, finish) in enumerate(written):
        zeros = np.zeros(len(tokens), np.float32)
        rollout.completions.append(Completion(b // 3, b % 3, tokens, zeros, finish))
    return rollout


def evaluator_of(toy, temperature: float) -> Evaluator:
    scorer: Any = None
    config = EvalConfig(num_problems=2, num_samples=3)
    return Evaluator(toy.engine(4, 8), scorer, PROBLEMS, config, temperature, 0)


def test_a_greedy_completion_cut_and_gone_on_with_is_the_same(toy):
    evaluator = evaluator_of(toy, 0.0)
    whole = sampled_by(toy, evaluator)
    begun = [(b, whole.completions[b].tokens[: 1 + b]) for b in range(6)]
    begun = [(b, tokens) for b, tokens in begun if len(tokens) < len(whole.completions[b].tokens)]
    assert len(begun) > 3
    longer = go_on(toy.engine(9, 8), toy.weights, whole, begun, evaluator.key, 0.0, None)
    for (b, _), (tokens, _) in zip(begun, longer, strict=True):
        expected = whole.completions[b].tokens
        assert tokens[: len(expected)] == expected


def test_samples_of_one_thought_differ_and_come_again(toy):
    evaluator = evaluator_of(toy, 1.0)
    rollout = sampled_by(toy, evaluator)
    begun = [(b, (1, 2, 3)) for b in range(3)]
    run = partial(go_on, toy.engine(9, 8), toy.weights, rollout)
    first, again = (run(begun, evaluator.key, 1.0, None) for _ in range(2))
    assert first == again and len(set(first)) == 3
    # Its numbers are those of the sample, not of its place among the requests.
    assert run(begun[2:], evaluator.key, 1.0, None) == first[2:]


def test_a_real_models_thoughts_are_cut_and_answered(toy):
    evaluator = evaluator_of(toy, 1.0)
    rollout = sampled_by(toy, evaluator)
    end = LETTERS.decode(rollout.completions[0].tokens[:3])[-1]  # so that one ends within 5
    settings = BudgetSettings(
        (2, 5),
        end_of_thought=end,
        force_answer=end + "a",
        answer_tokens=3,
        extend_with="w",
        answer_temperature=1.0,
    )
    held = Forcer(settings, evaluator, toy.engine)(toy.weights, rollout)
    assert set(held) == {(m, b) for m in (FORCED, EXTENDED) for b in (2, 5)}
    opening, cut = tuple(LETTERS.encode(end + "a")), 0
    for budget in (2, 5):
        for completion, forced in zip(rollout.completions, held[FORCED, budget], strict=True):
            own = read_draft(LETTERS, completion.tokens, completion.finish, end)
            if not own.exceeds(budget):
                assert forced == own
                continue
            cut += 1
            assert forced.tokens[: budget + 2] == own.tokens[:budget] + opening
            answer = forced.tokens[budget + 2 :]
            assert len(answer) == 3 or (forced.finish == EOS and 0 < len(answer) < 3)
            assert (forced.finish == EOS) is (answer[-1] in LETTERS.eos_ids)
    assert 0 < cut < 12
