r"""Is the final answer of a completion equal to the reference?

Where the answer stands, by `form`:

* "r1": the one `<answer>` block;
* "boxed": the last `\boxed{}` after the last `</think>`;
* "gsm8k": the rest of the line after the one `####`;
* "bare": the whole text.

If there is a box in it, the answer is what is in the box.

There is one answer or none. No answer: two answer blocks or `####` lines; a box that is not closed;
two boxes (only "boxed" takes the last of several), or one beside the answer block once the thinking
is over; over 1,000 characters.

What the same answer is:

* Numbers are compared exactly: 0.5, 1/2, \frac12, 2/4, 5e-1 and 5 \times 10^{-1} are the same,
  0.333 and 1/3 are not. Only ASCII digits. Commas, {,} and spaces separate groups of three
  digits, except within brackets, where a comma separates items. `2 3/4` and 2\frac34 are
  mixed numbers.
* A number has to be worked out: where the reference is a number, 10+1, 3! and \sqrt{16} are wrong;
  a fraction, a decimal, scientific notation or one power such as 2^{10} will do.
* A unit, currency, degree or percent sign may be left out or added, but two that differ are wrong,
  and none is converted: 50% is 50, and not 0.5. What is counted is a unit too (18 eggs), but not
  a word that changes the number (18 million, 18 or so). One letter is a unit only in \text{}.
* `x = 5` is 5, unless the reference names something else. The left side of such an equation is one
  name; `17 = 42` and chains such as `x = 1 = 2` are wrong. Other equations are the same if one is a
  multiple of the other. `x > 6` is (6, \infty).
* Lists and sets are compared without order, item by item, each once; tuples, intervals, ratios and
  matrices with their order and brackets. `1 \pm \sqrt{2}` is a list of two.
* 204_5 needs its base. Words are compared without case, the letter of a choice without brackets.
* Expressions with roots, constants, functions or variables are the same if both an evaluation to 40
  digits and Math-Verify say so (see rewards/math_symbolic.py). `log` has base 10; e and i are the
  constants; 1/2x and \sin x/2 are ambiguous and not read.

What cannot be read as a whole is no answer to anything: no number is picked out of a sentence.
"""

import enum
import functools
import math
import numbers
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from rewards.answers import parse_number
from rewards.api import BadReference, Problem, Verdict
from rewards.formats import answer_text
from rewards.math_clean import clean
from rewards.math_compare import difference
from rewards.math_exact import TooBig, exact
from rewards.math_expression import Unreadable
from rewards.math_syntax import MAX_CHARS, Answer, Group, Named, Scalar, read

Form = Literal["r1", "boxed", "gsm8k", "bare"]

# Imported by the pool's workers before the clock runs, and by a missing extra's error message.
PRELOAD = ("rewards.math_symbolic",)

_BOX = r"\boxed"
_MARK = "####"


