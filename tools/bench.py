"""How fast rollout, update and whole step are, and how near to what this machine can do.

  python tools/bench.py rollout|update|step --shape=smollm2-135m --prompts=4 --group=8 \\
    --prompt_len=128 --new=128 --lengths=fixed --json
  python tools/bench.py all          # the table of the README

One step's work, again and again: P random prompts (or GSM8K questions, with --model and --data),
G completions each, random rewards, one AdamW update; no reference, nothing dropped. `--lengths`:
fixed (nothing stops early), geometric (random weights that stop with a constant chance, half of
--new on average), real (real weights and questions).

The limit it is compared with is the time of the operations and bytes that the algorithm needs, each
prompt computed once, at the speed of a large matrix product and of reading a large array, both
measured on this machine right before each step: shared machines change their speed.
"""

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo import advantage, loss
from grpo.batch import RowShape, Sample, pack, row_shape, to_device, totals
from grpo.config import Config, ModelConfig, OptimConfig, bind
from grpo.data.prompts import encode_prompt
from grpo.engine.engine import Engine, Request
from grpo.model.arch import Arch
from grpo.model.params import Params, attention_share, num_params
from grpo.policy import Policy, lay_out
from grpo.runtime.host_memory import return_free_pages, return_large_blocks
from grpo.sharding import batch_ways, make_mesh, platform_of
from grpo.source import open_source
from grpo.structs import Completion, Scores, TrainState
from grpo.update import Update, decayed_params, init_state, learning_rate, make_optimizer
from rewards.api import Problem


def _arch(
    V: int, D: int, F: int, L: int, N: int, K: int, H: int, *, tied: bool, theta: float
) -> Arch:
    return Arch(
        vocab_size=V,
        width=D,
        mlp_width=F,
        num_layers=L,
        num_heads=N,
        num_kv_heads=K,
        head_width=H,
        tied_head=tied,
        rope_theta=theta,
    )


SHAPES = {
    "smollm2-135m": _arch(49_152, 576, 1536, 30, 9, 3, 64, tied=True, theta=1e5),
    "qwen2.5-0.5b": _arch(151_936, 896, 4864, 24, 14, 2, 64, tied=True, theta=1e6),
    "qwen2.5-1.5b": _arch(151_936, 1536, 8960, 28, 12, 2, 128, tied=True, theta=1e6),
    "qwen2.5-7b": _arch(152_064, 3584, 18_944, 28, 28, 4, 128, tied=False, theta=1e6),
}
# The table of `all`: what is compared with other trainers, and what memory is claimed for.
TABLE = (
    "--prompts=2 --group=8 --prompt_len=128 --new=64",
    "--prompts=4 --group=8 --prompt_len=128 --new=128",
    "--prompts=2 --group=8 --prompt_len=512 --new=64",
    "--prompts=2 --group=16 --prompt_len=512 --new=64",
    "--prompts=2 --group=8 --prompt_len=128 --new=256 --lengths=geometric",
)


@dataclasses.dataclass(frozen=True)
class IdTokenizer:
    """Ids in, ids out: tokenisation is not what is measured."""

    vocab_size: int
    eos_ids: tuple[int, ...]
    pad_id: int = 0
    bos_id: int | None = None
    adds_bos: bool = False
    chat_template: str | None = None
    template_variables: Any = dataclasses.field(default_factory=dict)

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return " ".join(map(str, ids))


# ---- the machine -------------------------------------------------------------------------------


def seconds_of(run: Callable[[], Any], repeats: int = 5) -> float:
    """Median seconds of a call, its results waited for; once before to warm up."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def machine(dtype: str) -> dict[str, float]:
    """FLOP/s of a large matrix product, bytes/s of reading and of copying a large array."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    square = jnp.ones((size, size), dtype)
    large = jnp.ones(1 << (26 if jax.default_backend() == "cpu" else 30), jnp.float32)
    product, read = jax.jit(jnp.matmul), jax.jit(jnp.sum)
    copy = jax.jit(lambda a: a + 1, donate_argnums=0)

    def copied() -> jax.Array:
        nonlocal large
        large = copy(large)
        return large

    nbytes = large.nbytes
    return {
        "matmul_flops": 2 * size**3 / seconds_of(lambda: product(square, square)),
        "read_bytes_per_s": nbytes / seconds_of(lambda: read(large)),
        "copy_bytes_per_s": nbytes / seconds_of(copied),
    }


