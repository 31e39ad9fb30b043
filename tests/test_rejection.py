"""Rejection sampling: what passes, what becomes of it, and that stopping changes nothing."""

import dataclasses
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_experiment import get_config

from grpo.checkpoint import params_sha256
from grpo.config import Config, validate
from grpo.data.few_shot import FewShot
from grpo.data.prompts import encode_prompt
from grpo.data.sources import JsonlProblems, ParquetProblems, ProblemSource
from grpo.data.tokenizer import ByteTokenizer
from grpo.gates import GateError
from grpo.policy import Policy, make_policy
from grpo.stages import rejection
from grpo.stages.rejection import sample_traces, sift
from grpo.stages.sft import worked_samples
from grpo.stages.traces import check_rows, chosen, row_of, table_of, write_jsonl, write_parquet
from grpo.structs import EOS, LENGTH, STOP, Completion, Rollout, Scores
from rewards.api import Batched, Problem

# ---- What passes -------------------------------------------------------------------------------


Judged = dict[str, list[tuple[str, str, float, float]]]


def read(source: ProblemSource) -> list[Problem]:
    return [source[i] for i in range(len(source))]


def rollout_of(
    judged: Judged,
) -> tuple[list[Problem], Rollout, Scores, np.ndarray, list[str]]:
    """From problem -> (text, finish, verifier's score, style's score); a score below 0 is none."""
    problems = [Problem(uid, prompt=uid, reference=7, meta={"kind": "sum"}) for uid in judged]
    cells = list(judged.values())
    truth_PG = np.array([[cell[2] for cell in group] for group in cells], np.float32)
    style_PG = np.array([[cell[3] for cell in group] for group in cells], np.float32)
    valid_PG = truth_PG >= 0
    rollout = Rollout(
        problems=problems,
        prompts=[[0]] * len(problems),
        completions=[
            Completion(p, g, tuple(cell[0].encode()), np.zeros(len(cell[0]), "f4"), cell[1])
            for p, group in enumerate(cells)
            for g, cell in enumerate(group)
        ],
        group_size=len(cells[0]),
    )
    scores = Scores(
        reward_PG=truth_PG,
        valid_PG=valid_PG,
        components={"truth": truth_PG, "style": style_PG},
        weights={"truth": 1.0, "style": 0.0},
        statuses={},
    )
    texts = [cell[0] for group in cells for cell in group]
    return problems, rollout, scores, (truth_PG >= 1) & valid_PG, texts


def test_each_step_drops_what_it_should():
    judged: Judged = {
        "a": [("7", EOS, 1, 0.9), ("8", EOS, 0, 1), ("7.", LENGTH, 1, 1), ("7\n", STOP, 1, 1)],
        "b": [("7!", EOS, 1, 0.8), ("7\ufffd", EOS, 1, 1), (" ", EOS, 1, 1), ("7?", EOS, -1, 1)],
        "c": [("x", EOS, -1, 1)] * 4,
    }
    rows, counts = sift(*rollout_of(judged), {"style": 0.9}, {"params_sha256": "abc", "seed": 3})
    assert counts == {
        "problems": 3,
        "steps": {
            "sampled": 12,
            "judged": 7,
            "right": 6,
            "ended": 5,
            "text": 3,
            "filter/style": 2,
        },
        "pass_rates": [3 / 4, 3 / 3, None],
    }
    assert [(row["uid"], row["worked"]) for row in rows] == [("a#0", "7"), ("a#3", "7")]
    assert rows[0] == {
        "uid": "a#0",
        "prompt": "a",
        "answer": 7,
        "kind": "sum",
        "worked": "7",
        "provenance": {
            "problem": "a",
            "sample": 0,
            "pass_rate": 0.75,
            "length_tokens": 1,
            "scores": {"truth": 1.0, "style": 0.9},
            "params_sha256": "abc",
            "seed": 3,
        },
    }


