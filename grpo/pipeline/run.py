"""Running the stages of a pipeline, each once, and measuring what they make."""

import contextlib
import copy
import dataclasses
import datetime
import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from grpo import runinfo
from grpo.config import Config, describe
from grpo.evaluate import evaluate
from grpo.pipeline.chain import Pipeline, Stage, check_pipeline, filled, put
from grpo.pipeline.manifest import Manifest, Output, find_output, read_json, stage_key
from grpo.pipeline.scores import Row, draw_scores, scores_console, scores_markdown
from grpo.runtime import hosts
from grpo.runtime.host_memory import return_free_pages


def run_pipeline(
    pipeline: Pipeline, workdir: str | Path, only: Sequence[str] = ()
) -> dict[str, Output]:
    """Runs what has not been run; returns what each stage made.

    Args:
      pipeline: the stages.
      workdir: a folder that all processes reach.
      only: names of stages; the others are left as they are. Empty: all.

    Raises:
      ValueError: the pipeline cannot work, or a stage that is needed has not been run.
      Exception: what a stage raises; everything before it stays finished.
    """
    check_pipeline(pipeline)
    check_names(pipeline, only)
    if "://" in str(workdir):
        raise ValueError(f"--workdir={workdir}: a pipeline needs a folder that all processes reach")
    with _keeping_programs(Path(workdir)):
        return _run_stages(pipeline, Path(workdir), only)


