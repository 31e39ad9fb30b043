"""The pod scripts: the commands they print, and what they do where gcloud and uv are stand-ins.

The stand-in for gcloud keeps the state of a queued resource in a file, and its `tpu-vm ssh` hands
the command to a shell as ssh does, in a home of its own. So quoting, packing, starting, stopping
and resuming are what they would be on a worker; that Google Cloud agrees is not tested here.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SCRIPTS = ["tools/tpu_pod.sh", "tools/tpu_worker.sh", "tools/bench_peers.sh", "tools/slurm.sbatch"]
FLAGS = [
    "--name=r1",
    "--zone=us-west4-a",
    "--accelerator=v5litepod-16",
    "--workdir=gs://bucket/r1",
]
LAUNCH = ["--", "--config=experiments/tiny.py", "--config.mesh.shape=(4,2)", "--config.x=it's a b"]

TPUS = "gcloud compute tpus"
CREATE = (
    f"{TPUS} queued-resources create r1 --node-id=r1 --zone=us-west4-a "
    "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite"
)
LOOK = (
    f"{TPUS} queued-resources list --zone=us-west4-a '--filter=name~/r1$' "
    "'--format=value(state.state)'"
)
INSTALL = [
    "# packs the commit and what the working tree changes into build/grpo.tar.gz",
    f"{TPUS} tpu-vm scp build/grpo.tar.gz r1: --zone=us-west4-a --worker=all",
    f"{TPUS} tpu-vm ssh r1 --zone=us-west4-a --worker=all '--command=rm -rf grpo_new && "
    "mkdir grpo_new && tar -xzf grpo.tar.gz -C grpo_new && "
    "bash grpo_new/tools/tpu_worker.sh idle && rm -rf grpo_code && mv grpo_new grpo_code && "
    "bash grpo_code/tools/tpu_worker.sh install 3.11 tpu,gcs'",
]


def on_worker(worker: str, command: str) -> str:
    return f"{TPUS} tpu-vm ssh r1 --zone=us-west4-a --worker={worker} '--command={command}'"


RUN = on_worker(
    "all",
    "bash grpo_code/tools/tpu_worker.sh launch --workdir=gs://bucket/r1 "
    r"--config=experiments/tiny.py '\''--config.mesh.shape=(4,2)'\'' "
    r"'\''--config.x=it'\''\'\'''\''s a b'\''",
)
LOGS = on_worker("0", "bash grpo_code/tools/tpu_worker.sh logs")
DELETE = f"{TPUS} queued-resources delete r1 --zone=us-west4-a --force --quiet"
STATUS = on_worker(
    "all", 'bash grpo_code/tools/tpu_worker.sh status || echo "$(hostname): not installed"'
)
PRINTED = {
    "create": [CREATE],
    "wait": [LOOK],
    "install": INSTALL,
    "launch": [RUN],
    "logs": [LOGS],
    "status": [f"{TPUS} queued-resources describe r1 --zone=us-west4-a", STATUS],
    "stop": [on_worker("all", "bash grpo_code/tools/tpu_worker.sh stop")],
    "delete": [DELETE],
    "up": [CREATE, LOOK, *INSTALL, RUN, LOGS],
    "resume": [LOOK, "# where that printed SUSPENDED:", DELETE, CREATE, LOOK, *INSTALL, RUN],
}


def pod(*argv: str, cwd: Path = ROOT, env: dict[str, str] | None = None):
    command = ["bash", str(cwd / "tools/tpu_pod.sh"), *argv]
    return subprocess.run(
        command, capture_output=True, text=True, env=env or dict(os.environ), timeout=300
    )


@pytest.mark.parametrize("command", PRINTED)
def test_dry_run_prints_every_command(command):
    done = pod(command, *FLAGS, "--dry_run", *LAUNCH)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == PRINTED[command]


def test_the_documented_commands_print_what_the_document_says():
    text = (ROOT / "docs/pods.md").read_text()
    blocks = re.findall(r"^```\n\$ (tools/tpu_pod.sh .+)\n((?:.+\n)+)```$", text, re.M)
    assert len(blocks) == 3
    for command, printed in blocks:
        done = pod(*shlex.split(command)[1:])
        assert done.stdout == printed, done.stderr


def test_every_flag_reaches_its_command():
    flags = ["--spot", "--project=p", "--alpha", "--worker=3", "--python=3.12", "--extras=tpu,math"]
    more = ["--create_flag=--network=n", "--create_flag=--tags=a b", "--ssh_flag=--internal-ip"]
    setup = "--setup=gcloud storage cp -r 'gs://b/a model' ~/models"
    printed = pod("up", *FLAGS, *flags, *more, setup, "--dry_run", *LAUNCH).stdout.splitlines()
    where = "--zone=us-west4-a --project=p"
    tpus = "gcloud alpha compute tpus"
    assert printed[0] == (
        f"{tpus} queued-resources create r1 --node-id=r1 {where} --accelerator-type=v5litepod-16 "
        "--runtime-version=v2-alpha-tpuv5-lite --spot --network=n '--tags=a b'"
    )
    assert f"tpu-vm scp build/grpo.tar.gz r1: {where} --internal-ip --worker=all" in printed[3]
    assert printed[4].endswith("install 3.12 tpu,math'")
    assert printed[5] == (
        f"{tpus} tpu-vm ssh r1 {where} --internal-ip --worker=all '--command=cd grpo_code && "
        r"gcloud storage cp -r '\''gs://b/a model'\'' ~/models'"
    )
    assert f"ssh r1 {where} --internal-ip --worker=3" in printed[-1]


@pytest.mark.parametrize(
    "accelerator, runtime",
    [
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v6e-64", "v2-alpha-tpuv6e"),
        ("v4-32", "tpu-ubuntu2204-base"),
    ],
)
def test_the_runtime_follows_the_accelerator(accelerator, runtime):
    done = pod("create", "--name=r1", "--zone=z", f"--accelerator={accelerator}", "--dry_run")
    assert f"--accelerator-type={accelerator} --runtime-version={runtime}" in done.stdout


@pytest.mark.parametrize(
    "argv, error",
    [
        (["fly"], "unknown command 'fly'"),
        (["up", "--nmae=r1"], "unknown argument --nmae=r1"),
        (["create", "--name=R 1"], "--name='R 1' must be"),
        (["create", "--name=r1"], "--zone is missing"),
        (["create", "--name=r1", "--zone=z"], "--accelerator is missing"),
        (["create", "--name=r1", "--zone=z", "--accelerator=tpu7x-8"], "--runtime=VERSION"),
        (["launch", "--name=r1", "--zone=z", "--workdir=runs/r1", *LAUNCH], "gs://BUCKET/FOLDER"),
        (["launch", "--name=r1", "--zone=z", "--workdir=gs://b", *LAUNCH], "gs://BUCKET/FOLDER"),
        (["launch", "--name=r1", "--zone=z", "--workdir=gs://b/r"], "nothing to launch"),
        (["launch", *FLAGS, *LAUNCH, "--workdir=gs://b/r"], "--workdir goes before the --"),
    ],
)
def test_mistakes_are_named_before_anything_is_asked_for(argv, error):
    done = pod(*argv, "--dry_run") if "--" not in argv else pod(argv[0], "--dry_run", *argv[1:])
    assert done.returncode == 2 and error in done.stderr and done.stdout == ""


# ---- With stand-ins for gcloud, uv and the trainer ---------------------------------------------

GCLOUD = """\
import json, os, shutil, subprocess, sys
from pathlib import Path

