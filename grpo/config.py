"""The configuration of a run: typed sections, every field documented where it is declared.

An experiment is a Python file whose `get_config()` returns a `Config`. Fields may be changed from
the command line (`--config.algo.group_size=16`) or from Python. A name that does not exist or a
value of the wrong type is an error at once; numbers that do not fit together are an error in
`validate`; a field that was set but that the run never reads is an error in `check_all_read`.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

from grpo import advantage, divergence, loss
from grpo.data.sources import ProblemSource
from grpo.model.arch import ATTENTION_CHOICES, BASE_DTYPES, REMAT_CHOICES, ROLLOUT_CHOICES
from rewards.api import Batched, Problem, Reward


def doc(default: Any, text: str) -> Any:
    """A field with its default and its documentation; lists and sections are made afresh."""
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata={"doc": text})
    return dataclasses.field(default=default, metadata={"doc": text})


class Section:
    """Base of every section: knows its fields, and which of them were read."""

    def __setattr__(self, name: str, value: Any) -> None:
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        if name not in names:
            raise AttributeError(unknown_field(type(self).__name__, name, names))
        object.__setattr__(self, name, value)

    def __getattribute__(self, name: str) -> Any:
        state = object.__getattribute__(self, "__dict__")
        if "_read" in state and name in state:
            state["_read"].add(name)
        return object.__getattribute__(self, name)


def unknown_field(section: str, name: str, known: list[str]) -> str:
    """The message for a field that does not exist: those that do, and the likeliest."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{section} has no field {name!r}; it has {sorted(known)}.{hint}"


@dataclasses.dataclass
class ModelConfig(Section):
    """Where the policy comes from and how it is computed."""

    source: str = doc(
        "",
        "weights: a Hugging Face folder, a .gguf file, the workdir of a run (its newest "
        "checkpoint), or a name `python -m grpo.fetch` knows; empty makes a new model of the sizes "
        "below",
    )
    tokenizer: str = doc(
        "bytes",
        "new model: `bytes`, or the model whose tokenizer it takes: a folder, a .gguf file, or a "
        "name as above",
    )
    shape: str = doc(
        "",
        "new model: its shape, as the text of a Hugging Face config.json of any supported family, "
        "without vocab_size; empty: of the sizes below",
    )
    thinking: str = doc(
        "default",
        "on or off: told to chat templates that can ask for a chain of thought or for none "
        "(Qwen 3, SmolLM 3); default: what the template does by itself",
    )
    width: int = doc(256, "new model: width of the residual stream")
    mlp_width: int = doc(1024, "new model: width of the MLP")
    num_layers: int = doc(4, "new model: layers")
    num_heads: int = doc(4, "new model: query heads, each width / num_heads wide")
    num_kv_heads: int = doc(4, "new model: key/value heads")
    compute_dtype: str = doc(
        "bfloat16", "what blocks compute in, sampler and trainer alike; parameters stay float32"
    )
    remat: str = doc("attn", f"activations recomputed in the backward pass: {REMAT_CHOICES}")
    attention: str = doc(
        "auto",
        f"what computes the trainer's attention: {ATTENTION_CHOICES}; auto is splash on a TPU, "
        "cudnn on a GPU in bfloat16 where the heads fit it, else xla",
    )
    logprob_chunk: int = doc(256, "completion tokens whose logits exist at one time, per row")
    base_dtype: str = doc(
        "float32",
        f"what the frozen weights beneath adapters are stored in: {BASE_DTYPES}; bfloat16 is exact "
        "where they were published in it, int8 and int4 quantise the matrices of layers (QLoRA)",
    )


@dataclasses.dataclass
class LoraConfig(Section):
    """Low-rank adapters, trained and saved in place of the weights, which stay frozen."""

    rank: int = doc(0, "r, of every adapter; 0 trains all weights")
    alpha: float = doc(32.0, "adapters count alpha / rank times")
    targets: tuple[str, ...] = doc(
        ("*",), "patterns of the matrices that get one: q k v o gate up down, [qv], *"
    )


@dataclasses.dataclass
class DataConfig(Section):
    """The problems."""

    train: ProblemSource | None = doc(None, "problems to learn from")
    held_out: ProblemSource | None = doc(None, "problems to measure on, never trained on")
    max_prompt_tokens: int = doc(
        256, "longer prompts are dropped when the run starts, counted and reported"
    )
    check_reference: Callable[[Any], str | None] | None = doc(
        None,
        "reference -> what is wrong with it, or None; problems with a bad one are dropped when "
        "the run starts, counted and reported (rewards.math_answer.check_reference)",
    )


