"""Checkpoints: Orbax behind the four calls a run needs."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from grpo.structs import TrainState


class Checkpoints:
    """The saved states of a run, asynchronous and atomic, the newest few kept."""

    def __init__(self, folder: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(
            folder.absolute(), options=options, item_handlers=ocp.StandardCheckpointHandler()
        )
        self._folder = folder

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest state, laid out as `like` (shapes, dtypes, shardings); None if none is saved.

        Raises:
          ValueError: what is saved does not have this model's shapes.
        """
        step = self._manager.latest_step()
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
        """Waits, and lets go of the folder."""
        self._manager.close()


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
    """Hex digest over names, shapes, dtypes and bytes: equal digests, bit-equal parameters."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(jax.device_get(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