home, argv = Path(os.environ["WORKER_HOME"]), sys.argv[1:]
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(argv) + "\\n")
state, what = Path(os.environ["STATE"]), argv[2:4]
flag = {arg.split("=", 1)[0]: arg.split("=", 1)[1] for arg in argv if "=" in arg}
if what == ["queued-resources", "list"]:
    print(state.read_text() if state.exists() else "", end="")
elif what == ["queued-resources", "create"]:
    if state.exists():
        sys.exit("already exists")
    state.write_text("ACTIVE\\n")
elif what == ["queued-resources", "delete"]:
    state.unlink()
elif what == ["tpu-vm", "scp"]:
    shutil.copy(argv[4], home)
elif what == ["tpu-vm", "ssh"]:
    # As gcloud and ssh do it: split at spaces, joined with spaces, to the login shell.
    command = " ".join(flag["--command"].split(" "))
    environ = {**os.environ, "HOME": str(home)}
    sys.exit(subprocess.run(["bash", "-c", command], cwd=home, env=environ).returncode)
"""

# `uv venv` makes an environment whose python is the trainer's stand-in.
UV = """\
#!/bin/bash
echo "$*" >>"$HOME/uv_calls"
if [ "$1" = venv ]; then
  mkdir -p "${@: -1}/bin"
  cp "$HOME/trainer" "${@: -1}/bin/python"