def test_rows_are_written_as_they_are_read(tmp_path):
    chat = (
        {"role": "system", "content": ""},
        {"role": "user", "content": "3加4？\u2028"},
    )
    problems = [
        Problem("raw", prompt="3+4=", reference=7, meta={"worked": "old", "level": 2}),
        Problem("chat", messages=chat, reference={"numbers": [1]}, meta={"provenance": {"a": 1}}),
    ]
    rows = [row_of(p, f"{p.uid}#1", "new", {"problem": p.uid}) for p in problems]
    write_jsonl(tmp_path / "traces.jsonl", rows)
    raw, told = read(JsonlProblems(path=str(tmp_path / "traces.jsonl"), answer_field="answer"))
    assert (raw.uid, raw.prompt, raw.reference, raw.gold) == ("raw#1", "3+4=", 7, "7")
    assert raw.meta == {"level": 2, "worked": "new", "provenance": {"problem": "raw"}}
    assert (told.uid, told.messages, told.reference) == ("chat#1", chat, {"numbers": [1]})
    assert told.meta == {"worked": "new", "provenance": {"problem": "chat"}}


@pytest.mark.parametrize(
    "problem, message",
    [
        (Problem("p", prompt="?", meta={"question": "?"}), "'p' has 'question' in its meta"),
        (Problem("p", prompt="?", reference={1, 2}), "'p' cannot be written as JSON"),
        (Problem("p", prompt="?", meta={"worked": 3}), r"'p' has no meta\['worked'\]"),
    ],
)
def test_what_no_row_can_hold_is_named_beforehand(problem, message):
    with pytest.raises(ValueError, match=f"here: problem {message}"):
        check_rows([problem], "here", worked="worked" in problem.meta)


def test_columns_of_two_types_go_into_no_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    rows = [{"uid": "a", "answer": 7}, {"uid": "b", "level": 1, "answer": 8}]
    write_parquet(tmp_path / "a.parquet", [{**row, "prompt": "?"} for row in rows])
    first, second = read(ParquetProblems(path=str(tmp_path / "a.parquet")))
    assert first.meta["level"] is None and (second.meta["level"], second.reference) == (1, 8)
    with pytest.raises(ValueError, match=r"rejection\.parquet to False"):
        write_parquet(tmp_path / "b.parquet", [*rows, {"uid": "c", "answer": "seven"}])


# ---- What is chosen ----------------------------------------------------------------------------


def trace(question: str, worked: str, pass_rate: float) -> dict[str, Any]:
    provenance = {"problem": question, "pass_rate": pass_rate}
    return row_of(Problem(question, prompt=question), f"{question}#{worked}", worked, provenance)


def test_the_summary_adds_up():
    """Two easy questions, a hard one, one never right; three general rows to every four traces."""
    passed = [trace("a", w, 1.0) for w in ("1", "2", "1 ", "3")]
    passed += [trace("b", w, 0.875) for w in ("1", "2")] + [trace("c", w, 0.25) for w in ("1", "2")]
    steps = {"sampled": 16, "judged": 15, "right": 12, "filter/f": 8}
    counts = [
        {"steps": steps, "pass_rates": [1.0, 0.875], "tokens": 70, "seconds": 1.5},
        {"steps": steps, "pass_rates": [0.25, 0.0], "tokens": 30, "seconds": 0.5},
    ]
    general = [Problem(str(i), prompt="g", reference="r", meta={"worked": "w"}) for i in range(9)]
    config = Config()
    settings = config.rejection
    settings.keep, settings.bucket_share = 2, 0.5
    settings.general, settings.general_share = general, 3 / 7
    rows, summary = chosen(passed, counts, settings, seed=0)
    assert summary == {
        "problems": 4,
        "problems_never_right": 1,
        "steps": {
            **{name: 2 * count for name, count in steps.items()},
            "different": 7,
            "kept": 6,
            "balanced": 4,
        },
        "duplicates": 1,
        "pass_rates": {
            "(0, 0.25]": {"problems": 1, "kept": 2, "rows": 2},
            "(0.25, 0.5]": {"problems": 0, "kept": 0, "rows": 0},
            "(0.5, 0.75]": {"problems": 0, "kept": 0, "rows": 0},
            "(0.75, 1]": {"problems": 2, "kept": 4, "rows": 2},
        },
        "rows": 7,
        "general_rows": 3,
        "general_share": round(3 / 7, 6),
        "tokens": 100,
        "seconds": 2.0,
    }
    assert len({row["uid"] for row in rows}) == 7
    assert [row["uid"] for row in rows if row["prompt"] == "c"] == ["c#1", "c#2"]
    assert all(row["provenance"]["general"] and row["answer"] == "r" for row in rows[4:])
    table = table_of(summary)
    assert re.search(r"^  filter/f +16 +50\.0%$", table, re.MULTILINE)
    assert "general rows: 3 of 7 (42.9%); 100 tokens sampled in 2 s" in table


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_samples": 0}, "rejection.num_samples is 0; it must be positive"),
        ({"num_problems": -1}, "rejection.num_problems is -1"),
        ({"bucket_share": 1.5}, r"rejection.bucket_share is 1.5; it must be in \[0, 1\]"),
        ({"general_share": 0.2}, "rejection.general is not set; set both or neither"),
        ({"general": [Problem("g", prompt="?")]}, "rejection.general is set; set both"),
        ({"general_share": 1.0}, "there would be no traces"),
        ({"filters": ((1.5, len),)}, "what gets less than 1.5 from builtins.len"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    config = get_config()
    for name, value in changes.items():
        setattr(config.rejection, name, value)
    with pytest.raises(ValueError, match=message):
        validate(config)


def test_batched_rewards_are_rewards_and_filters():
    def all_right(completions: list[str], problems: list[Problem]) -> list[float]:
        return [1.0 for _ in completions]

    config = get_config()
    config.reward.functions = ((1.0, Batched(all_right)),)
    config.rejection.filters = ((0.5, Batched(all_right)),)
    validate(config)


# ---- The stage ---------------------------------------------------------------------------------

# What the model says after "=", after a digit and after a space, whatever stands before: "1", " 2",
# "1 2" and the like, mostly with an end.
AFTER = {
    "=": {"1": 0.35, "2": 0.35, " ": 0.3},
    "12": {"<eos>": 0.7, " ": 0.3},
    " ": {"1": 0.4, "2": 0.4, "<eos>": 0.2},
}


SHAPE = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "tie_word_embeddings": False,
}


