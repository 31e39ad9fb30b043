"""The tiny task with a mixture of experts: Qwen 3 MoE's architecture in small, from random weights.

Source: as experiments/tiny.py, with eight experts a layer of which each token goes to two
  (arXiv:2505.09388). What the sampler's routers choose is replayed in the update.
Command: python -m grpo.launch --config=experiments/tiny_moe.py --workdir=runs/tiny_moe
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
