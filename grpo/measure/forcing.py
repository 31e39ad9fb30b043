"""Budget forcing: thoughts held to a number of tokens, and the answers they lead to.

A thought that is longer than its budget is cut there, and what closes it and opens the answer is
put behind it: the model has to answer at once. A thought that the model closes before is drawn
out, if asked for: its end is replaced by "Wait", and the model thinks on. To the model either is a
longer prompt.

Source: s1, arXiv:2501.19393, section 3.
"""

import bisect
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from grpo.data.tokenizer import Tokenizer
from grpo.engine.engine import Engine, Request
from grpo.engine.sampling import Filters
from grpo.measure.held_out import Evaluator
from grpo.model.params import Params
from grpo.rollout import stream
from grpo.structs import EOS, LENGTH, Completion, Rollout

FORCED, EXTENDED = "forced", "extended"  # the two ways of holding thoughts to a budget
_ANSWERS = 1  # number of the random numbers of answers; those of thoughts follow


@dataclasses.dataclass(frozen=True)
class BudgetSettings:
    """What `python -m grpo.evaluate --budget=...` measures; a field is the flag of its name.

    Attributes:
      budget: tokens of thought, each more than the one before.
      end_of_thought: text with which the model closes its thought.
      force_answer: text put behind a thought that has reached its budget.
      answer_tokens: most tokens that follow it.
      answer_temperature: with which they are sampled; 0 takes the likeliest.
      extend_with: text put in the place of an end that came before the budget.
      extensions: how often in one thought; 0 measures none that are drawn out.
      before: measure the model that the run started from as well; None: if there is a checkpoint.

    Raises:
      ValueError: a setting that cannot work; names the flag.
    """

    budget: tuple[int, ...]
    end_of_thought: str = "</think>"
    force_answer: str = "</think><answer>"
    answer_tokens: int = 32
    answer_temperature: float = 0.0
    extend_with: str = "Wait"
    extensions: int = 1
    before: bool | None = None

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip((0, *self.budget), self.budget, strict=False))
        _need(bool(self.budget) and rising, f"--budget={self.budget} must rise from 1 or more")
        _need(bool(self.end_of_thought), "--end_of_thought is empty; name the text that closes it")
        _need(
            bool(self.force_answer), "--force_answer is empty; name the text that opens an answer"
        )
        _need(self.answer_tokens > 0, f"--answer_tokens={self.answer_tokens} must be positive")
        warmth = self.answer_temperature
        _need(
            math.isfinite(warmth) and warmth >= 0,
            f"--answer_temperature={warmth} must be 0 (the likeliest token) or more, and finite",
        )
        _need(self.extensions >= 0, f"--extensions={self.extensions} cannot be negative")
        _need(
            bool(self.extend_with) or not self.extensions,
            "--extend_with is empty; name a text, or set --extensions=0",
        )
        _need(
            self.end_of_thought not in self.extend_with,
            f"--extend_with={self.extend_with!r} closes the thought by itself, since it contains "
            f"--end_of_thought={self.end_of_thought!r}; leave that out",
        )


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


class Draft(NamedTuple):
    """A completion as it was written, or with text put into it.

    Attributes:
      tokens: ids.
      finish: why it ended, as in `Completion`.
      thought: so many of its first tokens are the thought.
      closed: the model ended its thought by itself.
    """

    tokens: tuple[int, ...]
    finish: str
    thought: int
    closed: bool

    def exceeds(self, budget: int) -> bool:
        """Whether the thought has to be cut: it is longer, or as long and not at its end."""
        return self.thought > budget or (self.thought == budget and not self.closed)


def read_draft(tokenizer: Tokenizer, tokens: tuple[int, ...], finish: str, end: str) -> Draft:
    """A completion with its thought found; without `end` all of it but the stop token is one."""
    thought = thought_length(tokenizer, tokens, end)
    if thought is not None:
        return Draft(tokens, finish, thought, True)
    return Draft(tokens, finish, len(tokens) - (finish == EOS), finish != LENGTH)


