"""Where problems come from: TFDS, JSONL and Parquet files, reasoning-gym.

Every source is a plain dataclass, so an experiment file writes it down and the command line can
override its fields. Constructing one reads nothing; the first `len` or index loads.
"""

import contextlib
import dataclasses
import functools
import glob
import gzip
import importlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rewards.api import Problem


class ProblemSource(Protocol):
    """A finite list of problems; `source[i]` is the same in every process, 0 <= i < len."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Problem: ...


@dataclasses.dataclass(kw_only=True)
class PromptForm:
    """How a question becomes what the model is asked.

    Attributes:
      question_template: text in which every "{question}" is replaced; other braces stay.
      system: the system message. None sends none, so that a chat template may add its own
        default; "" sends an empty one, which keeps such a default out and saves its tokens.
      raw: ask by raw text, for a base model, rather than by chat messages; `system` is not used.
    """

    question_template: str = "{question}"
    system: str | None = None
    raw: bool = False

    def ask(self, question: str) -> dict[str, Any]:
        """The `messages` or `prompt` argument of a `Problem`."""
        if "{question}" not in self.question_template:
            raise ValueError(f"question_template {self.question_template!r} lacks {{question}}")
        text = self.question_template.replace("{question}", question)
        if self.raw:
            return {"prompt": text}
        user = {"role": "user", "content": text}
        if self.system is None:
            return {"messages": (user,)}
        return {"messages": ({"role": "system", "content": self.system}, user)}


@dataclasses.dataclass(kw_only=True)
class RowForm(PromptForm):
    r"""How a row of columns becomes a `Problem`.

    A row without the question column may hold `messages` or `prompt` instead, taken as they are.
    Columns not named here are kept in `meta`.

    Attributes:
      question_field: column of the question.
      answer_field: column of the answer, the `reference`; "" if rows have none.
      answer_pattern: regular expression that finds the final answer in the answer's text: the
        first group of its last match. With it, thousands separators are removed ("1,234" is
        1234) and `meta["solution"]` keeps the whole text. "" takes the answer as it is.
    """

    question_field: str = "question"
    answer_field: str = "answer"
    answer_pattern: str = ""

    def problem(self, row: Mapping[str, Any], uid: str) -> Problem:
        """The problem in `row`. Raises ValueError saying what is wrong with the row."""
        rest = dict(row)
        asked = self._asked(rest)
        if not self.answer_field:
            return Problem(uid=uid, reference=None, meta=rest, **asked)
        if self.answer_field not in rest:
            raise ValueError(_missing("answer_field", self.answer_field, row))
        reference = rest.pop(self.answer_field)
        if self.answer_pattern:
            rest["solution"] = reference
            reference = final_answer(str(reference), self.answer_pattern)
        gold = str(reference) if isinstance(reference, str | int | float) else None
        return Problem(uid=uid, reference=reference, gold=gold, meta=rest, **asked)

    def _asked(self, rest: dict[str, Any]) -> dict[str, Any]:
        """Takes the question, messages or prompt out of `rest`."""
        if self.question_field in rest:
            question = rest.pop(self.question_field)
            if not isinstance(question, str) or not question.strip():
                raise ValueError(f"{self.question_field!r} should be text, got {question!r}")
            return self.ask(question)
        if "messages" in rest:
            messages = rest.pop("messages")
            if not _are_messages(messages):
                raise ValueError(f'"messages" should be a list of role and content: {messages!r}')
            return {"messages": tuple(messages)}
        if isinstance(rest.get("prompt"), str):
            return {"prompt": rest.pop("prompt")}
        raise ValueError(_missing("question_field", self.question_field, rest))


def final_answer(text: str, pattern: str) -> str:
    """The first group of the last match of `pattern`, stripped, without thousands separators."""
    matches = list(re.finditer(pattern, text))
    if not matches:
        raise ValueError(f"answer_pattern {pattern!r} finds nothing in {text[-80:]!r}")
    found = matches[-1].group(1 if matches[-1].re.groups else 0).strip()
    is_grouped_number = re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", found)
    return found.replace(",", "") if is_grouped_number else found


def r1_form(thought: str, answer: str) -> str:
    """A whole completion in the form of DeepSeek-R1, as the cold start imitates it."""
    return f"<think>{thought}</think><answer>{answer}</answer>"


@dataclasses.dataclass(kw_only=True)
class TfdsProblems(RowForm):
    """A TFDS data set read from its array_record files; TensorFlow is not needed.

    TFDS stores rows in the order of a hash of their keys, so row 3 is not line 3 of the original
    file; the order is the same everywhere.

    Attributes:
      name: of the data set, in TFDS's form "name", "name/config" or "name:version".
      split: a split, or a part of one such as "train[:10%]".
      data_dir: where data sets are prepared; "" is TFDS's own default, ~/tensorflow_datasets.
      download: download and prepare the data set if it is not there. Off, because every host of
        a pod would do it, and because a machine without network retries for minutes.
      module: module to import first, for a data set that is defined by one of yours, or by TFDS
        outside tensorflow_datasets.text. Data that is already prepared needs none.
    """

    name: str = "gsm8k"
    split: str = "train"
    data_dir: str = ""
    download: bool = False
    module: str = ""
    answer_pattern: str = r"####\s*(.+)"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Problem:
        _check_index(i, len(self))
        row = {name: _plain(value) for name, value in self._rows[i].items()}
        uid = f"{self.name}/{self.split}/{i}"
        try:
            problem = self.problem(row, uid)
        except ValueError as error:
            raise ValueError(f"{uid}: {error}") from error
        if self.name.split(":")[0] != "gsm8k" or "solution" not in problem.meta:
            return problem
        return dataclasses.replace(problem, meta={**problem.meta, "worked": _gsm8k_worked(problem)})

    @functools.cached_property
    def _rows(self) -> Sequence[Mapping[str, Any]]:
        import tensorflow_datasets as tfds

        # Data sets that come with TFDS register on import, which it leaves to TensorFlow users.
        base = re.split("[/:]", self.name)[0]
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(f"tensorflow_datasets.text.{base}.{base}")
        if self.module:
            importlib.import_module(self.module)
        # What is written must be readable row by row; what is already there says itself what it is.
        written = {"file_format": "array_record"} if self.download else {}
        try:
            builder = tfds.builder(self.name, data_dir=self.data_dir or None, **written)
        except tfds.core.DatasetNotFoundError as error:
            raise ValueError(
                f"TFDS knows no data set {self.name!r} and has none prepared in {self._where}; for "
                "one of your own, name its module"
            ) from error
        if self.download:
            self._prepare(builder)
        if not (builder.data_path / "dataset_info.json").exists():
            raise FileNotFoundError(
                f"data set {self.name!r} is not prepared in {self._where} (no {builder.data_path})."
                " With network, set download=True once;" + self._offline
            )
        try:
            return builder.as_data_source(split=self.split)
        except NotImplementedError as error:
            raise ValueError(
                f"data set {self.name!r} in {self._where} was prepared in a format that cannot be "
                "read row by row without TensorFlow; prepare it again as array_record"
            ) from error

    def _prepare(self, builder: Any) -> None:
        try:
            builder.download_and_prepare()
        except OSError as error:
            raise OSError(
                f"cannot download data set {self.name!r} to {self._where}: {error}.{self._offline}"
            ) from error

    @property
    def _where(self) -> str:
        return f"data_dir {self.data_dir or '~/tensorflow_datasets'!r}"

    @property
    def _offline(self) -> str:
        """What to do without network."""
        if self.name.startswith("gsm8k"):
            command = f"python -m grpo.data.prepare_gsm8k RAW_DIR {self.data_dir or 'DATA_DIR'}"
            return f" offline, prepare it from its train.jsonl and test.jsonl with `{command}`"
        return " offline, prepare it elsewhere as array_record and copy the folder here"


@dataclasses.dataclass(kw_only=True)
class JsonlProblems(RowForm):
    """Rows of .jsonl or .jsonl.gz files.

    Attributes:
      path: a file, or a pattern such as "data/train-*.jsonl" whose files are read in the order
        of their names. A row's `uid` column names it, else file name and line do.
    """

    path: str

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, i: int) -> Problem:
        _check_index(i, len(self))
        return self._problems[i]

    @functools.cached_property
    def _problems(self) -> list[Problem]:
        rows = ((where, row) for file in _files(self.path) for where, row in _jsonl_rows(file))
        return _unique_problems(self, rows)


@dataclasses.dataclass(kw_only=True)
class ParquetProblems(RowForm):
    """Rows of Parquet files.

    Attributes:
      path: as in `JsonlProblems`.
    """

    path: str

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, i: int) -> Problem:
        _check_index(i, len(self))
        return self._problems[i]

    @functools.cached_property
    def _problems(self) -> list[Problem]:
        rows = ((where, row) for file in _files(self.path) for where, row in _parquet_rows(file))
        return _unique_problems(self, rows)


@dataclasses.dataclass(kw_only=True)
class GymProblems(PromptForm):
    """A task of reasoning-gym; score it with `rewards.gym.gym_reward`.

    Attributes:
      name: of the task, for example "chain_sum".
      size: how many problems.
      seed: problem i is a function of seed and i.
      config: the task's own settings, for example {"min_terms": 2, "max_terms": 2}.
    """

    name: str
    size: int = 1000
    seed: int = 0
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    question_template: str = "{question}\nGive the final answer inside <answer></answer> tags."

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, i: int) -> Problem:
        _check_index(i, len(self))
        entry = self._tasks[i]
        return Problem(
            uid=f"gym/{self.name}/{self.seed}/{i}",
            reference=entry["answer"],
            gold=entry["answer"],  # None where many answers are right
            meta={"gym_name": self.name, "gym_config": dict(self.config), "gym_entry": entry},
            **self.ask(entry["question"]),
        )

    @functools.cached_property
    def _tasks(self) -> Any:
        if self.name == "game_of_life_halting":
            raise ValueError(
                "game_of_life_halting scores every answer as right, so it teaches nothing"
            )
        try:
            import reasoning_gym
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'GymProblems needs reasoning-gym: pip install "grpo[gym]"'
            ) from error
        return reasoning_gym.create_dataset(
            self.name, size=self.size, seed=self.seed, **self.config
        )


@dataclasses.dataclass(kw_only=True)
class Slice:
    """Problems start..stop-1 of another source: cuts a held-out part from a single file.

    Attributes:
      source: the whole.
      start: first problem.
      stop: one past the last; None is the end of the source.
    """

    source: ProblemSource
    start: int = 0
    stop: int | None = None

    def __len__(self) -> int:
        whole = len(self.source)
        stop = whole if self.stop is None else self.stop
        if not 0 <= self.start <= stop <= whole:
            raise ValueError(
                f"slice {self.start}:{stop} is not within a source of {whole} problems"
            )
        return stop - self.start

    def __getitem__(self, i: int) -> Problem:
        _check_index(i, len(self))
        return self.source[self.start + i]


@dataclasses.dataclass(kw_only=True)
class Mixture:
    """Problems of several sources, as many of each as its share says, in a fixed random order.

    Attributes:
      parts: (share, source) pairs; shares add up to 1.
      size: how many problems; each source must hold its share of them.
      seed: of the order.
    """

    parts: tuple[tuple[float, ProblemSource], ...]
    size: int
    seed: int = 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Problem:
        _check_index(i, self.size)
        part, row = self._places[i]
        problem = self.parts[part][1][row]
        # Two generators of one kind number their problems alike.
        return dataclasses.replace(problem, uid=f"{part}/{problem.uid}")

    @functools.cached_property
    def _places(self) -> list[tuple[int, int]]:
        shares = [share for share, _ in self.parts]
        if not math.isclose(sum(shares), 1.0) or min(shares) < 0:
            raise ValueError(f"the shares of a mixture must add up to 1, got {shares}")
        ends = [round(end * self.size) for end in itertools.accumulate(shares)]
        counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        for number, (count, (_, source)) in enumerate(zip(counts, self.parts, strict=True)):
            if count > len(source):
                raise ValueError(
                    f"part {number} of the mixture is to give {count} problems, it has "
                    f"{len(source)}: lower its share or `size`"
                )
        places = [(part, row) for part, count in enumerate(counts) for row in range(count)]
        order = np.random.default_rng(self.seed).permutation(len(places))
        return [places[int(n)] for n in order]


def _check_index(i: int, length: int) -> None:
    if not 0 <= i < length:
        raise IndexError(f"problem {i} of a source of {length}")


def _plain(value: Any) -> Any:
    """TFDS values as plain data: bytes become text, arrays lists, NumPy scalars numbers."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _gsm8k_worked(problem: Problem) -> str:
    """GSM8K's solution in R1 form, without its calculator marks such as <<48/2=24>>."""
    thought = problem.meta["solution"].rpartition("####")[0].strip()
    return r1_form(re.sub(r"<<.*?>>", "", thought), problem.reference)


