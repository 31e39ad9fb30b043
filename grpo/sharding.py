"""Which mesh axis splits which logical axis: one table, one mesh, one `shard`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from grpo.model.params import ParamSpec, map_table

MESH_AXES = ("data", "fsdp", "tensor")

Rules = Mapping[str, str | tuple[str, ...] | None]
TRAIN_RULES: Rules = {  # logical axis -> mesh axes; None = replicated
    "batch": ("data", "fsdp"),
    "layer": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
}
# The sampler gathers over fsdp once a step instead of once a layer and token.
DECODE_RULES: Rules = {**TRAIN_RULES, "embed": None}


def make_mesh(
    data: int, fsdp: int, tensor: int, chosen: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over all devices, or those chosen; one size may be -1 and takes what is left.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    sizes, devices = [data, fsdp, tensor], len(jax.devices() if chosen is None else chosen)
    if sizes.count(-1) > 1:
        raise ValueError(
            f"mesh {dict(zip(MESH_AXES, sizes, strict=True))}: only one size may be -1"
        )
    if -1 in sizes:
        rest = -int(np.prod(sizes))
        sizes[sizes.index(-1)] = max(devices // rest, 1)
    if int(np.prod(sizes)) != devices:
        raise ValueError(
            f"mesh data={data} x fsdp={fsdp} x tensor={tensor} needs "
            f"{' x '.join(map(str, sizes))} = {int(np.prod(sizes))} devices, there are {devices}"
        )
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=chosen)


def spec(axes: tuple[str | None, ...], rules: Rules = TRAIN_RULES) -> PartitionSpec:
    """PartitionSpec of an array whose axes carry these logical names."""
    return PartitionSpec(*(rules[name] if name else None for name in axes))


def shard(x: jax.Array, *axes: str | None, rules: Rules = TRAIN_RULES) -> jax.Array:
    """Lays `x` out over the current mesh; does nothing where there is no mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, rules))


def param_shardings(
    table: Mapping[str, Any], mesh: Mesh, rules: Rules = TRAIN_RULES
) -> dict[str, Any]:
    """NamedSharding of every array in a parameter table.

    Raises:
      ValueError: a mesh axis does not divide the array axis it would split.
    """

    def sharding(param: ParamSpec) -> NamedSharding:
        named = NamedSharding(mesh, spec(param.axes, rules))
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
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """Splits the row axis, which comes after `leading` replicated axes."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, TRAIN_RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())
