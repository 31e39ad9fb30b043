"""Checkpoints: Orbax behind the four calls a run needs."""

import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from grpo.runtime import hosts
from grpo.structs import TrainState

_GATHERED_BYTES = 2**28  # of an array that many processes share, at a time


class Checkpoints:
    """The saved states of a run, asynchronous and atomic, the newest few kept.

    Where there are several processes all of them make every call, each writes what it holds, and
    the folder is one that all can reach. Use as a context manager.

    Args:
      folder: a `pathlib.Path` or, for a bucket, an `etils.epath.Path`.
      keep: the newest so many are kept.
    """

    def __init__(self, folder: Any, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(
            folder if "://" in str(folder) else folder.absolute(),
            options=options,
            item_handlers=ocp.StandardCheckpointHandler(),
        )
        self._folder = folder

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest state, laid out as `like` (shapes, dtypes, shardings); None if none is saved.

        Raises:
          ValueError: what is saved does not have this model's shapes.
        """
        step = hosts.from_main(self._manager.latest_step())
        if step is None:
            return None
        # Compared beforehand: a restore that Orbax gives up half-way leaves its readers hanging.
        saved, wanted = _shapes(self._manager.item_metadata(step).tree), _shapes(like)
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise ValueError(
                    f"checkpoint {step} in {self._folder} does not fit this configuration (another "
                    f"model or optimiser?): {name} has shape {saved.get(name, 'none')} there and "
                    f"{wanted.get(name, 'none')} here. Use a fresh --workdir, or the configuration "
                    "that wrote it"
                )
        return self._manager.restore(step, args=ocp.args.StandardRestore(like))

    def save(self, state: TrainState) -> None:
        """Starts saving; returns once the state may be overwritten."""
        step = int(state.step)
        if step != self._manager.latest_step():
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def wait(self) -> None:
        """Returns when everything started is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the folder; all processes together."""
        self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or jax.process_count() == 1:  # else another one may never come
            self.close()


def saved_steps(folder: Path) -> list[int]:
    """After which steps there is a whole checkpoint in `folder`, in rising order."""
    return sorted(ocp.utils.checkpoint_steps(folder.absolute())) if folder.is_dir() else []


def read_params(folder: Path, step: int, shardings: Any) -> Any:
    """The parameters alone of a saved state, straight to where `shardings` wants them.

    Args:
      folder: of the checkpoints.
      step: one of `saved_steps(folder)`.
      shardings: nested as the parameters are.

    Raises:
      ValueError: the saved parameters are not those of this tree.
    """
    options = ocp.CheckpointManagerOptions(create=False)
    handlers = ocp.PyTreeCheckpointHandler()
    with ocp.CheckpointManager(
        folder.absolute(), options=options, item_handlers=handlers
    ) as reader:
        saved = reader.item_metadata(step).tree["params"]
        names = {_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(saved)}
        wanted = {_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(shardings)}
        if names != wanted:
            odd = min(names ^ wanted)
            where = "is" if odd in names else "is not"
            raise ValueError(
                f"checkpoint {step} in {folder} is of another kind of model: {odd} {where} in it"
            )
        like = jax.tree.map(
            lambda sharding, array: ocp.ArrayRestoreArgs(
                sharding=sharding, global_shape=array.shape, dtype=array.dtype
            ),
            shardings,
            saved,
        )
        restored = reader.restore(
            step,
            args=ocp.args.PyTreeRestore(
                item={"params": saved}, restore_args={"params": like}, partial_restore=True
            ),
        )
    return restored["params"]


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every leaf by its path, whether the nodes are records, dicts or tuples."""
    return {_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def params_sha256(params: Any) -> str:
    """Hex digest over names, shapes, dtypes and bytes: equal digests, bit-equal parameters.

    Does not depend on how they are laid out over devices and processes. Where there are several
    processes it is a collective, of some rows of an array at a time.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        for part in _parts(leaf):
            digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


def _parts(leaf: Any) -> Iterator[np.ndarray]:
    """The array, or blocks of its rows in order if this process does not have it all."""
    if getattr(leaf, "is_fully_addressable", True) or leaf.is_fully_replicated:
        yield np.asarray(leaf)
        return
    everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
    rows = max(1, _GATHERED_BYTES * leaf.shape[0] // leaf.nbytes)
    for start in range(0, leaf.shape[0], rows):
        size = min(rows, leaf.shape[0] - start)
        yield np.asarray(_block(size, everywhere)(leaf, start))


@functools.cache
def _block(size: int, everywhere: NamedSharding) -> Callable[[jax.Array, int], jax.Array]:
    """(array, start) -> its rows from there, on every device."""
    take = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=size)
    return jax.jit(take, out_shardings=everywhere)
