r"""SmolLM2-135M-Instruct learns to say which of three numbers is the largest.

Source: GRPO (arXiv:2402.03300) with DAPO's token-level loss and higher upper clip
  (arXiv:2503.14476); the model: arXiv:2502.02737.
Command:
  python -m grpo.fetch smollm2-135m-instruct
  python -m grpo.launch --config=experiments/smollm2_max3.py --workdir=runs/smollm2_max3
  The same with adapters in place of all weights (LoRA):
  python -m grpo.launch --config=experiments/smollm2_max3.py --workdir=runs/smollm2_max3_lora \
    --config.lora.rank=16 --config.optim.learning_rate=1e-4
Hardware: two CPU cores, 8 GiB; any GPU or TPU.

The pretrained model knows digits and chat, but copies one of the three numbers more or less at
random, and often adds a sentence that spoils the answer. Only the last number it writes is judged.
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
)
from grpo.data.procedural import MaxOf
from rewards.answers import last_number, last_number_text


def get_config() -> Config:
    return Config(
        num_steps=60,
        model=ModelConfig(
            source="smollm2-135m-instruct",
            compute_dtype="float32",  # bfloat16 is no faster on a CPU
            remat="products",
        ),
        data=DataConfig(
            train=MaxOf(count=3, high=99),
            held_out=MaxOf(count=3, high=99, size=500, held_out=True),
            max_prompt_tokens=40,
        ),
        sample=SampleConfig(max_new_tokens=24, slots=64, tokens_per_dispatch=8),
        reward=RewardConfig(functions=((1.0, last_number),)),
        algo=AlgoConfig(problems_per_step=8, group_size=8, microbatch_tokens=1024),
        optim=OptimConfig(learning_rate=1e-5, warmup_updates=3),
        eval=EvalConfig(every=20, num_problems=64, num_samples=4, answer_of=last_number_text),
        log=LogConfig(save_every=10),
    )
