"""A run in a bucket: what process 0 writes is there before the checkpoint that follows it.

The bucket is a folder; what `etils.epath` makes of gs:// is not looked at here.
"""

import pytest
from etils import epath

from grpo.runtime.workdir import Workdir, open_workdir


@pytest.fixture
def bucket(tmp_path):
    path = tmp_path / "bucket" / "run"
    path.mkdir(parents=True)
    return path


def workdir_on(tmp_path, bucket, machine="here") -> Workdir:
    return Workdir(tmp_path / machine, epath.Path(bucket))


def test_a_folder_is_itself(tmp_path):
    workdir = open_workdir(tmp_path / "run")
    assert workdir.path == workdir.saves == tmp_path / "run"
    workdir.pull()
    workdir.push()
    assert not (tmp_path / "run").exists()


def test_another_machine_goes_on_with_what_the_bucket_has(tmp_path, bucket):
    first = workdir_on(tmp_path, bucket)
    first.pull()
    (first.path / "sft").mkdir()
    (first.path / "metrics.jsonl").write_text("0\n1\n")
    (first.path / "sft" / "metrics.jsonl").write_text("a\n")
    first.push()
    (bucket / "checkpoints" / "2").mkdir(parents=True)
    (bucket / "checkpoints" / "2" / "large").write_text("weights")
    second = workdir_on(tmp_path, bucket, "there")
    second.path.mkdir()
    (second.path / "metrics.jsonl").write_text("of a run that was deleted\n" * 9)
    second.pull()
    found = {str(p.relative_to(second.path)) for p in second.path.rglob("*") if p.is_file()}
    assert found == {"metrics.jsonl", "sft/metrics.jsonl"}  # not the checkpoints
    assert (second.path / "metrics.jsonl").read_text() == "0\n1\n"


def test_only_what_changed_is_copied_again(tmp_path, bucket):
    workdir = workdir_on(tmp_path, bucket)
    workdir.pull()
    for name in ("a", "b"):
        (workdir.path / name).write_text("old")
    workdir.push()
    for name in ("a", "b"):
        (bucket / name).write_text("in the bucket")
    with (workdir.path / "a").open("a") as file:
        file.write(" and new")
    workdir.push()
    assert (bucket / "a").read_text() == "old and new"
    assert (bucket / "b").read_text() == "in the bucket"


def test_a_copy_that_fails_is_told_and_tried_again(tmp_path, bucket, monkeypatch, capsys):
    workdir = workdir_on(tmp_path, bucket)
    workdir.pull()
    (workdir.path / "a").write_text("new")

    def fail(*_, **__):
        raise OSError("no network")

    with monkeypatch.context() as patch:
        patch.setattr(type(epath.Path(bucket)), "copy", fail)
        workdir.push()
    assert "a could not be copied to" in capsys.readouterr().out
    workdir.push()
    assert (bucket / "a").read_text() == "new"


@pytest.mark.parametrize(
    "address, installed, message",
    [
        ("s3://bucket/run", True, "must be a folder, or gs://BUCKET/FOLDER"),
        ("gs://", True, "must be a folder, or gs://BUCKET/FOLDER"),
        ("gs://bucket/run", False, r'needs gcsfs: pip install "grpo\[gcs\]"'),
    ],
)
def test_an_address_that_cannot_work_is_refused(monkeypatch, address, installed, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: installed or None)
    with pytest.raises(ValueError, match=message):
        open_workdir(address)


def test_a_bucket_has_a_folder_of_its_own_on_this_machine(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path)
    workdir = open_workdir("gs://bucket/runs/7/")
    assert workdir.path == tmp_path / ".cache/grpo/workdirs/bucket/runs/7"
    assert str(workdir.saves / "sft" / "checkpoints") == "gs://bucket/runs/7/sft/checkpoints"
