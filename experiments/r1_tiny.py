"""DeepSeek-R1's whole chain in small: thirteen stages, minutes on a CPU, from random weights.

Source: arXiv:2501.12948. Sums are asked in English and Chinese and worked out in words; a language
  consistency reward pays for thinking in the language of the question. A careless teacher takes
  the place of the web as a source of text: two fifths of its chains contain a slip, half mix the
  languages, three tenths lack the think tags.
Command: python -m grpo.pipeline --config=experiments/r1_tiny.py --workdir=runs/r1_tiny
Hardware: two CPU cores, 2 GiB, less than 20 minutes.
"""

import copy
import dataclasses
from typing import Any

from grpo.config import (
    AlgoConfig,
    Config,
    DataConfig,
    DistilConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    RejectionConfig,
    RewardConfig,
    SampleConfig,
    SftConfig,
)
from grpo.data.bilingual import Backwards, CarelessSums, WordedSums
from grpo.data.sources import JsonlProblems, Mixture, ProblemSource
from grpo.pipeline import Pipeline, Stage
from grpo.stages.distil import distil
from grpo.stages.rejection import sample_traces
from grpo.stages.release import release
from grpo.stages.supervise import supervise
from grpo.train import train
from rewards.answers import numeric_answer, tagged_answer
from rewards.by_task import by_task
from rewards.formats import r1_format
from rewards.language import language_consistency
from rewards.sequences import letters_share

SUMS = WordedSums(size=20_000)
HELD_OUT = dataclasses.replace(SUMS, size=1_000, held_out=True)
LETTERS = Backwards(min_letters=2, max_letters=3, size=4_000)
TEACHER: dict[str, Any] = {
    "width": 192,
    "mlp_width": 640,
    "num_layers": 4,
    "num_heads": 6,
    "num_kv_heads": 2,
}
STUDENT: dict[str, Any] = {
    "width": 144,
    "mlp_width": 400,
    "num_layers": 4,
    "num_heads": 6,
    "num_kv_heads": 2,
}
TRACES = JsonlProblems(path="", answer_field="answer")  # the path is filled in
ZERO = ((1.0, numeric_answer), (0.1, r1_format))  # what R1-Zero was rewarded for
READABLE = (*ZERO, (0.2, language_consistency))  # and R1
EVERYTHING = (
    (1.0, by_task({"WordedSums": numeric_answer, "Backwards": letters_share})),
    *READABLE[1:],
)


def sums_and_letters(sums: ProblemSource, share: float, size: int) -> Mixture:
    """`share` of `size` problems are sums."""
    return Mixture(parts=((share, sums), (1 - share, LETTERS)), size=size)


def config(sizes: dict[str, Any] | None = None, **sections: Any) -> Config:
    """A stage's configuration; `sizes` are of a new model, None goes on with an earlier one."""
    model = ModelConfig(**(sizes or {}), compute_dtype="float32", remat="none")
    return Config(
        model=model,
        sample=SampleConfig(max_new_tokens=74, slots=128, tokens_per_dispatch=16),
        log=LogConfig(save_every=10, keep_checkpoints=1),
        **sections,
    )


def sft(source: ProblemSource, num_steps: int, rate: float, sizes: Any = None) -> Config:
    """Supervised learning from `source`."""
    return config(
        sizes,
        data=DataConfig(max_prompt_tokens=16),
        sft=SftConfig(num_steps=num_steps, source=source, rows_per_step=32, learning_rate=rate),
        optim=OptimConfig(decay="linear", end_share=0.1),
    )


def rl(num_steps: int, problems: ProblemSource, functions: Any, rate: float = 2e-4) -> Config:
    """Reinforcement learning."""
    return config(
        num_steps=num_steps,
        data=DataConfig(train=problems, max_prompt_tokens=16),
        reward=rewards(functions),
        algo=AlgoConfig(problems_per_step=16, group_size=8, microbatch_tokens=3100),
        optim=OptimConfig(learning_rate=rate, warmup_updates=3, decay="linear", end_share=0.1),
    )


def rewards(functions: Any) -> RewardConfig:
    """Rewards, and what a right answer looks like; letters have no right or wrong to check."""
    gold = "<think>so</think><answer>{gold}</answer>"
    return RewardConfig(functions=functions, gold_format=gold)


