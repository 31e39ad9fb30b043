"""Compiling the programs of a run ahead of time, for devices that need not be here."""

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from grpo.batch import RowShape, pack
from grpo.build import make_engine, make_update, microbatch_shape, state_form
from grpo.config import Config, MeshConfig
from grpo.data.tokenizer import ByteTokenizer
from grpo.engine.engine import Engine
from grpo.engine.programs import abstract
from grpo.model.arch import Arch
from grpo.planning.chips import Topology
from grpo.planning.hlo import Collectives, collectives
from grpo.policy import Policy, lay_out
from grpo.schedule import Schedule, make_schedule
from grpo.sharding import batch_sharding, make_mesh
from grpo.structs import Program
from grpo.update import abstract_state, logprobs_program

# What is on the devices while a program of a kind runs: what it takes or gives, and what lies
# beside it. The reference is the state's own where it is renewed; it counts the same.
_STATE = ("parameters", "optimiser", "reference")
LIVE: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "hand-over": (("parameters", "decode weights"), ("optimiser", "reference")),
    "empty cache": (("KV cache",), (*_STATE, "decode weights")),
    "prefill": (("decode weights", "KV cache"), _STATE),
    "insert": (("KV cache",), (*_STATE, "decode weights")),
    "replay": (("decode weights", "KV cache"), _STATE),
    "decode": (("decode weights", "KV cache"), _STATE),
    "tail": (("KV cache", "tail KV cache"), (*_STATE, "decode weights")),
    "tail decode": (("decode weights", "tail KV cache"), (*_STATE, "KV cache")),
    "log-probs": (("parameters",), ("optimiser", "reference")),
    "no gradients": (("gradients",), ("parameters", "optimiser", "reference")),
    "gradients": (("parameters", "gradients"), ("optimiser", "reference")),
    "optimiser": ((*_STATE, "gradients"), ()),
}
UNROLLED = ("hand-over", "empty cache", "prefill", "insert", "replay", "decode", "tail")
_FEW, _MORE = 2, 3  # layers that unrolled programs are compiled with to extrapolate


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a plan looks at: the parts of a run without its data, weights and rewards.

    Attributes:
      kept: category -> bytes on each device (`LIVE` names the categories).
      programs: every program of the run, each kind's largest first.
    """

    config: Config
    policy: Policy
    schedule: Schedule
    engine: Engine
    kept: dict[str, float]
    programs: list[Program]

    @property
    def row_shape(self) -> RowShape:
        return self.schedule.row_shape


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program; bytes are those of one device.

    Attributes:
      kind, label: what it does, and of which size.
      seconds: of CPU time, all threads together, to lower and compile it.
      argument_bytes, output_bytes, alias_bytes: taken and given; aliased is both.
      temp_bytes: allotted beside.
      code_bytes: of the program itself.
      link_bytes: collective -> bytes each device sends (`grpo.planning.hlo`); None where this jax
        cannot print what its TPU compiler made.
      endless: the decode loop is counted once, as one token.
      refused: the compiler's message if it found the program too large by itself.
    """

    kind: str
    label: str
    seconds: float
    argument_bytes: float = 0.0
    output_bytes: float = 0.0
    alias_bytes: float = 0.0
    temp_bytes: float = 0.0
    code_bytes: float = 0.0
    link_bytes: dict[str, float] | None = dataclasses.field(default_factory=dict)
    endless: int = 0
    refused: str = ""


def use_no_device(topology: Topology, *, stand_ins: bool) -> None:
    """Whatever is in this machine stays free, unless the plan is for it."""
    if topology.platform == "local":
        return
    jax.config.update("jax_platforms", "cpu")
    if stand_ins:
        jax.config.update("jax_num_cpu_devices", topology.num_devices)


def stand_ins(topology: Topology) -> Sequence[Any]:
    """Devices of this machine in place of those of a topology, to lay a run out on.

    Raises:
      ValueError: there are too few.
    """
    devices = jax.devices()[: topology.num_devices]
    if len(devices) < (topology.num_devices or 0):
        raise ValueError(
            f"{topology.name} needs {topology.num_devices} devices to stand in for its own; there "
            f"are {len(devices)} (jax_num_cpu_devices, set before jax starts)"
        )
    return devices


