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


def sums(**more: Any) -> DigitChain:
    """Three or four digits from 1 to 6."""
    return DigitChain(min_terms=3, max_terms=4, high=6, **more)


def get_config() -> Config:
    problems = sums(size=12_000)
    return Config(
        num_steps=40,
        model=ModelConfig(shape=json.dumps(SHAPE), compute_dtype="float32", remat="none"),
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