def thought_length(tokenizer: Tokenizer, tokens: Sequence[int], end: str) -> int | None:
    """How many tokens come before the first `end` in their text; None if it is not there.

    A token that holds the start of `end` and text before it (".</") is not counted.
    """

    def text(count: int) -> str:
        return tokenizer.decode(tokens[:count], skip_special=False)

    if end not in text(len(tokens)):
        return None
    counts = range(len(tokens) + 1)
    complete = bisect.bisect_left(counts, True, key=lambda count: end in text(count))
    start = text(complete).index(end)
    return next(count for count in range(complete, -1, -1) if len(text(count)) <= start)


def can_extend(draft: Draft, budget: int, inserted: int) -> bool:
    """Whether the end of the thought may be replaced by so many tokens, with room for more."""
    return draft.closed and draft.thought + inserted < budget


def held_to(chain: Sequence[Draft], budget: int, extensions: int, inserted: int) -> Draft:
    """The draft that a budget arrives at, before it is cut.

    Args:
      chain: a completion, then each time the one before with its thought drawn out once more,
        for as long as `can_extend` says of the longest budget.
      budget: tokens of thought.
      extensions: how many are allowed.
      inserted: tokens that replace an end.
    """
    n = 0
    while n < min(extensions, len(chain) - 1) and can_extend(chain[n], budget, inserted):
        n += 1
    return chain[n]


class Forcer:
    """Holds the thoughts of held-out completions to budgets.

    Each completion is drawn out once for all budgets, and each cut thought answered once for all
    methods that arrive at it; so methods and budgets are compared on the same thoughts.

    Args:
      settings: how.
      evaluator: whose completions they are; thoughts go on with its temperature and filters.
      make_engine: (longest prompt, longest completion) -> an engine.

    Raises:
      ValueError: the model has too few positions; names the flags.
    """

    def __init__(
        self,
        settings: BudgetSettings,
        evaluator: Evaluator,
        make_engine: Callable[[int, int], Engine],
    ):
        self.settings, self.evaluator = settings, evaluator
        engine, longest = evaluator.engine, settings.budget[-1]
        self.tokenizer = engine.tokenizer
        self.opening = tuple(self.tokenizer.encode(settings.force_answer))
        self.extension = tuple(self.tokenizer.encode(settings.extend_with))
        prompt, answer = engine.max_prompt + longest, settings.answer_tokens
        thinks = bool(settings.extensions) or longest > engine.max_new
        # A thought drawn out may be as long as the longest budget, and its answer as any other.
        needed = prompt + max(len(self.opening), longest if thinks else 0) + answer
        if needed > engine.arch.max_positions:
            raise ValueError(
                f"--budget={longest} needs {needed} positions (the prompt's {engine.max_prompt}, "
                "the budget for what is read and again for what is thought on, "
                f"--answer_tokens={answer}), but the model has {engine.arch.max_positions}; lower "
                "it, or set --extensions=0"
            )
        self.answering = make_engine(prompt + len(self.opening), answer)
        self.thinking = make_engine(prompt, longest + answer) if thinks else None

    def __call__(self, weights: Params, rollout: Rollout) -> dict[tuple[str, int], list[Draft]]:
        """(FORCED or EXTENDED, budget) -> what becomes of each completion of the evaluation."""
        chains, settings = self._chains(weights, rollout), self.settings
        methods = {FORCED: 0} | ({EXTENDED: settings.extensions} if settings.extensions else {})
        held = {
            (method, budget): [
                held_to(chain, budget, extensions, len(self.extension)) for chain in chains
            ]
            for method, extensions in methods.items()
            for budget in settings.budget
        }
        cut = {
            (b, draft.tokens[:budget]): None
            for (_, budget), drafts in held.items()
            for b, draft in enumerate(drafts)
            if draft.exceeds(budget)
        }
        answers = self._answer(weights, rollout, list(cut))
        return {
            (method, budget): [
                answers[b, draft.tokens[:budget]] if draft.exceeds(budget) else draft
                for b, draft in enumerate(drafts)
            ]
            for (method, budget), drafts in held.items()
        }

    def _chains(self, weights: Params, rollout: Rollout) -> list[list[Draft]]:
        """Each completion, and behind it itself drawn out once, twice, ..."""
        longest, inserted = self.settings.budget[-1], len(self.extension)
        chains = [[self._read(c.tokens, c.finish)] for c in rollout.completions]
        # Where the run's own limit came first, the thought goes on as it would have.
        short = [b for b, (draft,) in enumerate(chains) if not draft.closed]
        short = [b for b in short if chains[b][0].thought < longest]
        begun = [(b, chains[b][0].tokens) for b in short]
        for b, draft in zip(short, self._think(weights, rollout, begun, 0), strict=True):
            chains[b] = [draft]
        for nth in range(self.settings.extensions):
            drawn = [b for b, chain in enumerate(chains) if len(chain) == nth + 1]
            drawn = [b for b in drawn if can_extend(chains[b][-1], longest, inserted)]
            last = {b: chains[b][-1] for b in drawn}
            begun = [(b, (*d.tokens[: d.thought], *self.extension)) for b, d in last.items()]
            for b, draft in zip(drawn, self._think(weights, rollout, begun, nth + 1), strict=True):
                chains[b].append(draft)
        return chains

    def _think(
        self,
        weights: Params,
        rollout: Rollout,
        begun: Sequence[tuple[int, tuple[int, ...]]],
        n: int,
    ) -> list[Draft]:
        """Lets thoughts go on, for the n-th time."""
        if not begun:
            return []
        assert self.thinking is not None  # short and drawn-out thoughts are why it is made
        warmth, filters = self.evaluator.temperature, self.evaluator.filters
        key = jax.random.fold_in(self.evaluator.key, _ANSWERS + 1 + n)
        written = go_on(self.thinking, weights, rollout, begun, key, warmth, filters)
        return [self._read(*one) for one in written]

    def _answer(
        self, weights: Params, rollout: Rollout, cut: Sequence[tuple[int, tuple[int, ...]]]
    ) -> dict[tuple[int, tuple[int, ...]], Draft]:
        """What the model answers behind each thought."""
        warmth = self.settings.answer_temperature
        filters = self.evaluator.filters if warmth else None
        key = jax.random.fold_in(self.evaluator.key, _ANSWERS)
        begun = [(b, (*thought, *self.opening)) for b, thought in cut]
        written = go_on(self.answering, weights, rollout, begun, key, warmth, filters)
        return {
            (b, thought): Draft(tokens, finish, len(thought), False)
            for (b, thought), (tokens, finish) in zip(cut, written, strict=True)
        }

    def _read(self, tokens: tuple[int, ...], finish: str) -> Draft:
        return read_draft(self.tokenizer, tokens, finish, self.settings.end_of_thought)


