"""A student with a quarter of the parameters learns to add up from what experiments/tiny.py made.

Source: on-policy distillation (GKD, arXiv:2306.13649; Thinking Machines, 2025) in small. The
  student begins with the same imperfect cold start as its teacher did, so that it writes chains of
  thought that the teacher knows, most of them wrong. Rewards are only logged.
Command:
  python -m grpo.launch --config=experiments/tiny.py --workdir=runs/tiny
  python -m grpo.stages.supervise --config=experiments/tiny_distil.py --workdir=runs/small
  python -m grpo.stages.distil --config=experiments/tiny_distil.py --workdir=runs/distilled \\
    --config.model.source=runs/small
Hardware: two CPU cores, 2 GiB.
"""

from experiments import tiny
from grpo.config import Config, DistilConfig, ModelConfig, OptimConfig


def get_config() -> Config:
    config = tiny.get_config()
    config.model = ModelConfig(
        width=96,
        mlp_width=320,
        num_layers=4,
        num_heads=3,
        num_kv_heads=1,
        compute_dtype="float32",
        remat="none",
    )
    config.distil = DistilConfig(teacher="runs/tiny")
    config.optim = OptimConfig(learning_rate=1e-3, warmup_updates=3, decay="linear", end_share=0.1)
    return config
