"""What counts as growth in a soak."""

import pytest

from grpo.runtime.host_memory import resident_gib
from tools.soak_train import growth


def rows(held):
    return [{"memory/host_gib": gib, "engine/compiled": 5.0} for gib in held]


def test_growth_is_late_against_early():
    start, steady = [0.5, 0.9], [1.0, 1.0]
    assert growth(rows(start + steady * 4 + [1.25, 1.25]))["grown_mib"] == 256.0
    assert growth(rows(start + steady * 5))["grown_mib"] == 0.0


def test_a_late_compilation_is_seen():
    later = rows([1.0] * 12)
    later[-1]["engine/compiled"] = 6.0
    assert growth(later)["compiled"] == 1.0


def test_resident_memory_follows_what_is_held():
    before = resident_gib()
    if not before:
        pytest.skip("this system does not say what a process holds")
    held = bytearray(1 << 28)
    held[::4096] = b"x" * len(held[::4096])
    assert resident_gib()["memory/host_gib"] - before["memory/host_gib"] == pytest.approx(
        0.25, abs=0.02
    )
