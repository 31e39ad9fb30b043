"""R1-Zero on Qwen2.5-72B: as r1_zero_qwen2p5_1p5b.py, on a larger model and slice.

Source: DeepSeek-R1-Zero (arXiv:2501.12948); Qwen2.5 (arXiv:2412.15115).
Command:
  python -m grpo.plan --config=experiments/r1_zero_qwen2p5_72b.py --topology=v5p:4x4x8
  python -m grpo.launch --config=experiments/r1_zero_qwen2p5_72b.py \\
      --workdir=gs://BUCKET/r1-zero --config.model.source=/models/Qwen2.5-72B \\
      --config.data.train.path=/data/math_train.jsonl
Hardware: TPU v5p-256 (128 chips, 4 x 4 x 8).
Time: see the table of plans in README.md. Not run.
"""

from experiments.r1_zero_qwen2p5_1p5b import r1_zero
from grpo.config import Config, MeshConfig


def get_config() -> Config:
    return r1_zero("/models/Qwen2.5-72B", mesh=MeshConfig(fsdp=16, tensor=8))
