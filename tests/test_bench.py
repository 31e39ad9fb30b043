"""The bench: its limits are what plain loops count, and a whole measurement runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.model.params import num_params
from tools import bench

ROOT = Path(__file__).parents[1]
TINY = bench._arch(64, 16, 24, 2, 4, 2, 4, tied=True, theta=1e4)
WORK = bench.Work(TINY, prompts=[3, 5], completions=[[2, 4], [1, 1]], bytes_per_number=4)
SPEED = {"matmul_flops": 1e9, "read_bytes_per_s": 2e9, "copy_bytes_per_s": 1e9}
LAYERS, HEAD = num_params(TINY) - 64 * 16, 64 * 16


def test_operations_of_an_update():
    """Every token once through the layers, completion tokens through the head, every pair seen."""
    pairs = 0.0
    for prompt, lengths in zip(WORK.prompts, WORK.completions, strict=True):
        pairs += sum(place + 0.5 for place in range(prompt))  # half of its own square
        for length in lengths:
            pairs += sum(prompt + place + 0.5 for place in range(length))
    tokens, written = 3 + 5 + 8, 8
    forward = 2 * (LAYERS * tokens + HEAD * written) + 2 * 2 * 4 * 4 * 2 * pairs
    assert WORK.update_flops() == pytest.approx(3 * forward)
    optimiser_bytes = 7 * 4 * num_params(TINY)
    expected = 3 * forward / 1e9 + optimiser_bytes / 2e9
    assert WORK.update_s(SPEED) == pytest.approx(expected)


def test_time_of_a_rollout():
    """Prefill; then each step reads all weights, or multiplies longer; and all that is cached."""
    a_cached_token = 2 * 2 * 2 * 4 * 4  # keys and values, layers, heads, width, bytes
    expected = 2 * LAYERS * (3 + 5) / 1e9
    for step, live in enumerate([4, 2, 1, 1]):
        products = 2 * (LAYERS + HEAD) * live / 1e9
        expected += max(products, 4 * num_params(TINY) / 2e9)
        expected += (3 + 5 + step * live) * a_cached_token / 2e9
    assert WORK.rollout_s(SPEED) == pytest.approx(expected)


@pytest.mark.parametrize("part", ["step", "rollout"])
def test_a_measurement(part, monkeypatch):
    """A prompt for each of the tests' devices."""
    monkeypatch.setattr(bench, "machine", lambda dtype: SPEED)
    monkeypatch.setitem(bench.SHAPES, "smollm2-135m", TINY)
    sizes = ["--prompts=8", "--group=2", "--prompt_len=4", "--new=5", "--repeats=3"]
    result = bench.measure(bench.arguments([part, *sizes]))
    assert json.loads(json.dumps(result)) == result
    assert (result["tokens"], result["recompiles"], result["occupancy"]) == (80, 0, 1.0)
    assert result["matmul_gflops"] == 1.0
    assert len(result["rollout_s"]) == 3 and result["rollout_of_limit"] > 0
    assert ("update_s" in result) == (part == "step")


def test_flags_that_belong_together():
    done = subprocess.run(
        [sys.executable, "tools/bench.py", "step", "--lengths=real"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "--model and --data go together" in done.stderr