@dataclasses.dataclass(frozen=True)
class Work:
    """What one step has to compute at least."""

    arch: Arch
    prompts: Sequence[int]  # tokens of each
    completions: Sequence[Sequence[int]]  # tokens of each, by prompt
    bytes_per_number: int

    def _matrix_flops(self, tokens: float, heads: float) -> float:
        """Of a forward pass: `tokens` through the layers, `heads` of them through the head."""
        embedding = self.arch.vocab_size * self.arch.width
        layers = num_params(self.arch) - embedding * (1 if self.arch.tied_head else 2)
        return 2 * (layers * tokens + embedding * heads)

    def _attended(self) -> float:
        """Pairs of positions that see one another, each prompt computed once."""
        pairs = 0.0
        for prompt, lengths in zip(self.prompts, self.completions, strict=True):
            pairs += prompt**2 / 2 + sum(n * prompt + n**2 / 2 for n in lengths)
        return pairs

    def _attention_flops(self) -> float:
        a = self.arch
        return 4 * a.num_heads * a.head_width * a.num_layers * self._attended()

    def update_flops(self) -> float:
        """Forward and backward, nothing computed twice."""
        written = sum(map(sum, self.completions))
        return 3 * (
            self._matrix_flops(sum(self.prompts) + written, written) + self._attention_flops()
        )

    def rollout_s(self, speed: dict[str, float]) -> float:
        """Prefill, then steps that each read the weights once, and keys and values once.

        A step's matrix products take their operations or their bytes, whichever is longer.
        """
        a, lengths = self.arch, [n for group in self.completions for n in group]
        weights = num_params(a) * self.bytes_per_number
        kv_token = 2 * a.num_layers * a.num_kv_heads * a.head_width * self.bytes_per_number
        prefill = self._matrix_flops(sum(self.prompts), 0) / speed["matmul_flops"]
        total = prefill
        for step in range(max(lengths)):
            live = sum(n > step for n in lengths)
            cached = sum(self.prompts) + step * live
            total += max(
                self._matrix_flops(live, live) / speed["matmul_flops"],
                weights / speed["read_bytes_per_s"],
            )
            total += cached * kv_token / speed["read_bytes_per_s"]
        return total

    def update_s(self, speed: dict[str, float]) -> float:
        """The operations; then AdamW, which reads four arrays and writes three."""
        optimiser = 7 * num_params(self.arch) * 4
        return self.update_flops() / speed["matmul_flops"] + optimiser / speed["read_bytes_per_s"]


# ---- one step ----------------------------------------------------------------------------------


class Bench:
    """The parts of a run that a step needs, at the sizes of the command line."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        mesh = make_mesh(1, -1, 1)
        jax.set_mesh(mesh)
        self.policy = _policy(args, mesh)
        self.prompts = _prompts(args, self.policy)
        max_prompt = max(map(len, self.prompts))
        slots = args.slots or args.prompts * args.group
        self.engine = Engine(
            self.policy.arch,
            self.policy.tokenizer,
            mesh,
            max_prompt=max_prompt,
            max_new=args.new,
            slots=slots,
            slots_per_prompt=args.slots_per_prompt or min(args.group, slots),
            tokens_per_dispatch=args.tokens_per_dispatch,
            dtype=args.dtype,
            tail_slots=args.tail_slots,
            draft_tokens=args.draft_tokens,
        )
        self.row_shape: RowShape = row_shape(
            max_prompt=max_prompt,
            max_new=args.new,
            group_size=args.group,
            samples=args.prompts * args.group,
            microbatch_tokens=args.microbatch_tokens,
            ways=batch_ways(mesh),
            attention_share=attention_share(self.policy.arch, platform_of(mesh)),
        )
        optim = OptimConfig(learning_rate=1e-6)
        rate = learning_rate(optim, optim.learning_rate, 0, 1000)
        optimizer = make_optimizer(optim, rate, decayed_params(self.policy))
        algo = Config().algo
        objective = lambda *arrays: loss.grpo_loss(  # noqa: E731
            *arrays,
            objective=bind(algo.objective, algo),
            aggregate=loss.by_token,
            correction=loss.uncorrected,
            kl=loss.k3,
            kl_coef=0.0,
            entropy_coef=0.0,
            on_policy=True,
        )
        self.update = Update(self.policy, objective, optimizer, rate)
        self.state: TrainState = init_state(self.policy, self.policy.initial_params(), optimizer)
        self.completions: list[Completion] = []

    def weights(self) -> Params:
        """The decode form of the current parameters."""
        return self.policy.for_decoding(self.state.params)

    def rollout(self, number: int, weights: Params | None = None) -> None:
        """Samples the completions of step `number`."""
        weights = self.weights() if weights is None else weights
        requests = [
            Request(prompt, stream, self.args.group)
            for stream, prompt in enumerate(self._asked(number))
        ]
        self.completions = sorted(
            self.engine.run(weights, requests, jax.random.key(number), temperature=1.0),
            key=lambda c: (c.problem, c.sample),
        )

    def learn(self, number: int) -> dict[str, Any]:
        """One update on the last rollout, with random rewards."""
        shape = (self.args.prompts, self.args.group)
        reward_PG = np.random.default_rng(1).random(shape, np.float32)
        scores = Scores(reward_PG, np.ones(shape, bool), {"random": reward_PG}, {"random": 1.0}, {})
        asked = self._asked(number)
        samples = [
            Sample(
                group=c.problem,
                prompt=asked[c.problem],
                completion=c.tokens,
                advantage=float(a),
                sampler_logprobs=c.logprobs,
            )
            for c, a in zip(self.completions, advantage.grpo(scores).reshape(-1), strict=True)
        ]
        packed = pack(samples, self.row_shape)
        batches = [to_device(batch, self.policy.mesh) for batch in packed.microbatches]
        self.state, report = self.update(self.state, batches, totals(samples))
        return {name: np.asarray(value) for name, value in report.items()}

    def work(self, number: int) -> Work:
        """What the last rollout's step had to compute."""
        lengths: list[list[int]] = [[] for _ in range(self.args.prompts)]
        for c in self.completions:
            lengths[c.problem].append(len(c.tokens))
        prompts = [len(prompt) for prompt in self._asked(number)]
        return Work(self.policy.arch, prompts, lengths, np.dtype(self.args.dtype).itemsize)

    def _asked(self, number: int) -> list[list[int]]:
        P = self.args.prompts
        first = number * P % len(self.prompts)
        return self.prompts[first : first + P]


