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


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every leaf by its path, whether the nodes are records, dicts or tuples."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in leaves}


def params_sha256(params: Any) -> str:
    """Hex digest over names, shapes, dtypes and bytes: equal digests, bit-equal parameters."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(jax.device_get(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
