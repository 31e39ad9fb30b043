"""DeepSeek-R1's chain on Qwen2.5-1.5B, and a student of 0.5B: ten stages, at full size.

Source: DeepSeek-R1 (arXiv:2501.12948, sections 2.3 and 2.4): stages, rewards, learning rates and
  batch sizes; in small: completions of 2,048 tokens, and thousands of problems where the paper
  has hundreds of thousands. Models: Qwen2.5 (arXiv:2412.15115).
Command:
  (Hugging Face folders of the base models; JSONL files of problems with the fields `problem` and
  `answer`, such as MATH and GSM8K; of general conversations with `uid`, `problem` and `worked`; and
  of open questions with `problem`; a judge behind an OpenAI-compatible endpoint)
  python -m grpo.pipeline --config=experiments/r1_qwen2p5_1p5b.py --workdir=/mnt/shared/r1 \\
      --dry_run --topology=v5e:4x4
  python -m grpo.pipeline --config=experiments/r1_qwen2p5_1p5b.py --workdir=/mnt/shared/r1
  The folder is one that all workers reach, such as a Filestore volume.
Hardware: TPU v5litepod-16 (4 x 4).
Time: 25 hours by formula (--dry_run: 9.3 h for each of the first two rounds of reinforcement, 3.7 h
  for the last, 1.9 h of sampling traces, 0.9 h for the student). Not run.
"""

import copy
import dataclasses
from functools import partial

from experiments.r1_zero_qwen2p5_1p5b import TEMPLATE, r1_zero
from grpo.config import (
    Config,
    DataConfig,
    DistilConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RejectionConfig,
    RewardConfig,
    SampleConfig,
    SftConfig,
)
from grpo.data.few_shot import FewShot
from grpo.data.sources import JsonlProblems, Mixture, ProblemSource, Slice
from grpo.pipeline import Pipeline, Stage
from grpo.stages.distil import distil
from grpo.stages.rejection import sample_traces
from grpo.stages.supervise import supervise
from grpo.train import train
from rewards.by_task import by_task
from rewards.formats import answer_text, r1_format
from rewards.language import LanguageShare
from rewards.llm_judge import llm_judge
from rewards.math_answer import check_reference, math_answer
from rewards.repetition import Unrepeated

BASE, SMALL = "/models/Qwen2.5-1.5B", "/models/Qwen2.5-0.5B"
MESH = MeshConfig(fsdp=16)
TRACES = JsonlProblems(path="", answer_field="answer")  # the path is filled in
RIGHT = (1.0, partial(math_answer, form="r1"))
ENGLISH = LanguageShare("en")
# A chain of thought as the cold start wants it: short steps, one language, a check at the end.
EXAMPLES = (
    (
        TEMPLATE.replace("{question}", "What is the sum of the first 20 odd numbers?"),
        " <think>The first n odd numbers add up to n squared: 1 = 1, 1 + 3 = 4, 1 + 3 + 5 = 9. "
        "For n = 20 that is 20 * 20 = 400. Check by pairing: the numbers are 1 to 39, so each of "
        "the 10 pairs adds up to 40, and 10 * 40 = 400. Both ways agree.</think> "
        "<answer>400</answer>",
    ),
    (
        TEMPLATE.replace("{question}", "Solve 3x + 7 = 2(x + 9) for x."),
        " <think>Expand the right side: 2(x + 9) = 2x + 18. So 3x + 7 = 2x + 18. Subtract 2x: "
        "x + 7 = 18. Subtract 7: x = 11. Check: 3 * 11 + 7 = 40 and 2 * (11 + 9) = 40. It "
        "holds.</think> <answer>11</answer>",
    ),
)


def questions(path: str, answer_field: str = "answer") -> JsonlProblems:
    """Problems of a file, asked in R1-Zero's template."""
    return JsonlProblems(
        path=path,
        question_field="problem",
        answer_field=answer_field,
        question_template=TEMPLATE,
        raw=True,
    )


MATHS = questions("/data/math_train.jsonl")
GENERAL = questions("/data/general_worked.jsonl", answer_field="")


def rl(num_steps: int, source: str = "") -> Config:
    """Reinforcement learning as in R1-Zero, for English chains of thought."""
    config = r1_zero(source, mesh=MESH)
    config.num_steps = num_steps
    config.optim = OptimConfig(learning_rate=3e-6, warmup_updates=min(10, num_steps))
    reward = config.reward
    reward.functions = (RIGHT, (0.1, r1_format), (0.2, ENGLISH))
    return config


