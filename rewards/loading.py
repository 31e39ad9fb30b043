"""Rewards by name and rows from files, for the command line tools."""

import importlib
import importlib.util
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rewards.api import FACTS, Batched, Component, Facts, Problem, Reward
from rewards.pool import RewardPool


def load_reward(where: str) -> Reward | Batched:
    """What `module:name` or `path/to/file.py:name` names; looked for in this directory too.

    Raises:
      SystemExit: there is no such module or name; the message says which.
    """
    source, colon, name = where.rpartition(":")
    if not colon:
        raise SystemExit(f"{where!r} names no function; write my_module:my_reward")
    if "" not in sys.path:
        sys.path.insert(0, "")
    if source.endswith(".py"):
        module = _from_file(source)
    else:
        try:
            module = importlib.import_module(source)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{source}.".startswith(f"{error.name}."):
                raise  # one that the module itself needs
            raise SystemExit(f"there is no module {error.name!r}") from error
    reward: Reward | Batched | None = getattr(module, name, None)
    if isinstance(reward, type):
        raise SystemExit(f"{where} is a class; name one with its settings: mine = {name}(…)")
    if not isinstance(reward, Batched) and not callable(reward):
        raise SystemExit(f"{source!r} has no function {name!r}")
    return reward


def _from_file(source: str) -> Any:
    spec = importlib.util.spec_from_file_location(pathlib.Path(source).stem, source)
    if spec is None or spec.loader is None or not pathlib.Path(source).exists():
        raise SystemExit(f"{source!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


def start_pool(rewards: Sequence[str], workers: int, deadline_s: float) -> RewardPool:
    """A pool of rewards by name; what is wrong with them ends the program in one line."""
    components: list[Component] = [(1.0, load_reward(where)) for where in rewards]
    try:
        return RewardPool(components, workers=workers, deadline_s=deadline_s)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SystemExit(str(error)) from error


def read_rows(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one a line.

    Raises:
      SystemExit: no such file, or a line that is no JSON object; the message says where.
    """
    try:
        lines = path.open(encoding="utf-8")
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}") from error
    with lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise SystemExit(f"{path}:{number}: no JSON: {error}") from error
            if not isinstance(row, dict):
                raise SystemExit(f"{path}:{number}: expected a JSON object")
            yield row


def problem_of(row: Mapping[str, Any], number: int = 0) -> Problem:
    """The problem of a row: fields of the row itself, or of its `problem`, as runs store them.

    What went through JSON comes back as JSON has it: a tuple is a list here.
    """
    fields = row.get("problem") if isinstance(row.get("problem"), dict) else row
    assert fields is not None
    messages = tuple(fields.get("messages") or ())
    prompt = fields.get("prompt") or row.get("prompt") or " "
    return Problem(
        uid=str(fields.get("uid", number)),
        messages=messages,
        prompt="" if messages else prompt,
        reference=fields.get("reference"),
        gold=None if fields.get("gold") is None else str(fields["gold"]),
        meta=fields.get("meta") or {},
    )


def facts_of(row: Mapping[str, Any]) -> Facts:
    """The FACTS that a row states."""
    return {name: row[name] for name in FACTS if name in row}
