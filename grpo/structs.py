"""The records that pass between the verbs of the loop, and the legend of shape letters.

An array's name ends in its shape:

  P problems a step      G completions a problem     B = P * G sequences
  Q prompt slots         C completion slots          T = Q + C token slots of a row
  S key/value slots      R rows of a batch           M microbatches
  V vocabulary           D model width               F MLP width
  N query heads          K key/value heads           H head width
  L layers               E experts                   U problems of the run
  X groups carried over

`Problem` and `Score` are in `rewards.api`, which stands without this package.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from flax import struct

from rewards.api import Problem

EOS, STOP, LENGTH = "eos", "stop", "length"  # why a completion ended
SOLVED = 1.0 - 1e-6  # the verifier's score from which on a completion counts as right


@dataclasses.dataclass(frozen=True)
class Completion:
    """What the policy wrote for one problem, one sample.

    Attributes:
      problem: index into the prompts that were asked.
      sample: which of the group's completions this is.
      tokens: ids as sampled, the stop token included: stopping is an action and is trained.
      logprobs: float32 nats, one a token, of the distribution really sampled from.
      finish: "eos" (a stop token), "stop" (a stop string) or "length" (cut off).
      carried: of its tokens the first so many were sampled in earlier steps, by older policies.
      routes: int16 [n, L, k], the experts that each token of prompt and completion but the last
        went to in the sampler, in the L layers that have experts; None: the model has none.
    """

    problem: int
    sample: int
    tokens: tuple[int, ...]
    logprobs: np.ndarray
    finish: str
    carried: int = 0
    routes: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Rollout:
    """All completions of a step: `completions[b]` belongs to problem `b // G`."""

    problems: list[Problem]
    prompts: list[list[int]]
    completions: list[Completion]
    group_size: int

    @property
    def lengths_B(self) -> np.ndarray:
        """Tokens of each completion, int32."""
        return np.array([len(c.tokens) for c in self.completions], np.int32)


@dataclasses.dataclass(frozen=True)
class Scores:
    """What the rules said of a rollout.

    Attributes:
      reward_PG: float32, the weighted sum of the components.
      valid_PG: bool; False where a verifier itself failed, and the row must not train.
      components: name -> float32 [P, G], before weights.
      weights: name -> what the component is multiplied by in the sum.
      statuses: name -> list of B statuses (`rewards.api`).
    """

    reward_PG: np.ndarray
    valid_PG: np.ndarray
    components: dict[str, np.ndarray]
    weights: dict[str, float]
    statuses: dict[str, list[str]]


class Batch(struct.PyTreeNode):
    """Fixed-shape packed rows for the update.

    A row holds prompts, each followed by one or more of its completions, which share it. A
    completion never spans two rows. Whatever stands where `mask_RC` is False is never read.

    Attributes:
      tokens_RT: int32 ids; padding anywhere `groups_RT` is 0.
      positions_RT: int32, from 0 at the start of each prompt; completions of one prompt each go on
        from its end.
      groups_RT: int32; which prompt-with-completions of the row a token belongs to; 0 is padding.
      branches_RT: int32; 0 for prompt tokens, else which completion of the row. A token sees
        earlier tokens of its own branch and of its group's prompt.
      contexts_RC: int32 slot in the row whose hidden state predicts each completion token.
      targets_RC: int32 id of each completion token.
      sequences_RC: int32 below C: number, within the row, of the completion the token belongs to.
      mask_RC: bool, this completion token trains.
      advantage_RC: float32, the advantage of the sequence the token belongs to.
      old_logprobs_RC: float32 nats of the policy the ratio is taken against. Ignored if the
        batch gets a single update, where the ratio is 1 by construction.
      sampler_logprobs_RC: float32 nats as the rollout engine reported them.
      ref_logprobs_RC: float32 nats of the frozen reference; zeros if there is none.
      carried_RC: bool, the token was sampled in an earlier step, by an older policy; None: no
        token was.
      routes_RTLk: int16, the experts that each token went to in the sampler, in the L layers that
        have experts; -1: not known, and the router chooses. None: it chooses for all.
    """

    tokens_RT: Any
    positions_RT: Any
    groups_RT: Any
    branches_RT: Any
    contexts_RC: Any
    targets_RC: Any
    sequences_RC: Any
    mask_RC: Any
    advantage_RC: Any
    old_logprobs_RC: Any
    sampler_logprobs_RC: Any
    ref_logprobs_RC: Any
    carried_RC: Any = None
    routes_RTLk: Any = None


class Comparison(NamedTuple):
    """What a student and its teacher make of completion tokens; float32 nats.

    Attributes:
      divergence_RC: between their distributions of the token, and what is learnt from.
      logprobs_RC: of the token, by the student.
      teacher_logprobs_RC: of the token, by the teacher.
    """

    divergence_RC: Any
    logprobs_RC: Any
    teacher_logprobs_RC: Any


class Totals(NamedTuple):
    """What a loss is divided by: counts over the whole minibatch, before rows are dropped or split.

    Attributes:
      tokens: trained completion tokens.
      sequences: completions with at least one trained token.
    """

    tokens: Any
    sequences: Any


class Program(NamedTuple):
    """A jitted function and what it is compiled for.

    Attributes:
      kind: what it does, in a word or two; programs of one kind differ in size only.
      function: jitted.
      arguments: abstract, with shardings.
      static: further ones, which are part of the program.
    """

    kind: str
    function: Any
    arguments: tuple[Any, ...]
    static: Mapping[str, Any] = MappingProxyType({})


class TrainState(struct.PyTreeNode):
    """The only mutable state of a run.

    Attributes:
      step: int32, rollouts (or supervised batches) consumed so far.
      updates: int32, optimiser updates made so far; what the learning rate follows.
      bad_updates: int32, updates in a row that were skipped because a number was not finite.
      cursor: int32, problems drawn so far (`grpo.data.order.draw`).
      params: the train form, float32.
      opt_state: what optax keeps.
      ref_params: the reference policy, where it is renewed during the run (`algo.ref_every`).
      pass_rates: `grpo.curriculum.PassRates`, on the host, where problems are chosen by them
        (`algo.curriculum`).
      carried: `grpo.carry.Carried`, on the host, where groups go on in a later step
        (`algo.oversample`).
    """

    step: Any
    updates: Any
    bad_updates: Any
    cursor: Any
    params: Any
    opt_state: Any
    ref_params: Any = None
    pass_rates: Any = None
    carried: Any = None


class Mean(NamedTuple):
    """A metric that can be added up: the mean is `total / count`, once, at the end."""

    total: Any
    count: Any
