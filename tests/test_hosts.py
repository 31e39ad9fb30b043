"""Several processes: how they find one another, and that their number changes nothing."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from logged_rows import MACHINE, rows

from grpo.runtime import hosts
from grpo.runtime.hosts import joining

HERE = Path(__file__).parent
ROOT = HERE.parent


# ---- Who is there ------------------------------------------------------------------------------

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1"}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}


def found(environ, *given, attributes=None):
    return joining(*(given or (None,) * 3), environ=environ, attribute=(attributes or {}).get)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        SLURM,  # inside salloc, without srun
        SLURM | {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"},
        MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
        {"JAX_COORDINATOR_ADDRESS": "h:1"},
    ],
)
def test_a_machine_by_itself_starts_nothing(environ):
    assert found(environ) is None


@pytest.mark.parametrize(
    "environ",
    [
        SLURM | {"SLURM_STEP_NUM_TASKS": "2"},
        MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"},
        {"TPU_WORKER_HOSTNAMES": "t-0,t-1"},
        {"TPU_PROCESS_ADDRESSES": "t-0:8476,t-1:8476"},
        {"TPU_WORKER_HOSTNAMES": "t-0", "MEGASCALE_NUM_SLICES": "2"},
    ],
)
def test_others_are_found_without_flags(environ):
    assert found(environ) == {}


def test_a_tpu_machine_asks_for_the_workers_of_its_slice(monkeypatch):
    monkeypatch.setattr(hosts, "_has_tpu", lambda environ: True)
    key = "worker-network-endpoints"
    assert found({}, attributes={key: "a:8470:10.0.0.1,b:8470:10.0.0.2"}) == {}
    assert found({}, attributes={key: "a:8470:10.0.0.1"}) is None
    assert found({}) is None  # no metadata server


def test_by_hand():
    wanted = {"coordinator_address": "10.0.0.1:1234", "num_processes": 2, "process_id": 1}
    assert found({}, "10.0.0.1:1234", 2, 1) == wanted
    # Open MPI 5 says how many and which, but not where.
    assert found(MPI, "h:1", None, None) == {
        "coordinator_address": "h:1",
        "num_processes": 4,
        "process_id": 3,
    }


@pytest.mark.parametrize(
    "environ, given, message",
    [
        ({}, (None, 2, None), "--num_processes is set, but --coordinator_address=HOST:PORT is not"),
        ({}, (None, None, 0), "--process_id is set, but --coordinator_address"),
        ({}, ("h:1", 2, None), "--coordinator_address is set, but --process_id is not"),
        ({}, ("h", 2, 0), "--coordinator_address=h must be HOST:PORT"),
        ({}, ("h:x", 2, 0), "must be HOST:PORT"),
        ({}, ("h:1", 2, 2), "--process_id=2 must be at least 0 and below 2"),
        (MPI, (None, None, None), "process 3 of 4, but nothing says where process 0 is"),
    ],
)
def test_what_is_missing_is_named(environ, given, message):
    with pytest.raises(ValueError) as refused:
        found(environ, *given)
    assert message in str(refused.value)


# ---- By oneself --------------------------------------------------------------------------------


def test_a_single_process_agrees_with_itself():
    gathered = hosts.gather({"a": np.arange(3), "b": np.array(0.1)})
    assert gathered["a"].tolist() == [[0, 1, 2]] and gathered["b"].tolist() == [0.1]
    assert hosts.from_main({"a": (1, None)}) == {"a": [1, None]}
    assert hosts.is_main() and hosts.owns(7)
    with pytest.raises(KeyError, match="as it is"), hosts.together():
        raise KeyError("as it is")


# ---- Two processes of four devices each --------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    path = os.pathsep.join([str(ROOT), str(HERE)])
    ours = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": path}
    # Only process 0 would find its programs there; once, with programs from it, the collectives of
    # two processes on CPUs came in different orders.
    ours.pop("JAX_COMPILATION_CACHE_DIR", None)
    return ours


class Processes:
    """Programs started together, none of which outlives the block; what they print is in `said`."""

    def __init__(self, commands: list[list[str]], devices: int, folder: Path):
        self.logs = [folder / f"process_{i}.log" for i in range(len(commands))]
        self.all = [self._start(*each, devices) for each in zip(commands, self.logs, strict=True)]

    def _start(self, command: list[str], log: Path, devices: int) -> subprocess.Popen[bytes]:
        with log.open("w") as output:
            return subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment(devices),
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.all:
            process.kill()
            process.wait()

    def ended(self, seconds: float = 900) -> list[int]:
        """Their exit statuses, once all have ended."""
        until = time.monotonic() + seconds
        return [process.wait(max(until - time.monotonic(), 0.1)) for process in self.all]

    def said(self) -> list[str]:
        return [log.read_text(errors="replace") for log in self.logs]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Any]:
    """What one process of one device found, and each of two processes of four."""
    worker, port = str(HERE / "two_processes.py"), str(free_port())
    alone, pair = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("pair")
    commands = [[worker, str(pair), port, str(i)] for i in range(2)]
    with (
        Processes(commands, 4, pair) as several,
        Processes([[worker, str(alone)]], 1, alone) as one,
    ):
        assert several.ended() == [0, 0], several.said()
        assert one.ended() == [0], one.said()
    found = {"alone": alone / "0.json", "0": pair / "0.json", "1": pair / "1.json"}
    return {name: json.loads(path.read_text()) for name, path in found.items()}


def test_there_are_as_many_devices_as_said(results):
    assert [results[name]["devices"] for name in ("alone", "0", "1")] == [1, 8, 8]


def test_values_are_gathered_and_failures_are_everybodys(results):
    for process in "01":
        got = results[process]["agreements"]
        assert got["a"] == [[[0.1] * 3] * 2, [[1.1] * 3] * 2]  # float64, and not rounded
        assert got["b"] == [0, 1]
        assert got["from_main"] == {"of": 0, "text": "é" * 300}
        assert got["owned"] == ([0, 2, 4] if process == "0" else [1, 3])
        for culprit in "01":
            said = got[f"failure of {culprit}"]
            assert said.startswith(f"HostError: process {culprit} of 2 (")
            assert said.endswith(f"OSError: no disk on {culprit}")
    assert results["alone"]["agreements"]["failure of 0"] == "OSError: no disk on 0"


def test_sampled_tokens_do_not_depend_on_processes(results):
    expected = results["alone"]["rollout"]
    assert len({tuple(tokens) for tokens in expected["tokens"]}) > 10
    for process in "01":
        got = results[process]["rollout"]
        assert got["tokens"] == expected["tokens"]
        for ours, theirs in zip(got["logprobs"], expected["logprobs"], strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_a_slow_or_broken_verifier_of_one_host_masks_its_rows_alone(results):
    """Problem p is process p % 2's; of process 1 one reward raises, and one hangs for too long."""
    alone = results["alone"]["rollout"]
    assert alone["statuses"] == ["ok"] * 20 and np.all(alone["valid_PG"])
    for process in "01":
        got = results[process]["rollout"]
        assert got["statuses"][4:8] == ["crash"] * 4 and got["statuses"][12:16] == ["lost"] * 4
        valid_P = np.all(got["valid_PG"], axis=1)
        assert valid_P.tolist() == [True, False, True, False, True]
        assert not np.any(got["valid_PG"], axis=1)[[1, 3]].any()
        np.testing.assert_array_equal(
            np.array(got["reward_PG"])[valid_P], np.array(alone["reward_PG"])[valid_P]
        )
        assert got["crashes"] == 4  # of all processes