def devices_of(topology: Topology) -> Sequence[Any]:
    """The devices of a TPU slice that need not be here, or those that are.

    Raises:
      ValueError: no TPU compiler, and how to install it; or it does not know the slice.
    """
    if topology.platform == "local":
        return jax.devices()
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"planning for {topology.name} needs the TPU compiler, which no TPU is needed for: "
            "pip install 'grpo[plan]' (Linux on x86-64)"
        )
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no machine to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor one to keep others from
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"{topology.name} is not a slice the compiler knows: {error}") from error
    return described.devices


def make_parts(config: Config, arch: Arch, devices: Sequence[Any] | Mesh) -> Parts:
    """Lays a run out on devices; nothing is compiled.

    Raises:
      ValueError: sizes that cannot work together, as `grpo.build.build` says them.
    """
    mesh = devices if isinstance(devices, Mesh) else _mesh(config.mesh, devices)
    policy = lay_out(
        arch,
        ByteTokenizer(),
        mesh,
        config.model,
        temperature=config.sample.temperature,
        lora=config.lora,
        sampled=config.sample.weights,
    )
    shape = microbatch_shape(config, policy)
    schedule = make_schedule(config, shape)
    engine = make_engine(config, policy)
    update, optimizer, _ = make_update(config, policy, schedule)
    state = abstract_state(policy, optimizer, **state_form(config))
    with jax.set_mesh(mesh):
        whole = state.params, policy.base_like
        weights = abstract(jax.eval_shape(policy.to_decode, *whole), policy.decode_shardings)
        rows = batch_sharding(mesh)
        batch = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows),
            pack([], shape).microbatches[0],
        )
        programs = [Program("hand-over", policy.to_decode, whole)]
        programs += engine.programs(weights)
        if config.algo.kl_coef or not schedule.on_policy:
            programs.append(Program("log-probs", logprobs_program(policy), (*whole, batch)))
        programs += update.programs(batch)
    params = device_bytes(state.params)
    caches = {
        program.kind: program.arguments[1] for program in programs if "decode" in program.kind
    }
    kept = {
        "parameters": params + device_bytes(policy.base_like),  # trained, and frozen beneath
        "optimiser": device_bytes(state.opt_state),
        "reference": params if config.algo.kl_coef and not config.algo.ref_offload else 0.0,
        "gradients": params,
        "decode weights": device_bytes(weights),
        "KV cache": device_bytes(caches["decode"]),
        "tail KV cache": device_bytes(caches.get("tail decode")),
    }
    return Parts(config, policy, schedule, engine, kept, programs)


def device_bytes(tree: Any) -> float:
    """Bytes of a tree of abstract arrays on one device, without those in its host's memory."""

    def size(leaf: Any) -> float:
        sharding = getattr(leaf, "sharding", None)
        if sharding is not None and sharding.memory_kind == "pinned_host":
            return 0.0
        shape = sharding.shard_shape(leaf.shape) if sharding is not None else leaf.shape
        return math.prod(shape) * _itemsize(leaf.dtype)

    return sum(map(size, jax.tree.leaves(tree)))


def label(program: Program) -> str:
    """Of which size a program is: the places or tokens it looks at."""
    if "view" in program.static:
        return f"{program.static['view']} places"
    if program.kind == "prefill":
        rows, length = program.arguments[2].shape
        return f"{rows} x {length} tokens"
    batches = [a for a in program.arguments if hasattr(a, "tokens_RT")]
    return "{} x {} tokens".format(*batches[0].tokens_RT.shape) if batches else ""


def largest(parts: Parts, every_size: bool = False, kind: str = "") -> list[Program]:
    """The largest program of each kind, or of one, or all of them."""
    first: dict[str, Program] = {}
    for program in parts.programs:
        first.setdefault(program.kind, program)
    chosen = parts.programs if every_size else list(first.values())
    return [program for program in chosen if kind in ("", program.kind)]


