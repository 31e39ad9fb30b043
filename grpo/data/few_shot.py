"""Asking by example: worked problems in front of the one that is asked."""

import dataclasses

from rewards.api import Problem


@dataclasses.dataclass(frozen=True)
class FewShot:
    """A problem -> the same problem with worked examples in front of it.

    As raw text they are written one after another; as messages they are turns of a chat that went
    before, behind the system message. A base model goes on with an example of its own making: name
    `separator` in `sample.stop_strings`, so that it ends there.

    Attributes:
      examples: (question, completion) pairs, the question in the form that problems are asked in.
      separator: of raw text, behind each completion.

    Raises:
      ValueError: no examples.
    """

    examples: tuple[tuple[str, str], ...]
    separator: str = "\n"

    def __post_init__(self) -> None:
        if not self.examples:
            raise ValueError("FewShot has no examples: there is nothing to put before a problem")

    def __call__(self, problem: Problem) -> Problem:
        if problem.prompt:
            shown = "".join(f"{asked}{said}{self.separator}" for asked, said in self.examples)
            return dataclasses.replace(problem, prompt=shown + problem.prompt)
        turns = [
            {"role": role, "content": text}
            for example in self.examples
            for role, text in zip(("user", "assistant"), example, strict=True)
        ]
        own = problem.messages
        opening = next((n for n, turn in enumerate(own) if turn["role"] != "system"), len(own))
        return dataclasses.replace(problem, messages=(*own[:opening], *turns, *own[opening:]))
