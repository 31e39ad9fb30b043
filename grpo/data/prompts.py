"""The one way from a problem to the token ids the model is given."""

import datetime
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from grpo.data.sources import ProblemSource
from grpo.data.tokenizer import Tokenizer
from rewards.api import Problem


def encode_prompt(tokenizer: Tokenizer, problem: Problem) -> list[int]:
    """Prompt ids of `problem`, for sampling, training and evaluation alike.

    Messages go through the tokenizer's chat template, up to where the model begins to speak; a raw
    prompt is encoded as it stands. A model that expects a BOS gets exactly one, whether or not its
    template writes it. Nothing is put after the prompt.

    Raises:
      ValueError: messages without a chat template, a template that refuses the messages or closes
        the model's turn, or a prompt of no tokens.
    """
    text = render_chat(tokenizer, problem) if problem.messages else problem.prompt
    ids = tokenizer.encode(text)
    if tokenizer.adds_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids = [tokenizer.bos_id, *ids]
    if not ids:
        raise ValueError(f"the prompt of problem {problem.uid!r} has no tokens")
    if problem.messages and ids[-1] == tokenizer.eos_ids[0]:
        raise ValueError(
            f"the chat template ends the prompt of problem {problem.uid!r} with the stop token, "
            "so the model would answer after its own end; it seems to ignore add_generation_prompt"
        )
    return ids


def render_chat(tokenizer: Tokenizer, problem: Problem) -> str:
    """The text of a problem's messages, with the opening of the model's turn."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"problem {problem.uid!r} has messages but this tokenizer has no chat template: use an "
            "instruction-tuned model, add chat_template.jinja to the model's folder, or ask by raw "
            "prompt (raw=True on the problem source)"
        )
    try:
        return _compile(tokenizer.chat_template).render(
            messages=[dict(message) for message in problem.messages],
            add_generation_prompt=True,
            tools=None,
            documents=None,
            **tokenizer.template_variables,
        )
    except jinja2.TemplateError as error:
        raise ValueError(
            f"the chat template refused the messages of problem {problem.uid!r}: {error}"
        ) from error


def fits(prompt_ids: Sequence[int], max_prompt_tokens: int) -> bool:
    """Whether a prompt goes into the prompt slots as it is; it is never truncated."""
    return len(prompt_ids) <= max_prompt_tokens


def usable_indices(
    tokenizer: Tokenizer,
    source: ProblemSource,
    max_prompt_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Sequence[int], int]:
    """Which problems of `source` have prompts that fit, and how many do not.

    The one policy for long prompts: they are dropped here, before the first step, and counted.
    Every row is encoded, so the data order stays a pure function of (seed, step) over the result.

    Args:
      tokenizer: of the model to be trained.
      source: the problems.
      max_prompt_tokens: prompt slots.
      progress: called with (rows done, rows in all) every 10,000 rows.

    Returns:
      The indices in rising order (a `range` if nothing was dropped) and the number dropped.

    Raises:
      ValueError: an empty source, or one of which nothing fits.
    """
    total = len(source)
    if total == 0:
        raise ValueError("the problem source is empty")
    kept, shortest = [], None
    for i in range(total):
        ids = encode_prompt(tokenizer, source[i])
        shortest = len(ids) if shortest is None else min(shortest, len(ids))
        if fits(ids, max_prompt_tokens):
            kept.append(i)
        if progress and (i + 1) % 10_000 == 0:
            progress(i + 1, total)
    if not kept:
        raise ValueError(
            f"all {total} prompts are longer than max_prompt_tokens={max_prompt_tokens}; "
            f"the shortest has {shortest} tokens"
        )
    dropped = total - len(kept)
    return (kept if dropped else range(total)), dropped


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    """Compiles a chat template in the dialect that published models write theirs in."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


class _Generation(jinja2.ext.Extension):
    """Accepts {% generation %}...{% endgeneration %} marks around model turns, as plain text."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it, and reads it from the class

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """In place of Jinja's, which escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    """A fixed day: prompts must be the same when a run resumes tomorrow.

    It is the one Llama 3 templates fall back on.
    """
    return datetime.datetime(2024, 7, 26).strftime(pattern)
