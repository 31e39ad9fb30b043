"""R1-Zero on Qwen2.5-1.5B: reinforcement learning on mathematics, straight from the base model.

Source: DeepSeek-R1-Zero (arXiv:2501.12948), its template (table 1), rewards (accuracy and format)
  and GRPO settings (`grpo.presets.r1_zero`); in small: completions of 2,048 tokens. Model:
  Qwen2.5 (arXiv:2412.15115).
Command:
  (a Hugging Face folder of the base model, and a JSONL file of problems with the fields `problem`
  and `answer`, such as MATH, arXiv:2103.03874:)
  python -m grpo.plan --config=experiments/r1_zero_qwen2p5_1p5b.py --topology=v5e:4x4
  python -m grpo.launch --config=experiments/r1_zero_qwen2p5_1p5b.py \\
      --workdir=gs://BUCKET/r1-zero --config.model.source=/models/Qwen2.5-1.5B \\
      --config.data.train.path=/data/math_train.jsonl
Hardware: TPU v5litepod-16 (4 x 4).
Time: see the table of plans in README.md. Not run.
"""

from functools import partial

from grpo import presets
from grpo.config import (
    AlgoConfig,
    Config,
    DataConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    SampleConfig,
)
from grpo.data.sources import JsonlProblems
from rewards.formats import r1_format
from rewards.math_answer import check_reference, math_answer

# Table 1 of the paper; a base model goes on with the text, which opens the thinking itself.
TEMPLATE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer. The reasoning process and answer are enclosed within <think> </think> "
    "and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> "
    "<answer> answer here </answer>. User: {question}. Assistant:"
)


def r1_zero(source: str, *, mesh: MeshConfig, remat: str = "attn") -> Config:
    """The run for a Qwen2.5 base model of any size.

    Args:
      source: folder of the model.
      mesh: how the slice is split.
      remat: as `model.remat`.
    """
    config = Config(
        num_steps=1000,
        model=ModelConfig(source=source, remat=remat),
        data=DataConfig(
            train=JsonlProblems(
                path="/data/math_train.jsonl",
                question_field="problem",
                answer_field="answer",
                question_template=TEMPLATE,
                raw=True,
            ),
            max_prompt_tokens=512,
            check_reference=check_reference,
        ),
        sample=SampleConfig(max_new_tokens=2048, slots=512, tokens_per_dispatch=32),
        reward=RewardConfig(
            functions=((1.0, partial(math_answer, form="r1")), (0.1, r1_format)),
            gold_format="<think>so</think>\n<answer>{gold}</answer>",
            workers=16,
        ),
        algo=AlgoConfig(problems_per_step=32, group_size=16, microbatch_tokens=2560),
        optim=OptimConfig(learning_rate=1e-6, warmup_updates=10),
        log=LogConfig(save_every=50),
        mesh=mesh,
    )
    presets.r1_zero(config)
    return config


def get_config() -> Config:
    return r1_zero("/models/Qwen2.5-1.5B", mesh=MeshConfig(fsdp=16, tensor=1))
