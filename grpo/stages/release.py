"""A model for other programs and modest machines: its files, and what it takes to run it.

    python -m grpo.stages.release --config=experiments/x.py --workdir=DIR

exports the model of `model.source` to DIR/hf (a Hugging Face folder, which `grpo.chat` talks to)
and DIR/model.gguf, and lets the first answer problems of `data.train` one after another, as a
person would ask. Size, memory and speed are printed and kept in DIR/result.json.
"""

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from grpo import runinfo
from grpo.config import Config, check_all_read, track_reads, validate
from grpo.data.prompts import encode_prompt
from grpo.export import export
from grpo.model.params import num_params
from grpo.runtime import hosts
from grpo.runtime.host_memory import resident_gib
from grpo.source import fitting_mesh, open_source
from grpo.talk.speaker import Speaker, make_speaker

_ASKED = 8  # problems that are timed, after one that is not
_GB = 10**9


def release(config: Config, workdir: str | Path, baseline: Config | None = None) -> dict[str, Any]:
    """Exports a model and measures it; files that are there are not written again.

    Args:
      config: its `model.source`, `data.train` and the prompt and completion limits.
      workdir: a folder.
      baseline: the configuration as its author left it; everything else that differs from it is
        an error.

    Returns:
      What is in result.json.

    Raises:
      ValueError: nothing to release or to ask, a field that is not used, or a model that a kind of
        file cannot hold.
    """
    validate(config, scored=False)
    track_reads(config)
    released, problems = config.model.source, config.data.train
    max_prompt, max_new = config.data.max_prompt_tokens, config.sample.max_new_tokens
    check_all_read(config, baseline or Config())
    if not released or problems is None:
        raise ValueError("model.source and data.train must say what is released, and what to ask")
    workdir = Path(workdir)
    source, folder, file = open_source(released), workdir / "hf", workdir / "model.gguf"
    for out in (folder, file):
        if not out.exists():
            export(source, out)
    written = open_source(str(folder))
    mesh = fitting_mesh(written.arch)
    with jax.set_mesh(mesh):
        speaker = make_speaker(
            written,
            mesh,
            group_size=1,
            max_prompt=max_prompt,
            max_new=max_new,
            temperature=0.0,
        )
        prompts = [
            encode_prompt(speaker.tokenizer, problems[i])
            for i in range(min(_ASKED + 1, len(problems)))
        ]
        speed = tokens_per_s(speaker, prompts)
    sizes = {path.name: path.stat().st_size for path in (*folder.glob("*.safetensors"), file)}
    facts = {
        "parameters": num_params(written.arch),
        "bytes": sizes,
        "tokens_per_s": round(speed, 1),
        **resident_gib(),
        "device": jax.devices()[0].device_kind,
        "sha256": _digest([*folder.glob("*.safetensors"), file]),
    }
    runinfo.write_result(workdir, **facts)
    listed = ", ".join(f"{name} {size / _GB:.4f} GB" for name, size in sizes.items())
    hosts.say(
        f"{facts['parameters']:,} parameters: {listed}; {facts['tokens_per_s']} tokens/s of one "
        f"answer at a time in {facts.get('memory/host_gib', 0):.2f} GiB, on {facts['device']}\n"
        f"talk to it: python -m grpo.chat {folder}"
    )
    return facts


def tokens_per_s(speaker: Speaker, prompts: Sequence[Sequence[int]]) -> float:
    """Tokens of single answers, a second; the first prompt compiles and is not counted."""
    tokens, started = 0, 0.0
    for turn, prompt in enumerate(prompts):
        if turn == min(1, len(prompts) - 1):
            tokens, started = 0, time.monotonic()
        tokens += len(speaker.say(prompt, turn, lambda _: None).tokens)
    return tokens / (time.monotonic() - started)


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


if __name__ == "__main__":
    from grpo.launch import main

    main(release)