@dataclasses.dataclass
class SampleConfig(Section):
    """How completions are sampled."""

    temperature: float = doc(1.0, "divides the logits, in sampling and in the loss alike")
    max_new_tokens: int = doc(512, "a completion is cut off here and its finish says `length`")
    slots: int = doc(64, "completions decoded side by side; refilled as they end")
    slots_per_prompt: int = doc(
        0, "slots that share one stored prompt, and change it together; 0: chosen by the run"
    )
    tail_slots: int = doc(
        0,
        "once nothing waits and no more completions than this are left, they go on in a smaller "
        "state, which is faster; 0: never",
    )
    draft_tokens: int = doc(
        0,
        "guessed ahead in the tail from what the text repeats; the same tokens in fewer passes if "
        "it repeats itself, in slower ones if not",
    )
    tokens_per_dispatch: int = doc(16, "tokens decoded before the host looks again")
    stop_strings: tuple[str, ...] = doc((), "texts that end a completion, beside its stop tokens")
    weights: str = doc(
        "compute",
        f"of the sampler, evaluation included: {ROLLOUT_CHOICES}; int8 rounds the matrices of "
        "layers anew at each step, with one scale an output",
    )
    cache: str = doc(
        "compute",
        f"the sampler's keys and values: {ROLLOUT_CHOICES}; int8 has one scale a token and head",
    )


@dataclasses.dataclass
class RewardConfig(Section):
    """How completions are scored."""

    functions: tuple[tuple[float, Reward | Batched], ...] = doc(
        (),
        "(weight, function) pairs, added up. The first is the verifier: its score of 1 is what "
        "`solved` and the evaluation count",
    )
    workers: int = doc(2, "processes that run the rewards")
    deadline_s: float = doc(2.0, "a reward that takes longer is killed and scores 0 (`timeout`)")
    wait_s: float = doc(
        600.0,
        "verdicts still missing so many seconds after the last completion ended are not waited "
        "for: their rows do not train (`lost`)",
    )
    gold_format: str = doc(
        "{gold}", "a right completion, with {gold} for the answer; checked before the run starts"
    )
    gold_check: int = doc(
        32, "problems whose gold answer must score right, and others' wrong; 0 skips the check"
    )


@dataclasses.dataclass
class AlgoConfig(Section):
    """Group-relative policy optimisation."""

    problems_per_step: int = doc(32, "P: problems asked each step")
    group_size: int = doc(8, "G: completions a problem, compared with one another")
    minibatches: int = doc(1, "parts a rollout is split into, one optimiser update each")
    passes: int = doc(
        1, "mu: times all minibatches are gone through; 1 pass of 1 minibatch is exactly on-policy"
    )
    microbatch_tokens: int = doc(
        4096, "token slots on each device at one time while gradients add up; at least one row"
    )
    advantage: Callable[..., Any] = doc(
        advantage.grpo, "scores -> advantages [P, G]: a function of grpo.advantage"
    )
    objective: Callable[..., Any] = doc(
        loss.clipped, "log-ratio -> what is maximised, a token: an objective of grpo.loss"
    )
    aggregate: Callable[..., Any] = doc(
        loss.by_token, "what each token counts: by_token, by_sequence or by_length of grpo.loss"
    )
    correction: Callable[..., Any] | None = doc(
        None,
        "importance weights against the sampler: truncated, icepop, masked_sequences of grpo.loss; "
        "uncorrected never corrects. None: the run decides: none while sampler and trainer are "
        "exactly on-policy (one minibatch, one pass, nothing carried over, sampler not quantised), "
        "else truncated",
    )
    clip_low: float = doc(
        0.2, "how far the ratio may fall below 1; needs several updates a rollout"
    )
    clip_high: float = doc(0.28, "how far the ratio may rise above 1; likewise")
    dual_clip: float = doc(3.0, "loss.dual_clipped: ratio from which a bad token has no gradient")
    sapo_temperature_positive: float = doc(1.0, "loss.sapo: how soon the gate closes where A > 0")
    sapo_temperature_negative: float = doc(1.05, "loss.sapo: the same where A < 0")
    correction_cap: float = doc(
        2.0, "loss.truncated, masked_sequences: largest importance weight of a token"
    )
    correction_low: float = doc(0.5, "loss.icepop: tokens whose weight is lower are dropped")
    correction_high: float = doc(5.0, "loss.icepop: tokens whose weight is higher are dropped")
    sequence_gap_max: float = doc(
        0.01, "loss.masked_sequences: nats of mean gap beyond which a completion is dropped"
    )
    pass_k: int = doc(4, "advantage.pass_at_k: tries of which the best counts; below group_size")
    kl: Callable[..., Any] = doc(loss.k3, "KL to the reference as a loss: k2 or k3 of grpo.loss")
    kl_coef: float = doc(0.0, "weight of the KL to the reference; 0 keeps no reference")
    kl_in_reward: bool = doc(
        False,
        "subtract kl_coef * sum of (log pi_old - log pi_ref) from the reward; no KL loss then",
    )
    ref_every: int = doc(
        0, "steps after which the reference becomes the current policy; 0: it stays the initial one"
    )
    ref_offload: bool = doc(
        False,
        "keep the reference (4 bytes a parameter) in the hosts' memory, except while it is asked",
    )
    entropy_coef: float = doc(0.0, "weight of the entropy, which it raises")
    mask_truncated: bool = doc(
        False, "completions cut off at the limit neither train nor count in the denominator"
    )
    dynamic_rounds: int = doc(
        0,
        "further rounds of problems drawn to replace groups whose rewards are all equal; 0: off",
    )
    oversample: float = doc(
        0.0,
        "groups under way beyond problems_per_step, as a share of it: the first problems_per_step "
        "complete ones train, what is unfinished goes on in the next step, corrected for the older "
        "policies that sampled it; the bias is stated in grpo/carry.py. 0: off",
    )
    overlong_buffer_tokens: int = doc(
        0,
        "soft penalty: completions that use the last so many tokens of max_new_tokens lose up to "
        "overlong_penalty points, linearly; 0: off",
    )
    overlong_penalty: float = doc(1.0, "points lost at max_new_tokens")
    curriculum: int = doc(
        0,
        "problems considered for each one asked; those whose running pass rate is nearest to one "
        "half are asked; 0 or 1: off",
    )


