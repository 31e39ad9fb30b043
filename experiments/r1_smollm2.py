"""SmolLM2-135M-Instruct learns to name the largest of three numbers, and passes it on.

Source: the second half of DeepSeek-R1's chain (arXiv:2501.12948): reinforcement learning (with
  adapters, arXiv:2106.09685), rejection sampling, supervised fine-tuning of the first model again,
  then a fresh model a twelfth the size that learns from the traces and on its own completions.
Command:
  python -m grpo.fetch smollm2-135m-instruct
  python -m grpo.pipeline --config=experiments/r1_smollm2.py --workdir=runs/r1_smollm2
Hardware: two CPU cores, 8 GiB; any GPU or TPU.
"""

import copy
from typing import Any

from experiments import smollm2_max3
from grpo.config import (
    Config,
    DistilConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RejectionConfig,
    SftConfig,
)
from grpo.data.sources import JsonlProblems
from grpo.pipeline import Pipeline, Stage
from grpo.stages.distil import distil
from grpo.stages.rejection import sample_traces
from grpo.stages.supervise import supervise
from grpo.train import train

TRACES = JsonlProblems(path="", answer_field="answer")  # the path is filled in
STUDENT = {"width": 192, "mlp_width": 512, "num_layers": 6, "num_heads": 6, "num_kv_heads": 2}


def rl() -> Config:
    """The run of smollm2_max3.py, with adapters."""
    config = smollm2_max3.get_config()
    config.num_steps = 40
    config.lora = LoraConfig(rank=16)
    config.optim.learning_rate = 1e-4
    return config


def traces() -> Config:
    """Right completions of problems."""
    config = smollm2_max3.get_config()
    config.model.source = ""  # filled in
    config.rejection = RejectionConfig(num_problems=256, num_samples=4, chunk_problems=64, keep=2)
    return config


def sft(num_steps: int, rate: float, **model: Any) -> Config:
    """Supervised learning on the traces."""
    config = smollm2_max3.get_config()
    return Config(
        model=ModelConfig(**model, compute_dtype="float32", remat="products"),
        data=config.data,
        sample=config.sample,
        sft=SftConfig(
            num_steps=num_steps,
            source=copy.copy(TRACES),
            rows_per_step=16,
            learning_rate=rate,
            microbatch_tokens=1024,
        ),
        optim=OptimConfig(decay="linear", end_share=0.1),
        log=LogConfig(save_every=10, keep_checkpoints=1),
    )


def taught() -> Config:
    """On-policy distillation of the fresh model."""
    config = smollm2_max3.get_config()
    config.num_steps = 10
    config.model.source = ""  # filled in
    config.eval.every = 0
    config.optim = OptimConfig(learning_rate=5e-4, warmup_updates=3)
    config.distil = DistilConfig()
    return config


def get_pipeline() -> Pipeline:
    base = "smollm2-135m-instruct"
    scores = smollm2_max3.get_config()
    stages = (
        Stage("rl", train, rl(), about="reinforcement learning with adapters of rank 16"),
        Stage("traces", sample_traces, traces(), {"model.source": "rl"}, about="what is right"),
        Stage(
            "sft",
            supervise,
            sft(24, 2e-5, source=base),
            {"sft.source.path": "traces"},
            about="the first model again, on the traces",
        ),
        Stage(
            "student",
            supervise,
            sft(100, 1e-3, tokenizer=base, **STUDENT),
            {"sft.source.path": "traces"},
            about="a fresh small model, on the traces",
        ),
        Stage(
            "student_on_policy",
            distil,
            taught(),
            {"model.source": "student", "distil.teacher": "rl"},
            about="and on its own completions, judged token by token",
        ),
    )
    return Pipeline(stages, scores)