def compile_all(
    parts: Parts, programs: Sequence[Program], *, extrapolate: bool, tell: Callable[[str], None]
) -> list[Compiled]:
    """Compiles programs one at a time.

    Args:
      parts: of the run.
      programs: some of its own.
      extrapolate: programs with unrolled layers are compiled with 2 and 3 of them, and what they
        need is taken to be linear in the number of layers.
      tell: gets a line for each.
    """
    arch = parts.policy.arch
    few = extrapolate and arch.num_layers > _MORE and not arch.layer_types  # all layers alike
    shorter = [_with_layers(parts, layers) for layers in (_FEW, _MORE)] if few else []
    compiled = []
    for program in programs:
        if shorter and program.kind.removesuffix(" decode") in UNROLLED:
            index = parts.programs.index(program)
            low, high = [compile_one(p.programs[index], p.policy.mesh) for p in shorter]
            done = _extrapolated(low, high, parts.policy.arch.num_layers)
        else:
            done = compile_one(program, parts.policy.mesh)
        note = "; the compiler refuses it" if done.refused else ""
        tell(f"compiled {done.kind} {done.label} in {done.seconds:.0f} s of CPU time{note}")
        compiled.append(done)
    return compiled


def compile_one(program: Program, mesh: Mesh) -> Compiled:
    """Lowers and compiles a program; one that is too large by itself is told as such."""
    started = time.process_time()
    told = partial(Compiled, program.kind, label(program))
    try:
        with jax.set_mesh(mesh):
            compiled = program.function.lower(*program.arguments, **program.static).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = _used_bytes(str(error))
        taken = device_bytes(program.arguments)
        return told(
            time.process_time() - started,
            argument_bytes=taken,
            temp_bytes=max(used - taken, 0.0),
            refused=str(error).splitlines()[0],
        )
    seconds = time.process_time() - started
    memory, exchanged = compiled.memory_analysis(), _exchanged(compiled)
    return told(
        seconds,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        link_bytes=exchanged.link_bytes if exchanged else None,
        endless=exchanged.endless if exchanged else 0,
    )


def _exchanged(compiled: Any) -> Collectives | None:
    try:
        return collectives(compiled.as_text())
    except (
        jax.errors.JaxRuntimeError
    ):  # asynchronous operations of a newer kind (v6e, libtpu 0.0.52)
        return None


def _mesh(sizes: MeshConfig, devices: Sequence[Any]) -> Mesh:
    try:
        return make_mesh(
            sizes.data,
            sizes.fsdp,
            sizes.tensor,
            sizes.axis_types,
            expert=sizes.expert,
            chosen=list(devices),
        )
    except NotImplementedError as error:  # sides of a slice that do not multiply to the sizes
        raise ValueError(
            f"mesh data={sizes.data} x fsdp={sizes.fsdp} x tensor={sizes.tensor} cannot be laid on "
            f"this slice: each size must be a product of its sides ({error})"
        ) from error


def _with_layers(parts: Parts, layers: int) -> Parts:
    arch = dataclasses.replace(parts.policy.arch, num_layers=layers)
    return make_parts(parts.config, arch, parts.policy.mesh)


def _extrapolated(low: Compiled, high: Compiled, layers: int) -> Compiled:
    def along(a: float, b: float) -> float:
        return max(a + (b - a) * (layers - _FEW) / (_MORE - _FEW), 0.0)

    names = [f.name for f in dataclasses.fields(Compiled) if f.type in (float, "float")]
    numbers: Any = {name: along(getattr(low, name), getattr(high, name)) for name in names}
    if low.link_bytes is None or high.link_bytes is None:
        return dataclasses.replace(high, **numbers, link_bytes=None)
    ops = {*low.link_bytes, *high.link_bytes}
    links = {op: along(low.link_bytes.get(op, 0), high.link_bytes.get(op, 0)) for op in ops}
    return dataclasses.replace(high, **numbers, link_bytes=links)


def _itemsize(dtype: Any) -> int:
    # A random key is a pair of 32-bit words.
    return 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else np.dtype(dtype).itemsize


def _used_bytes(message: str) -> float:
    """From "Used 17.91G of 15.75G hbm" in what the compiler says."""
    if found := re.search(r"Used ([\d.]+)([KMG]) of", message):
        return float(found[1]) * 1024 ** (" KMG".index(found[2]))
    return 0.0
