"""Command line: `python -m grpo.launch --config=experiments/x.py --workdir=DIR`.

Any field of the configuration can be set: `--config.algo.group_size=16`; `python -m grpo.config`
lists them all. `--preset=dapo` puts a published algorithm (grpo/presets.py) in place of the
experiment's; fields set on the command line win over it. The same command goes on with a run that
was stopped.

Several processes run the same command, each on its own: on every worker of a TPU pod slice, by
`srun` or by `mpirun`, nothing need be said. Elsewhere `--coordinator_address=HOST:PORT` (of process
0), `--num_processes` and `--process_id` say it. All must reach the same `--workdir`.
"""

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from absl import app, flags, logging
from ml_collections import config_flags
from ml_collections.config_flags import config_path

from grpo import presets
from grpo.config import Config, unknown_field
from grpo.gates import GateError
from grpo.runtime import hosts
from grpo.runtime.host_memory import return_large_blocks
from grpo.scoring import RewardFailure

_Made = TypeVar("_Made")

# What a user can mend; anything else is a bug of ours and keeps its traceback.
EXPECTED = (
    ValueError,
    TypeError,
    OSError,
    RewardFailure,
    GateError,
    FloatingPointError,
    hosts.HostError,
)


def main(command: Callable[..., Any]) -> None:
    """Parses flags and calls `command(config, workdir, baseline=baseline)`, as `with_config` does.

    The flags also say which process of several this is.
    """
    workdir = flags.DEFINE_string(
        "workdir", None, "folder of this run, or gs://BUCKET/FOLDER", required=True
    )
    joined = define_processes()

    def run(config: Config, baseline: Config | None) -> None:
        place = workdir.value if "://" in workdir.value else Path(workdir.value)
        with joined():
            command(config, place, baseline=baseline)

    with_config(run)


def define_processes() -> Callable[[], AbstractContextManager[None]]:
    """Defines the flags that say which process of several this is; what joins the others."""
    coordinator = flags.DEFINE_string(
        "coordinator_address", None, "HOST:PORT of process 0, where nothing else tells of others"
    )
    num_processes = flags.DEFINE_integer("num_processes", None, "of this run")
    process_id = flags.DEFINE_integer("process_id", None, "of this process, from 0")

    @contextmanager
    def joined() -> Iterator[None]:
        hosts.start(coordinator.value, num_processes.value, process_id.value)
        try:
            yield
        finally:
            hosts.finish()

    return joined


def with_config(use: Callable[[Config, Config | None], None]) -> None:
    """Parses flags and calls `use(config, baseline)`.

    The baseline is the experiment, with the preset if one is named, before any field was set.
    """
    config_flag = config_flags.DEFINE_config_file("config", None, "experiment file")
    flags.FLAGS["config"].parser = experiment = _Experiment()
    flags.mark_flag_as_required("config")
    preset = flags.DEFINE_enum("preset", None, presets.names(), "algorithm of a paper")

    def parse(argv: list[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except (flags.Error, LookupError, AttributeError, TypeError, ValueError) as error:
            wrong = _unknown_field(argv, experiment.baseline) or _message(error)
            return sys.exit(
                f"error: {wrong}\n(--help and `python -m grpo.config` list the choices)"
            )

    def start(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            sys.exit(f"error: unexpected arguments {argv[1:]}; fields are set by --config.x=y")
        verbose = flags.FLAGS.verbosity > 0
        if flags.FLAGS.verbosity == 0:  # what app.run makes of the default
            logging.set_verbosity(logging.WARNING)  # libraries tell every checkpoint's details
        return_large_blocks()
        config, baseline = config_flag.value, experiment.baseline
        if preset.value is not None:
            assert baseline is not None  # --config is required
            overrides = config_flags.get_override_values(flags.FLAGS["config"])
            apply_preset(preset.value, config, baseline, overrides)
        try:
            use(config, baseline)
        except EXPECTED as error:
            if verbose:
                raise
            sys.exit(f"error: {_message(error)}\n(--verbosity=1 shows where it was raised)")

    app.run(start, flags_parser=parse)


def apply_preset(name: str, config: Config, baseline: Config, overrides: Mapping[str, Any]) -> None:
    """Changes `config` and `baseline` as the preset does; in `config` the overrides win.

    A preset that computes with numbers of the run (DAPO's buffer is a share of
    `sample.max_new_tokens`) sees those of the command line, which `config` has already.

    Args:
      name: of the preset.
      config: the experiment with its overrides.
      baseline: the experiment without.
      overrides: values by path, such as "algo.group_size".
    """
    presets.apply(config, name)
    presets.apply(baseline, name)
    for path, value in overrides.items():
        config_path.set_value(path, config, value)


class _Experiment(flags.ArgumentParser):
    """Turns the value of --config into what the file's `get_config()` returns.

    Attributes:
      baseline: the same once more, which no flag changes.
    """

    baseline: Config | None = None

    def parse(self, argument: str) -> Config:
        get_config = load_experiment(argument)
        self.baseline = get_config()
        return get_config()


def load_experiment(path: str) -> Callable[[], Config]:
    """`get_config` of the file at `path`, which did run once.

    Raises:
      ValueError: there is no such file, it cannot be run, or it gives no Config; says where.
    """
    return load(path, "get_config", Config)


def load(path: str, function: str, kind: type[_Made]) -> Callable[[], _Made]:
    """The function of that name in the Python file at `path`, which did run once.

    Raises:
      ValueError: there is no such file, it cannot be run, or it makes something else; says where.
    """
    spec = importlib.util.spec_from_file_location("grpo_experiment", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise ValueError(f"there is no Python file (looked from {Path.cwd()})")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up there
    try:
        spec.loader.exec_module(module)
        make: Callable[[], _Made] | None = getattr(module, function, None)
        made = make() if make else None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if Path(f.filename).resolve() == Path(path).resolve()]
        where = f" (line {lines[-1]})" if lines else ""
        raise ValueError(f"it raises {type(error).__name__}: {error}{where}") from error
    if make is None:
        raise ValueError(f"it defines no {function}()")
    if not isinstance(made, kind):
        wanted = f"{kind.__module__}.{kind.__name__}"
        raise ValueError(f"its {function}() must return a {wanted}, not {made!r}")
    return make


def _unknown_field(argv: Sequence[str], config: Any) -> str:
    """For the first `--config.a.b` that does not exist: the fields that its section has."""
    paths = [arg.lstrip("-").split("=", 1)[0] for arg in argv if arg.startswith("--config.")]
    for path in paths if config is not None else []:
        section = config
        for name in path.split(".")[1:]:
            known = vars(section) if hasattr(section, "__dict__") else {}
            if name not in known:
                return unknown_field(f"--{path}: {type(section).__name__}", name, list(known))
            section = known[name]
    return ""


def _message(error: BaseException) -> str:
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


if __name__ == "__main__":
    from grpo.train import train

    main(train)