@dataclasses.dataclass
class OptimConfig(Section):
    """AdamW."""

    learning_rate: float = doc(1e-6, "peak")
    warmup_updates: int = doc(0, "optimiser updates of linear warm-up")
    decay: str = doc("constant", "after warm-up: `constant`, `linear` or `cosine`, to `end_share`")
    end_share: float = doc(0.0, "share of the peak reached with the last update")
    beta1: float = doc(0.9, "decay of the mean")
    beta2: float = doc(0.95, "decay of the variance")
    eps: float = doc(1e-8, "added to the root of the variance")
    weight_decay: float = doc(0.0, "decoupled; not applied to norm scales")
    clip_norm: float = doc(1.0, "longest gradient, by global norm")
    offload: bool = doc(
        False,
        "keep the moments (8 bytes a parameter) in the hosts' memory, but for the update itself",
    )


@dataclasses.dataclass
class SftConfig(Section):
    """Cold start: supervised fine-tuning on worked completions before reinforcement learning."""

    num_steps: int = doc(0, "supervised updates; 0 leaves the stage out")
    source: ProblemSource | None = doc(
        None, "problems whose meta['worked'] is a whole completion; None takes data.train"
    )
    rows_per_step: int = doc(64, "worked problems an update")
    microbatch_tokens: int = doc(
        4096, "token slots on each device at one time while gradients add up; at least one row"
    )
    learning_rate: float = doc(1e-3, "peak; the rest is as in `optim`")
    warmup_updates: int = doc(10, "updates of linear warm-up")


@dataclasses.dataclass
class RejectionConfig(Section):
    """Rejection sampling (grpo/stages/rejection.py): right completions become data."""

    num_problems: int = doc(0, "problems of data.train that are asked, the first so many; 0: all")
    num_samples: int = doc(16, "completions a problem")
    chunk_problems: int = doc(64, "problems between two saves")
    asked_as: Callable[[Problem], Problem] | None = doc(
        None,
        "how a problem is put to the model, while the plain one is written: "
        "grpo.data.few_shot.FewShot, for a model that was never taught the form",
    )
    filters: tuple[tuple[float, Reward | Batched], ...] = doc(
        (),
        "(at_least, reward) pairs: a right completion that gets less from one of them is dropped",
    )
    keep: int = doc(4, "different completions kept of a question, at most")
    bucket_share: float = doc(
        1.0,
        "largest share of the traces for problems of one difficulty, by quarters of the pass rate; "
        "1: any",
    )
    general: ProblemSource | None = doc(
        None, "other problems with meta['worked'], mixed in: general supervised data"
    )
    general_share: float = doc(0.0, "of the rows written are from `general`; below 1")
    parquet: bool = doc(False, "write traces.parquet beside traces.jsonl")


