"""What a reward is, the record it judges against, and the record of what it said.

A reward is a plain function `(completion, problem) -> float`. Its contract:

* any string at all gets a finite float in [0, 1]: the policy searches for the exceptions;
* pure: it runs in another process, sometimes twice, in any order;
* picklable: defined at the top level of an importable module, or anything cloudpickle takes
  (a function of a notebook cell, a partial, a callable dataclass);
* under the pool's deadline; a completion that makes it run longer scores 0.0;
* raising means a bug of the reward or of the data set, never a wrong answer: that completion is
  marked invalid and is not trained on.

It may return a `Verdict` instead of a bare float, to say what it read and why. It may also ask for
facts that the text does not show, by naming them as keyword-only parameters (see `FACTS`).

A `Batched` component scores many completions with one call, on processes of its own: for judges
and services that are slow to answer but can answer many at once.
"""

import asyncio
import dataclasses
import enum
import functools
import http.client
import inspect
import math
import time
import traceback
import urllib.error
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Self

# What a reward may ask for besides the text: its length in the policy's tokens, end token
# included, and how it ended: "eos", "stop" for a stop string, or "length" if it was cut off.
FACTS = ("length_tokens", "finish_reason")

_MAX_DETAIL = 500
_BUSY = 429  # the HTTP status of a service that asks for less


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


# (completion, problem), and by keyword the FACTS it asks for; `async def` or not.
Reward = Callable[..., float | Awaitable[float]]
Facts = Mapping[str, Any]
Row = tuple[str, Problem, Facts]  # what is judged


class Verdict(float):
    """A reward's value that also says what it read and why, for logs and `python -m rewards.run`.

    Attributes:
      extracted: the answer as the reward read it, None if it found none.
      reason: one or a few words to count by: "wrong", "no answer", "unparsable reference".
    """

    extracted: str | None
    reason: str

    def __new__(cls, value: float, reason: str = "", extracted: str | None = None) -> Self:
        verdict = super().__new__(cls, value)
        verdict.reason, verdict.extracted = reason, extracted
        return verdict

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (float(self), self.reason, self.extracted)


class BadReference(ValueError):
    """Raised by a reward that cannot read the problem's reference, a fault of the data set."""


class Unavailable(Exception):
    """Raised by a `Batched` function whose service did not answer; it is asked again later."""


@dataclasses.dataclass(frozen=True)
class Batched:
    """A component that scores many completions with one call.

    Attributes:
      function: `(completions, problems) -> values`, lists of one length; `async def` or not. A
        value is what a reward may return, or a `Score`. FACTS come as lists, by keyword.
      size: most completions in one call.
      wait_s: how long the first of a call waits for others to join it.
      timeout_s: seconds for one call; a call that takes longer is killed and was no answer.
      retries: how often a completion whose call got no answer is tried again. A service gives no
        answer if it refuses or drops the connection, times out, or says HTTP 429 or 5xx (as
        exceptions of urllib or the standard library, or as `Unavailable`). What it does say is
        never asked twice.
      parallel: calls in flight at once, each in a process of its own.
      backoff_s: pause before the first retry; it doubles with each.
    """

    function: Callable[..., Sequence[Any] | Awaitable[Sequence[Any]]]
    size: int = 16
    wait_s: float = 0.05
    timeout_s: float = 60.0
    retries: int = 3
    parallel: int = 2
    backoff_s: float = 0.5

    def __post_init__(self) -> None:
        counts = self.size < 1 or self.parallel < 1 or self.retries < 0
        if counts or self.timeout_s <= 0 or self.wait_s < 0 or self.backoff_s < 0:
            raise ValueError(f"a batch needs a size, a process and time: {self}")


Component = tuple[float, Reward | Batched]  # weight, function


class Status(enum.StrEnum):
    """How one call of a reward ended; only `OK` and `TIMEOUT` are trained on."""

    OK = "ok"
    TIMEOUT = "timeout"  # the completion made the reward run out of time: 0.0, and it counts
    CRASH = "crash"  # the reward raised
    BAD_REFERENCE = "bad_reference"  # the reward raised BadReference
    LOST = "lost"  # the worker died under it, and again on the second try
    BAD_VALUE = "bad_value"  # what it returned is no finite float in [0, 1]
    UNAVAILABLE = "unavailable"  # a service it needs did not answer, nor on the retries


@dataclasses.dataclass(frozen=True)
class Score:
    """What one reward said of one completion.

    Attributes:
      value: in [0, 1]; 0.0 wherever `status` is not `OK`.
      valid: False where the 0.0 is a failure of ours, so that it must not be learnt from.
      status: how the call ended.
      detail: one line for the log if the status is not `OK`.
      reason: what the reward itself said of the completion, if it gave a `Verdict`.
      extracted: the answer as the reward read it, its beginning if that is long.
      seconds: wall time of the call. Not compared: two scores that say the same are equal.
    """

    value: float
    valid: bool
    status: Status
    detail: str = ""
    reason: str = ""
    extracted: str | None = None
    seconds: float = dataclasses.field(default=0.0, compare=False)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Score":
        """The score that `dataclasses.asdict` wrote."""
        return cls(**{**fields, "status": Status(fields["status"])})


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
        name = reward_name(function)
        candidates = [name, *(f"{name}_{i}" for i in range(2, len(components) + 2))]
        names.append(next(candidate for candidate in candidates if candidate not in names))
    return tuple(names)


