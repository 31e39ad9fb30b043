"""The tiny task with a mixture of experts: Qwen 3 MoE's architecture in small, from random weights.

Source: as experiments/tiny.py, with eight experts a layer of which each token goes to two
  (arXiv:2505.09388). What the sampler's routers choose is replayed in the update.
Command: python -m grpo.launch --config=experiments/tiny_moe.py --workdir=runs/tiny_moe
  on 8 devices, experts split two ways:
  ... --config.mesh.fsdp=2 --config.mesh.tensor=2 --config.mesh.expert=2
Hardware: two CPU cores, 2 GiB.
"""

import json

from experiments import tiny
from grpo.config import Config, ModelConfig

SHAPE = {
    "model_type": "qwen3_moe",
    "hidden_size": 192,
    "intermediate_size": 640,  # of dense layers, of which there are none
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
}


def get_config() -> Config:
    config = tiny.get_config()
    config.model = ModelConfig(shape=json.dumps(SHAPE), compute_dtype="float32", remat="none")
    return config