def test_loss_gradients_and_the_update_do_not_depend_on_processes(results):
    expected = results["alone"]["update"]
    assert expected["microbatches"] > 1 and expected["grad_norm"] > 0.01
    for process in "01":
        got = results[process]["update"]
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        for ours, theirs in zip(got["grads"], expected["grads"], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(got["params"], expected["params"], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6)
        # The digest is of the values, wherever they lie.
        assert got["params_sha256_before"] == expected["params_sha256_before"]
    assert results["0"]["update"] == results["1"]["update"]


# ---- Whole runs --------------------------------------------------------------------------------

EXPERIMENT = [f"--config={HERE / 'tiny_experiment.py'}"]
Mesh = tuple[int, int, int]


def launch(
    workdir: Path, mesh: Mesh, count: int = 1, own: Sequence[str] = (), **fields
) -> Processes:
    """The same command for every process, but for `own`, flags of the last one."""
    sizes = dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))
    flags = [f"--config.mesh.{axis}={size}" for axis, size in sizes.items()]
    flags += [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
    command = ["-m", "grpo.launch", *EXPERIMENT, f"--workdir={workdir}", *flags]
    several = [f"--coordinator_address=127.0.0.1:{free_port()}", f"--num_processes={count}"]
    commands = [[*command, *several, f"--process_id={i}"] for i in range(count)]
    commands[-1] += own
    workdir.parent.mkdir(exist_ok=True)
    devices = int(np.prod(mesh)) // count
    return Processes(commands if count > 1 else [command], devices, workdir.parent)


@pytest.mark.parametrize(
    "own, both_say, first_says, statuses",
    [
        (
            "--config.seed=1",
            "ValueError: this process differs from process 0: config.seed: 0 -> 1",
            "",
            [1, 1],
        ),
        (
            "--config.algo.minibatches=3",
            "ValueError: problems_per_step (4) x group_size (4) = 16 rows cannot be split into 3",
            "ends too, because another one failed: process 1 of 2 (",
            [134, 1],
        ),
    ],
)
def test_a_process_that_cannot_go_on_ends_all(tmp_path, own, both_say, first_says, statuses):
    with launch(tmp_path / "run", (1, 2, 1), count=2, own=[own]) as run:
        assert run.ended() == statuses, run.said()
        said = run.said()
    assert first_says in said[0]
    for text in said:
        assert both_say in text and "Traceback" not in text
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def assert_close_metrics(ours: Path, theirs: Path) -> None:
    """All of them but times, to what float32 leaves of sums in another order."""
    # Differences that are rounding themselves; and how many programs there are, how many copies of
    # the weights.
    rounding = ("sampler/gap", "sampler/kl", "engine/compiled", "handover/weights_bytes")
    for got, expected in zip(rows(ours), rows(theirs), strict=True):
        assert got.keys() == expected.keys()
        for name in got:
            if not name.startswith((*MACHINE, *rounding)):
                wanted = pytest.approx(expected[name], rel=1e-4, abs=1e-6)
                assert got[name] == wanted, (got["step"], name)


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_and_devices(tmp_path):
    """Eight devices of two processes, stopped; two of one; one in each of two: as eight of one."""
    with launch(tmp_path / "a" / "run", (2, 2, 2)) as straight:
        assert straight.ended() == [0], straight.said()
    workdir = tmp_path / "b" / "run"
    with launch(workdir, (2, 2, 2), count=2, log__save_every=50) as run:
        while not (workdir / "sft/metrics.jsonl").exists():
            assert run.all[0].poll() is None, run.said()
            time.sleep(0.01)
        run.all[1].send_signal(signal.SIGTERM)  # one of them is told; both stop, after one step
        assert run.ended() == [143, 143], run.said()
        assert "saved after step" in run.said()[0]
    assert len([p for p in (workdir / "sft/checkpoints").iterdir() if p.is_dir()]) == 1
    with launch(workdir, (1, 2, 1), num_steps=2) as run:
        assert run.ended() == [0], run.said()
    with launch(workdir, (2, 1, 1), count=2) as run:
        assert run.ended() == [0, 0], run.said()
        assert "resuming after step 2 of 4" in run.said()[0] and run.said()[1].count("\n") < 50
    expected = tmp_path / "a" / "run"
    for name in ("rollouts.jsonl", *(f"evaluations/step_{i:06d}.jsonl" for i in (0, 2, 4))):
        assert rows(workdir / name) == rows(expected / name), name
    assert_close_metrics(workdir / "metrics.jsonl", expected / "metrics.jsonl")
    assert_close_metrics(workdir / "sft/metrics.jsonl", expected / "sft/metrics.jsonl")


@pytest.mark.slow
def test_one_of_two_processes_is_killed_and_the_run_ends_bit_identical(tmp_path):
    sizes = [f"--config.mesh.{axis}={n}" for axis, n in (("data", 2), ("fsdp", 1), ("tensor", 1))]
    tool = [
        "tools/resume_check.py",
        str(tmp_path / "out"),
        "--processes=2",
        "--kills=1",
        "--seed=1",
    ]
    with Processes([[*tool, "--", *EXPERIMENT, *sizes]], 1, tmp_path) as check:
        assert check.ended() == [0], check.said()
        found = json.loads(check.said()[0].splitlines()[-1])
    assert found["same_params"] and found["same_metrics"]
    assert len(found["killed_after_s"]) == 1
