"""Times TRL's GRPOTrainer with transformers' generate; prints one JSON line.

  .peers/trl/bin/python -m tools.peers.trl_grpo --prompts=2 --new=64 --micro=1 --steps=3

Run it in an environment made from requirements-trl.txt, in the repository's root. The flags and
what is measured: workload.py.
"""

import argparse
import importlib.metadata
import os
import tempfile
import time
from typing import Any

# Before the libraries are imported, which read it then: nothing here is to be looked up.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from tools.peers import workload


def numbers(args: argparse.Namespace) -> PreTrainedTokenizerFast:
    """A tokenizer of ids written as words: t17 is token 17.

    Its special tokens are ids that no prompt has, the one for unknown words too: a special token
    is cut out of every word that it begins. Were "t1" one, "t17" would be two tokens, and a prompt
    of 128 words about 162.
    """
    vocabulary = {f"t{i}": i for i in range(args.vocab)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=f"t{args.pad}"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token=f"t{args.eos}",
        pad_token=f"t{args.pad}",
        padding_side="left",
    )


def build_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """SmolLM2-135M: the weights of `--model`, else random ones."""
    dtype = getattr(torch, args.dtype)
    if args.model:
        return LlamaForCausalLM.from_pretrained(args.model, dtype=dtype)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=workload.WIDTH,
        intermediate_size=workload.MLP_WIDTH,
        num_hidden_layers=args.layers,
        num_attention_heads=workload.HEADS,
        num_key_value_heads=workload.KV_HEADS,
        head_dim=workload.HEAD_WIDTH,
        rms_norm_eps=workload.NORM_EPS,
        rope_theta=workload.ROPE_THETA,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        bos_token_id=0,
        eos_token_id=args.eos,
        pad_token_id=args.pad,
    )
    return LlamaForCausalLM(config).to(dtype)


def prompt_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every prompt of the run: a text of ids, or a chat that the trainer renders."""
    if args.model:
        return [{"prompt": [{"role": "user", "content": q}]} for q in workload.questions(args)]
    prompts = workload.random_prompts(args, args.prompt_len)
    return [{"prompt": " ".join(f"t{i}" for i in ids)} for ids in prompts]


def grpo_config(args: argparse.Namespace, folder: str) -> GRPOConfig:
    """One rollout of all prompts and one update a step, in microbatches of `--micro` prompts."""
    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=args.micro * args.group,
        gradient_accumulation_steps=args.prompts // args.micro,
        num_generations=args.group,
        max_completion_length=args.new,
        max_steps=args.steps,
        shuffle_dataset=False,
        beta=args.beta,
        learning_rate=workload.LEARNING_RATE,
        temperature=1.0,
        top_k=0,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        logging_steps=1_000,
        disable_tqdm=True,
    )


def reward(completions: list[Any], **_: Any) -> list[float]:
    """Random points: what completions say is not what is measured."""
    return workload.random_rewards(len(completions))


def main() -> None:
    args = workload.arguments(__doc__.splitlines()[0])
    if args.model:
        tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    else:
        tokenizer = numbers(args)
    model = build_model(args)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    stopwatch = workload.Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=grpo_config(args, folder),
            train_dataset=Dataset.from_list(prompt_rows(args)),
            processing_class=tokenizer,
        )
        # Its own name for one batch through `generate`; nothing public is as narrow.
        trainer._generate_single_turn = stopwatch.timed(
            trainer._generate_single_turn, lambda out: out[0]
        )
        trainer.train()
        end = time.perf_counter()
    versions = {name: importlib.metadata.version(name) for name in ("trl", "transformers", "torch")}
    workload.report("trl", versions, parameters, args, stopwatch, end)


if __name__ == "__main__":
    main()