def rl_everything(num_steps: int) -> Config:
    """Rules for mathematics, a judge for open questions; rows of both name their `task`."""
    config = rl(num_steps)
    open_questions = questions("/data/open_questions.jsonl", answer_field="")
    config.data.train = Mixture(parts=((0.75, MATHS), (0.25, open_questions)), size=8_000)
    config.data.check_reference = None  # open questions have none
    config.sample.temperature = 0.7
    judge = llm_judge("http://localhost:8000/v1", "judge")
    judged = by_task({"maths": RIGHT[1], "open": judge})
    config.reward.functions = ((1.0, judged), *config.reward.functions[1:])
    return config


def sft(source: ProblemSource, num_steps: int, rate: float, model: str = "") -> Config:
    """Supervised learning in batches of 128, the rate falling to a tenth."""
    return Config(
        model=ModelConfig(source=model),
        data=DataConfig(max_prompt_tokens=512),
        sample=SampleConfig(max_new_tokens=2048),
        sft=SftConfig(
            num_steps=num_steps,
            source=source,
            rows_per_step=128,
            learning_rate=rate,
            microbatch_tokens=2560,
        ),
        optim=OptimConfig(decay="cosine", end_share=0.1),
        log=LogConfig(save_every=100),
        mesh=MESH,
    )


def traces(rejection: RejectionConfig, source: str = "") -> Config:
    """Right, readable completions of English problems."""
    config = rl(1, source)
    config.rejection = dataclasses.replace(
        rejection, filters=((1.0, r1_format), (0.95, ENGLISH), (0.8, Unrepeated()))
    )
    return config


def get_pipeline() -> Pipeline:
    held_out = Slice(source=questions("/data/math_test.jsonl"), stop=500)
    scores = Config(
        data=DataConfig(
            train=MATHS,
            held_out=held_out,
            max_prompt_tokens=512,
            check_reference=check_reference,
        ),
        sample=SampleConfig(max_new_tokens=2048, slots=512, tokens_per_dispatch=32),
        reward=RewardConfig(
            functions=(RIGHT, (0.1, r1_format), (0.2, ENGLISH)),
            gold_format="<think>so</think>\n<answer>{gold}</answer>",
            workers=16,
        ),
        eval=EvalConfig(
            num_problems=500, num_samples=16, temperature=0.6, top_p=0.95, answer_of=answer_text
        ),
        mesh=MESH,
    )
    cold = RejectionConfig(
        num_problems=4_000, num_samples=8, keep=1, asked_as=FewShot(EXAMPLES, separator="\n\n")
    )
    shown = traces(cold, BASE)
    shown.data.max_prompt_tokens = 1_024
    shown.sample.stop_strings = ("</answer>",)
    many = RejectionConfig(
        num_problems=7_500, num_samples=16, bucket_share=0.4, general=GENERAL, general_share=0.25
    )
    distilled = rl(200)
    distilled.distil = DistilConfig()
    stages = (
        Stage("r1_zero", train, rl(1_000, BASE), about="R1-Zero: reinforcement learning alone"),
        Stage("cold_traces", sample_traces, shown, about="long chains of thought by example"),
        Stage(
            "cold_start",
            supervise,
            sft(copy.copy(TRACES), 60, 5e-5, BASE),
            {"sft.source.path": "cold_traces"},
            about="cold start",
        ),
        Stage(
            "reasoning_rl",
            train,
            rl(1_000),
            {"model.source": "cold_start"},
            about="reasoning RL with language consistency",
        ),
        Stage(
            "traces",
            sample_traces,
            traces(many),
            {"model.source": "reasoning_rl"},
            about="rejection sampling, a quarter general data",
        ),
        Stage(
            "sft",
            supervise,
            sft(copy.copy(TRACES), 500, 5e-5, BASE),
            {"sft.source.path": "traces"},
            about="supervised fine-tuning, from the base model again",
        ),
        Stage(
            "r1",
            train,
            rl_everything(400),
            {"model.source": "sft"},
            about="RL for all scenarios",
        ),
        Stage(
            "student",
            supervise,
            sft(copy.copy(TRACES), 500, 1e-4, SMALL),
            {"sft.source.path": "traces"},
            about="0.5B distilled from the traces",
        ),
        Stage(
            "student_on_policy",
            distil,
            distilled,
            {"model.source": "student", "distil.teacher": "r1"},
            about="0.5B distilled further on its own completions",
        ),
    )
    columns = {"format": "eval/full/r1_format", "language": "eval/component/LanguageShare"}
    return Pipeline(stages, scores, columns)
