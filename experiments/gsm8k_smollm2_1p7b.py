"""GSM8K with SmolLM2-1.7B-Instruct on one GPU, or one host of TPUs.

Source: GRPO (arXiv:2402.03300) on GSM8K (arXiv:2110.14168), rewards and template as in DeepSeek-R1
  (arXiv:2501.12948): think first, then the answer in tags; model: arXiv:2502.02737.
Command:
  (a Hugging Face folder of the model, and GSM8K prepared once:)
  python -m grpo.data.prepare_gsm8k FOLDER_WITH_TRAIN_AND_TEST_JSONL ~/tensorflow_datasets
  python -m grpo.launch --config=experiments/gsm8k_smollm2_1p7b.py --workdir=runs/gsm8k \\
      --config.model.source=/models/SmolLM2-1.7B-Instruct
Hardware: one 80 GB GPU or a TPU v5litepod-8 (one host).
Time, expected score: not measured yet.
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
from grpo.data.sources import TfdsProblems
from rewards.answers import numeric_answer, tagged_answer
from rewards.formats import r1_format_lenient

QUESTION = (
    "{question}\n\nThink step by step inside <think> </think>, then give only the final number "
    "inside <answer> </answer>."
)


def get_config() -> Config:
    return Config(
        num_steps=300,
        model=ModelConfig(source="/models/SmolLM2-1.7B-Instruct", remat="attn"),
        data=DataConfig(
            train=TfdsProblems(name="gsm8k", split="train", question_template=QUESTION),
            held_out=TfdsProblems(name="gsm8k", split="test", question_template=QUESTION),
            max_prompt_tokens=320,
        ),
        sample=SampleConfig(max_new_tokens=512, slots=128, tokens_per_dispatch=32),
        reward=RewardConfig(
            functions=((1.0, numeric_answer), (0.1, r1_format_lenient)),
            gold_format="<think>so</think>\n<answer>{gold}</answer>",
        ),
        algo=AlgoConfig(problems_per_step=32, group_size=8, microbatch_tokens=4096),
        optim=OptimConfig(learning_rate=1e-6, warmup_updates=10),
        eval=EvalConfig(every=50, num_problems=256, num_samples=4, answer_of=tagged_answer),
        log=LogConfig(save_every=25),
    )
