"""Several processes that run one program: how they start, and what they must agree on.

Every process runs every jitted call, in the same order. So whatever decides what is computed next
must be the same everywhere: a function of the configuration, an output that is replicated over the
mesh, or something that was gathered here. A process that fails by itself must not just stop: the
others would wait for it in their next collective.

With a single process nothing here communicates.
"""

import contextlib
import importlib.util
import json
import os
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_MESSAGE_BYTES = 600  # of what one process tells the others about its failure
_SMALLEST = 256  # bytes; see `_room`
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


class HostError(RuntimeError):
    """One process cannot go on, so none can; raised on all, the message says which and why."""


# ---- Starting ----------------------------------------------------------------------------------


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
    attribute: Callable[[str], str | None] | None = None,
) -> None:
    """Joins the other processes, if there are others; before anything asks for devices.

    Without arguments looks for a SLURM step, an Open MPI job or a TPU pod slice. A machine by
    itself starts nothing.

    Args:
      coordinator_address: HOST:PORT of process 0, reachable from all others.
      num_processes: of the run.
      process_id: of this process, from 0.
      environ: the environment.
      attribute: name -> an attribute of this Google Cloud VM, or None; by default the metadata
        server is asked.

    Raises:
      ValueError: the arguments or the environment do not say enough, or jax is already in use.
    """
    settings = joining(
        coordinator_address,
        num_processes,
        process_id,
        environ=environ,
        attribute=attribute or _attribute,
    )
    if settings is None:
        return
    try:
        jax.distributed.initialize(**settings)
    except RuntimeError as error:
        raise ValueError(
            f"this process could not join the others: {error}. Is process 0 running, is its "
            "address reachable from here, do --num_processes and --process_id fit, and does the "
            "experiment file leave devices alone while it is read?"
        ) from error