def traces(num_problems: int, num_samples: int, **more: Any) -> Config:
    """Right and readable completions of a model."""
    return config(
        data=DataConfig(train=SUMS, max_prompt_tokens=16),
        reward=rewards(READABLE),
        rejection=RejectionConfig(
            num_problems=num_problems,
            num_samples=num_samples,
            chunk_problems=128,
            filters=((1.0, r1_format), (1.0, language_consistency)),
            keep=2,
            **more,
        ),
    )


def taught(num_steps: int) -> Config:
    """On-policy distillation."""
    made = rl(num_steps, SUMS, READABLE, rate=1e-4)
    made.distil = DistilConfig()
    return made


def get_pipeline() -> Pipeline:
    careless = CarelessSums(source=SUMS, slip_rate=0.4, mix_rate=0.5, loose_rate=0.3)
    corpus = sums_and_letters(careless, share=0.9, size=20_000)
    scores = config(
        data=DataConfig(train=SUMS, held_out=HELD_OUT, max_prompt_tokens=16),
        reward=rewards(READABLE),
        eval=EvalConfig(num_problems=128, num_samples=4, answer_of=tagged_answer),
    )
    stages = (
        Stage(
            "base",
            supervise,
            sft(corpus, 450, 2e-3, TEACHER),
            about="a base model, of careless text in two languages",
        ),
        Stage(
            "r1_zero",
            train,
            rl(30, SUMS, ZERO),
            {"model.source": "base"},
            about="R1-Zero: reinforcement learning alone, for right answers and the form",
        ),
        Stage(
            "cold_traces",
            sample_traces,
            traces(512, 4),
            {"model.source": "base"},
            about="what the base model itself writes that is right and readable",
        ),
        Stage(
            "cold_start",
            supervise,
            sft(copy.copy(TRACES), 30, 5e-4),
            {"model.source": "base", "sft.source.path": "cold_traces"},
            about="cold start on it",
        ),
        Stage(
            "reasoning_rl",
            train,
            rl(30, SUMS, READABLE),
            {"model.source": "cold_start"},
            about="reasoning RL: the rewards of R1-Zero and language consistency",
        ),
        Stage(
            "traces",
            sample_traces,
            traces(1024, 2, general=LETTERS, general_share=0.2),
            {"model.source": "reasoning_rl"},
            about="rejection sampling, mixed with general supervised data",
        ),
        Stage(
            "sft",
            supervise,
            sft(copy.copy(TRACES), 120, 1e-3),
            {"model.source": "base", "sft.source.path": "traces"},
            about="supervised fine-tuning on it, of the base model again",
        ),
        Stage(
            "r1",
            train,
            rl(12, sums_and_letters(SUMS, share=0.75, size=10_000), EVERYTHING, rate=1e-4),
            {"model.source": "sft"},
            about="RL for all scenarios: rules for sums, a graded reward for the rest",
        ),
        Stage(
            "student_base",
            supervise,
            sft(corpus, 450, 2e-3, STUDENT),
            about="a base model half the size",
        ),
        Stage(
            "student",
            supervise,
            sft(copy.copy(TRACES), 160, 1e-3),
            {"model.source": "student_base", "sft.source.path": "traces"},
            about="distilled: it learns from the traces",
        ),
        Stage(
            "student_rl",
            train,
            rl(22, SUMS, READABLE),
            {"model.source": "student_base"},
            about="for comparison: reinforcement learning alone, in the time distilling takes",
        ),
        Stage(
            "student_on_policy",
            distil,
            taught(20),
            {"model.source": "student", "distil.teacher": "r1"},
            about="distilled further on its own completions, each token judged by R1",
        ),
        Stage(
            "child",
            release,
            config(data=DataConfig(train=HELD_OUT, max_prompt_tokens=16)),
            {"model.source": "student_on_policy"},
            about="for modest hardware: a Hugging Face folder and a .gguf file",
        ),
    )
    columns = {
        "format": "eval/full/r1_format",
        "language": "eval/component/language_consistency",
        "unmixed": "eval/full/language_consistency",
    }
    return Pipeline(stages, scores, columns)
