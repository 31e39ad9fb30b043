"""The README.md of an exported model: where it comes from, what was done to it, what it scores."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo.model.arch import Arch
from grpo.model.params import num_params
from grpo.report import first_and_last_eval, read_metrics
from grpo.source import Source


def model_card(source: Source, *, dtype: str, params_sha256: str) -> str:
    """Markdown, with the front matter that Hugging Face reads.

    Args:
      source: what was exported.
      dtype: of the exported weights.
      params_sha256: `grpo.checkpoint.params_sha256` of the float32 parameters.
    """
    licence = _licence(source.files)
    lines = ["---", "library_name: transformers", "tags: [grpo, reinforcement-learning, jax]"]
    if licence:
        lines.append(f"license: {json.dumps(licence)}")
    lines += ["---", "", *_introduction(source), "", "## Model", "", *_facts(source.arch, dtype)]
    lines.append(f"- `params_sha256` (float32, as trained): `{params_sha256}`")
    if source.workdir is not None:
        lines += ["", "## Held-out scores", "", *_scores(source.workdir, source.step)]
        lines += ["", "## Configuration", "", *_configuration(source.workdir)]
    lines += ["", "## Licence", "", _licence_note(source, licence)]
    return "\n".join(lines) + "\n"


def _introduction(source: Source) -> list[str]:
    began = "random weights" if source.files is None else f"`{source.files.name}`"
    if source.workdir is None:
        return [f"# {_title(source)}", "", f"Converted from {began}, not trained further."]
    config = _json(source.workdir / "config.json")
    of = f" of {config['num_steps']}" if "num_steps" in config else ""
    return [
        f"# {_title(source)}",
        "",
        f"Trained from {began} by group-relative policy optimisation with verifiable rewards "
        f"(GRPO, arXiv:2402.03300): {source.step} steps{of}.",
    ]


def _title(source: Source) -> str:
    if source.workdir is not None:
        return source.workdir.resolve().name
    return source.files.stem if source.files is not None else "model"


def _facts(arch: Arch, dtype: str) -> list[str]:
    return [
        f"- {num_params(arch):,} parameters, {dtype}",
        f"- {arch.num_layers} layers of width {arch.width}, {arch.num_heads} query and "
        f"{arch.num_kv_heads} key/value heads, vocabulary {arch.vocab_size:,}",
    ]


def _scores(workdir: Path, step: int) -> list[str]:
    """The evaluations during the run, and the last one of `grpo.evaluate`."""
    path = workdir / "metrics.jsonl"
    series = read_metrics(path) if path.is_file() else {}
    upto = {
        name: (steps[steps <= step], values[steps <= step])
        for name, (steps, values) in series.items()
        if name.startswith("eval/") and (steps <= step).any()
    }
    first, last = first_and_last_eval(upto)
    columns = [("before training", first), ("last evaluation of the run", last)]
    alone = _json(workdir / "evaluation.json")
    if alone.get("step") == step:
        columns.append(("`grpo.evaluate` of this checkpoint", alone))
    columns = [(title, metrics) for title, metrics in columns if metrics]
    if not columns:
        return ["The run was not evaluated on held-out problems."]
    names = sorted({name for _, metrics in columns for name in metrics if _is_score(name)})
    return [
        "| | " + " | ".join(title for title, _ in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
        *(
            f"| {name.removeprefix('eval/')} | "
            + " | ".join(_interval(metrics, name) for _, metrics in columns)
            + " |"
            for name in names
        ),
        "",
        "In brackets: 95 % bootstrap intervals over the problems.",
    ]


def _is_score(name: str) -> bool:
    kept = (
        "eval/pass_at_",
        "eval/maj_at_",
        "eval/full/",
        "eval/problems",
        "eval/length_tokens_mean",
    )
    return name.startswith(kept) and not name.endswith(("_low", "_high"))


def _interval(metrics: Mapping[str, float], name: str) -> str:
    if name not in metrics:
        return ""
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    value = f"{metrics[name]:.4g}"
    return value if low is None or high is None else f"{value} [{low:.3g}, {high:.3g}]"


def _configuration(workdir: Path) -> list[str]:
    environment = _json(workdir / "environment.json")
    packages = ", ".join(f"{n} {v}" for n, v in environment.get("packages", {}).items())
    lines = ["```json", json.dumps(_json(workdir / "config.json"), indent=2), "```"]
    if packages:
        lines += ["", f"Code at commit {environment.get('commit', 'unknown')}; {packages}."]
    return lines


def _licence(files: Path | None) -> str | None:
    """What the base model says of its licence."""
    if files is None:
        return None
    if files.is_file():
        from gguf import GGUFReader

        field = GGUFReader(files).fields.get("general.license")
        return None if field is None else str(field.contents())
    card = files / "README.md"
    if not card.is_file():
        return None
    head = card.read_text(encoding="utf-8", errors="replace").split("---")
    for line in head[1].splitlines() if len(head) > 2 and not head[0].strip() else []:
        name, _, value = line.partition(":")
        if name.strip() == "license" and value.strip():
            return value.strip().strip("'\"")
    return None


def _licence_note(source: Source, licence: str | None) -> str:
    if source.files is None:
        return "Trained from random weights: no base model's licence applies."
    name = f"`{source.files.name}`"
    if licence is None:
        return (
            f"These weights derive from {name}, which states no licence where it was read: its "
            "licence applies to them; look it up before you pass them on."
        )
    return f"These weights derive from {name}, whose licence, {licence}, applies to them."


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
