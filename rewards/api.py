"""What a reward is, the record it judges against, and the record of what it said.

A reward is a plain function `(completion, problem) -> float`. Its contract:

* any string at all gets a finite float in [0, 1]: the policy searches for the exceptions;
* pure: it runs in another process, sometimes twice, in any order;
* picklable: defined at the top level of an importable module, or anything cloudpickle takes
  (a function of a notebook cell, a partial, a callable dataclass);
* under the pool's deadline; a completion that makes it run longer scores 0.0;
* raising means a bug of the reward or of the data set, never a wrong answer: that completion is
  marked invalid and is not trained on.
"""

import dataclasses
import enum
import functools
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_MAX_DETAIL = 500


@dataclasses.dataclass(frozen=True)
class Problem:
    """One row of a data set.

    Attributes:
      uid: names the row; unique within its source, the same in every run.
      messages: chat turns, each {"role": ..., "content": ...}; rendered by the model's own chat
        template. Either this or `prompt` is given.
      prompt: raw text put before the model as it is.
      reference: whatever the reward compares with; plain picklable data.
      gold: the text of a right final answer, if one is known. A run starts only if such answers
        score as right and those of other problems as wrong.
      meta: anything else worth keeping (source, difficulty, worked solution).
    """

    uid: str
    messages: tuple[Mapping[str, str], ...] = ()
    prompt: str = ""
    reference: Any = None
    gold: str | None = None
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.messages) == bool(self.prompt):
            raise ValueError(f"problem {self.uid!r} needs either messages or a prompt, not both")


Reward = Callable[[str, Problem], float]
Component = tuple[float, Reward]  # weight, function


class Status(enum.StrEnum):
    """How one call of a reward ended; only `OK` and `TIMEOUT` are trained on."""

    OK = "ok"
    TIMEOUT = "timeout"  # the completion made the reward run out of time: 0.0, and it counts
    CRASH = "crash"  # the reward raised
    LOST = "lost"  # the worker died under it, and again on the second try
    BAD_VALUE = "bad_value"  # what it returned is no finite float in [0, 1]


@dataclasses.dataclass(frozen=True)
class Score:
    """What one reward said of one completion.

    Attributes:
      value: in [0, 1]; 0.0 wherever `status` is not `OK`.
      valid: False where the 0.0 is a failure of ours, so that it must not be learnt from.
      status: how the call ended.
      detail: one line for the log if the status is not `OK`.
    """

    value: float
    valid: bool
    status: Status
    detail: str = ""


def last_tag(completion: str, tag: str) -> str | None:
    """Content of the last closed `<tag>…</tag>`, None if there is none; linear time."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    start = completion.rfind(opening, 0, max(completion.rfind(closing), 0))
    if start < 0:
        return None
    start += len(opening)
    return completion[start : completion.find(closing, start)]


def component_names(components: Sequence[Component]) -> tuple[str, ...]:
    """The functions' own names, for metrics; a repeated one gets a suffix: `f`, `f_2`."""
    names: list[str] = []
    for _, function in components:
        plain = _innermost(function)
        name = getattr(plain, "__name__", type(plain).__name__)
        candidates = [name, *(f"{name}_{i}" for i in range(2, len(components) + 2))]
        names.append(next(candidate for candidate in candidates if candidate not in names))
    return tuple(names)


def judge(function: Reward, completion: str, problem: Problem) -> Score:
    """Calls one reward and turns whatever happens into a `Score`; sets no deadline."""
    try:
        result: Any = function(completion, problem)
    except KeyboardInterrupt:
        raise
    # Not Exception: sys.exit, and timeouts that derive from BaseException, must not pass.
    except BaseException as error:
        return Score(0.0, False, Status.CRASH, _where_it_raised(error))
    try:
        if isinstance(result, str | bytes):
            raise TypeError
        value = float(result)
    except Exception:
        return _bad_value(f"expected a float, got {type(result).__name__}")
    if not 0.0 <= value <= 1.0 or math.isnan(value):
        return _bad_value(f"expected a float in [0, 1], got {value}")
    return Score(value, True, Status.OK)


def score_inline(components: Sequence[Component], completion: str, problem: Problem) -> list[Score]:
    """One score a component, computed in this process: for debugging and tests.

    The same statuses as the pool's, except that nothing stops a reward that hangs or that takes
    the interpreter down with it.
    """
    return [judge(function, completion, problem) for _, function in components]


def _innermost(function: Reward) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _bad_value(detail: str) -> Score:
    return Score(0.0, False, Status.BAD_VALUE, detail)


def _where_it_raised(error: BaseException) -> str:
    """`ValueError: text (file.py:12)`, one printable line."""
    said = " ".join(traceback.format_exception_only(error)[-1][:_MAX_DETAIL].split())
    frames = traceback.extract_tb(error.__traceback__, limit=-1)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return (said + place).encode("utf-8", "backslashreplace").decode()