fi
"""

# Notes its flags and leaves when told: with 143 on SIGTERM, else with what the file `leave` says.
TRAINER = """\
#!/bin/bash
[ "$1" != -c ] || exit 0
for flag in "${@:3}"; do printf '%s\\0' "$flag"; done >>"$HOME/flags"
trap 'exit 143' TERM
echo training
while [ ! -s "$HOME/leave" ] && ((SECONDS < 300)); do sleep 0.05; done
exit "$(cat "$HOME/leave")"
"""


class Cloud:
    """A checkout, a worker's home, and an environment in which gcloud is the stand-in."""

    def __init__(self, folder: Path):
        self.checkout, self.home = folder / "checkout", folder / "home"
        self.state, self.calls = folder / "state", folder / "calls"
        bin = folder / "bin"
        for made in (self.home, bin):
            made.mkdir(parents=True)
        for path in SCRIPTS[:2]:
            (self.checkout / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, self.checkout / path)
        (self.checkout / ".gitignore").write_text("build/\nruns/\n")
        (self.checkout / "edited.py").write_text("committed\n")
        (self.checkout / "deleted.py").write_text("committed\n")
        self.git("init", "--quiet")
        self.git("add", ".")
        self.git("-c", "user.name=n", "-c", "user.email=e", "commit", "--quiet", "-m", "first")
        self._program(bin / "gcloud", f"#!{sys.executable} -IS\n{GCLOUD}")
        self._program(bin / "uv", UV)
        self._program(self.home / "trainer", TRAINER)
        self.env = {
            "PATH": f"{bin}:{os.environ['PATH']}",
            "HOME": str(folder),
            "WORKER_HOME": str(self.home),
            "STATE": str(self.state),
            "CALLS": str(self.calls),
        }

    @staticmethod
    def _program(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def git(self, *argv: str, cwd: Path | None = None) -> str:
        command = ["git", "-C", str(cwd or self.checkout), *argv]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def pod(self, command: str, *flags: str, launch: list[str] = LAUNCH):
        return pod(command, *FLAGS, *flags, *launch, cwd=self.checkout, env=self.env)

    def asked(self) -> list[str]:
        """The calls of gcloud since the last time, such as "queued-resources create"."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return [" ".join(json.loads(line)[2:4]) for line in lines]

    def end(self) -> None:
        """Leaves no process behind."""
        with contextlib.suppress(OSError, ValueError):
            os.killpg(os.getpgid(int((self.home / "grpo_run/pid").read_text())), signal.SIGKILL)


@pytest.fixture
def cloud(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    cloud = Cloud(tmp_path)
    yield cloud
    cloud.end()


def test_the_working_tree_travels_with_its_commit(cloud):
    (cloud.checkout / "edited.py").write_text("edited\n")
    (cloud.checkout / "deleted.py").unlink()
    (cloud.checkout / "new file.py").write_text("new\n")
    (cloud.checkout / "runs").mkdir()
    (cloud.checkout / "runs/large").write_text("ignored\n")
    cloud.state.write_text("ACTIVE\n")
    done = cloud.pod("install", "--setup=echo 'set  up' >../done")
    assert done.returncode == 0, done.stderr

    code = cloud.home / "grpo_code"
    assert (code / "edited.py").read_text() == "edited\n"
    assert (code / "new file.py").exists()
    assert not (code / "deleted.py").exists() and not (code / "runs").exists()
    assert cloud.git("rev-parse", "HEAD", cwd=code) == cloud.git("rev-parse", "HEAD")
    changed = cloud.git("status", "--porcelain", cwd=code).splitlines()
    assert [line.split()[0] for line in changed] == ["D", "M", "??"]
    assert (cloud.home / "uv_calls").read_text().splitlines() == [
        f"venv --quiet --allow-existing --python 3.11 {cloud.home}/grpo_venv",
        f"pip install --quiet --python {cloud.home}/grpo_venv/bin/python --editable .[tpu,gcs]",
    ]
    assert (cloud.home / "done").read_text() == "set  up\n"
    with tarfile.open(cloud.checkout / "build/grpo.tar.gz") as tar:  # nothing of the machine
        assert not [name for name in tar.getnames() if name.startswith(("/", ".."))]


def test_a_run_from_start_to_end(cloud):
    flags = [*LAUNCH, '--config.y=a  b\n$HOME `c` "d" \\ * é', "--config.empty="]
    assert cloud.pod("create").returncode == 0
    assert cloud.pod("wait").returncode == 0
    assert ": not installed" in cloud.pod("status").stdout
    assert cloud.pod("launch").returncode == 1  # there is nothing to launch yet
    assert cloud.pod("install").returncode == 0
    assert ": not started" in cloud.pod("status").stdout
    assert cloud.pod("launch", launch=flags).returncode == 0
    assert re.search(r": running \(pid \d+, for ", cloud.pod("status").stdout)

    # A second run, or other code under a running one, is refused.
    for command in ("launch", "install"):
        done = cloud.pod(command)
        assert done.returncode == 1 and "stop it first" in done.stderr

    done = cloud.pod("stop")
    assert done.returncode == 0 and ": ended (exit code 143)" in done.stdout
    assert "training" in cloud.pod("logs").stdout
    got = (cloud.home / "flags").read_text().split("\0")[:-1]
    assert got == ["--workdir=gs://bucket/r1", *flags[1:]]


def test_resume_does_what_the_state_asks_for(cloud):
    look, ssh = "queued-resources list", "tpu-vm ssh"
    create, delete = "queued-resources create", "queued-resources delete"
    make = [create, look, "tpu-vm scp", ssh]

    assert cloud.pod("resume").returncode == 0  # nothing there
    assert cloud.asked() == [look, *make, ssh]

    assert cloud.pod("resume").returncode == 0  # going on
    assert cloud.asked() == [look, ssh]

    cloud.end()  # the machine was restarted
    (cloud.home / "flags").unlink()
    done = cloud.pod("resume")
    assert done.returncode == 0 and ": gone" in done.stdout and "launched" in done.stdout
    assert cloud.asked() == [look, ssh, ssh, ssh]

    assert cloud.pod("stop").returncode == 0
    cloud.asked()
    cloud.state.write_text("SUSPENDED\n")  # preempted
    shutil.rmtree(cloud.home / "grpo_run")
    assert cloud.pod("resume").returncode == 0
    assert cloud.asked() == [look, delete, *make, ssh]

    (cloud.home / "leave").write_text("1")  # an error of its own is not tried again
    assert cloud.pod("logs").returncode == 0
    done = cloud.pod("resume", "--watch_s=1")
    assert done.returncode == 4 and "failed by itself" in done.stderr

    (cloud.home / "leave").write_text("0")
    assert cloud.pod("launch").returncode == 0
    assert cloud.pod("logs").returncode == 0
    done = cloud.pod("resume")
    assert done.returncode == 3 and "the run has ended" in done.stderr
    assert cloud.pod("resume", "--watch_s=1").returncode == 0


def test_a_slice_that_will_not_come_is_said(cloud):
    done = cloud.pod("wait")
    assert done.returncode == 1 and "not asked for" in done.stderr
    cloud.state.write_text("FAILED\n")
    done = cloud.pod("wait")
    assert done.returncode == 1 and "will not come (FAILED)" in done.stderr
    cloud.state.write_text("ACTIVE\n")
    done = cloud.pod("create")
    assert done.returncode == 1 and "already exists" in done.stderr


# ---- The files as such ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS)
def test_bash_reads_it(path):
    done = subprocess.run(["bash", "-n", ROOT / path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def shellcheck(*argv: str | Path, text: str | None = None) -> None:
    program = shutil.which("shellcheck") or shutil.which(
        "shellcheck", path=str(Path(sys.executable).parent)
    )
    if program is None:
        pytest.skip("shellcheck is not installed (it comes with the extra `test`)")
    done = subprocess.run([program, *argv], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS)
def test_shellcheck_finds_nothing(path):
    shellcheck(ROOT / path)


@pytest.mark.parametrize("part", ["setup", "run"])
def test_the_skypilot_file_holds_shell(part):
    task = yaml.safe_load((ROOT / "tools/skypilot.yaml").read_text())
    assert "--workdir=" in task["run"] and task["resources"]["use_spot"]
    shellcheck("--shell=bash", "-", text=task[part])


def test_slurm_requeues_what_was_told_to_stop_and_nothing_else(tmp_path):
    bin = tmp_path / "bin"
    bin.mkdir()
    Cloud._program(
        bin / "srun",
        '#!/bin/bash\nprintf "%s\\0" "$@" >flags\n'
        '[ ! -e cancelled ] || kill -TERM "$PPID"\nexit "$(cat code)"\n',
    )
    Cloud._program(bin / "scontrol", '#!/bin/bash\necho "$*" >requeued\n')
    env = {"PATH": f"{bin}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "WORKDIR": "/runs/a b"}
    env["SLURM_SUBMIT_DIR"] = str(tmp_path)
    env["SLURM_CPUS_PER_TASK"] = "12"
    (tmp_path / "cancelled").touch()
    for code, requeued in (("143", False), ("0", False), ("1", False), ("143", True)):
        (tmp_path / "code").write_text(code)
        (tmp_path / "requeued").unlink(missing_ok=True)
        command = ["bash", str(ROOT / "tools/slurm.sbatch"), "--config=x.py", "--config.x=(1, 2)"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == int(code), done.stderr
        assert (tmp_path / "requeued").exists() == requeued
        (tmp_path / "cancelled").unlink(missing_ok=True)
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    flags = (tmp_path / "flags").read_text().split("\0")[:-1]
    assert flags[-3:] == ["--workdir=/runs/a b", "--config=x.py", "--config.x=(1, 2)"]


def test_slurm_starts_a_process_a_gpu():
    """As jax expects it there: process i of a node takes its GPU i, so it must see them all."""
    text = (ROOT / "tools/slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", text, re.M))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert "--gpu-bind=none" in text
