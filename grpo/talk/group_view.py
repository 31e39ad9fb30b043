"""A group of completions for one problem, with what the rewards say of each."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax

from grpo.config import RewardConfig
from grpo.data.prompts import encode_prompt
from grpo.data.sources import PromptForm
from grpo.engine.engine import Request
from grpo.launch import load_experiment
from grpo.rollout import sample_and_score, stream
from grpo.scoring import Scorer
from grpo.source import Source, config_of
from grpo.structs import Completion, Scores
from grpo.talk.speaker import Speaker
from grpo.talk.terminal import ThoughtStream, opens_thought, shown
from rewards.api import Batched, Problem, Reward
from rewards.loading import load_reward


@dataclasses.dataclass(frozen=True)
class Asking:
    """How a question is put, and who judges the answers.

    Attributes:
      form: makes messages or raw text of the question.
      rewards: (weight, reward) pairs; none: the answers are only shown.
      deadline_s: of a reward.
    """

    form: PromptForm
    rewards: tuple[tuple[float, Any], ...]  # as RewardConfig.functions
    deadline_s: float = RewardConfig.deadline_s

    def problem(self, question: str, reference: str | None) -> Problem:
        """The question as a `Problem`; a reference that is JSON is read as such."""
        return Problem("asked", reference=parse_reference(reference), **self.form.ask(question))


def parse_reference(text: str | None) -> Any:
    """What `text` says as JSON, or else the text itself."""
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        return text


def asking(source: Source, experiment: str = "", rewards: Sequence[str] = ()) -> Asking:
    """As the named rewards, else the experiment, else the run that `source` is of, have it.

    Args:
      source: of the model.
      experiment: path of an experiment file.
      rewards: `MODULE_OR_FILE:NAME`s, each of weight 1.

    Raises:
      ValueError: the experiment cannot be loaded, or a reward of the run not be found by name.
    """
    run = config_of(source.workdir) if source.workdir is not None else {}
    functions: tuple[tuple[float, Any], ...]
    if experiment:
        config = load_experiment(experiment)()
        train = config.data.train
        form = train if isinstance(train, PromptForm) else _plain_form(source)
        functions, deadline_s = config.reward.functions, config.reward.deadline_s
    elif run and not rewards:
        form = _form_of_run(source, run)
        functions = tuple((weight, _by_name(name)) for weight, name in run["reward"]["functions"])
        deadline_s = run["reward"]["deadline_s"]
    else:
        form = _form_of_run(source, run)
        functions, deadline_s = (), RewardConfig.deadline_s
    if rewards:
        functions = tuple((1.0, load_reward(name)) for name in rewards)
    return Asking(form, functions, deadline_s)


def show_group(
    speaker: Speaker,
    asked: Asking,
    problem: Problem,
    group_size: int,
    write: Callable[[str], None],
    colour: bool,
) -> None:
    """Samples a group, and shows every completion and a table of its rewards.

    Args:
      speaker: samples.
      asked: who judges.
      problem: what is asked.
      group_size: completions.
      write: shows a line.
      colour: thoughts may be dimmed.

    Raises:
      ValueError: a prompt that does not fit, or one that the model's chat template refuses.
    """
    tokenizer, prompt = speaker.tokenizer, encode_prompt(speaker.tokenizer, problem)
    sample = _judged if asked.rewards else _unjudged
    completions, scores = sample(speaker, asked, problem, group_size)
    prompt_text = tokenizer.decode(prompt, skip_special=False)
    write(f"--- prompt, {len(prompt)} tokens\n{prompt_text}")
    for completion in completions:
        text = tokenizer.decode(completion.tokens)
        thoughts = ThoughtStream(opens_thought(prompt_text))
        pieces = [*thoughts.add(text), *thoughts.end()]
        write(f"--- {completion.sample}")
        write("".join(shown(piece, colour) for piece in pieces))
    write("---")
    for line in table(completions, scores):
        write(line)


def _judged(
    speaker: Speaker, asked: Asking, problem: Problem, group_size: int
) -> tuple[list[Completion], Scores]:
    config = RewardConfig(functions=asked.rewards, workers=1, deadline_s=asked.deadline_s)
    with Scorer(config) as scorer:
        rollout, scores, _ = sample_and_score(
            speaker.engine(len(encode_prompt(speaker.tokenizer, problem))),
            scorer,
            speaker.weights,
            [problem],
            group_size,
            jax.random.key(speaker.seed),
            temperature=speaker.temperature,
            filters=speaker.filters,
        )
    return rollout.completions, scores


def _unjudged(
    speaker: Speaker, asked: Asking, problem: Problem, group_size: int
) -> tuple[list[Completion], None]:
    prompt = encode_prompt(speaker.tokenizer, problem)
    completions = speaker.engine(len(prompt)).run(
        speaker.weights,
        [Request(prompt, stream(problem), group_size)],
        jax.random.key(speaker.seed),
        temperature=speaker.temperature,
        filters=speaker.filters,
    )
    return sorted(completions, key=lambda completion: completion.sample), None


def table(completions: Sequence[Completion], scores: Scores | None) -> list[str]:
    """A line a completion: its length, how it ended, its reward and the components of it.

    A reward that failed by itself shows its status in place of a number.
    """
    rows = [["sample", "tokens", "ended by"]]
    rows += [[str(c.sample), str(len(c.tokens)), c.finish] for c in completions]
    if scores is not None:
        rows[0] += ["reward", *(f"{w:g} x {name}" for name, w in scores.weights.items())]
        for g, row in enumerate(rows[1:]):
            valid = bool(scores.valid_PG[0, g])
            row.append(f"{scores.reward_PG[0, g]:.3f}" if valid else "invalid")
            for name, value_PG in scores.components.items():
                status = scores.statuses[name][g]
                row.append(f"{value_PG[0, g]:.3f}" if status == "ok" else status)
        valid_G = scores.valid_PG[0]
        mean = scores.reward_PG[0].sum(where=valid_G) / max(int(valid_G.sum()), 1)
        rows.append(["mean", "", "", f"{mean:.3f}", *[""] * len(scores.components)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _plain_form(source: Source) -> PromptForm:
    return PromptForm(raw=source.tokenizer.chat_template is None)


def _form_of_run(source: Source, run: dict[str, Any]) -> PromptForm:
    """How the run's training problems were put, if its source says so."""
    train = run.get("data", {}).get("train") or {}
    names = [field.name for field in dataclasses.fields(PromptForm)]
    if not isinstance(train, dict) or not all(name in train for name in names):
        return _plain_form(source)
    return PromptForm(**{name: train[name] for name in names})


def _by_name(described: Any) -> Reward | Batched:
    """The reward that a run's config.json describes as "module.name"."""
    module, _, name = str(described).rpartition(".")
    try:
        if not isinstance(described, str) or not module or "<" in described:
            raise SystemExit("it is no function at the top level of a module")
        return load_reward(f"{module}:{name}")
    except SystemExit as reason:
        raise ValueError(
            f"the run's reward {described} cannot be found by its name ({reason}): name the "
            "experiment by --config=FILE, or rewards by --reward=MODULE:NAME"
        ) from None
