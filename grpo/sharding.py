"""Which mesh axis splits which logical axis: one table, one mesh, one `shard`.

The axes of a mesh are of one of two types. Explicit: how an array lies is part of its type, so a
parameter, moment or gradient that lies otherwise than said is an error while tracing. Auto: XLA
decides wherever nothing is said. What is written is the same in both, and computes the same. Inside
a block of the model, the loss and the engine's programs XLA decides either way (`propagated`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from grpo.model.params import ParamSpec, map_table

MESH_AXES = ("data", "fsdp", "tensor", "expert")
AXIS_TYPES = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}

Rules = Mapping[str, str | tuple[str, ...] | None]
TRAIN_RULES: Rules = {  # logical axis -> mesh axes; None = replicated
    "batch": ("data", "fsdp", "expert"),
    "layer": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
}
# The sampler gathers over fsdp once a step instead of once a layer and token.
DECODE_RULES: Rules = {**TRAIN_RULES, "embed": None}


def make_mesh(
    data: int,
    fsdp: int,
    tensor: int,
    axis_types: str = "auto",
    *,
    expert: int = 1,
    chosen: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh over all devices, or those chosen; one size may be -1 and takes what is left.

    `axis_types` is one of `AXIS_TYPES`, for all axes.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    sizes = [data, fsdp, tensor, expert]
    devices = len(jax.devices() if chosen is None else chosen)
    if sizes.count(-1) > 1:
        raise ValueError(
            f"mesh {dict(zip(MESH_AXES, sizes, strict=True))}: only one size may be -1"
        )
    if -1 in sizes:
        rest = -int(np.prod(sizes))
        sizes[sizes.index(-1)] = max(devices // rest, 1)
    if int(np.prod(sizes)) != devices:
        asked = dict(zip(MESH_AXES, (data, fsdp, tensor, expert), strict=True))
        if expert == 1:  # as in most runs
            del asked["expert"]
        named = " x ".join(f"{name}={size}" for name, size in asked.items())
        product = " x ".join(map(str, sizes[: len(asked)]))
        raise ValueError(
            f"mesh {named} needs {product} = {int(np.prod(sizes))} devices, there are {devices}"
        )
    types = (AXIS_TYPES[axis_types],) * len(MESH_AXES)
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=types, devices=chosen)


def spec(axes: tuple[str | None, ...], rules: Rules = TRAIN_RULES) -> PartitionSpec:
    """PartitionSpec of an array whose axes carry these logical names."""
    return PartitionSpec(*(rules[name] if name else None for name in axes))


def fitted(
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
    mesh: Mesh | AbstractMesh,
    rules: Rules = TRAIN_RULES,
) -> PartitionSpec:
    """`spec`, for an array of this shape on this mesh.

    Key/value heads may be fewer than the devices of a tensor axis. If they divide them, every
    device keeps all of them; its query heads use one.
    """
    wanted = dict(rules)
    if "kv_heads" in axes and wanted["kv_heads"] is not None:
        heads, ways = shape[axes.index("kv_heads")], mesh.shape[str(wanted["kv_heads"])]
        if heads < ways and ways % heads == 0:
            wanted["kv_heads"] = None
    return spec(axes, wanted)


def shard(x: jax.Array, *axes: str | None, rules: Rules = TRAIN_RULES) -> jax.Array:
    """Lays `x` out over the current mesh; does nothing where there is no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    wanted = fitted(axes, x.shape, mesh, rules)
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(x, wanted)
    return jax.lax.with_sharding_constraint(x, wanted)


def propagated(function: Callable[..., Any], out: Any) -> Callable[..., Any]:
    """`function` with XLA choosing how arrays lie inside of it, whatever the type of the axes.

    Args:
      function: of arrays given by position; it must not close over arrays of an explicit mesh.
      out: PartitionSpecs of its results, or of whole subtrees of them.
    """
    return jax.sharding.auto_axes(function, out_sharding=out)


def param_shardings(
    table: Mapping[str, Any], mesh: Mesh, rules: Rules = TRAIN_RULES
) -> dict[str, Any]:
    """NamedSharding of every array in a parameter table.

    Raises:
      ValueError: a mesh axis does not divide the array axis it would split.
    """

    def sharding(param: ParamSpec) -> NamedSharding:
        named = NamedSharding(mesh, fitted(param.axes, param.shape, mesh, rules))
        for axis, size, parts in zip(param.axes, param.shape, named.spec, strict=False):
            names = (parts,) if isinstance(parts, str) else parts or ()
            ways = int(np.prod([mesh.shape[name] for name in names]))
            if size % ways:
                raise ValueError(
                    f"the model's {axis!r} axis ({size}) cannot be split {ways} ways over mesh "
                    f"axis {parts!r}; choose a mesh size that divides it"
                )
        return named

    return map_table(sharding, table)


def batch_ways(mesh: Mesh) -> int:
    """Into how many parts the mesh splits a batch axis."""
    return mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["expert"]


def platform_of(mesh: Mesh) -> str:
    """What jax calls the devices of the mesh: "cpu", "gpu" or "tpu"."""
    return mesh.devices.flat[0].platform


def specs_of(shardings: Any) -> Any:
    """The PartitionSpecs of a tree of NamedShardings."""
    return jax.tree.map(lambda sharding: sharding.spec, shardings)


def in_host_memory(shardings: Any) -> Any:
    """The same layout in the memory of each device's host, from which the device copies fast."""
    return jax.tree.map(lambda sharding: sharding.with_memory_kind("pinned_host"), shardings)


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """Splits the row axis, which comes after `leading` replicated axes."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, TRAIN_RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())
