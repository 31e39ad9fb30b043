"""Where a run lives: a folder, or a bucket with a folder of this machine in front of it.

A bucket cannot be appended to, line by line, as logs are. So with `--workdir=gs://BUCKET/RUN` only
the checkpoints are written there directly, by all processes. Process 0 writes everything else to a
folder of its machine and copies what has changed to the bucket, each time before a checkpoint is
saved: whatever step a run goes on from, on whatever machine, the rows before it are there.
"""

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from grpo.runtime import hosts

_SAVES = "checkpoints"  # folders of this name are not copied


class Workdir:
    """The folder of a run.

    Args:
      path: where process 0 writes.
      bucket: what `path` is a copy of, but for the checkpoints; None if it is none.

    Attributes:
      path: as given.
      saves: below which checkpoints are; all processes reach it.
    """

    def __init__(self, path: Path, bucket: Any = None):
        self.path, self._bucket = path, bucket
        self.saves: Any = path if bucket is None else bucket
        self._copied: dict[Path, tuple[int, int]] = {}  # file -> size and time when it was copied

    def pull(self) -> None:
        """Makes the folder what the bucket has; on process 0, before anything is written."""
        if self._bucket is None or not hosts.is_main():
            return
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        for remote, name in _files(self._bucket, ()):
            local = self.path.joinpath(*name)
            local.parent.mkdir(parents=True, exist_ok=True)
            remote.copy(local)
            self._copied[local] = _version(local)
        hosts.say(f"logs are written to {self.path} and copied to {self._bucket}")

    def push(self) -> None:
        """Copies what has changed to the bucket; on process 0. What fails is tried again later."""
        if self._bucket is None or not hosts.is_main() or not self.path.exists():
            return
        for local, name in _files(epath.Path(self.path), ()):
            version = _version(Path(local))
            if self._copied.get(Path(local)) == version:
                continue
            remote = self._bucket.joinpath(*name)
            try:
                remote.parent.mkdir(parents=True, exist_ok=True)
                local.copy(remote, overwrite=True)
            except OSError as error:  # logs are not worth a run
                hosts.say(f"warning: {local} could not be copied to {remote}: {error}")
                continue
            self._copied[Path(local)] = version


def open_workdir(address: str | Path) -> Workdir:
    """The workdir at a path or a gs:// address; nothing is made or copied yet.

    Raises:
      ValueError: another kind of address, or what reaches a bucket is not installed.
    """
    scheme, separator, place = str(address).partition("://")
    if not separator:
        return Workdir(Path(address))
    if scheme != "gs" or not place.strip("/"):
        raise ValueError(f"--workdir={address} must be a folder, or gs://BUCKET/FOLDER")
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError(f'--workdir={address} needs gcsfs: pip install "grpo[gcs]"')
    path = Path.home() / ".cache" / "grpo" / "workdirs" / place.strip("/")
    return Workdir(path, epath.Path(str(address).rstrip("/")))


def _files(folder: Any, below: tuple[str, ...]) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Each file with the parts of its name below the first folder, checkpoints left out."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        name = (*below, entry.name)
        if not entry.is_dir():
            yield entry, name
        elif entry.name != _SAVES:
            yield from _files(entry, name)


def _version(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