class Outcome(enum.StrEnum):
    """The `reason` of a verdict begins with one of these; all of them count."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no answer"
    UNPARSABLE = "unparsable prediction"


@dataclass(frozen=True)
class _Reference:
    text: str
    value: Fraction | None
    answer: Answer


def math_answer(completion: str, problem: Problem, *, form: Form = "r1") -> Verdict:
    """1.0 if the completion's one final answer equals `problem.reference`, else 0.0.

    Needs `pip install "grpo[math]"`; a pool refuses to start without it, and a direct call fails
    only once it comes to comparing expressions. A direct call also has no deadline.

    Args:
      completion: what the model wrote.
      problem: its reference is a number, or a text as `check_reference` takes it.
      form: where the answer stands; see the module. Use
        `functools.partial(math_answer, form="boxed")`.

    Returns:
      A float that also says why: its `reason` is an `Outcome`, then a colon and what differs; its
      `extracted` is the answer's text.

    Raises:
      BadReference: the reference cannot be read. That is a fault of the data set, so the row is
        not trained on.
      ModuleNotFoundError: Math-Verify is needed and not installed.
    """
    reference = _reference(_as_text(problem.reference))
    said, problem_with_form = _extract(completion, form)
    if said is None:
        return Verdict(0.0, f"{Outcome.NO_ANSWER}: {problem_with_form}")
    outcome, why = _judge(said, reference)
    reason = f"{outcome}: {why}" if why else str(outcome)
    return Verdict(float(outcome is Outcome.CORRECT), reason, said)


def check_reference(reference: Any) -> str | None:
    """What is wrong with a data set's answer, None if completions can be judged by it.

    Call it once for each row when data loads, and drop and report the rows it objects to.
    """
    try:
        _reference(_as_text(reference))
    except BadReference as error:
        return str(error)
    return None


def _as_text(reference: Any) -> str:
    """A float stands for the decimal it prints as: 27.0 is 27."""
    if isinstance(reference, str):
        return reference
    finite = isinstance(reference, numbers.Real) and math.isfinite(reference)
    if not finite or isinstance(reference, bool):
        raise BadReference(f"the reference {str(reference)[:80]!r} is no text and no number")
    return str(reference)


@functools.lru_cache(maxsize=50_000)
def _reference(text: str) -> _Reference:
    """Reads a reference; a box around it is taken off."""
    inside = text.strip()
    if inside.startswith(_BOX):
        inside = _last_box(inside)[0] or inside
    try:
        cleaned = clean(_limited(inside))
        answer = read(cleaned)
        _work_out(answer)
    except (Unreadable, TooBig) as error:
        raise BadReference(f"the reference {text[:80]!r} cannot be read: {error}") from error
    return _Reference(cleaned, _plain_number(cleaned), answer)


def _work_out(answer: Answer) -> None:
    """Raises TooBig for a number that could not be compared with others."""
    if isinstance(answer, Scalar):
        exact(answer.node)
    for item in answer.items if isinstance(answer, Group) else ():
        _work_out(item)
    if isinstance(answer, Named):
        _work_out(answer.answer)


def _limited(text: str) -> str:
    if len(text) > MAX_CHARS:
        raise Unreadable(f"over {MAX_CHARS} characters")
    return text


def _plain_number(text: str) -> Fraction | None:
    """The value of a number without sign of a unit: what can be compared at once."""
    return None if "$" in text or "%" in text else parse_number(text)


def _judge(said: str, reference: _Reference) -> tuple[Outcome, str]:
    text = clean(said)
    if text == reference.text:
        return Outcome.CORRECT, ""
    if reference.value is not None:
        value = _plain_number(text)
        if value is not None:
            same = value == reference.value
            return (Outcome.CORRECT, "") if same else (Outcome.WRONG, "another number")
    try:
        why = difference(reference.answer, read(text))
    except (Unreadable, TooBig) as error:
        return Outcome.UNPARSABLE, str(error)
    return (Outcome.WRONG, why) if why else (Outcome.CORRECT, "")


def _extract(completion: str, form: Form) -> tuple[str | None, str]:
    """The answer's text, or None and why there is none; time is linear in the completion."""
    if form == "r1":
        found, why = _from_answer_block(completion)
    elif form == "boxed":
        _, _, conclusion = completion.rpartition("</think>")
        unfinished = "<think>" in conclusion
        found, why = (None, "still thinking") if unfinished else _last_box(conclusion)
    elif form == "gsm8k":
        found, why = _after_mark(completion)
    elif form == "bare":
        found, why = _unboxed(completion)
    else:
        raise ValueError(f"form is one of r1, boxed, gsm8k and bare, not {form!r}")
    if found is not None and len(found) > MAX_CHARS:
        return None, f"over {MAX_CHARS} characters"
    if found is not None and not found:
        return None, "empty"
    return found, why


def _from_answer_block(completion: str) -> tuple[str | None, str]:
    content = answer_text(completion)
    if content is None:
        return None, "not one answer block"
    before, _, rest = completion.partition("<answer>")
    after = rest.partition("</answer>")[2]
    if "</think>" in after:
        return None, "the answer block is within the thinking"
    _, thought, between = before.rpartition("</think>")
    if _BOX in after or (thought and _BOX in between):
        return None, "a box outside the answer block"
    return _unboxed(content)


def _unboxed(text: str) -> tuple[str | None, str]:
    """What is in the one box of a text, or all of it if there is none."""
    boxes = text.count(_BOX)
    if boxes > 1:
        return None, "two boxes"
    return _last_box(text) if boxes else (text.strip(), "")


def _after_mark(completion: str) -> tuple[str | None, str]:
    if completion.count(_MARK) != 1:
        return None, "not one ####"
    return _unboxed(completion.partition(_MARK)[2].partition("\n")[0])


def _last_box(text: str) -> tuple[str | None, str]:
    """The content of the last box that is not within another box."""
    start = text.rfind(_BOX)
    if start < 0:
        return None, "no box"
    outer = text.rfind(_BOX, max(0, start - MAX_CHARS), start)
    if outer >= 0:
        end = _box_end(text, outer)
        if end is None or end > start:
            return None, "a box within a box, or one that is not closed"
    end = _box_end(text, start)
    if end is None:
        return None, "a box that is not closed, or over 1000 characters"
    return text[text.index("{", start) + 1 : end].strip(), ""


def _box_end(text: str, start: int) -> int | None:
    """Where the brace after the `\\boxed` at `start` closes; looks no further than the limit."""
    first = start + len(_BOX)
    depth = 0
    for at in range(first, min(len(text), first + MAX_CHARS + 2)):
        character = text[at]
        if character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
        elif depth == 0 and character != " ":
            return None
        if depth == 0 and character == "}":
            return at
    return None
