"""A model that answers: any source of weights, an engine around it, and what it was asked."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from grpo.config import ModelConfig
from grpo.data.prompts import encode_prompt
from grpo.data.tokenizer import Tokenizer
from grpo.engine.engine import Engine, Request, shared_slots
from grpo.engine.sampling import Filters
from grpo.model.params import Params
from grpo.policy import lay_out
from grpo.sharding import batch_ways
from grpo.source import Source, config_of
from grpo.structs import Completion
from rewards.api import Problem

_TOKENS = 8  # before the host looks again: a reader sees every dispatch
_SHORTEST, _GROWTH = 256, 4  # of the prompt lengths that an engine is made for


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A model ready to sample. Use it within `jax.set_mesh(mesh)`.

    Attributes:
      tokenizer: of the model.
      weights: the decode form.
      make_engine: longest prompt -> an engine. Every token looks at all the slots for the prompt,
        filled or not: so a short one gets an engine with few.
      max_prompt: longest prompt of all, tokens.
      temperature: 0 takes the likeliest token.
      filters: of the tokens that may be drawn; None: all may.
      seed: of everything it says.
    """

    tokenizer: Tokenizer
    weights: Params
    make_engine: Callable[[int], Engine]
    max_prompt: int
    temperature: float
    filters: Filters | None
    seed: int

    def engine(self, prompt_len: int) -> Engine:
        """An engine for a prompt of this many tokens."""
        length = _SHORTEST
        while length < prompt_len:
            length *= _GROWTH
        return self.make_engine(min(length, self.max_prompt))

    def say(
        self, prompt: Sequence[int], turn: int, heard: Callable[[Sequence[int]], None]
    ) -> Completion:
        """One completion of a prompt; `heard` gets its tokens as they come."""
        completions = self.engine(len(prompt)).run(
            self.weights,
            [Request(prompt, stream=0, num_samples=1)],
            jax.random.fold_in(jax.random.key(self.seed), turn),
            temperature=self.temperature,
            filters=self.filters,
            heard=lambda request, sample, tokens: heard(tokens),
        )
        return next(completions)


def make_speaker(
    source: Source,
    mesh: Mesh,
    *,
    group_size: int,
    max_prompt: int,
    max_new: int,
    temperature: float,
    filters: Filters | None = None,
    seed: int = 0,
) -> Speaker:
    """Reads the weights and lays them out for sampling; within `jax.set_mesh(mesh)`.

    What the run of `source` computed in, and its stop strings, hold here too; without a run that is
    float32 on a CPU and bfloat16 elsewhere.

    Args:
      source: of the model.
      mesh: devices.
      group_size: completions side by side.
      max_prompt: longest prompt, tokens.
      max_new: longest completion, tokens.
      temperature: divides the logits; 0 takes the likeliest token.
      filters: of the tokens that may be drawn.
      seed: of the random numbers.
    """
    run = config_of(source.workdir) if source.workdir is not None else {}
    usual = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    dtype = run.get("model", {}).get("compute_dtype", usual)
    policy = lay_out(
        source.arch,
        source.tokenizer,
        mesh,
        ModelConfig(compute_dtype=dtype),
        temperature=1.0,  # of log-probs, which nobody asks for
        read=source.read,
    )
    ways = batch_ways(mesh)
    slots = -(-group_size // ways) * ways

    @functools.cache
    def make_engine(longest: int) -> Engine:
        return Engine(
            source.arch,
            source.tokenizer,
            mesh,
            max_prompt=longest,
            max_new=max_new,
            slots=slots,
            slots_per_prompt=shared_slots(slots, ways, group_size, group_size),
            tokens_per_dispatch=_TOKENS,
            dtype=dtype,
            stop_strings=tuple(run.get("sample", {}).get("stop_strings", ())),
        )

    weights = policy.for_decoding(policy.initial_params())
    return Speaker(source.tokenizer, weights, make_engine, max_prompt, temperature, filters, seed)


def make_filters(top_k: int, top_p: float, min_p: float) -> Filters | None:
    """The tokens that may be drawn; None where all may."""
    if top_k == 0 and top_p == 1 and min_p == 0:
        return None
    return Filters(np.int32(top_k), np.float32(top_p), np.float32(min_p))


@dataclasses.dataclass
class Conversation:
    """What was said so far, and the prompt that follows from it.

    A model without a chat template goes on behind raw text, each line by itself.

    Attributes:
      tokenizer: of the model.
      max_prompt: tokens; the oldest turns are forgotten where all do not fit.
      system: the system message; None: none, so that the template may add its own.
      turns: messages of user and assistant, alternating.
    """

    tokenizer: Tokenizer
    max_prompt: int
    system: str | None = None
    turns: list[Mapping[str, str]] = dataclasses.field(default_factory=list)

    @property
    def is_chat(self) -> bool:
        return self.tokenizer.chat_template is not None

    def ask(self, text: str) -> tuple[list[int], int]:
        """The prompt that ends with `text`, and how many turns were forgotten for it to fit.

        Raises:
          ValueError: `text` alone does not fit; it is not kept.
        """
        if not self.is_chat:
            return self._fitting(encode_prompt(self.tokenizer, Problem("chat", prompt=text))), 0
        turns = [*self.turns, {"role": "user", "content": text}]
        forgotten = 0
        while True:
            ids = encode_prompt(self.tokenizer, Problem("chat", messages=self._with_system(turns)))
            if len(ids) <= self.max_prompt or len(turns) == 1:
                break
            oldest = min(2, len(turns) - 1)  # a question and its answer
            del turns[:oldest]
            forgotten += oldest
        ids = self._fitting(ids)
        self.turns = turns
        return ids, forgotten

    def answered(self, text: str) -> None:
        """Keeps an answer, whole or cut off."""
        if self.is_chat:
            self.turns.append({"role": "assistant", "content": text})

    def _with_system(self, turns: Sequence[Mapping[str, str]]) -> tuple[Mapping[str, str], ...]:
        if self.system is None:
            return tuple(turns)
        return ({"role": "system", "content": self.system}, *turns)

    def _fitting(self, ids: list[int]) -> list[int]:
        if len(ids) > self.max_prompt:
            raise ValueError(
                f"that is {len(ids)} tokens, {self.max_prompt} are allowed (--max_context, "
                "--max_new_tokens)"
            )
        return ids
