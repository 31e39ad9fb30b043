"""Times google-tunix's GRPOLearner with its own sampler; prints one JSON line.

  .peers/tunix/bin/python -m tools.peers.tunix_grpo --prompts=2 --new=64 --micro=1 --steps=3

Run it in an environment made from requirements-tunix.txt, in the repository's root. The flags
and what is measured: workload.py.
"""

import argparse
import importlib.metadata
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from transformers import AutoTokenizer
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as llama_params
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

from tools.peers import workload

_INIT_STD = 0.02


class Numbers:
    """A tokenizer of ids written as text: how fast text is tokenised is not what is measured."""

    def __init__(self, eos: int, pad: int):
        self._eos, self._pad = eos, pad

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 0

    def eos_id(self) -> int:
        return self._eos

    def pad_id(self) -> int:
        return self._pad


def build_model(args: argparse.Namespace, mesh: Mesh, seed: int) -> nnx.Module:
    """SmolLM2-135M: the weights of `--model`, else random ones (norms as initialised)."""
    config = llama.ModelConfig(
        num_layers=args.layers,
        vocab_size=args.vocab,
        embed_dim=workload.WIDTH,
        hidden_dim=workload.MLP_WIDTH,
        num_heads=workload.HEADS,
        head_dim=workload.HEAD_WIDTH,
        num_kv_heads=workload.KV_HEADS,
        norm_eps=workload.NORM_EPS,
        rope_theta=int(workload.ROPE_THETA),
        weight_tying=True,
    )
    dtype = jnp.dtype(args.dtype)
    if args.model:
        return llama_params.create_model_from_safe_tensors(args.model, config, mesh, dtype=dtype)
    key = jax.random.key(seed)

    def weights(param: jax.Array) -> jax.Array:
        if param.ndim > 1:
            param = jax.random.normal(key, param.shape) * _INIT_STD
        return param.astype(dtype)

    graph, state = nnx.split(llama.Llama3(config, rngs=nnx.Rngs(seed)))
    return nnx.merge(graph, jax.tree.map(weights, state))


def prompt_texts(args: argparse.Namespace, tokenizer: Any) -> list[str]:
    """Every prompt of the run, as the text that the sampler tokenises."""
    if not args.model:
        # One id fewer: the sampler puts the start token before each prompt.
        return [
            " ".join(map(str, ids)) for ids in workload.random_prompts(args, args.prompt_len - 1)
        ]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in workload.questions(args)
    ]


def build_cluster(
    args: argparse.Namespace, tokenizer: Any, actor: nnx.Module, mesh: Mesh
) -> rl_cluster.RLCluster:
    """The models and the sampler, all on one mesh."""
    rollout = base_rollout.RolloutConfig(
        max_tokens_to_generate=args.new,
        max_prompt_length=args.prompt_len,
        kv_cache_size=args.prompt_len + args.new,
        temperature=1.0,
        top_p=1.0,
        top_k=None,
        eos_tokens=[tokenizer.eos_token_id] if args.model else None,
    )
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.adamw(workload.LEARNING_RATE),
        eval_every_n_steps=10_000,  # never
        max_steps=args.steps,
        mini_batch_size=args.prompts,
        train_micro_batch_size=args.micro,
        rollout_micro_batch_size=args.prompts,
        compute_logps_micro_batch_size=args.prompts,
    )
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    return rl_cluster.RLCluster(
        actor=actor,
        reference=build_model(args, mesh, seed=0) if args.beta else None,
        tokenizer=tokenizer,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            rollout_engine="vanilla",
            training_config=training,
            rollout_config=rollout,
        ),
    )


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Random points: what completions say is not what is measured."""
    del prompts
    return workload.random_rewards(len(completions))


def main() -> None:
    args = workload.arguments(__doc__.splitlines()[0])
    mesh = Mesh(np.array(jax.devices()).reshape(1, -1), ("fsdp", "tp"))
    if args.model:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    else:
        tokenizer = Numbers(args.eos, args.pad)
    actor = build_model(args, mesh, seed=0)
    parameters = sum(param.size for param in jax.tree.leaves(nnx.state(actor)))
    cluster = build_cluster(args, tokenizer, actor, mesh)
    learner = grpo_learner.GRPOLearner(
        rl_cluster=cluster,
        algo_config=grpo_learner.GRPOConfig(
            num_generations=args.group, num_iterations=1, beta=args.beta
        ),
        reward_fns=reward,
    )
    stopwatch = workload.Stopwatch()
    cluster.generate = stopwatch.timed(cluster.generate, lambda out: out.tokens)
    texts = np.array(prompt_texts(args, tokenizer)).reshape(args.steps, args.prompts)
    learner.train([{"prompts": step_texts} for step_texts in texts])
    end = time.perf_counter()
    versions = {name: importlib.metadata.version(name) for name in ("google-tunix", "jax")}
    workload.report("tunix", versions, parameters, args, stopwatch, end)


if __name__ == "__main__":
    main()
