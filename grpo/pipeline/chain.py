"""What a pipeline is: stages, what each takes from earlier ones, how their models are measured."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grpo.config import Config
from grpo.pipeline.manifest import Output

StageFunction = Callable[[Config, Path, Config], Any]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step of a pipeline.

    Attributes:
      name: of the stage and its folder.
      run: (config, workdir, baseline) -> what nobody looks at; leaves a model, traces or files in
        the workdir (`grpo.pipeline.manifest.find_output`).
      config: of it.
      inputs: field, such as "model.source" or "sft.source.path" -> the stage whose output goes
        there: of a model its folder, of traces their file.
      about: a line for people.
    """

    name: str
    run: StageFunction
    config: Config
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    about: str = ""


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Stages in the order they run.

    Attributes:
      stages: each takes from earlier ones only.
      scores: how models are measured: `data.held_out`, `eval`, `reward` and what they are sampled
        with; `model.source` is filled in. None: they are not.
      columns: of the table of scores, beside pass@k, maj@k and length: title -> metric.
    """

    stages: tuple[Stage, ...]
    scores: Config | None = None
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)


def check_pipeline(pipeline: Pipeline) -> None:
    """Raises ValueError for a pipeline that cannot work; names the stage."""
    known: set[str] = set()
    for stage in pipeline.stages:
        plain = stage.name.replace("_", "").replace("-", "")
        if not (plain.isascii() and plain.isalnum()):
            raise ValueError(f"stage {stage.name!r}: a name has letters, digits, _ and - only")
        if stage.name in known:
            raise ValueError(f"there are two stages {stage.name!r}")
        for path, source in stage.inputs.items():
            if source not in known:
                raise ValueError(
                    f"stage {stage.name!r} takes {path} from {source!r}, which is no earlier "
                    f"stage; those are {sorted(known)}"
                )
            put(copy.deepcopy(stage.config), path, "", f"stage {stage.name!r}")
        known.add(stage.name)


def put(config: Config, path: str, value: Any, who: str) -> None:
    """Sets the field of `config`, or of something in it, at a path such as "sft.source.path".

    Raises:
      ValueError: there is no such field.
    """
    *outer, last = path.split(".")
    place: Any = config
    for name in outer:
        place = getattr(place, name, None)
    if place is None or not hasattr(place, last):
        raise ValueError(f"{who}: its configuration has no field {path!r} to put an input into")
    setattr(place, last, value)


def filled(stage: Stage, made: Mapping[str, Output]) -> Config:
    """The configuration of a stage, with what earlier ones made put where it says."""
    config = copy.deepcopy(stage.config)
    for path, source in stage.inputs.items():
        put(config, path, str(made[source].path), f"stage {stage.name!r}")
    return config
