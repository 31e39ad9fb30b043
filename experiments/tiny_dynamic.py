"""Few problems teach anything: dynamic sampling on a set that is mostly solved or hopeless.

Three kinds of sums. Six in ten have three digits, which the cold start already teaches nearly
without a slip; a quarter add two-digit numbers, which it never shows; the rest have four digits,
taught by a teacher who slips in most of its chains, and are all there is to learn. Held out are
four digits alone. --config.algo.dynamic_rounds=0 switches dynamic sampling off.

Source: DAPO, arXiv:2503.14476, section 3.2, in small.
Command:
  python -m grpo.launch --config=experiments/tiny_dynamic.py --workdir=runs/dynamic
  python -m grpo.launch --config=experiments/tiny_dynamic.py --workdir=runs/static \\
    --config.algo.dynamic_rounds=0
Hardware: two CPU cores, 2 GiB.
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
from grpo.data.procedural import DigitChain, SlippedChains
from grpo.data.sources import Mixture
from rewards.answers import numeric_answer, tagged_answer
from rewards.formats import r1_format

SIZE = 8_000


def get_config() -> Config:
    easy = DigitChain(min_terms=3, max_terms=3, high=6, size=SIZE)
    hopeless = DigitChain(min_terms=2, max_terms=2, high=99, size=SIZE)
    hard = DigitChain(min_terms=4, max_terms=4, high=6, size=SIZE)
    taught = (
        (0.5, SlippedChains(source=easy, slip_rate=0.02)),
        (0.5, SlippedChains(source=hard, slip_rate=0.6)),
    )
    return Config(
        num_steps=30,
        model=ModelConfig(
            width=192,
            mlp_width=640,
            num_layers=4,
            num_heads=6,
            num_kv_heads=2,
            compute_dtype="float32",
            remat="none",
        ),
        data=DataConfig(
            train=Mixture(parts=((0.6, easy), (0.25, hopeless), (0.15, hard)), size=SIZE),
            held_out=DigitChain(min_terms=4, max_terms=4, high=6, size=1_000, held_out=True),
            max_prompt_tokens=8,
        ),
        sample=SampleConfig(max_new_tokens=60, slots=128, tokens_per_dispatch=16),
        reward=RewardConfig(
            functions=((1.0, numeric_answer), (0.1, r1_format)),
            gold_format="<think>so</think><answer>{gold}</answer>",
        ),
        algo=AlgoConfig(
            problems_per_step=16, group_size=8, microbatch_tokens=3100, dynamic_rounds=6
        ),
        optim=OptimConfig(learning_rate=2e-4, warmup_updates=3),
        sft=SftConfig(
            num_steps=320,
            source=Mixture(parts=taught, size=SIZE),
            rows_per_step=32,
            learning_rate=2e-3,
        ),
        eval=EvalConfig(every=5, num_problems=128, num_samples=4, answer_of=tagged_answer),
        log=LogConfig(save_every=10),
    )
