"""What a run leaves about itself is whole whenever it is ended."""

import json
import os

import pytest
from tiny_experiment import get_config

from grpo import runinfo
from grpo.pipeline.manifest import Manifest, find_output


class Killed(BaseException):
    pass


@pytest.fixture
def kill_while_writing(monkeypatch):
    """kill_while_writing(n): the n-th file from then on gets half its bytes; nothing follows."""

    def kill(number: int) -> None:
        fsync, left = os.fsync, [number]

        def cut(descriptor):
            left[0] -= 1
            if left[0]:
                return fsync(descriptor)
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            raise Killed

        monkeypatch.setattr(os, "fsync", cut)

    return kill


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.json")}


def write_twice(write, workdir, kill, number):
    """Writes, and again until killed; what was there before and is now."""
    write(1)
    before = files(workdir)
    kill(number)
    with pytest.raises(Killed):
        write(2)
    return before, files(workdir)


def test_a_file_of_a_killed_process_is_the_old_one(tmp_path, kill_while_writing, monkeypatch):
    path = tmp_path / "new" / "a.json"
    before, after = write_twice(
        lambda n: runinfo.write_json(path, {"n": n}), path.parent, kill_while_writing, 1
    )
    assert before == after == {"a.json": b'{\n  "n": 1\n}\n'}
    partial = path.with_name("a.json.partial")
    assert partial.read_text() == '{\n  "n'  # it was cut off, and disturbs nobody
    monkeypatch.undo()
    runinfo.write_json(path, {"n": 2})
    assert json.loads(path.read_text()) == {"n": 2} and not partial.exists()


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path):
    runinfo.write_json(tmp_path / "a.json", {"n": 1})
    with pytest.raises(TypeError):
        runinfo.write_json(tmp_path / "a.json", {"n": 2, "what": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"n": 1}


def test_a_stage_killed_while_it_writes_its_result_is_looked_at_as_before(
    tmp_path, kill_while_writing
):
    kill_while_writing(1)
    with pytest.raises(Killed):
        runinfo.write_result(tmp_path, params_sha256="abc")
    assert find_output(tmp_path) is None


@pytest.mark.parametrize("number", [1, 2], ids=["config.json", "environment.json"])
def test_the_description_of_a_run_is_never_partial(tmp_path, kill_while_writing, number):
    def write(seed):
        config = get_config()
        config.seed = seed
        runinfo.write(config, tmp_path)

    before, after = write_twice(write, tmp_path, kill_while_writing, number)
    assert after.keys() == before.keys() == {"config.json", "environment.json"}
    assert after["environment.json"] == before["environment.json"]
    assert json.loads(after["config.json"])["seed"] == number


def test_what_decides_is_kept_whole_or_not_at_all(tmp_path, kill_while_writing):
    kill_while_writing(1)
    with pytest.raises(Killed):
        runinfo.check_unchanged(tmp_path / "made_with.json", {"n": 1})
    assert files(tmp_path) == {}


def test_a_manifest_is_never_partial(tmp_path, kill_while_writing):
    manifest = Manifest(tmp_path / "manifest.json")
    before, after = write_twice(lambda n: manifest.note("a", n=n), tmp_path, kill_while_writing, 1)
    assert before == after
    assert Manifest(tmp_path / "manifest.json").entry("a") == {"n": 1}