def go_on(
    engine: Engine,
    weights: Params,
    rollout: Rollout,
    begun: Sequence[tuple[int, tuple[int, ...]]],
    key: jax.Array,
    temperature: float,
    filters: Filters | None,
) -> list[tuple[tuple[int, ...], str]]:
    """What the model writes behind completions that were begun, each given with its beginning.

    Args:
      engine: its prompts hold the problem's prompt and what was begun.
      weights: the decode form.
      rollout: of the completions.
      begun: (which completion, its first tokens) of each.
      key: of the random numbers; a completion's are those of its problem and sample number.
      temperature: as in `Engine.run`.
      filters: likewise.

    Returns:
      Tokens, the beginning included, and finish of each.
    """
    G = rollout.group_size
    requests = [
        Request(
            [*rollout.prompts[b // G], *tokens],
            stream(rollout.problems[b // G]),
            num_samples=b % G + 1,
            done=range(b % G),
        )
        for b, tokens in begun
    ]
    ended = engine.run(weights, requests, key, temperature=temperature, filters=filters)
    written = {completion.problem: completion for completion in ended}
    return [
        ((*tokens, *written[n].tokens), written[n].finish) for n, (_, tokens) in enumerate(begun)
    ]


def with_drafts(rollout: Rollout, drafts: Sequence[Draft]) -> Rollout:
    """The rollout with these in place of its completions; log-probs are NaN, not all is sampled."""
    completions = [
        Completion(
            problem=c.problem,
            sample=c.sample,
            tokens=draft.tokens,
            logprobs=np.full(len(draft.tokens), np.nan, np.float32),
            finish=draft.finish,
        )
        for c, draft in zip(rollout.completions, drafts, strict=True)
    ]
    return dataclasses.replace(rollout, completions=completions)