def chatty(policy: Policy) -> Policy:
    """The policy with weights by which it speaks as AFTER says."""

    def initial_params() -> Any:
        like = jax.tree.map(np.asarray, policy.initial_params())
        params = jax.tree.map(np.zeros_like, like)  # no layer adds anything to the embedding
        params["final_norm"] = like["final_norm"]
        params["embed"][:, -1] = 1.0
        params["head"][:] = -5.0
        eos = policy.tokenizer.eos_ids[0]
        for k, (last, following) in enumerate(AFTER.items()):
            ids = list(last.encode())
            params["embed"][ids] = np.eye(params["embed"].shape[1])[k]
            for text, probability in following.items():
                token = eos if text == "<eos>" else ord(text)
                params["head"][k, token] = np.log(probability) / 4  # the norm makes a 1 of 16 a 4
        return jax.device_put(params, policy.shardings)

    return dataclasses.replace(policy, initial_params=initial_params)


def problems(count: int) -> list[Problem]:
    return [
        Problem(
            f"p{i}",
            prompt=f"{i:02d}=",
            reference=1 + i % 2,
            gold=str(1 + i % 2),
            meta={"level": i},
        )
        for i in range(count)
    ]


def small(**changes: Any) -> Config:
    """The tiny experiment over short texts, with changes to `rejection`."""

    def right(completion, problem):
        return float(completion.strip() == str(problem.reference))

    def tight(completion, problem):
        return 0.9 - 0.5 * completion.endswith(" ")

    config = get_config()
    config.model.shape = json.dumps(SHAPE)
    config.data.train = problems(16)
    config.sample.max_new_tokens = 4
    config.reward = dataclasses.replace(
        config.reward, functions=((1.0, right),), gold_format="{gold}", gold_check=4
    )
    settings = config.rejection
    settings.num_problems, settings.num_samples, settings.chunk_problems = 10, 8, 4
    settings.filters, settings.keep = ((0.9, tight),), 2
    for name, value in changes.items():
        setattr(settings, name, value)
    return config


@pytest.fixture(scope="module", autouse=True)
def model(compiled_once):
    """Every policy of the stage speaks as AFTER says."""
    original = rejection.start

    def started(config, workdir, stack):
        folder, watchdog, policy = original(config, workdir, stack)
        return folder, watchdog, chatty(policy)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rejection, "start", started)
        yield


def sampled(config: Config, workdir: Path) -> list[dict[str, Any]]:
    """Runs the stage; the rows of traces.jsonl."""
    path = sample_traces(config, workdir, baseline=config)
    return [json.loads(line) for line in path.read_text().splitlines()]


