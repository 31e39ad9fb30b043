"""The smallest run that has everything: an experiment file that the tests of the loop share.

Its rewards judge the look of a text, so that a model of random weights earns some: what is tested
is the machinery, not whether anything is learnt.
"""

from grpo.config import (
    AlgoConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    SampleConfig,
    SftConfig,
)
from grpo.data.procedural import DigitChain


def get_config() -> Config:
    # Nested, so that the reward workers get them by value and need not import this file.
    def even(completion, problem):
        return float(sum(map(ord, completion)) % 2 == 0)

    def digits(completion, problem):
        return sum(c.isdigit() for c in completion) / max(len(completion), 1)

    def vote(text):
        return text[:1]

    problems = DigitChain(min_terms=2, max_terms=2, size=40)
    return Config(
        num_steps=4,
        model=ModelConfig(
            width=16,
            mlp_width=32,
            num_layers=2,
            num_heads=2,
            num_kv_heads=2,
            compute_dtype="float32",
            logprob_chunk=16,
        ),
        data=DataConfig(
            train=problems,
            held_out=DigitChain(min_terms=2, max_terms=2, size=40, held_out=True),
            max_prompt_tokens=8,
        ),
        sample=SampleConfig(max_new_tokens=48, slots=16, tokens_per_dispatch=16),
        reward=RewardConfig(
            functions=((1.0, even), (0.5, digits)), workers=1, gold_check=0, deadline_s=10.0
        ),
        algo=AlgoConfig(problems_per_step=4, group_size=4, microbatch_tokens=104),
        optim=OptimConfig(learning_rate=1e-2),
        sft=SftConfig(num_steps=4, rows_per_step=8, warmup_updates=2, learning_rate=1e-2),
        eval=EvalConfig(every=2, num_problems=4, num_samples=4, answer_of=vote),
        log=LogConfig(save_every=1),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
    )
