"""A byte-level model learns to write one-line programs that pass tests it never sees, on a CPU.

Source: the recipe of DeepSeek-R1 (arXiv:2501.12948) in small, as in experiments/tiny.py: a short
  cold start with a teacher whose program is the wrong one in three of ten cases, then GRPO
  (arXiv:2402.03300). The reward runs every program in the sandbox of `rewards.code_tests` and
  asserts what the function gives on the examples of the prompt, and on others.
Command:
  python -m grpo.launch --config=experiments/tiny_code.py --workdir=runs/tiny_code
Hardware: two CPU cores, 2 GiB, Linux with bubblewrap or Landlock.
"""

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
from grpo.data.procedural import OneLiners, SlippedPrograms
from rewards.answers import tagged_answer
from rewards.code_tests import code_tests
from rewards.formats import r1_format


def get_config() -> Config:
    problems = OneLiners(size=12_000)
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
            held_out=OneLiners(size=1_000, held_out=True),
            max_prompt_tokens=20,
        ),
        sample=SampleConfig(max_new_tokens=68, slots=64, tokens_per_dispatch=16),
        reward=RewardConfig(
            functions=((1.0, code_tests), (0.1, r1_format)),
            gold_format="<think>so</think><answer>{gold}</answer>",
        ),
        algo=AlgoConfig(problems_per_step=16, group_size=8),
        optim=OptimConfig(learning_rate=2e-4, warmup_updates=3, decay="linear", end_share=0.1),
        sft=SftConfig(
            num_steps=400,
            source=SlippedPrograms(source=problems, slip_rate=0.3),
            rows_per_step=32,
            learning_rate=2e-3,
        ),
        eval=EvalConfig(every=10, num_problems=128, num_samples=4, answer_of=tagged_answer),
        log=LogConfig(save_every=10),
    )
