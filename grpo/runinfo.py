"""What a run was: configuration, versions, commit, result; and batches that went wrong."""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grpo.config import Config, describe
from grpo.runtime import hosts
from grpo.structs import Batch

_PACKAGES = ("grpo", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers")


def check_same(config: Config, workdir: str | Path) -> None:
    """Every process must be about to do the same. A collective.

    Raises:
      HostError: some process has another configuration, workdir, commit or package; names the
        process and what differs.
    """
    ours = {"config": describe(config), "workdir": str(workdir), **_software()}
    theirs = hosts.from_main(ours)
    with hosts.together():
        differing = list(_differences(theirs, json.loads(json.dumps(ours)), ""))
        if differing:
            raise ValueError("this process differs from process 0: " + "; ".join(differing))


def write(config: Config, workdir: Path) -> None:
    """config.json and environment.json; tells what changed if the workdir has a config already.

    Process 0 alone, as everything that is written but checkpoints.
    """
    if not hosts.is_main():
        return
    new, path = describe(config), workdir / "config.json"
    if path.exists():
        changed = list(_differences(json.loads(path.read_text()), new))
        if changed:
            print("this run was configured differently before:\n  " + "\n  ".join(changed))
    write_json(path, new)
    environment = _software() | {
        "devices": [str(device) for device in jax.devices()],
        "processes": jax.process_count(),
    }
    write_json(workdir / "environment.json", environment)


def check_unchanged(path: Path, made_with: Mapping[str, Any]) -> None:
    """What is kept beside `path` was made with the same, or nothing is kept yet. A collective.

    Process 0 writes the file where there is none.

    Args:
      path: a JSON file.
      made_with: JSON-able; what decides the bits of what is kept.

    Raises:
      ValueError: something was different then; names it. HostError, if there are other processes.
    """
    with hosts.together():
        if not hosts.is_main():
            return
        ours = json.loads(json.dumps(made_with))
        if not path.exists():
            write_json(path, ours)
            return
        changed = list(_differences(json.loads(path.read_text()), ours, ""))
        if changed:
            raise ValueError(
                f"what is in {path.parent} was made otherwise: {'; '.join(changed)}. Go on as "
                "before, or take a fresh --workdir"
            )


def write_result(workdir: Path, **result: Any) -> None:
    """result.json, written by process 0 when a run has ended well."""
    if hosts.is_main():
        write_json(workdir / "result.json", result)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a file in one step: whatever ends the process, the old is whole or the new is.

    Args:
      path: its folder is made.
      value: JSON-able.
    """
    text = json.dumps(value, indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # else a machine that goes down may keep the name without the bytes
    os.replace(partial, path)


def dump_batch(workdir: Path, step: int, microbatches: Sequence[Batch]) -> None:
    """Keeps the rows of an update that was not finite, for whoever looks for the reason."""
    if not hosts.is_main():
        return
    folder = workdir / "gates" / f"step_{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "batch.npz"
    names = [name for name, value in vars(microbatches[0]).items() if value is not None]
    arrays: dict[str, Any] = {
        name: np.concatenate([np.asarray(getattr(batch, name)) for batch in microbatches])
        for name in names
    }
    np.savez_compressed(path, **arrays)
    print(f"step {step}: an update was not finite and was skipped; its batch is in {path}")


def _differences(old: Any, new: Any, path: str = "config") -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(name), new.get(name), f"{path}.{name}".lstrip("."))
    elif old != new:
        yield f"{path}: {old!r} -> {new!r}"


def _software() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "commit": commit(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """Commit of the checkout this package runs from, with "+" if it was changed since."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        if commit.returncode:
            return "unknown"
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
        return commit.stdout.strip() + ("+" if status.stdout else "")
    except OSError:
        return "unknown"
