"""The architecture, as a test: imports point down, and no name hides the standard library's."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("grpo", "rewards", "experiments", "tools")

# What the lower modules may know of `grpo`, by the start of the name. Everything else may import
# anything, as long as no circle closes.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "grpo.structs": (),
    "grpo.advantage": ("grpo.structs",),
    "grpo.curriculum": (),
    "grpo.divergence": (),
    "grpo.measure.estimators": (),
    "grpo.fetch": (),
    "grpo.loss": ("grpo.structs",),
    "grpo.config": (
        "grpo.advantage",
        "grpo.data.sources",
        "grpo.divergence",
        "grpo.loss",
        "grpo.model.arch",
    ),
    "grpo.presets": ("grpo.advantage", "grpo.config", "grpo.loss"),
    "grpo.sharding": ("grpo.model.params",),
    "grpo.batch": ("grpo.sharding", "grpo.structs"),
    "grpo.runtime.host_memory": (),
    "grpo.groups": ("grpo.advantage", "grpo.structs"),
    "grpo.schedule": ("grpo.batch", "grpo.config"),
    "grpo.runtime.hosts": (),
    "grpo.runtime.watchdog": ("grpo.runtime.hosts",),
    "grpo.runtime.workdir": ("grpo.runtime.hosts",),
    "grpo.runtime.signals": ("grpo.runtime.hosts",),
    "grpo.metrics": ("grpo.runtime.hosts",),
    "grpo.data": ("grpo.data",),
    "grpo.model": ("grpo.model", "grpo.sharding", "grpo.structs"),
    "grpo.engine.sampling": ("grpo.sharding",),
    "grpo.engine": (
        "grpo.engine",
        "grpo.model",
        "grpo.sharding",
        "grpo.structs",
        "grpo.data.tokenizer",
    ),
    "grpo.stages.selection": (),
    "grpo.planning.chips": (),
    "grpo.planning.hlo": (),
    "grpo.planning.formulas": ("grpo.batch", "grpo.model.arch", "grpo.planning.chips"),
    "rewards": (),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path for folder in OURS for path in sorted((ROOT / folder).rglob("*.py"))
}


def imported_by(path: Path) -> Iterator[str]:
    """Every module the file imports, anywhere in it; `from a import b` is a.b if that is one."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module


def under(name: str, parents: tuple[str, ...]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


@pytest.mark.parametrize("module", sorted(MAY_IMPORT))
def test_lower_modules_import_only_what_is_below_them(module):
    files = [name for name in MODULES if under(name, (module,))]
    assert files, f"{module} is gone: take it out of MAY_IMPORT"
    for name in files:
        for imported in imported_by(MODULES[name]):
            if under(imported, ("grpo",)):
                assert under(imported, MAY_IMPORT[module]), f"{name} may not import {imported}"


def test_imports_close_no_circle():
    graph = {
        name: {imported for imported in imported_by(path) if imported in MODULES} - {name}
        for name, path in MODULES.items()
    }
    assert list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("top", ["experiments", "tools"])
def test_experiments_and_tools_are_imported_by_nobody(top):
    for name, path in MODULES.items():
        if not under(name, (top,)):
            for imported in imported_by(path):
                assert not under(imported, (top,)), f"{name} may not import {imported}"


def test_rewards_load_neither_jax_nor_grpo():
    """Looked at in a fresh process, so that what an import drags in counts as well."""
    names = [name for name in MODULES if under(name, ("rewards",))]
    program = (
        f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
        "print(sorted({m.partition('.')[0] for m in sys.modules} & {'jax', 'flax', 'grpo'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_no_module_hides_one_of_the_standard_library():
    for name, path in MODULES.items():
        assert path.stem == "__init__" or path.stem not in sys.stdlib_module_names, name
        assert under(name, OURS)