@dataclasses.dataclass(frozen=True)
class Straight:
    """A run of the stage that nothing disturbed: its folder, rows and model, all it sampled."""

    workdir: Path
    rows: list[dict[str, Any]]
    digest: str
    tokens: dict[tuple[str, int], tuple[int, ...]]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Straight:
    workdir, tokens = tmp_path_factory.mktemp("straight"), {}
    original = rejection.sample_and_score

    def listening(*args, **kwargs):
        found = original(*args, **kwargs)
        for completion in found[0].completions:
            uid = found[0].problems[completion.problem].uid
            tokens[uid, completion.sample] = completion.tokens
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rejection, "sample_and_score", listening)
        rows = sampled(small(), workdir)
    policy = chatty(make_policy(small()))
    return Straight(workdir, rows, params_sha256(policy.initial_params()), tokens)


def test_traces_are_right_whole_filtered_different_and_few(straight):
    """Against a plain loop over everything that was sampled."""
    assert len(straight.tokens) == 10 * 8
    wanted = []
    for problem in problems(10):
        texts = [
            ByteTokenizer().decode(straight.tokens[problem.uid, g], skip_special=False)
            for g in range(8)
        ]
        right = [t.removesuffix("<eos>").strip() == problem.gold for t in texts]
        kept: list[str] = []
        for g, text in enumerate(texts):
            clean = right[g] and text.endswith("<eos>") and not text.endswith(" <eos>")
            said = text.removesuffix("<eos>")
            if clean and said.strip() not in map(str.strip, kept) and len(kept) < 2:
                kept.append(said)
                wanted.append((problem.uid, g, said, sum(right) / 8))
    found = []
    for row in straight.rows:
        origin = row["provenance"]
        found.append((origin["problem"], origin["sample"], row["worked"], origin["pass_rate"]))
    assert found == wanted and 3 < len(found) < 20


def test_what_is_learnt_is_what_was_sampled(straight):
    path = straight.workdir / "traces.jsonl"
    source = read(JsonlProblems(path=str(path), answer_field="answer"))
    tokenizer = ByteTokenizer()
    samples = worked_samples(tokenizer, source, max_prompt=8, max_new=4)
    plain = {problem.uid: problem for problem in problems(10)}
    for problem, sample in zip(source, samples, strict=True):
        uid, number = problem.uid.split("#")
        assert tuple(sample.completion) == straight.tokens[uid, int(number)]
        assert sample.prompt == encode_prompt(tokenizer, plain[uid])
        assert (problem.reference, problem.gold) == (plain[uid].reference, plain[uid].gold)
        assert problem.meta["level"] == plain[uid].meta["level"]


def test_a_run_leaves_its_record(straight):
    summary = json.loads((straight.workdir / "summary.json").read_text())
    steps = summary["steps"]
    assert list(steps)[:5] == ["sampled", "judged", "right", "ended", "text"]
    assert list(steps)[5:] == ["filter/tight", "different", "kept", "balanced"]
    assert steps["sampled"] == 80 and list(steps.values()) == sorted(steps.values(), reverse=True)
    assert summary["rows"] == steps["balanced"] == len(straight.rows)
    assert summary["tokens"] == sum(map(len, straight.tokens.values()))
    result = json.loads((straight.workdir / "result.json").read_text())
    digests = {row["provenance"]["params_sha256"] for row in straight.rows}
    assert digests == {result["params_sha256"]} == {straight.digest}
    assert result["rows"] == len(straight.rows)
    assert sorted(path.name for path in (straight.workdir / "parts").iterdir()) == [
        *(f"{c:05d}.jsonl" for c in range(3)),
        "made_with.json",
        "model.json",
    ]


@pytest.mark.parametrize("how", ["SIGTERM", "crash"])
def test_stopped_after_a_chunk_it_ends_the_same(how, straight, tmp_path, monkeypatch):
    original, chunks, stops = rejection.write_jsonl, list[str](), [how]

    def stopping(path, rows):
        if stops == ["crash"] and len(chunks) == 1:
            stops.clear()
            path.with_name(path.name + ".partial").write_text('{"half a li')
            raise MemoryError("killed")
        original(path, rows)
        if path.parent.name == "parts":
            chunks.append(path.name)
        if stops == ["SIGTERM"]:
            stops.clear()
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(rejection, "write_jsonl", stopping)
    with pytest.raises(SystemExit if how == "SIGTERM" else MemoryError):
        sampled(small(), tmp_path)
    assert chunks == ["00000.jsonl"] and not (tmp_path / "traces.jsonl").exists()
    first = (tmp_path / "parts/00000.jsonl").read_bytes()
    sampled(small(), tmp_path)
    assert chunks == ["00000.jsonl", "00001.jsonl", "00002.jsonl"]
    assert (tmp_path / "parts/00000.jsonl").read_bytes() == first
    for name in ("traces.jsonl", "result.json"):
        assert (tmp_path / name).read_bytes() == (straight.workdir / name).read_bytes()