@dataclasses.dataclass
class DistilConfig(Section):
    """On-policy distillation (grpo/stages/distil.py): the policy learns from a teacher."""

    teacher: str = doc(
        "", "weights of the teacher, as in model.source; its tokenizer must be the policy's"
    )
    divergence: Callable[..., Any] = doc(
        divergence.reverse_kl,
        "from the teacher, a token, and made small: reverse_kl, forward_kl, jsd or "
        "sampled_reverse_kl of grpo.divergence",
    )
    beta: float = doc(
        0.5, "divergence.jsd: the teacher's share of the mixture; near 0 forward KL, near 1 reverse"
    )


@dataclasses.dataclass
class EvalConfig(Section):
    """Measuring on held-out problems."""

    every: int = doc(
        0, "steps between evaluations, also before the first and after the last; 0: never"
    )
    num_problems: int = doc(64, "held-out problems, the first so many")
    num_samples: int = doc(4, "completions a problem")
    temperature: float | None = doc(
        None, "None: the run's; 0 takes the likeliest token, where one sample is as good as many"
    )
    top_k: int = doc(0, "only this many likeliest tokens may be drawn; 0: all")
    top_p: float = doc(1.0, "only the fewest likeliest tokens of so much probability; 1: all")
    min_p: float = doc(0.0, "only tokens at least this share as likely as the likeliest; 0: all")
    answer_of: Callable[[str], str | None] | None = doc(
        None, "text -> final answer, for the majority vote; None leaves maj@k out"
    )


@dataclasses.dataclass
class GatesConfig(Section):
    """Bounds of a sane run (grpo/gates.py): beyond one it warns, or saves and stops."""

    max_bad_updates: int = doc(
        3, "stop after this many updates in a row were skipped for a number that is not finite"
    )
    max_gap_nats_mean: float = doc(
        0.1, "stop when sampler and trainer disagree by more, on average, on a token"
    )
    max_gap_nats_max: float = doc(10.0, "warn when they disagree by more on a single token")
    max_sampler_kl_nats: float = doc(0.1, "warn when their KL divergence, per token, is larger")
    max_failure_rate: float = doc(0.1, "stop when verifiers fail on more of a step's rows")
    max_timeout_rate: float = doc(0.5, "stop when more of a step's rows time out")
    max_repeated_share: float = doc(
        0.5, "completions of a step that mostly repeat one to four tokens; 1 allows any"
    )
    max_zero_id_share: float = doc(0.5, "sampled tokens of a step whose id is 0; 1 allows any")
    max_stuck_share: float = doc(
        0.9, "groups whose completions are all the same and not right; 1 allows any"
    )
    degenerate_steps: int = doc(
        3, "stop when one of the last three bounds is passed this many steps in a row; warn before"
    )
    still_steps: int = doc(
        5,
        "stop when the parameters did not change at all for so many steps in a row, although "
        "there was something to learn and a learning rate",
    )
    max_param_change: float = doc(
        0.05, "warn when a step changes the parameters by more, relative to their norm"
    )
    min_adapter_change: float = doc(
        1e-5,
        "warn when adapters have added less to their matrices, relative to the matrices' norm, for "
        "still_steps steps in a row in which there was something to learn; 0 never does",
    )
    max_kl_old_nats: float = doc(
        0.5, "warn when the updates of a step move the policy further, in KL divergence per token"
    )


@dataclasses.dataclass
class LogConfig(Section):
    """What is written, how often."""

    save_every: int = doc(50, "steps between checkpoints")
    keep_checkpoints: int = doc(2, "older ones are deleted")
    rollouts_every: int = doc(1, "steps between stored rollouts (rollouts.jsonl); 0: never")


@dataclasses.dataclass
class MeshConfig(Section):
    """Devices; sizes multiply to the number of devices, one may be -1 and takes the rest."""

    data: int = doc(1, "copies of the model")
    fsdp: int = doc(-1, "ways parameters are split, gathered layer by layer")
    tensor: int = doc(1, "ways each matrix product is split")
    expert: int = doc(1, "ways the experts of a mixture are split; rows are split by it as well")
    axis_types: str = doc(
        "auto",
        "explicit: how arrays lie is part of their types, and checked while tracing; auto: XLA "
        "decides where nothing is said. The numbers are the same",
    )