def _run_stages(pipeline: Pipeline, workdir: Path, only: Sequence[str]) -> dict[str, Output]:
    manifest, made = Manifest(workdir / "manifest.json"), dict[str, Output]()
    for number, stage in enumerate(pipeline.stages, start=1):
        standing = _agreed(look(stage, workdir, manifest, made))
        output, title = standing.finished, f"stage {number} of {len(pipeline.stages)}, {stage.name}"
        if output is not None:
            hosts.say(f"{title}: finished already")
        elif only and stage.name not in only:
            hosts.say(f"{title}: left out; it {standing.why}")
            continue
        elif not standing.key:
            raise ValueError(f"stage {stage.name!r} {standing.why}")
        else:
            hosts.say(f"\n{'=' * 100}\n{title}: {stage.about or describe(stage.run)}")
            output = _run_stage(stage, workdir, manifest, made, standing.key)
        made[stage.name] = output
        if pipeline.scores is not None and output.kind == "model":
            _measure(stage, pipeline.scores, workdir, manifest, output)
            _report(pipeline, workdir, manifest, made)
    if hosts.is_main() and pipeline.stages[-1].name in made:
        lines = manifest.lineage(pipeline.stages[-1].name)
        (workdir / "lineage.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print("\nlineage (also in lineage.txt):\n" + "\n".join(lines), flush=True)
    return made


def check_names(pipeline: Pipeline, only: Sequence[str]) -> None:
    """Raises ValueError if one of the names is no stage's."""
    names = [stage.name for stage in pipeline.stages]
    for name in only:
        if name not in names:
            raise ValueError(f"--stages: there is no stage {name!r}; there are {', '.join(names)}")


@dataclasses.dataclass
class Standing:
    """Where a stage stands.

    Attributes:
      key: of it now; "" if what it takes is not there.
      finished: what it made, if that is still what it would make.
      why: it is not finished.
    """

    key: str = ""
    finished: Output | None = None
    why: str = ""


def _agreed(standing: Standing) -> Standing:
    """What process 0 found: it alone writes what the others would look at. A collective."""
    done = _output_agreed(standing.finished)
    key, why = hosts.from_main([standing.key, standing.why])
    return Standing(key, done, why)


def _output_agreed(output: Output | None) -> Output | None:
    told = hosts.from_main(output and [output.kind, str(output.path), output.sha256])
    return told and Output(told[0], Path(told[1]), told[2])


def look(stage: Stage, workdir: Path, manifest: Manifest, made: Mapping[str, Output]) -> Standing:
    """Where a stage stands, given what those before it have made."""
    missing = sorted({source for source in stage.inputs.values() if source not in made})
    if missing:
        return Standing(why=f"takes from {', '.join(missing)}, to be run first")
    inputs = {path: made[source].sha256 for path, source in stage.inputs.items()}
    state, entry = Standing(stage_key(stage.run, stage.config, inputs)), manifest.entry(stage.name)
    output = find_output(workdir / stage.name)
    if not entry:
        begun = read_json(workdir / stage.name / "stage.json").get("key") == state.key
        state.why = "was stopped half-way" if begun else "was not run yet"
    elif entry["key"] != state.key:
        old = {path: source["sha256"] for path, source in entry["inputs"].items()}
        changed = sorted({stage.inputs.get(p, p) for p in old if old[p] != inputs.get(p)})
        what = f"what {', '.join(changed)} made" if changed else "its configuration or code"
        state.why = f"{what} has changed"
    elif output is None or output.sha256 != entry["output"]["sha256"]:
        state.why = "its files are no longer what it made"
    else:
        state.finished = output
    return state


def _run_stage(
    stage: Stage, workdir: Path, manifest: Manifest, made: Mapping[str, Output], key: str
) -> Output:
    folder = workdir / stage.name
    started, spent = time.time(), 0.0
    if hosts.is_main():
        manifest.forget(stage.name)
        spent = _take_over(folder, key, workdir)
        begun = {"key": key, "started": started, "spent_s": spent}
        runinfo.write_json(folder / "stage.json", begun)
    hosts.from_main(0)  # nobody begins before the folder is there
    config = filled(stage, made)
    stage.run(config, folder, config)
    output = _output_agreed(find_output(folder))
    if output is None:
        raise ValueError(f"stage {stage.name!r} left neither a model nor traces in {folder}")
    if hosts.is_main():
        manifest.note(
            stage.name,
            key=key,
            run=describe(stage.run),
            inputs={
                path: {"stage": source, "sha256": made[source].sha256}
                for path, source in stage.inputs.items()
            },
            output={"kind": output.kind, "sha256": output.sha256},
            commit=runinfo.commit(),
            seconds=round(spent + time.time() - started, 1),
            finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
    _forget_programs()
    return output


def _take_over(folder: Path, key: str, workdir: Path) -> float:
    """Makes a stage's folder its own; seconds spent in it before, if it was begun like this.

    What another configuration left is kept, in DIR/replaced.
    """
    begun = read_json(folder / "stage.json")
    if begun.get("key") == key:
        last = max(file.stat().st_mtime for file in folder.rglob("*") if file.is_file())
        return float(begun["spent_s"] + max(0.0, last - begun["started"]))
    if folder.exists():
        replaced = workdir / "replaced"
        replaced.mkdir(exist_ok=True)
        kept = (replaced / f"{folder.name}.{number}" for number in itertools.count(1))
        os.rename(folder, next(path for path in kept if not path.exists()))
        print(f"what {folder} held was made otherwise; it is in {replaced} now", flush=True)
    return 0.0


# ---- Scores ------------------------------------------------------------------------------------


def _measure(
    stage: Stage, scores: Config, workdir: Path, manifest: Manifest, output: Output
) -> None:
    """Evaluates what a stage made, unless that was done."""
    key = stage_key(evaluate, scores, {"model.source": output.sha256})
    if hosts.from_main(manifest.entry(stage.name).get("scores", {}).get("key")) == key:
        return
    config = copy.deepcopy(scores)
    put(config, "model.source", str(output.path), "scores")
    started = time.time()
    metrics = evaluate(config, workdir / stage.name / "scores", config)
    _forget_programs()
    if hosts.is_main():
        seconds = round(time.time() - started, 1)
        manifest.note(stage.name, scores={"key": key, "metrics": metrics, "seconds": seconds})


def _report(
    pipeline: Pipeline, workdir: Path, manifest: Manifest, made: Mapping[str, Output]
) -> None:
    """The table and the picture of the scores so far; what is to be made again is left out."""
    if not hosts.is_main():
        return
    rows = [
        Row(stage.name, stage.about, entry["scores"]["metrics"], entry["seconds"])
        for stage in pipeline.stages
        if stage.name in made and "scores" in (entry := manifest.entry(stage.name))
    ]
    (workdir / "scores.md").write_text(scores_markdown(rows, pipeline.columns), encoding="utf-8")
    draw_scores(rows, pipeline.columns, workdir / "scores.png")
    print("\n" + scores_console(rows, pipeline.columns), flush=True)


# ---- Programs ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _keeping_programs(workdir: Path) -> Iterator[None]:
    """Stages of one shape compile once: what was compiled is kept, on a CPU beside the stages.

    (Elsewhere `grpo.build.start` keeps it.)
    """
    name = "jax_compilation_cache_dir"
    before = getattr(jax.config, name)
    if before is not None or jax.default_backend() != "cpu":
        yield
        return
    jax.config.update(name, str((workdir / "programs").absolute()))
    compilation_cache.reset_cache()  # it looks at the setting only once
    try:
        yield
    finally:
        jax.config.update(name, before)
        compilation_cache.reset_cache()


def _forget_programs() -> None:
    """The next stage has others; and what the last one held is given back."""
    jax.clear_caches()
    return_free_pages()