def test_choosing_otherwise_samples_nothing_anew(straight, monkeypatch):
    monkeypatch.setattr(rejection, "sample_and_score", None)
    monkeypatch.setattr(rejection, "params_sha256", None)  # the model is not even read
    rows = sampled(small(keep=1, parquet=True), straight.workdir)
    assert [row["uid"] for row in rows] == [
        row["uid"]
        for n, row in enumerate(straight.rows)
        if n == 0 or row["prompt"] != straight.rows[n - 1]["prompt"]
    ]
    stored = read(ParquetProblems(path=str(straight.workdir / "traces.parquet")))
    assert [problem.uid for problem in stored] == [row["uid"] for row in rows]
    assert sampled(small(), straight.workdir) == straight.rows
    with pytest.raises(ValueError, match=r"made otherwise: rejection.num_samples: 8 -> 9"):
        sampled(small(num_samples=9), straight.workdir)


def test_more_problems_are_added_to_those_there(straight, tmp_path):
    assert sampled(small(num_problems=6), tmp_path) == [
        row for row in straight.rows if int(row["provenance"]["problem"][1:]) < 6
    ]
    first = (tmp_path / "parts/00000.jsonl").stat().st_mtime_ns
    assert sampled(small(), tmp_path) == straight.rows
    assert (tmp_path / "parts/00000.jsonl").stat().st_mtime_ns == first


def test_asked_by_example_the_plain_problem_is_written(tmp_path, monkeypatch):
    asked: list[str] = []
    original = rejection.sample_and_score

    def listening(engine, scorer, weights, problems, *args, **kwargs):
        asked.extend(problem.prompt for problem in problems)
        return original(engine, scorer, weights, problems, *args, **kwargs)

    monkeypatch.setattr(rejection, "sample_and_score", listening)
    rows = sampled(small(asked_as=FewShot((("7=", "1"),))), tmp_path)
    assert asked == [f"7=1\n{i:02d}=" for i in range(10)]
    assert {row["prompt"] for row in rows} <= {problem.prompt for problem in problems(10)}
    assert rows


def test_a_problem_stays_the_same_problem(tmp_path):
    with pytest.raises(ValueError, match="made problem 'x' of 'p0'"):
        sampled(small(asked_as=lambda p: dataclasses.replace(p, uid="x")), tmp_path)


def test_if_nothing_passes_the_table_says_why(tmp_path, capsys):
    def never(completion, problem):
        return 0.0

    with pytest.raises(ValueError, match="no completion passed"):
        sampled(small(num_problems=4, filters=((1.0, never),)), tmp_path)
    assert re.search(r"^  filter/never +0 +0\.0%$", capsys.readouterr().out, re.MULTILINE)
    assert not (tmp_path / "traces.jsonl").exists() and not (tmp_path / "result.json").exists()


def test_filters_that_fail_stop_the_stage(tmp_path):
    def broken(completion, problem):
        raise RuntimeError("a bug")

    config = small(num_problems=4, filters=((1.0, broken),))
    config.reward.gold_check = 0  # which would have found it first
    with pytest.raises(GateError, match="verifiers failed on 100%"):
        sampled(config, tmp_path)
    assert not list((tmp_path / "parts").glob("*.jsonl"))


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("algo__group_size", 4, r"config\.algo\.group_size=4"),
        ("log__save_every", 7, r"config\.log\.save_every=7"),
        ("lora__rank", 4, "lora.rank is 4, but sampling trains nothing"),
    ],
)
def test_what_sampling_does_not_use_may_not_be_set(path, value, message, tmp_path):
    config = small()
    baseline = dataclasses.replace(config)
    section, field = path.split("__")
    changed = getattr(config, section)
    setattr(config, section, dataclasses.replace(changed, **{field: value}))
    setattr(baseline, section, dataclasses.replace(changed, **{field: value + 1}))
    with pytest.raises(ValueError, match=message):
        sample_traces(config, tmp_path, baseline=baseline)