@dataclasses.dataclass
class HostsConfig(Section):
    """Running on several hosts, or on one."""

    watch_s: float = doc(
        900.0,
        "a process that does one thing for so many seconds says so, with what all others are doing",
    )


@dataclasses.dataclass
class Config(Section):
    """A whole run."""

    seed: int = doc(0, "everything random in the run follows from it")
    num_steps: int = doc(100, "rollouts")
    model: ModelConfig = doc(ModelConfig, "the policy")
    lora: LoraConfig = doc(LoraConfig, "the adapters")
    data: DataConfig = doc(DataConfig, "the problems")
    sample: SampleConfig = doc(SampleConfig, "sampling")
    reward: RewardConfig = doc(RewardConfig, "scoring")
    algo: AlgoConfig = doc(AlgoConfig, "the algorithm")
    optim: OptimConfig = doc(OptimConfig, "the optimiser")
    sft: SftConfig = doc(SftConfig, "the cold start")
    rejection: RejectionConfig = doc(RejectionConfig, "the rejection sampling")
    distil: DistilConfig = doc(DistilConfig, "the teacher")
    eval: EvalConfig = doc(EvalConfig, "the evaluation")
    gates: GatesConfig = doc(GatesConfig, "what stops a run")
    log: LogConfig = doc(LogConfig, "logs and checkpoints")
    mesh: MeshConfig = doc(MeshConfig, "the devices")
    hosts: HostsConfig = doc(HostsConfig, "the processes")


# ---- checks ----------------------------------------------------------------------------------


def sections(config: Any, path: str = "config") -> Iterator[tuple[str, Section]]:
    """(path, section) of every section, outermost first."""
    yield path, config
    for field in dataclasses.fields(config):
        value = config.__dict__[field.name]
        if isinstance(value, Section):
            yield from sections(value, f"{path}.{field.name}")


