"""Published algorithms by name: what each paper sets, in one place.

A preset is a function that changes `config.algo` in place. It first puts every choice of the
algorithm back to its default, so that nothing of another one is left, and leaves alone what
belongs to the machine and the data (problems_per_step, group_size, microbatch_tokens), except
`minibatches`: where the ratio of new and old policy is the point, one update a rollout would make
it 1 and the algorithm the plain policy gradient, so these presets take 4 unless the experiment
makes several updates already. Optimiser, sampling and rewards are the experiment's own.

An experiment calls one, `presets.dapo(config)`; the command line names one, `--preset=dapo`.
"""

import dataclasses
import inspect
import sys

from grpo import advantage, loss
from grpo.config import AlgoConfig, Config, unknown_field

_OF_THE_RUN = ("problems_per_step", "group_size", "minibatches", "passes", "microbatch_tokens")
_SEVERAL_UPDATES = 4  # GSPO's own number; small enough for small rollouts


def apply(config: Config, name: str) -> None:
    """Changes `config` as the preset of that name does.

    Raises:
      ValueError: there is no such preset; the message lists them.
    """
    if name not in names():
        raise ValueError(unknown_field("grpo.presets", name, names()))
    getattr(sys.modules[__name__], name)(config)


def names() -> list[str]:
    """All presets, as written below."""
    here = sys.modules[__name__]
    functions = [n for n, f in vars(here).items() if inspect.isfunction(f)]
    own = [n for n in functions if vars(here)[n].__module__ == __name__]
    return [n for n in own if not n.startswith("_") and n not in ("apply", "names")]


def grpo(config: Config) -> None:
    """GRPO as first published: deviation, mean by completion, symmetric clip, k3 KL of 0.04.

    One update a rollout, as in the paper: the ratio is 1 and the clip idle until `minibatches` or
    `passes` is raised. The paper takes 64 completions a problem and a learning rate of 1e-6.

    Source: DeepSeekMath, arXiv:2402.03300, section 4.1 and 4.2; clip: PPO's 0.2.
    """
    algo = _fresh(config)
    algo.advantage = advantage.grpo
    algo.aggregate = loss.by_sequence
    algo.objective = loss.clipped
    algo.clip_low = algo.clip_high = 0.2
    algo.kl, algo.kl_coef = loss.k3, 0.04


def r1_zero(config: Config) -> None:
    """`grpo` with the numbers of DeepSeek-R1-Zero: KL of 0.001, reference renewed every 400 steps.

    32 problems a step, 16 completions each, temperature 1, learning rate 3e-6. The clip of 10 is
    what the paper gives for the first stage of R1: ratios up to 11 count, and none is too low.

    Source: arXiv:2501.12948 (version 2 and Nature), training details.
    """
    grpo(config)
    algo = config.algo
    algo.kl_coef, algo.ref_every = 0.001, 400
    algo.clip_low, algo.clip_high = 1.0, 10.0


def dr_grpo(config: Config) -> None:
    """GRPO done right: no deviation, a constant in place of the length, no KL.

    Source: arXiv:2503.20783, section 3.2; 8 completions a problem, no KL in its published runs.
    """
    algo = _fresh(config)
    algo.advantage = advantage.dr_grpo
    algo.aggregate = loss.by_length
    algo.objective = loss.clipped
    algo.clip_low = algo.clip_high = 0.2


