"""Whether a completion keeps the form `<think>…</think> <answer>…</answer>`.

All scans are counts and finds of fixed strings, so they are linear in the completion; no regular
expression sees model text here.
"""

from rewards.api import Problem

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def answer_text(completion: str) -> str | None:
    """Content of the one answer block; None if there is none, two, or it is not closed.

    Two blocks are none: else a completion could offer two answers and be paid for the better.
    """
    if completion.count("<answer>") != 1 or completion.count("</answer>") != 1:
        return None
    _, _, rest = completion.partition("<answer>")
    content, closed, _ = rest.partition("</answer>")
    return content if closed else None


def r1_format(completion: str, problem: Problem, *, prefix: str = "") -> float:
    """1.0 if all of the completion is one think block and then one answer block, else 0.0.

    Only whitespace may stand before, between and after them; each tag occurs exactly once; neither
    block is blank.

    Args:
      completion: what the model wrote.
      problem: not looked at.
      prefix: what the prompt already wrote of the completion. With chat templates that end in
        "<think>", use `functools.partial(r1_format, prefix="<think>")`.

    Source: the format reward of arXiv:2501.12948, section 2.2.2, table 1.
    """
    del problem
    text = (prefix + completion).strip()
    if not (text.startswith("<think>") and text.endswith("</answer>")):
        return 0.0
    if any(text.count(tag) != 1 for tag in _TAGS):
        return 0.0
    thought, _, rest = text.removeprefix("<think>").partition("</think>")
    between, opened, answer = rest.removesuffix("</answer>").partition("<answer>")
    return float(bool(opened and thought.strip() and not between.strip() and answer.strip()))


def r1_format_lenient(completion: str, problem: Problem, *, prefix: str = "") -> float:
    """A quarter for each of the four tags that is well placed: something to climb early on.

    A tag is well placed if it occurs exactly once and after every well placed tag before it; a
    closing tag also needs its opening one, and something other than whitespace between them. Text
    outside the blocks costs nothing here. See `r1_format` for the arguments.
    """
    del problem
    text = prefix + completion
    placed: dict[str, int] = {}
    for tag in _TAGS:
        at = text.find(tag)
        if text.count(tag) != 1 or at < max(placed.values(), default=0):
            continue
        opening = tag.replace("/", "")
        inside = text[placed[opening] + len(opening) : at] if opening in placed else ""
        if tag == opening or inside.strip():
            placed[tag] = at
    return len(placed) / len(_TAGS)