def joining(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    environ: Mapping[str, str],
    attribute: Callable[[str], str | None],
) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`; None where there is only this process.

    Args and errors are those of `start`.
    """
    given = {"num_processes": num_processes, "process_id": process_id}
    if coordinator_address is None:
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"--{name} is set, but --coordinator_address=HOST:PORT is not")
        return _detected(environ, attribute)
    host, _, port = coordinator_address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--coordinator_address={coordinator_address} must be HOST:PORT")
    ranks = _ranks(environ) or (None, None)
    for name, value in zip(given, ranks, strict=True):
        if given[name] is None:
            given[name] = value
        if given[name] is None:
            raise ValueError(f"--coordinator_address is set, but --{name} is not")
    count, number = given["num_processes"], given["process_id"]
    assert count is not None and number is not None
    if not 0 <= number < count:
        raise ValueError(f"--process_id={number} must be at least 0 and below {count} processes")
    return {"coordinator_address": coordinator_address, **given}


def _detected(
    environ: Mapping[str, str], attribute: Callable[[str], str | None]
) -> dict[str, Any] | None:
    """No arguments where jax finds the rest by itself."""
    ranks = _ranks(environ)
    if ranks is not None:
        by_slurm = "OMPI_COMM_WORLD_SIZE" not in environ and "SLURM_STEP_NODELIST" in environ
        if by_slurm or "OMPI_MCA_orte_hnp_uri" in environ:
            return {}
        raise ValueError(
            f"this is process {ranks[1]} of {ranks[0]}, but nothing says where process 0 is (Open "
            "MPI 5 does not); add --coordinator_address=HOST:PORT with the host of process 0"
        )
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if hosts is None and _has_tpu(environ):
        hosts = attribute("worker-network-endpoints")
    slices = int(environ.get("MEGASCALE_NUM_SLICES") or 1)
    return {} if slices > 1 or len((hosts or "").split(",")) > 1 else None


def _ranks(environ: Mapping[str, str]) -> tuple[int, int] | None:
    """(processes, this one) of an Open MPI job or a SLURM step of more than one."""
    for count, number in (
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        # The step's, not the job's: a command inside salloc or sbatch without srun is one process.
        ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ):
        if int(environ.get(count) or 1) > 1:
            return int(environ[count]), int(environ[number])
    return None


def _has_tpu(environ: Mapping[str, str]) -> bool:
    """Whether this machine has TPU chips that jax may use."""
    if "TPU_SKIP_MDS_QUERY" in environ or "tpu" not in (environ.get("JAX_PLATFORMS") or "tpu"):
        return False
    chips = os.path.exists("/dev/accel0") or os.path.isdir("/dev/vfio")
    return chips and importlib.util.find_spec("libtpu") is not None


def _attribute(name: str) -> str | None:
    request = urllib.request.Request(_METADATA + name, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, TimeoutError):
        return None  # no Google Cloud VM, or not one of a TPU


def finish() -> None:
    """Waits for the other processes at the end of a run, so that none is taken for dead."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


# ---- Who does what -----------------------------------------------------------------------------


def is_main() -> bool:
    """Whether this process writes the files and speaks to the user: it is process 0."""
    return jax.process_index() == 0


def say(text: object = "") -> None:
    """Prints on process 0."""
    if is_main():
        print(text, flush=True)


def owns(group: int) -> bool:
    """Whether this process judges the completions of the group with that number.

    Whole groups, so that rewards that compare completions have them on one host.
    """
    return group % jax.process_count() == jax.process_index()


def name() -> str:
    """This process, for messages."""
    return f"process {jax.process_index()} of {jax.process_count()} ({socket.gethostname()})"


# ---- Agreeing ----------------------------------------------------------------------------------


def gather(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of every process, each with a leading axis of processes.

    A collective. Names, shapes and dtypes must be the same on all.
    """
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    if jax.process_count() == 1:
        return {name: array[None] for name, array in arrays.items()}
    # As bytes, in one array: one collective, one compiled program for many shapes, and no dtype
    # that jax would change (float64).
    flat = b"".join(array.tobytes() for array in arrays.values())
    row = np.zeros(_room(len(flat)), np.uint8)
    row[: len(flat)] = np.frombuffer(flat, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(row))
    found, begin = {}, 0
    for name, array in arrays.items():
        part = np.ascontiguousarray(rows[:, begin : begin + array.nbytes])
        found[name] = part.view(array.dtype).reshape(len(rows), *array.shape)
        begin += array.nbytes
    return found


def _room(size: int) -> int:
    """A power of two: programs are compiled for few sizes."""
    return max(_SMALLEST, 1 << (size - 1).bit_length())


def from_main(value: Any) -> Any:
    """What process 0 gives, as JSON makes it; what others give is not looked at. A collective."""
    if jax.process_count() == 1:
        return json.loads(json.dumps(value))
    text = json.dumps(value).encode() if is_main() else b""
    size = int(gather({"size": np.array(len(text), np.int64)})["size"][0])
    row = np.zeros(_room(size), np.uint8)
    row[: len(text)] = np.frombuffer(text, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(row))[:size].tobytes())


def message_bytes(error: BaseException | None) -> np.ndarray:
    """What went wrong here, to be gathered; uint8 of a fixed size, zeros if nothing did."""
    text = "" if error is None else f"{name()}: {type(error).__name__}: {error}"
    return np.frombuffer(
        text.encode("utf-8", "replace")[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0"), np.uint8
    )


def check_messages(messages: np.ndarray, own: BaseException | None) -> None:
    """Raises if any process reports a failure.

    Args:
      messages: gathered `message_bytes`, one row a process.
      own: what went wrong here.

    Raises:
      HostError: with what each process said; by a single process, `own` itself.
    """
    if own is not None and len(messages) == 1:
        raise own
    texts = [row.tobytes().rstrip(b"\0").decode("utf-8", "replace") for row in messages]
    said = [text for text in texts if text]
    if said:
        raise HostError("; ".join(said)) from own


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What fails in the body on any process fails on all of them. Its end is a collective.

    Raises:
      HostError: the body raised on some process; by a single process, what it raised.
    """
    if jax.process_count() == 1:
        yield
        return
    failure: BaseException | None = None
    try:
        yield
    except Exception as error:
        failure = error
    check_messages(gather({"message": message_bytes(failure)})["message"], failure)


def flush() -> None:
    """Everything printed so far is out; before a process ends without unwinding."""
    sys.stdout.flush()
    sys.stderr.flush()
