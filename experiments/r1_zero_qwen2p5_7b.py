"""R1-Zero on Qwen2.5-7B: as r1_zero_qwen2p5_1p5b.py, on a larger model and slice.

Source: DeepSeek-R1-Zero (arXiv:2501.12948); Qwen2.5 (arXiv:2412.15115).
Command:
  python -m grpo.plan --config=experiments/r1_zero_qwen2p5_7b.py --topology=v5e:8x8
  python -m grpo.plan --config=experiments/r1_zero_qwen2p5_7b.py --topology=v6e:4x4 \\
      --config.mesh.fsdp=4
  python -m grpo.launch --config=experiments/r1_zero_qwen2p5_7b.py \\
      --workdir=gs://BUCKET/r1-zero --config.model.source=/models/Qwen2.5-7B \\
      --config.data.train.path=/data/math_train.jsonl
Hardware: TPU v5litepod-64 (8 x 8); or TPU v6e-16 (4 x 4) with --config.mesh.fsdp=4.
Time: see the table of plans in README.md. Not run.
"""

from experiments.r1_zero_qwen2p5_1p5b import r1_zero
from grpo.config import Config, MeshConfig


def get_config() -> Config:
    return r1_zero("/models/Qwen2.5-7B", mesh=MeshConfig(fsdp=16, tensor=4))