def _files(path: str) -> list[Path]:
    found = sorted(glob.glob(str(Path(path).expanduser())))
    if not found:
        raise FileNotFoundError(f"no problem file at {path!r} (from {Path.cwd()})")
    return [Path(name) for name in found]


def _jsonl_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of every line that is not blank."""
    opened = gzip.open if file.name.endswith(".gz") else open
    with opened(file, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{file}, line {number}: not JSON ({error}); "
                    "every line should be one whole JSON object"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{file}, line {number}: should be a JSON object with named fields"
                )
            yield f"{file}, line {number}", {"uid": f"{_stem(file)}/{number}", **row}


def _parquet_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'ParquetProblems needs pyarrow: pip install "grpo[parquet]"'
        ) from error
    with pyarrow.parquet.ParquetFile(file) as table:
        number = 0
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", {"uid": f"{_stem(file)}/{number}", **row}


def _stem(file: Path) -> str:
    return file.name.split(".")[0]


def _unique_problems(form: RowForm, rows: Iterator[tuple[str, dict[str, Any]]]) -> list[Problem]:
    """The problems of `rows`; an error names the place of the row that caused it."""
    problems: list[Problem] = []
    places: dict[str, str] = {}
    for place, row in rows:
        uid = str(row.pop("uid"))
        if uid in places:
            raise ValueError(f"{place}: uid {uid!r} is already that of {places[uid]}")
        places[uid] = place
        try:
            problems.append(form.problem(row, uid))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    return problems


def _missing(option: str, name: str, row: Mapping[str, Any]) -> str:
    return f"no {name!r}; set {option} to one of {sorted(row)}"


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, dict)
            and isinstance(turn.get("role"), str)
            and isinstance(turn.get("content"), str)
            for turn in value
        )
    )