def fields(config: Config) -> Iterator[tuple[str, Any, Any]]:
    """(path of the section, field, value) of every field that is not itself a section."""
    for path, section in sections(config):
        for field in dataclasses.fields(section):  # type: ignore[arg-type]
            value = section.__dict__[field.name]
            if not isinstance(value, Section):
                yield path, field, value


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, choice) for choice in typing.get_args(hint))
    if origin is tuple:
        inner = typing.get_args(hint)
        if not isinstance(value, tuple):
            return False
        if inner[-1] is Ellipsis:
            return all(_fits(v, inner[0]) for v in value)
        return len(value) == len(inner) and all(map(_fits, value, inner))
    if origin is not None:  # Callable[...]
        return callable(value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is ProblemSource:
        return hasattr(value, "__len__") and hasattr(value, "__getitem__")
    return isinstance(value, hint)


def check_types(config: Config) -> None:
    """Raises TypeError for the first field whose value is not of its declared type."""
    for path, section in sections(config):
        hints = typing.get_type_hints(type(section))
        for field in dataclasses.fields(section):  # type: ignore[arg-type]
            value, hint = section.__dict__[field.name], hints[field.name]
            if not _fits(value, hint):
                wanted = hint.__name__ if isinstance(hint, type) else hint
                raise TypeError(
                    f"{path}.{field.name} is {value!r}, a {type(value).__name__}; "
                    f"it must be {wanted} ({field.metadata['doc']})"
                )


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


_POSITIVE = """
    algo.problems_per_step algo.minibatches algo.passes algo.microbatch_tokens algo.dual_clip
    algo.sapo_temperature_positive algo.sapo_temperature_negative algo.correction_cap
    algo.correction_low algo.correction_high algo.sequence_gap_max algo.pass_k
    sample.max_new_tokens sample.slots sample.tokens_per_dispatch data.max_prompt_tokens
    reward.workers reward.deadline_s reward.wait_s hosts.watch_s
    model.width model.mlp_width model.num_layers
    model.num_heads model.num_kv_heads model.logprob_chunk lora.alpha optim.eps optim.clip_norm
    gates.max_bad_updates gates.max_gap_nats_mean gates.max_gap_nats_max gates.max_sampler_kl_nats
    gates.degenerate_steps gates.still_steps gates.max_param_change gates.max_kl_old_nats
    sft.rows_per_step sft.microbatch_tokens rejection.num_samples rejection.chunk_problems
    rejection.keep rejection.bucket_share eval.num_problems eval.num_samples eval.top_p
    log.save_every log.keep_checkpoints
""".split()
_NOT_NEGATIVE = """
    seed num_steps lora.rank sample.slots_per_prompt sample.tail_slots sample.draft_tokens
    algo.clip_high algo.kl_coef algo.ref_every algo.entropy_coef algo.dynamic_rounds algo.curriculum
    algo.overlong_buffer_tokens algo.overlong_penalty optim.learning_rate optim.warmup_updates
    optim.weight_decay reward.gold_check sft.num_steps sft.learning_rate
    sft.warmup_updates rejection.num_problems eval.every eval.top_k log.rollouts_every
    gates.min_adapter_change
""".split()
_SHARES = """
    algo.clip_low algo.oversample optim.end_share optim.beta1 optim.beta2 gates.max_failure_rate
    gates.max_timeout_rate gates.max_repeated_share gates.max_zero_id_share gates.max_stuck_share
    rejection.bucket_share rejection.general_share
    eval.top_p eval.min_p
""".split()


def validate(config: Config, *, scored: bool = True) -> None:
    """Raises ValueError for numbers that cannot work, or cannot work together.

    Args:
      config: all of it.
      scored: problems are to be asked and rewards to judge; supervised learning needs neither.
    """
    check_types(config)
    value_of = {f"{path}.{f.name}"[len("config.") :]: v for path, f, v in fields(config)}
    for name in _POSITIVE + _NOT_NEGATIVE + _SHARES:
        value = value_of[name]
        _need(math.isfinite(value), f"{name} is {value}; it must be a finite number")
        _need(value > 0 or name not in _POSITIVE, f"{name} is {value}; it must be positive")
        _need(value >= 0, f"{name} is {value}; it cannot be negative")
        _need(value <= 1 or name not in _SHARES, f"{name} is {value}; it must be in [0, 1]")
    algo, sample, reward, optim = config.algo, config.sample, config.reward, config.optim
    for axis in ("data", "fsdp", "tensor", "expert"):
        size = value_of[f"mesh.{axis}"]
        _need(size > 0 or size == -1, f"mesh.{axis} is {size}; it must be positive, or -1")
    _need(algo.group_size >= 2, f"algo.group_size is {algo.group_size}; a group needs at least 2")
    _need(
        sample.temperature > 0,
        f"sample.temperature is {sample.temperature}; training needs a positive one (0, the "
        "likeliest token, gives every completion of a group the same text)",
    )
    rows = algo.problems_per_step * algo.group_size
    product = f"problems_per_step ({algo.problems_per_step}) x group_size ({algo.group_size})"
    _need(
        algo.problems_per_step % algo.minibatches == 0,
        f"{product} = {rows} rows cannot be split into {algo.minibatches} equal minibatches of "
        "whole groups",
    )
    _validate_algorithm(config)
    if scored:
        _need(bool(reward.functions), "reward.functions is empty: there is nothing to learn from")
        _need(config.data.train is not None, "data.train is not set: there is nothing to ask")
    for weight, function in reward.functions:
        _need(math.isfinite(weight), f"the weight of {describe(function)} is {weight}")
    axis_types = ("explicit", "auto")
    _need(
        config.mesh.axis_types in axis_types,
        f"mesh.axis_types is {config.mesh.axis_types!r}; choose from {axis_types}",
    )
    choices = ("constant", "linear", "cosine")
    _need(optim.decay in choices, f"optim.decay is {optim.decay!r}; choose from {choices}")
    _need(
        config.model.remat in REMAT_CHOICES,
        f"model.remat is {config.model.remat!r}; choose from {REMAT_CHOICES}",
    )
    _need(
        config.model.attention in ATTENTION_CHOICES,
        f"model.attention is {config.model.attention!r}; choose from {ATTENTION_CHOICES}",
    )
    choices = ("default", "on", "off")
    _need(
        config.model.thinking in choices,
        f"model.thinking is {config.model.thinking!r}; choose from {choices}",
    )
    dtypes = {
        "model.compute_dtype": ("float32", "bfloat16"),
        "model.base_dtype": BASE_DTYPES,
        "sample.weights": ROLLOUT_CHOICES,
        "sample.cache": ROLLOUT_CHOICES,
    }
    for name, known in dtypes.items():
        _need(value_of[name] in known, f"{name} is {value_of[name]!r}; choose from {known}")
    _validate_adapters(config)
    _validate_rejection(config.rejection)
    _need("{gold}" in reward.gold_format, "reward.gold_format must contain {gold}")
    updates = config.num_steps * algo.minibatches * algo.passes
    _need(
        config.num_steps == 0 or optim.warmup_updates <= updates,
        f"optim.warmup_updates is {optim.warmup_updates}, but the run makes only num_steps "
        f"({config.num_steps}) x minibatches ({algo.minibatches}) x passes ({algo.passes}) = "
        f"{updates} updates: it would never reach its learning rate",
    )
    beta = config.distil.beta
    _need(
        0 < beta < 1,
        f"distil.beta is {beta}; it must be strictly between 0 and 1 (at the ends the divergence "
        "vanishes: divergence.forward_kl and reverse_kl are what it becomes there)",
    )
    if config.eval.every:
        _need(config.data.held_out is not None, "eval.every is set, but data.held_out is not")
        warmth = config.eval.temperature
        _need(
            warmth is None or (warmth >= 0 and math.isfinite(warmth)),
            f"eval.temperature is {warmth}; it must be a finite number, 0 (the likeliest token) or "
            "more, or None (the run's)",
        )
    if config.sft.num_steps:
        sft = config.sft
        _need(
            sft.warmup_updates <= sft.num_steps,
            f"sft.warmup_updates is {sft.warmup_updates}, but the cold start makes only "
            f"sft.num_steps = {sft.num_steps} updates: it would never reach its learning rate",
        )


def _validate_rejection(rejection: RejectionConfig) -> None:
    for bound, function in rejection.filters:
        _need(
            0 < bound <= 1,
            f"rejection.filters drops what gets less than {bound} from {describe(function)}; "
            "rewards lie in [0, 1]",
        )
    share = rejection.general_share
    _need(share < 1, "rejection.general_share is 1: there would be no traces")
    _need(
        bool(share) == (rejection.general is not None),
        f"rejection.general_share is {share} and rejection.general is "
        f"{'set' if rejection.general is not None else 'not set'}; set both or neither",
    )


def _validate_adapters(config: Config) -> None:
    lora, base_dtype = config.lora, config.model.base_dtype
    _need(bool(lora.targets), "lora.targets is empty: no matrix would get an adapter")
    _need(
        lora.rank == 0 or config.sample.weights == "compute" or not base_dtype.startswith("int"),
        f"sample.weights is {config.sample.weights!r}, but model.base_dtype is {base_dtype!r}: the "
        "sampler uses the base as it is stored; leave sample.weights at 'compute'",
    )


def _validate_algorithm(config: Config) -> None:
    """The part of `validate` for choices of the algorithm that exclude one another."""
    algo, limit = config.algo, config.sample.max_new_tokens
    chosen = _function(algo.advantage)
    if chosen is advantage.pass_at_k:
        _need(
            algo.pass_k < algo.group_size,
            f"algo.pass_k is {algo.pass_k}, but must be below algo.group_size ({algo.group_size}): "
            "a completion is compared with k others",
        )
    if chosen is advantage.maxrl:
        negative = [describe(f) for weight, f in config.reward.functions if weight < 0]
        subtracts = {
            "a negative weight in reward.functions": bool(negative),
            "algo.overlong_buffer_tokens": algo.overlong_buffer_tokens > 0,
            "algo.kl_in_reward": algo.kl_in_reward,
        }
        for what, present in subtracts.items():
            _need(
                not present,
                f"advantage.maxrl divides by the mean reward, which {what} can make negative or 0; "
                "take another advantage or leave that out",
            )
    if _function(algo.objective) is loss.dual_clipped:
        _need(
            algo.dual_clip > 1 + algo.clip_high,
            f"algo.dual_clip is {algo.dual_clip}; it must be above 1 + clip_high "
            f"({1 + algo.clip_high}), else it takes the place of the clip",
        )
    if _function(algo.correction) is loss.icepop:
        _need(
            algo.correction_low < 1 < algo.correction_high,
            f"algo.correction_low ({algo.correction_low}) and algo.correction_high "
            f"({algo.correction_high}) must lie on both sides of 1: a weight of 1 is no gap at all",
        )
    loss.check_kl(algo.kl)
    _need(
        algo.kl_coef > 0 or not algo.kl_in_reward,
        f"algo.kl_in_reward is set, but algo.kl_coef is {algo.kl_coef}: nothing is subtracted",
    )
    _need(
        algo.kl_coef > 0 or not algo.ref_every,
        f"algo.ref_every is set, but algo.kl_coef is {algo.kl_coef}: there is no reference",
    )
    _need(
        algo.kl_coef > 0 or not algo.ref_offload,
        f"algo.ref_offload is set, but algo.kl_coef is {algo.kl_coef}: there is no reference",
    )
    if algo.oversample:
        _validate_oversample(algo)
    _need(
        algo.overlong_buffer_tokens <= limit,
        f"algo.overlong_buffer_tokens is {algo.overlong_buffer_tokens}, but completions have at "
        f"most sample.max_new_tokens = {limit}",
    )


def _validate_oversample(algo: AlgoConfig) -> None:
    _need(
        round(algo.problems_per_step * algo.oversample) > 0,
        f"algo.oversample is {algo.oversample}, but so much of algo.problems_per_step "
        f"({algo.problems_per_step}) is not one group; raise it, or set it to 0",
    )
    _need(
        not algo.dynamic_rounds,
        f"algo.oversample ({algo.oversample}) and algo.dynamic_rounds ({algo.dynamic_rounds}) are "
        "both set: groups that end late cannot be drawn again in the same step; set one to 0",
    )
    _need(
        _function(algo.correction) is not loss.uncorrected,
        "algo.oversample is set, but algo.correction is loss.uncorrected: carried tokens were "
        "sampled by older policies; leave it at None, or take another correction",
    )


def _function(chosen: Any) -> Any:
    """What a `functools.partial` of it calls."""
    return chosen.func if isinstance(chosen, functools.partial) else chosen


def bind(function: Callable[..., Any], *settings: Section) -> Callable[..., Any]:
    """`function` with its numbers filled in from the configuration.

    A number is a keyword-only parameter without a default. It is read from the first of `settings`
    that has a field of its name, and so counts as used; numbers of functions that were not chosen
    do not. A function without such parameters is returned as it is.

    Raises:
      ValueError: no section has a field of that name.
    """
    numbers = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            having = [s for s in settings if name in {f.name for f in dataclasses.fields(s)}]  # type: ignore[arg-type]
            if not having:
                kinds = " or ".join(type(s).__name__ for s in settings)
                raise ValueError(
                    f"{describe(function)} wants a number {name!r}, but {kinds} has no such field; "
                    f"give it a default, or set it with functools.partial({name}=...)"
                )
            numbers[name] = getattr(having[0], name)
    return functools.partial(function, **numbers) if numbers else function


def track_reads(config: Config) -> None:
    """From here on, every section remembers which of its fields were read."""
    for _, section in sections(config):
        object.__setattr__(section, "_read", set())


def check_all_read(config: Config, baseline: Config) -> None:
    """Raises ValueError if a field that differs from `baseline` was not read so far.

    Called when everything is built and nothing has run: whatever a run uses, it has read by then.
    """
    own, base = dict(sections(config)), dict(sections(baseline))
    idle = [
        f"{path}.{field.name}={value!r} ({field.metadata['doc']})"
        for path, field, value in fields(config)
        if field.name not in own[path].__dict__["_read"]
        # As described: a function made by get_config() is another one each time.
        and describe(value) != describe(base[path].__dict__[field.name])
    ]
    if idle:
        raise ValueError(
            "these fields are set but this run does not use them; leave them at their defaults or "
            "switch on what reads them:\n  " + "\n  ".join(idle)
        )


def describe(value: Any) -> Any:
    """Plain JSON-able data of a config, for the workdir; functions by their full names."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        state = value.__dict__ if isinstance(value, Section) else vars(value)
        fields = {f.name: describe(state[f.name]) for f in dataclasses.fields(value)}
        return fields if isinstance(value, Section) else {"class": type(value).__name__, **fields}
    if isinstance(value, tuple | list):
        return [describe(v) for v in value]
    if isinstance(value, dict):
        return {str(k): describe(v) for k, v in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    name = getattr(value, "__qualname__", None)
    if name:
        return f"{getattr(value, '__module__', '?')}.{name}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # equal in every process


def help_text(config: Config) -> str:
    """Every field with its value in `config` and its documentation."""
    column = " " * 44
    lines = ["Every field and its default; --config.section.field=value sets it."]
    for path, section in sections(config):
        lines += ["", f"{path}: {section.__doc__}"]
        for where, field, value in fields(config):
            if where == path:
                shown = describe(value) if callable(value) else repr(value)
                setting = f"  {path}.{field.name}={shown}".ljust(len(column) - 1)
                text = f"{setting} {field.metadata['doc']}"
                lines += textwrap.wrap(text, 100, subsequent_indent=column)
    return "\n".join(lines)


if __name__ == "__main__":
    print(help_text(Config()))
