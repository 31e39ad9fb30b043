"""The tiny task with DeepSeek-V3's architecture in small, from random weights.

Source: as experiments/tiny.py, with multi-head latent attention, a dense first layer, and experts
  routed by sigmoid in groups beside a shared one (arXiv:2412.19437). The cache holds 48 + 16
  numbers a token and layer. What the sampler's routers choose is replayed in the update.
Command: python -m grpo.launch --config=experiments/tiny_mla.py --workdir=runs/tiny_mla
  on 8 devices, experts split two ways:
  ... --config.mesh.fsdp=2 --config.mesh.tensor=2 --config.mesh.expert=2
Hardware: two CPU cores, 2 GiB.
"""

import json

from experiments import tiny
from grpo.config import Config, ModelConfig

SHAPE = {
    "model_type": "deepseek_v3",
    "hidden_size": 192,
    "intermediate_size": 640,  # of the first layer
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "kv_lora_rank": 48,
    "q_lora_rank": None,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "tie_word_embeddings": True,
}


def get_config() -> Config:
    config = tiny.get_config()
    config.model = ModelConfig(shape=json.dumps(SHAPE), compute_dtype="float32", remat="none")
    return config