def _policy(args: argparse.Namespace, mesh: jax.sharding.Mesh) -> Policy:
    if args.model:
        source = open_source(args.model)
        arch, tokenizer, read = source.arch, source.tokenizer, source.read
    else:
        arch = SHAPES[args.shape]
        mean = args.new / 2 if args.lengths == "geometric" else 0
        stops = tuple(range(round(arch.vocab_size / mean))) if mean else ()
        tokenizer, read = IdTokenizer(arch.vocab_size, eos_ids=stops), None
    model = ModelConfig(
        compute_dtype=args.dtype, remat=args.remat, logprob_chunk=args.logprob_chunk
    )
    return lay_out(arch, tokenizer, mesh, model, temperature=1.0, read=read)


def _prompts(args: argparse.Namespace, policy: Policy) -> list[list[int]]:
    """Of every step: random ids, or the first questions of --data."""
    count = args.prompts * (args.repeats + 1)
    if not args.data:
        rng = np.random.default_rng(0)
        return [rng.integers(5, 40_000, args.prompt_len).tolist() for _ in range(count)]
    prompts: list[list[int]] = []
    with open(args.data, encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            messages = ({"role": "user", "content": json.loads(line)["question"]},)
            problem = Problem(uid=str(number), messages=messages, reference="")
            prompt = encode_prompt(policy.tokenizer, problem)
            if len(prompt) <= args.prompt_len:
                prompts.append(prompt)
            if len(prompts) == count:
                break
    return prompts


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Times `args.repeats` steps (or parts of steps) after one that compiles."""
    bench = Bench(args)
    started = time.perf_counter()
    bench.engine.compile(bench.weights())
    empty = to_device(pack([], bench.row_shape).microbatches[0], bench.policy.mesh)
    bench.update.compile(empty)
    return_free_pages()
    bench.rollout(0)
    bench.learn(0)
    compile_s = time.perf_counter() - started
    compiled = bench.engine.num_compiled() + bench.update.num_compiled()
    parts: dict[str, list[float]] = {"rollout_s": [], "update_s": [], "step_s": []}
    tokens, rollout_limit, update_limit, occupancy, idle, speeds = [], [], [], [], [], []
    for number in range(1, args.repeats + 1):
        return_free_pages()  # else the arrays of the next line would be the peak of memory
        speeds.append(machine(args.dtype))
        times = [time.perf_counter()]
        if args.part != "update":
            bench.rollout(number)
        times.append(time.perf_counter())
        if args.part != "rollout":
            bench.learn(number if args.part == "step" else 0)
        times.append(time.perf_counter())
        parts["rollout_s"].append(times[1] - times[0])
        parts["update_s"].append(times[2] - times[1])
        parts["step_s"].append(times[2] - times[0])
        work = bench.work(number if args.part != "update" else 0)
        tokens.append(sum(map(sum, work.completions)))
        rollout_limit.append(work.rollout_s(speeds[-1]))
        update_limit.append(work.update_s(speeds[-1]))
        stats = bench.engine.stats
        occupancy.append(stats.tokens / max(stats.slot_steps, 1))
        idle.append(stats.idle_s / max(stats.seconds, 1e-9))
    speed = {name: statistics.median(s[name] for s in speeds) for name in speeds[0]}
    rate = {
        n: statistics.median(t / s for t, s in zip(tokens, v, strict=True) if s)
        for n, v in parts.items()
        if any(v)
    }
    result: dict[str, Any] = {
        "trainer": "ours",
        "part": args.part,
        "shape": args.shape if not args.model else "model",
        "prompts": args.prompts,
        "group": args.group,
        "prompt_len": args.prompt_len,
        "new": args.new,
        "lengths": args.lengths,
        "dtype": args.dtype,
        "device": jax.devices()[0].device_kind,
        "row_shape": list(dataclasses.astuple(bench.row_shape)),
        "tokens": statistics.median(tokens),
        **{name: [round(s, 3) for s in values] for name, values in parts.items()},
        "rollout_tok_s": round(rate.get("rollout_s", 0), 1),
        "step_tok_s": round(rate.get("step_s", 0), 1),
        "rollout_of_limit": _share(rollout_limit, parts["rollout_s"]),
        "update_of_limit": _share(update_limit, parts["update_s"]),
        "occupancy": round(statistics.median(occupancy), 3),
        "idle_share": round(statistics.median(idle), 3),
        "compile_s": round(compile_s, 1),
        "recompiles": bench.engine.num_compiled() + bench.update.num_compiled() - compiled,
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        **{name: round(value / 1e9, 1) for name, value in _giga(speed).items()},
    }
    if args.part == "rollout":
        del result["update_s"], result["step_s"], result["update_of_limit"]
    if args.part == "update":
        del result["rollout_s"], result["step_s"], result["rollout_of_limit"]
    memory = jax.devices()[0].memory_stats()
    if memory:
        result["peak_device_gib"] = round(memory["peak_bytes_in_use"] / 2**30, 2)
    return result


def _share(limits: Sequence[float], seconds: Sequence[float]) -> float:
    """The median of what each time is of its limit; 0 of a part that was not timed."""
    shares = [limit / s for limit, s in zip(limits, seconds, strict=True) if s > 0.001]
    return round(statistics.median(shares or [0.0]), 3)


def _giga(speed: dict[str, float]) -> dict[str, float]:
    names = {
        "matmul_flops": "matmul_gflops",
        "read_bytes_per_s": "read_gb_s",
        "copy_bytes_per_s": "copy_gb_s",
    }
    return {names[name]: value for name, value in speed.items()}


# ---- command line ------------------------------------------------------------------------------


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Time rollout, update and step.")
    parser.add_argument("part", choices=("rollout", "update", "step", "all"))
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt_len", type=int, default=128, help="tokens; with --data, at most")
    parser.add_argument("--new", type=int, default=128, help="tokens a completion, at most")
    parser.add_argument("--lengths", choices=("fixed", "geometric", "real"), default="fixed")
    parser.add_argument("--model", help="Hugging Face folder, for --lengths=real")
    parser.add_argument("--data", help="JSON lines with a 'question' each, for --lengths=real")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--remat", default="products")
    parser.add_argument("--logprob_chunk", type=int, default=512)
    parser.add_argument("--microbatch_tokens", type=int, default=1024)
    parser.add_argument("--slots", type=int, default=0, help="0: one a completion")
    parser.add_argument("--slots_per_prompt", type=int, default=0, help="0: the group; 1: unshared")
    parser.add_argument("--tail_slots", type=int, default=0)
    parser.add_argument("--draft_tokens", type=int, default=0)
    parser.add_argument("--tokens_per_dispatch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="nothing but one JSON line")
    args = parser.parse_args(argv)
    if (args.lengths == "real") != bool(args.model and args.data):
        parser.error("--lengths=real, --model and --data go together")
    return args


def main() -> None:
    """Prints one JSON line, or the table."""
    return_large_blocks()
    args = arguments()
    if args.part != "all":
        print(json.dumps(measure(args)))
        return
    print("| work | rollout tok/s | of limit | update s | of limit | step s | peak GiB |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for flags in TABLE:  # a process each: the peak of memory is a process's
        command = [sys.executable, __file__, "step", *flags.split(), f"--repeats={args.repeats}"]
        out = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True)
        r = json.loads(out.stdout.splitlines()[-1])
        print(
            f"| {flags.replace('--', '')} | {r['rollout_tok_s']:.0f} | {r['rollout_of_limit']:.0%} "
            f"| {statistics.median(r['update_s']):.2f} | {r['update_of_limit']:.0%} "
            f"| {statistics.median(r['step_s']):.2f} | {r['peak_rss_gib']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