def dapo(config: Config) -> None:
    """DAPO: clip higher, mean by token, dynamic sampling, soft penalty near the limit, no KL.

    The paper draws until the batch is full; here at most 9 further rounds. The penalty begins a
    fifth before `sample.max_new_tokens` as it is now (the paper: the last 4096 of 20480). The
    paper takes 16 completions a problem and 16 updates a rollout.

    Source: arXiv:2503.14476, sections 3 and 4.1.
    """
    algo = _fresh(config, several_updates=True)
    algo.advantage = advantage.grpo
    algo.aggregate = loss.by_token
    algo.objective = loss.clipped
    algo.clip_low, algo.clip_high = 0.2, 0.28
    algo.dynamic_rounds = 9
    algo.overlong_buffer_tokens = max(config.sample.max_new_tokens // 5, 1)
    algo.overlong_penalty = 1.0


def gspo(config: Config) -> None:
    """GSPO: one ratio a completion, clipped within 3e-4 below and 4e-4 above; 4 minibatches.

    Source: arXiv:2507.18071, sections 4 and 5.1.
    """
    algo = _fresh(config, several_updates=True)
    algo.advantage = advantage.grpo
    algo.aggregate = loss.by_sequence
    algo.objective = loss.gspo
    algo.clip_low, algo.clip_high = 3e-4, 4e-4


def gmpo(config: Config) -> None:
    """GMPO: the geometric mean of a completion's ratios, each within exp(-0.4) to exp(0.4).

    Source: arXiv:2507.20673, sections 3 and 4.
    """
    algo = _fresh(config, several_updates=True)
    algo.advantage = advantage.grpo
    algo.aggregate = loss.by_sequence
    algo.objective = loss.gmpo
    algo.clip_low = algo.clip_high = 0.4


def cispo(config: Config) -> None:
    """CISPO: importance weights clipped from above only, no token without gradient.

    The paper tunes the bound and does not print it; 5 in all is what ScaleRL takes.

    Source: MiniMax-M1, arXiv:2506.13585, section 3.1; bound: arXiv:2510.13786.
    """
    algo = _fresh(config, several_updates=True)
    algo.advantage = advantage.grpo
    algo.aggregate = loss.by_token
    algo.objective = loss.cispo
    algo.clip_high = 4.0


def sapo(config: Config) -> None:
    """SAPO: a soft gate in place of the clip, closing sooner for bad completions.

    Source: arXiv:2511.20347; temperatures 1.0 and 1.05.
    """
    algo = _fresh(config, several_updates=True)
    algo.advantage = advantage.grpo
    algo.aggregate = loss.by_sequence
    algo.objective = loss.sapo
    algo.sapo_temperature_positive, algo.sapo_temperature_negative = 1.0, 1.05


def rloo(config: Config) -> None:
    """RLOO: REINFORCE against the mean of the others, KL of 0.03 in the reward.

    No clip: with one update a rollout there is nothing to clip. The unit is the whole completion,
    whose log-prob is the sum over its tokens: hence a constant in place of the length.

    Source: arXiv:2402.14740, section 2 and appendix C.
    """
    algo = _fresh(config)
    algo.advantage = advantage.rloo
    algo.aggregate = loss.by_length
    algo.objective = loss.policy_gradient
    algo.kl_in_reward, algo.kl_coef = True, 0.03


def reinforce_pp(config: Config) -> None:
    """REINFORCE++ with a group baseline: deviation over the batch, clip, k2 KL as a loss.

    The paper's KL loss for this variant is k2, of small weight; 1e-3 here.

    Source: arXiv:2501.03262, section 3.
    """
    algo = _fresh(config, several_updates=True)
    algo.advantage = advantage.reinforce_pp
    algo.aggregate = loss.by_token
    algo.objective = loss.clipped
    algo.clip_low = algo.clip_high = 0.2
    algo.kl, algo.kl_coef = loss.k2, 1e-3


def maxrl(config: Config) -> None:
    """MaxRL: maximum likelihood of success, so that rare successes weigh more. No clip, no KL.

    Source: arXiv:2602.02710.
    """
    algo = _fresh(config)
    algo.advantage = advantage.maxrl
    algo.aggregate = loss.by_token
    algo.objective = loss.policy_gradient


def pass_at_k(config: Config) -> None:
    """Trains what the best of k completions scores, for k = 4 or half a group if that is less.

    Source: PKPO, arXiv:2505.15201.
    """
    algo = _fresh(config)
    algo.advantage = advantage.pass_at_k
    algo.pass_k = max(1, min(4, algo.group_size // 2))
    algo.aggregate = loss.by_token
    algo.objective = loss.policy_gradient


def gdpo(config: Config) -> None:
    """GDPO: several rewards, each normalised by itself before they are added up.

    With a single reward it is `grpo` without KL, rescaled by the batch.

    Source: arXiv:2601.05242.
    """
    algo = _fresh(config, several_updates=True)
    algo.advantage = advantage.gdpo
    algo.aggregate = loss.by_token
    algo.objective = loss.clipped
    algo.clip_low, algo.clip_high = 0.2, 0.28


def _fresh(config: Config, *, several_updates: bool = False) -> AlgoConfig:
    """`config.algo` with all but the run's own numbers at their defaults."""
    algo, default = config.algo, AlgoConfig()
    for field in dataclasses.fields(algo):
        if field.name not in _OF_THE_RUN:
            setattr(algo, field.name, getattr(default, field.name))
    if several_updates and algo.minibatches * algo.passes == 1:
        algo.minibatches = _SEVERAL_UPDATES
    return algo
