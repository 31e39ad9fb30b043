"""A chain of stages as one command, such as the one that made DeepSeek-R1.

    python -m grpo.pipeline --config=experiments/r1_tiny.py --workdir=DIR

A pipeline is a Python file whose `get_pipeline()` returns a `Pipeline`: a list of stages, each a
function that also runs alone (`grpo.train`, `grpo.stages`), a configuration, and which of its
fields are filled in with what earlier stages made. Every stage has its folder, DIR/NAME.
DIR/manifest.json says what each was made from; a finished stage is not run again unless it, or
something it depends on, has changed. The same command goes on where it was stopped, inside a stage
from its checkpoints. After each stage that makes a model, it is measured on the same held-out
problems: DIR/scores.md and DIR/scores.png.

  --dry_run          says what would run, why, and what it costs; runs nothing
  --topology=v5e:8x8 only with it: the hours it would take there
  --stages=a,b       only these; what they depend on must be there
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags

from grpo import command
from grpo.launch import EXPECTED, define_processes, load
from grpo.model.arch import Arch
from grpo.pipeline.chain import Pipeline, check_pipeline
from grpo.pipeline.costs import expected_cost
from grpo.pipeline.manifest import Manifest, Output
from grpo.pipeline.run import check_names, look, run_pipeline
from grpo.planning.chips import Topology, parse_topology
from grpo.planning.lower import use_no_device
from grpo.planning.shapes import find_arch
from grpo.runtime.host_memory import return_large_blocks


def plan_lines(
    pipeline: Pipeline,
    workdir: Path,
    topology: Topology | None = None,
    only: Sequence[str] = (),
) -> Iterator[str]:
    """What `run_pipeline` would do, a few lines a stage.

    Args:
      pipeline: the stages.
      workdir: the pipeline's folder.
      topology: the machine whose hours are told; None: none are.
      only: as for `run_pipeline`.

    Raises:
      ValueError: where `run_pipeline` would.
    """
    check_pipeline(pipeline)
    check_names(pipeline, only)
    manifest, made = Manifest(workdir / "manifest.json"), dict[str, Output]()
    archs: dict[str, Arch] = {}  # of the stages that will be there
    for number, stage in enumerate(pipeline.stages, start=1):
        state, title = look(stage, workdir, manifest, made), f"{number:2d}. {stage.name}"
        if state.finished is not None:
            made[stage.name] = state.finished
            yield f"{title}: finished"
        elif only and stage.name not in only:
            yield f"{title}: left out; it {state.why}"
            continue
        elif missing := sorted(set(stage.inputs.values()) - archs.keys()):
            raise ValueError(
                f"stage {stage.name!r} takes from {', '.join(missing)}, to be run first"
            )
        else:
            yield f"{title}: runs: {state.why}"
        if stage.about:
            yield f"      {stage.about}"
        for path, source in sorted(stage.inputs.items()):
            yield f"      {path} from {source}"
        source = stage.inputs.get("model.source", "")
        archs[stage.name] = arch = archs[source] if source else find_arch(stage.config.model)
        yield f"      {expected_cost(stage.run, stage.config, arch, topology)}"
        if "seconds" in (entry := manifest.entry(stage.name)):
            yield f"      took {entry['seconds']:,.0f} s when it last ran"


def main() -> None:
    """Command line; see the module's docstring."""
    path = flags.DEFINE_string("config", None, "file with get_pipeline()", required=True)
    workdir = flags.DEFINE_string("workdir", None, "folder of the pipeline", required=True)
    stages = flags.DEFINE_list("stages", [], "only these, by name")
    dry_run = flags.DEFINE_bool("dry_run", False, "say what would run, and run nothing")
    topology = flags.DEFINE_string(
        "topology", "", "with --dry_run: the machine whose hours are wanted, as grpo.plan knows it"
    )
    joined = define_processes()

    def start() -> None:
        if topology.value and not dry_run.value:
            raise ValueError(
                f"--topology={topology.value} is for a --dry_run, which tells the hours it would "
                "take there: add --dry_run, or leave --topology out"
            )
        try:
            pipeline = load(path.value, "get_pipeline", Pipeline)()
        except ValueError as error:
            raise ValueError(f"--config={path.value}: {error}") from error
        if dry_run.value:
            machine = parse_topology(topology.value) if topology.value else None
            if machine is not None:
                use_no_device(machine, stand_ins=True)
            for line in plan_lines(pipeline, Path(workdir.value), machine, stages.value):
                print(line, flush=True)
            return
        return_large_blocks()
        with joined():
            run_pipeline(pipeline, workdir.value, stages.value)

    usage = (
        "usage: python -m grpo.pipeline --config=FILE --workdir=DIR [--stages=A,B] "
        "[--dry_run [--topology=v5e:8x8]]"
    )
    command.run(start, usage=usage, expected=EXPECTED)


if __name__ == "__main__":
    main()
