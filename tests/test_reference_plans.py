"""The table of plans in README.md, made again; minutes for each run where a compiler made it."""

import importlib.util
import re
from pathlib import Path

import pytest

from tools.reference_plans import HEAD, REFERENCE, plan, row

README = (Path(__file__).parent.parent / "README.md").read_text()
TOLERANCE = 0.05  # of every number: another version of the compiler allots a little differently


def committed(experiment: str, topology: str) -> list[str]:
    """The cells of a run's line."""
    for line in README.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[:2] == [f"`{experiment}`", topology]:
            return cells
    return []


def numbers(cells: list[str]) -> list[float]:
    return [float(n.replace(",", "")) for cell in cells for n in re.findall(r"[\d,]*\.?\d+", cell)]


@pytest.mark.parametrize("experiment, topology", [r[:2] for r in REFERENCE])
def test_every_reference_run_is_in_the_table(experiment, topology):
    cells = committed(experiment, topology)
    assert len(cells) == len(HEAD), f"README.md has no plan of {experiment} on {topology}"


@pytest.mark.slow
@pytest.mark.parametrize("experiment, topology, settings", REFERENCE)
def test_the_table_is_made_again(experiment, topology, settings):
    kept = committed(experiment, topology)
    by_formula = kept[5] == "formula"
    if not by_formula and importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs the TPU compiler: grpo[plan]")
    made = row(experiment, plan(experiment, topology, [*settings, *["--nocompile"] * by_formula]))
    assert numbers(made[2:]) == pytest.approx(numbers(kept[2:]), rel=TOLERANCE), made
    assert made[4:6] == kept[4:6] and made[9] == kept[9]