def wanted_facts(function: Any) -> tuple[str, ...]:
    """The FACTS that a reward asks for: keyword-only parameters of these names; all by `**`.

    Raises:
      TypeError: it asks for something else, so that no call of it could succeed.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a builtin that does not say
        return ()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return FACTS
    named = [parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    missing = [p.name for p in named if p.default is p.empty and p.name not in FACTS]
    if missing:
        raise TypeError(
            f"reward {reward_name(function)!r} asks for {', '.join(missing)}, which nobody gives "
            f"it: it may ask for {', '.join(FACTS)}; bind the rest with functools.partial"
        )
    return tuple(parameter.name for parameter in named if parameter.name in FACTS)


def call(function: Reward, completion: str, problem: Problem, facts: Facts) -> float:
    """Calls a reward with those facts that it asks for; what wraps another reward uses this."""
    known = {name: facts[name] for name in wanted_facts(function) if name in facts}
    result: Any = function(completion, problem, **known)
    value: float = asyncio.run(result) if inspect.iscoroutine(result) else result
    return value


def call_batch(function: Callable[..., Any], rows: Sequence[Row]) -> Sequence[Any]:
    """Calls the function of a `Batched`; what wraps another one uses this.

    Raises:
      ValueError: it did not return one value a row.
    """
    completions, problems = [row[0] for row in rows], [row[1] for row in rows]
    known = {name: [row[2].get(name) for row in rows] for name in wanted_facts(function)}
    results: Any = function(completions, problems, **known)
    if inspect.iscoroutine(results):
        results = asyncio.run(results)
    values: Sequence[Any] = results
    if len(values) != len(rows):
        raise ValueError(f"{len(rows)} completions went in, {len(values)} values came out")
    return values


def judge(function: Reward, completion: str, problem: Problem, facts: Facts | None = None) -> Score:
    """Calls one reward and turns whatever happens into a `Score`; sets no deadline."""
    started = time.monotonic()
    try:
        result = call(function, completion, problem, facts or {})
    except KeyboardInterrupt:
        raise
    # Not Exception: sys.exit, and timeouts that derive from BaseException, must not pass.
    except BaseException as error:
        status = Status.BAD_REFERENCE if isinstance(error, BadReference) else Status.CRASH
        score = Score(0.0, False, status, _where_it_raised(error))
    else:
        score = _score_of(result)
    return dataclasses.replace(score, seconds=time.monotonic() - started)


def judge_batch(batched: Batched, rows: Sequence[Row]) -> list[Score]:
    """Calls a batched reward once; one score a row, whatever happens. Retries nothing."""
    started = time.monotonic()
    try:
        results = call_batch(batched.function, rows)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        status = Status.UNAVAILABLE if _no_answer(error) else Status.CRASH
        scores = [Score(0.0, False, status, _where_it_raised(error))] * len(rows)
    else:
        scores = [result if isinstance(result, Score) else _score_of(result) for result in results]
    seconds = time.monotonic() - started
    return [dataclasses.replace(score, seconds=seconds) for score in scores]


def score_inline(
    components: Sequence[Component], completion: str, problem: Problem, facts: Facts | None = None
) -> list[Score]:
    """One score a component, computed in this process: for debugging and tests.

    The same statuses as the pool's, except that nothing stops a reward that hangs or that takes
    the interpreter down with it, and nothing is tried again.
    """
    return [
        judge_batch(function, [(completion, problem, facts or {})])[0]
        if isinstance(function, Batched)
        else judge(function, completion, problem, facts)
        for _, function in components
    ]


def reward_name(function: Any) -> str:
    """A function's own name, or its class's."""
    plain = innermost(function)
    return str(getattr(plain, "__name__", type(plain).__name__))


def innermost(function: Any) -> Any:
    """The function that partials and batches are made of."""
    while isinstance(function, functools.partial | Batched):
        function = function.func if isinstance(function, functools.partial) else function.function
    return function


def parts(function: Any) -> Iterator[Any]:
    """A reward's own function and, if it is a record that holds others, theirs."""
    plain = innermost(function)
    yield plain
    if dataclasses.is_dataclass(plain) and not isinstance(plain, type):
        for field in dataclasses.fields(plain):
            value = getattr(plain, field.name)
            for held in value.values() if isinstance(value, Mapping) else [value]:
                if callable(held) or isinstance(held, Batched):
                    yield from parts(held)


def _no_answer(error: BaseException) -> bool:
    """Whether it says that a service could not be asked, rather than what the service said."""
    if isinstance(error, urllib.error.HTTPError):  # before OSError, which it is too
        return error.code == _BUSY or error.code >= 500
    return isinstance(
        error,
        Unavailable
        | urllib.error.URLError
        | ConnectionError
        | TimeoutError
        | http.client.HTTPException,
    )


def _score_of(result: Any) -> Score:
    """The score of what a reward returned."""
    try:
        if isinstance(result, str | bytes):
            raise TypeError
        value = float(result)
    except Exception:
        return _bad_value(f"expected a float, got {type(result).__name__}")
    if not 0.0 <= value <= 1.0 or math.isnan(value):
        return _bad_value(f"expected a float in [0, 1], got {value}")
    if not isinstance(result, Verdict):
        return Score(value, True, Status.OK)
    extracted = None if result.extracted is None else str(result.extracted)[:_MAX_DETAIL]
    return Score(value, True, Status.OK, "", str(result.reason)[:_MAX_DETAIL], extracted)


def _bad_value(detail: str) -> Score:
    return Score(0.0, False, Status.BAD_VALUE, detail)


def _where_it_raised(error: BaseException) -> str:
    """`ValueError: text (file.py:12)`, one printable line."""
    said = " ".join(traceback.format_exception_only(error)[-1][:_MAX_DETAIL].split())
    frames = traceback.extract_tb(error.__traceback__, limit=-1)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return (said + place).encode("utf-8", "backslashreplace").decode()
