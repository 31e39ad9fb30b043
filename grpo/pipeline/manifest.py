"""What the stages of a pipeline were made from, and what they made.

A stage is known by its key: a hash of what it runs, of its configuration as the pipeline's file
writes it, and of the outputs of the stages it takes something from. A finished stage whose key is
still the same is not run again; one whose key has changed is, and so is what depends on it. The
code's own version is recorded, but not part of the key: a commit does not throw away a week's work.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from grpo.config import Config, describe
from grpo.runinfo import write_json

_OURS = ("grpo", "rewards")  # whose versions the manifest records; users' code is part of the key
TRACES = "traces.jsonl"


@dataclasses.dataclass(frozen=True)
class Output:
    """What a stage has made.

    Attributes:
      kind: "model", whose `path` is the workdir of a run; "traces", worked problems in a file; or
        "files", which no stage takes.
      path: of it.
      sha256: of the parameters, or of the bytes.
    """

    kind: str
    path: Path
    sha256: str


def find_output(folder: Path) -> Output | None:
    """What a finished stage left in its folder; None if it has left nothing."""
    traces = folder / TRACES
    if traces.is_file():
        return Output("traces", traces, hash_file(traces))
    result = read_json(folder / "result.json")
    if "params_sha256" in result:
        return Output("model", folder, result["params_sha256"])
    if "sha256" in result:
        return Output("files", folder, result["sha256"])
    return None


def stage_key(run: Any, config: Config, inputs: Mapping[str, str]) -> str:
    """Hex digest that a stage is known by.

    Args:
      run: the function of the stage.
      config: as the pipeline's file writes it, before inputs are put into it.
      inputs: path in the configuration -> digest of what is put there.
    """
    known = {
        "run": describe(run),
        "config": describe(config),
        "code": sorted(set(own_code(config))),
        "inputs": dict(inputs),
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def own_code(value: Any) -> Iterator[str]:
    """Sources of the functions and classes in a configuration that come from outside this package.

    A reward that a user changes makes another run, though its name stays.
    """
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for item in value:
            yield from own_code(item)
        return
    if isinstance(value, functools.partial):
        yield from own_code((value.func, *value.args, value.keywords))
        return
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # As it is stored: a section counts the fields that are read.
        state = object.__getattribute__(value, "__dict__")
        yield from own_code([state.get(field.name) for field in dataclasses.fields(value)])
        value = type(value)
    module = getattr(value, "__module__", None)
    if module is None or module.partition(".")[0] in _OURS or not callable(value):
        return
    try:
        yield inspect.getsource(value if inspect.isroutine(value) else _class_of(value))
    except (OSError, TypeError):  # written in C, or at a prompt: its name has to do
        return


def _class_of(value: Any) -> type:
    return value if isinstance(value, type) else type(value)


class Manifest:
    """`manifest.json` of a pipeline's folder: an entry a finished stage, in the order they ended.

    Written whole and in one step; processes other than the first only read.

    Args:
      path: of the file.
    """

    def __init__(self, path: Path):
        self._path = path
        self._entries: dict[str, dict[str, Any]] = read_json(path).get("stages", {})

    def entry(self, name: str) -> dict[str, Any]:
        """What is known of a stage; empty if it has not finished yet."""
        return self._entries.get(name, {})

    def note(self, name: str, **facts: Any) -> None:
        """Adds facts to a stage's entry and writes the file."""
        self._entries[name] = {**self.entry(name), **facts}
        write_json(self._path, {"stages": self._entries})

    def forget(self, name: str) -> None:
        """Takes a stage out: it is about to run again."""
        if self._entries.pop(name, None) is not None:
            write_json(self._path, {"stages": self._entries})

    def lineage(self, name: str) -> list[str]:
        """Lines that say what a stage was made from, indented, down to the first ones.

        What was told already is only named again.
        """
        return list(self._lines(name, "", set()))

    def _lines(self, name: str, indent: str, told: set[str]) -> Iterator[str]:
        entry = self.entry(name)
        output = entry.get("output", {})
        digest = output.get("sha256", "?")[:12]
        if name in told:
            yield f"{indent}{name} ({digest}), see above"
            return
        told.add(name)
        code = entry.get("commit", "unknown")[:12]
        yield (
            f"{indent}{name}: {output.get('kind', 'nothing yet')} {digest} by {entry.get('run')}, "
            f"key {entry.get('key', '?')[:12]}, code {code}"
        )
        for path, source in sorted(entry.get("inputs", {}).items()):
            yield f"{indent}  {path} from"
            yield from self._lines(source["stage"], indent + "    ", told)


def hash_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is no file.

    Raises:
      ValueError: the file holds something else.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); remove it to begin anew") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object; remove it to begin anew")
    return value
