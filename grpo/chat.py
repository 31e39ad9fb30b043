"""Chat: talk to a model in the terminal, or see a group of its completions judged.

    python -m grpo.chat MODEL_OR_WORKDIR

answers what you type, as it comes, thoughts dimmed. MODEL_OR_WORKDIR is a Hugging Face folder, a
.gguf file, a name that `python -m grpo.fetch` knows, or the workdir of a run. A model without a
chat template goes on behind each line. `/reset` forgets the conversation, `/system TEXT` begins
another one, `/exit` or Ctrl-D ends; Ctrl-C cuts an answer short.

    python -m grpo.chat WORKDIR --problem="What is 2+3?" --reference=5 --group_size=8

samples a group for one problem and prints every completion with its rewards: those of the run, of
an experiment (--config), or named (--reward=rewards.answers:last_number).
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence

import jax
from absl import flags

from grpo import command
from grpo.data.tokenizer import Tokenizer
from grpo.source import fitting_mesh, open_source
from grpo.talk.group_view import asking, show_group
from grpo.talk.speaker import Conversation, Speaker, make_filters, make_speaker
from grpo.talk.terminal import TextStream, ThoughtStream, opens_thought, shown

_USAGE = 'usage: python -m grpo.chat MODEL_OR_WORKDIR [--problem="What is 2+3?" --reference=5]'


def talk(
    speaker: Speaker,
    conversation: Conversation,
    read: Callable[[], str],
    write: Callable[[str], None],
    colour: bool,
) -> None:
    """Asks and answers until `read` raises EOFError.

    Args:
      speaker: who answers.
      conversation: what was said before, and what is added.
      read: the next line of the user.
      write: shows text at once.
      colour: thoughts may be dimmed.
    """
    turn = 0
    while True:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        name, _, rest = line.partition(" ")
        if not line:
            continue
        if name == "/exit":
            return
        if name == "/reset":
            conversation.turns.clear()
            continue
        if name == "/system":
            conversation.turns.clear()
            conversation.system = rest.strip() or None
            continue
        try:
            prompt, forgotten = conversation.ask(line)
        except ValueError as error:
            write(f"({error})\n")
            continue
        if forgotten:
            write(f"(the oldest {forgotten} turns no longer fit and are forgotten)\n")
        conversation.answered(answer(speaker, prompt, turn, write, colour))
        turn += 1


def answer(
    speaker: Speaker, prompt: Sequence[int], turn: int, write: Callable[[str], None], colour: bool
) -> str:
    """Shows an answer as it comes, and returns it; Ctrl-C cuts it short."""
    texts = TextStream(speaker.tokenizer)
    thoughts = ThoughtStream(opens_thought(speaker.tokenizer.decode(prompt, skip_special=False)))
    said: list[str] = []

    def show(text: str) -> None:
        said.append(text)
        for piece in thoughts.add(text):
            write(shown(piece, colour))

    try:
        completion = speaker.say(prompt, turn, lambda tokens: show(texts.add(tokens)))
        note = "" if completion.finish != "length" else " (cut off at --max_new_tokens)"
    except KeyboardInterrupt:
        note = " (cut off)"
    show(texts.end())
    for piece in thoughts.end():
        write(shown(piece, colour))
    write(f"{note}\n")
    return "".join(said)


def _prompt_text(tokenizer: Tokenizer) -> str:
    return "> " if tokenizer.chat_template is not None else "text> "


def main() -> None:
    """Command line; see the module's docstring."""
    problem = flags.DEFINE_string("problem", "", "sample a group for this problem, and end")
    reference = flags.DEFINE_string(
        "reference", None, 'what the rewards compare with: JSON (5, [1, 2], "5"), or else text'
    )
    reward = flags.DEFINE_multi_string(
        "reward", [], "MODULE_OR_FILE:NAME of a reward, each of weight 1; may be repeated"
    )
    config = flags.DEFINE_string("config", "", "experiment file: its rewards and its question form")
    group = flags.DEFINE_integer("group_size", 8, "completions of the problem", 1)
    system = flags.DEFINE_string("system", None, "system message; by default the template's own")
    temperature = flags.DEFINE_float("temperature", 1.0, "0 takes the likeliest token", 0.0)
    top_k = flags.DEFINE_integer("top_k", 0, "draw from so many likeliest tokens; 0: all", 0)
    top_p = flags.DEFINE_float(
        "top_p", 1.0, "draw from the likeliest that hold this much", 0.0, 1.0
    )
    min_p = flags.DEFINE_float("min_p", 0.0, "draw from those so likely beside the likeliest", 0.0)
    max_new = flags.DEFINE_integer("max_new_tokens", 1024, "longest answer", 1)
    context = flags.DEFINE_integer("max_context", 4096, "tokens of conversation and answer", 2)
    seed = flags.DEFINE_integer("seed", 0, "of the random numbers", 0)
    step = flags.DEFINE_integer("step", None, "of the run's checkpoint; by default the newest")
    base = flags.DEFINE_string("base", "", "where the model that the run began with is now")

    def start(name: str) -> None:
        source = open_source(name, step=step.value, base=base.value)
        asked = asking(source, config.value, reward.value) if problem.value else None
        colour = sys.stdout.isatty()
        total = min(context.value, source.arch.max_positions)
        new = min(max_new.value, total // 2)
        mesh = fitting_mesh(source.arch)
        with jax.set_mesh(mesh):
            speaker = make_speaker(
                source,
                mesh,
                group_size=group.value if problem.value else 1,
                max_prompt=total - new,
                max_new=new,
                temperature=temperature.value,
                filters=make_filters(top_k.value, top_p.value, min_p.value)
                if temperature.value
                else None,
                seed=seed.value,
            )
            if asked is not None:
                if system.value is not None:
                    form = dataclasses.replace(asked.form, system=system.value)
                    asked = dataclasses.replace(asked, form=form)
                row = asked.problem(problem.value, reference.value)
                show_group(speaker, asked, row, group.value, print, colour)
                return
            what = f"{name}, step {source.step}" if source.workdir is not None else name
            print(f"{what}. /reset, /system TEXT, /exit; Ctrl-C cuts an answer short.")
            if speaker.tokenizer.chat_template is None:
                print("It has no chat template: it goes on behind each line.")
            talk(
                speaker,
                Conversation(speaker.tokenizer, total - new, system.value),
                lambda: input(_prompt_text(speaker.tokenizer)),
                lambda text: print(text, end="", flush=True),
                colour,
            )

    command.run(start, "MODEL_OR_WORKDIR", usage=_USAGE)


if __name__ == "__main__":
    main()
