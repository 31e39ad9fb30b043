"""Command line: `python -m grpo.launch --config=experiments/x.py --workdir=DIR`.

Any field of the configuration can be set: `--config.algo.group_size=16`. The same command goes on
with a run that was stopped.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from grpo.config import Config, Section


def main(command: Callable[..., Any]) -> None:
    """Parses flags and calls `command(config, workdir, baseline=the experiment unchanged)`."""
    config_flag = config_flags.DEFINE_config_file("config", None, "experiment file")
    workdir = flags.DEFINE_string("workdir", None, "folder of this run")
    flags.mark_flags_as_required(["config", "workdir"])

    def start(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected arguments {argv[1:]}; fields are set by --config.x=y")
        baseline = _experiment(config_flags.get_config_filename(flags.FLAGS["config"]))
        try:
            command(config_flag.value, Path(workdir.value), baseline=baseline)
        except (ValueError, TypeError, FileNotFoundError) as error:
            if flags.FLAGS.verbosity > 0:
                raise
            sys.exit(f"error: {error}")

    app.run(start, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    """Parses flags; a field that does not exist is answered with those that do."""
    try:
        return app.parse_flags_with_usage(argv)
    except (KeyError, AttributeError) as error:
        sys.exit(f"error: {error.args[0] if error.args else error}{_choices(argv)}")


def _choices(argv: Sequence[str]) -> str:
    """For the first `--config.a.b` that does not exist: the fields of the section it would be in."""
    files = [arg.split("=", 1)[1] for arg in argv if arg.startswith("--config=")]
    paths = [arg[2:].split("=", 1)[0] for arg in argv if arg.startswith("--config.")]
    for path in paths if files else []:
        section: Any = _experiment(files[0])
        for name in path.split(".")[1:]:
            known = sorted(vars(section)) if hasattr(section, "__dict__") else []
            if name not in known:
                return f"\n--{path}: {type(section).__name__} has no field {name!r}; it has {known}"
            section = getattr(section, name)
    return ""


def _experiment(path: str) -> Config:
    """What the experiment file says, untouched."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("grpo_experiment", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    if not isinstance(config, Section):
        raise TypeError(f"get_config() of {path} must return a grpo.config.Config, not {config!r}")
    return config


if __name__ == "__main__":
    from grpo.train import train

    main(train)
