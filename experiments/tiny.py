"""A byte-level model learns to add up a list of digits, from random weights, in minutes on a CPU.

Source: the recipe of DeepSeek-R1 (arXiv:2501.12948) in small: a short cold start on worked chains
  of thought, then GRPO (arXiv:2402.03300) on the same kind of problem. The cold start's teacher is
  imperfect on purpose: six in ten of its chains contain a slip, so imitation alone gets under half
  of the problems right, and what comes after is learnt from the reward.
Command: make demo, or
  python -m grpo.launch --config=experiments/tiny.py --workdir=runs/tiny
Hardware: two CPU cores, 2 GiB.
"""

from typing import Any

from grpo.config import (
    AlgoConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    SampleConfig,
    SftConfig,
)
from grpo.data.procedural import DigitChain, SlippedChains
from rewards.answers import numeric_answer, tagged_answer
from rewards.formats import r1_format


def sums(**more: Any) -> DigitChain:
    """Three or four digits from 1 to 6."""
    return DigitChain(min_terms=3, max_terms=4, high=6, **more)


def get_config() -> Config:
    problems = sums(size=12_000)
    return Config(
        num_steps=40,
        model=ModelConfig(
            width=192,
            mlp_width=640,
            num_layers=4,
            num_heads=6,
            num_kv_heads=2,
            compute_dtype="float32",  # bfloat16 is no faster on a CPU
            remat="none",
        ),
        data=DataConfig(
            train=problems,
            held_out=sums(size=1_000, held_out=True),
            max_prompt_tokens=8,
        ),
        sample=SampleConfig(max_new_tokens=60, slots=128, tokens_per_dispatch=16),
        reward=RewardConfig(
            functions=((1.0, numeric_answer), (0.1, r1_format)),
            gold_format="<think>so</think><answer>{gold}</answer>",
        ),
        algo=AlgoConfig(problems_per_step=16, group_size=8, microbatch_tokens=3100),
        optim=OptimConfig(learning_rate=2e-4, warmup_updates=3, decay="linear", end_share=0.1),
        sft=SftConfig(
            num_steps=320,
            source=SlippedChains(source=problems, slip_rate=0.58),
            rows_per_step=32,
            learning_rate=2e-3,
        ),
        eval=EvalConfig(every=10, num_problems=128, num_samples=4, answer_of=tagged_answer),
        log=LogConfig(save_every=10),
    )
