"""Problem sources, and the order in which steps ask them."""

import dataclasses
import gzip
import json
import math
import pickle
import shutil
import socket

import absl.flags
import pytest
from ml_collections import config_flags

from grpo.data.order import draw, problems_for_step
from grpo.data.procedural import DigitChain, MaxOf
from grpo.data.sources import (
    GymProblems,
    JsonlProblems,
    Mixture,
    ParquetProblems,
    ProblemSource,
    Slice,
    TfdsProblems,
    final_answer,
)
from rewards.api import Problem
from rewards.gym import gym_reward

GSM8K = [
    ("Ann has 3 pens and buys 4. How many now?", "She has 3+4=<<3+4=7>>7 pens.\n#### 7"),
    ("A shop sells 5 boxes of 300. How many?", "5*300=<<5*300=1500>>1,500.\n#### 1,500"),
    ("It is 2 and falls by 6. How cold is it?", "2-6=<<2-6=-4>>-4.\n#### -4"),
]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("the test went online")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


# TFDS


@pytest.fixture(scope="module")
def gsm8k_dir(tmp_path_factory):
    from grpo.data.prepare_gsm8k import prepare

    raw, data_dir = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("data")
    rows = [{"question": question, "answer": answer} for question, answer in GSM8K]
    write_jsonl(raw / "train.jsonl", rows)
    write_jsonl(raw / "test.jsonl", rows[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", None)  # calling it would be a TypeError
        assert prepare(raw, data_dir) == {"train": 3, "test": 1}
    return str(data_dir)


def test_gsm8k_rows_become_problems(gsm8k_dir, no_network):
    source = TfdsProblems(data_dir=gsm8k_dir)
    problems = {source[i].messages[0]["content"]: source[i] for i in range(len(source))}
    assert [problems[question].reference for question, _ in GSM8K] == ["7", "1500", "-4"]
    pens = problems[GSM8K[0][0]]
    assert pens.gold == "7" and pens.messages == ({"role": "user", "content": GSM8K[0][0]},)
    assert pens.meta["solution"] == GSM8K[0][1]
    assert pens.meta["worked"] == "<think>She has 3+4=7 pens.</think><answer>7</answer>"
    assert [source[i].uid for i in range(3)] == [f"gsm8k/train/{i}" for i in range(3)]
    assert len(TfdsProblems(data_dir=gsm8k_dir, split="train[:2]")) == 2
    assert pickle.loads(pickle.dumps(pens)) == pens
    with pytest.raises(IndexError):
        source[3]


def test_question_form_is_the_users(gsm8k_dir):
    form = {"data_dir": gsm8k_dir, "split": "test", "question_template": "{question} \\boxed{}"}
    question = GSM8K[0][0]
    assert TfdsProblems(**form, system="Think.")[0].messages == (
        {"role": "system", "content": "Think."},
        {"role": "user", "content": question + " \\boxed{}"},
    )
    assert TfdsProblems(**form, raw=True)[0].prompt == question + " \\boxed{}"
    with pytest.raises(ValueError, match="lacks {question}"):
        TfdsProblems(data_dir=gsm8k_dir, question_template="Q")[0]


def test_absent_data_sets_say_how_to_get_them(tmp_path, gsm8k_dir, no_network):
    with pytest.raises(FileNotFoundError, match=rf"'gsm8k'.*{tmp_path}.*prepare_gsm8k RAW_DIR"):
        len(TfdsProblems(data_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="no data set 'unheard_of'.*module"):
        len(TfdsProblems(name="unheard_of", data_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="Unknown split 'valid'"):
        len(TfdsProblems(data_dir=gsm8k_dir, split="valid"))


def test_a_prepared_data_set_is_not_downloaded(gsm8k_dir, no_network):
    assert len(TfdsProblems(data_dir=gsm8k_dir, download=True)) == 3


def test_a_failed_download_says_how_to_do_without(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    def fail(self):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(OSError, match=r"cannot download .*no route.*offline, prepare it from"):
        len(TfdsProblems(data_dir=str(tmp_path), download=True))


def test_files_that_only_tensorflow_can_read_are_refused(tmp_path, gsm8k_dir):
    shutil.copytree(gsm8k_dir, tmp_path, dirs_exist_ok=True)
    (info,) = tmp_path.glob("gsm8k/*/dataset_info.json")
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(ValueError, match="prepare it again as array_record"):
        len(TfdsProblems(data_dir=str(tmp_path)))


def test_preparing_names_the_missing_file(tmp_path):
    from grpo.data.prepare_gsm8k import prepare

    with pytest.raises(FileNotFoundError, match=r"train\.jsonl"):
        prepare(tmp_path, tmp_path)


def test_building_a_source_reads_nothing():
    TfdsProblems(data_dir="/nowhere")
    JsonlProblems(path="/nowhere.jsonl")
    ParquetProblems(path="/nowhere.parquet")
    GymProblems(name="unheard_of")


def test_fields_can_be_set_from_the_command_line():
    @dataclasses.dataclass
    class Data:
        train: ProblemSource

    given = [
        "program",
        "--config.train.split=test",
        "--config.train.system=Go",
        "--config.train.raw",
    ]
    flags = absl.flags.FlagValues()
    config = config_flags.DEFINE_config_dataclass(
        "config", Data(train=TfdsProblems(data_dir="/no")), flag_values=flags, sys_argv=given
    )
    flags(given)
    assert config.value.train == TfdsProblems(data_dir="/no", split="test", system="Go", raw=True)


@pytest.mark.parametrize(
    "text, pattern, answer",
    [
        ("so\n#### 1,234,567", r"####\s*(.+)", "1234567"),
        ("#### 1\n#### -2.5 ", r"####\s*(.+)", "-2.5"),
        ("#### 1,2,3", r"####\s*(.+)", "1,2,3"),  # a list, not a number
        ("x = 12", r"\d+", "12"),
    ],
)
def test_final_answer(text, pattern, answer):
    assert final_answer(text, pattern) == answer


# Files


def test_jsonl_rows_become_problems(tmp_path):
    rows = [
        {"question": "1+1?", "answer": 2, "level": "easy"},
        {"uid": "mine", "messages": [{"role": "user", "content": "hi"}], "answer": {"n": [1]}},
        {"prompt": "2+2=", "answer": "4", "worked": "4"},
    ]
    source = JsonlProblems(path=write_jsonl(tmp_path / "a.jsonl", rows))
    first, second, third = (source[i] for i in range(len(source)))
    assert (first.uid, first.reference, first.gold) == ("a/1", 2, "2")
    assert first.meta == {"level": "easy"}
    assert (second.uid, second.gold, second.reference) == ("mine", None, {"n": [1]})
    assert second.messages == ({"role": "user", "content": "hi"},)
    assert (third.prompt, third.meta) == ("2+2=", {"worked": "4"})


def test_jsonl_patterns_and_gzip(tmp_path):
    for name in ("b", "a"):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as file:
            file.write('{"q": "x", "a": "= 5"}\n\n')
    source = JsonlProblems(
        path=str(tmp_path / "*.gz"), question_field="q", answer_field="a", answer_pattern="= (.*)"
    )
    assert [source[i].uid for i in range(2)] == ["a/1", "b/1"]
    assert source[0].reference == "5" and source[0].meta["solution"] == "= 5"
    unanswered = JsonlProblems(path=source.path, question_field="q", answer_field="")
    assert unanswered[0].reference is None and unanswered[0].meta == {"a": "= 5"}


@pytest.mark.parametrize(
    "line, message",
    [
        ("{broken", r"a\.jsonl, line 2: not JSON"),
        ("[1]", "line 2: should be a JSON object"),
        ('{"question": "q"}', r"line 2: no 'answer'; set answer_field to one of \['question'\]"),
        ('{"text": "q", "answer": 1}', "line 2: no 'question'; set question_field to one of"),
        ('{"question": " ", "answer": 1}', "line 2: 'question' should be text, got ' '"),
        ('{"messages": ["hi"], "answer": 1}', 'line 2: "messages" should be a list of role'),
        ('{"question": "q", "answer": 1, "uid": "a/1"}', r"uid 'a/1' is already that of .*line 1"),
    ],
)
def test_a_bad_row_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "q", "answer": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        len(JsonlProblems(path=str(path)))


def test_an_answer_without_the_pattern_is_named(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "seven"}])
    with pytest.raises(ValueError, match=r"line 1: answer_pattern '####.*' finds nothing"):
        len(JsonlProblems(path=path, answer_pattern="####(.*)"))


@pytest.mark.parametrize("kind", [JsonlProblems, ParquetProblems])
def test_missing_files_are_named(tmp_path, kind):
    with pytest.raises(FileNotFoundError, match="no problem file at .*absent"):
        len(kind(path=str(tmp_path / "absent.*")))


def test_parquet_rows_become_problems(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"question": f"{i}+1?", "answer": i + 1, "tags": ["sum"]} for i in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "sums.parquet")
    source = ParquetProblems(path=str(tmp_path / "sums.parquet"))
    assert len(source) == 3
    assert source[2] == Problem(
        uid="sums/3",
        messages=({"role": "user", "content": "2+1?"},),
        reference=3,
        gold="3",
        meta={"tags": ["sum"]},
    )
    with pytest.raises(ValueError, match=r"sums\.parquet, row 1: no 'text'"):
        len(ParquetProblems(path=source.path, answer_field="text"))


def test_slices_split_one_source(tmp_path):
    rows = [{"question": str(i), "answer": i} for i in range(5)]
    whole = JsonlProblems(path=write_jsonl(tmp_path / "a.jsonl", rows))
    head, tail = Slice(source=whole, stop=2), Slice(source=whole, start=2)
    assert [head[i].reference for i in range(len(head))] == [0, 1]
    assert [tail[i].reference for i in range(len(tail))] == [2, 3, 4]
    with pytest.raises(IndexError):
        head[2]
    with pytest.raises(ValueError, match=r"slice 2:9 is not within a source of 5"):
        len(Slice(source=whole, start=2, stop=9))


# reasoning-gym


@pytest.fixture(scope="module")
def chain_sums():
    pytest.importorskip("reasoning_gym")
    return GymProblems(name="chain_sum", size=5, seed=3, config={"min_terms": 2, "max_terms": 2})


def test_gym_problems_score_their_own_answers(chain_sums):
    for i in range(len(chain_sums)):
        problem = pickle.loads(pickle.dumps(chain_sums[i]))
        assert gym_reward(f"<answer>{problem.gold}</answer>", problem) == 1.0
        assert gym_reward(f"{problem.gold}", problem) == 0.0
        assert gym_reward(f"<answer>{int(problem.gold) + 1}</answer>", problem) < 0.5
    assert "<answer></answer>" in chain_sums[0].messages[0]["content"]


@pytest.mark.parametrize("name", ["chain_sum", "prime_factorization", "countdown"])
def test_gym_reward_survives_junk(chain_sums, name):
    problem = GymProblems(name=name, size=1)[0]
    for text in ["", "nan", "inf", "1e999", "x" * 10_000, "\x00", "９", "((((", "-0"]:
        score = gym_reward(f"<answer>{text}</answer>", problem)
        assert math.isfinite(score) and 0.0 <= score <= 1.0


def test_gym_reward_is_safe_with_any_scorer(chain_sums, monkeypatch):
    class Scorer:
        def score_answer(self, answer, entry):
            if answer == "crash":
                raise RuntimeError
            return float(answer)

    monkeypatch.setattr("rewards.gym._scorer", lambda name, config: Scorer())
    scores = [
        gym_reward(f"<answer>{text}</answer>", chain_sums[0])
        for text in ("crash", "nan", "inf", "7", "-7", "0.25")
    ]
    assert scores == [0.0, 0.0, 0.0, 1.0, 0.0, 0.25]


def test_gym_refuses_what_cannot_be_trained_on(chain_sums):
    with pytest.raises(ValueError, match="every answer as right"):
        GymProblems(name="game_of_life_halting")[0]
    with pytest.raises(ValueError, match="no gym_name"):
        gym_reward("<answer>1</answer>", MaxOf()[0])


# Order


def test_steps_cover_an_epoch_without_repetition():
    epoch = [problems_for_step(10, step, 3, seed=0) for step in range(3)]
    asked = [i for step in epoch for i in step]
    assert len(set(asked)) == 9 and set(asked) <= set(range(10))
    following = [i for step in range(3, 6) for i in problems_for_step(10, step, 3, seed=0)]
    assert len(set(following)) == 9 and following != asked


def test_order_is_a_function_of_seed_and_step():
    forwards = [problems_for_step(50, step, 4, seed=1) for step in range(40)]
    backwards = [problems_for_step(50, step, 4, seed=1) for step in reversed(range(40))]
    assert forwards == backwards[::-1]
    assert forwards != [problems_for_step(50, step, 4, seed=2) for step in range(40)]
    assert problems_for_step(5, 0, 3, seed=0) == [2, 4, 3]  # pinned: a resumed run depends on it


def test_a_step_larger_than_the_source_is_explained():
    assert sorted(problems_for_step(4, 7, 4, seed=0)) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="asks 6 .* holds 4: 6 - 4 = 2 too few"):
        problems_for_step(4, 0, 6, seed=0)
    with pytest.raises(ValueError, match="seed >= 0"):
        problems_for_step(4, 0, 2, seed=-1)


@pytest.mark.parametrize("length, count", [(10, 3), (12, 4), (5, 5), (7, 1)])
def test_draws_of_one_size_are_the_steps(length, count):
    cursor = 0
    for step in range(3 * length):
        drawn, cursor = draw(length, cursor, count, seed=3)
        assert drawn == problems_for_step(length, step, count, seed=3)


def test_draws_of_any_size_are_without_repetition_and_go_through_every_epoch():
    """By hand, of 10 problems: 4 and 5 of the first epoch, whose last cannot fill the next 4."""
    drawn, cursors = [], [0]
    for count in (4, 5, 4, 6, 10):
        some, cursor = draw(10, cursors[-1], count, seed=0)
        assert len(set(some)) == len(some) == count
        drawn.append(some)
        cursors.append(cursor)
    assert cursors == [0, 4, 9, 14, 20, 30]
    first, second = drawn[0] + drawn[1], drawn[2] + drawn[3]
    assert len(set(first)) == 9 and sorted(second) == sorted(drawn[4]) == list(range(10))
    assert second != drawn[4]
    assert draw(10, 0, 10, seed=1)[0] != draw(10, 0, 10, seed=0)[0]


@pytest.mark.parametrize("numbers", [(4, 0, 0, 0), (4, -1, 2, 0), (4, 0, 2, -1)])
def test_draws_out_of_range_are_refused(numbers):
    with pytest.raises(ValueError, match="need count >= 1, cursor >= 0, seed >= 0"):
        draw(*numbers)
    with pytest.raises(ValueError, match="need step >= 0"):
        problems_for_step(4, -1, 2, seed=0)


def test_a_mixture_gives_each_source_its_share_once_each():
    shares = (0.5, 0.3, 0.2)
    parts = tuple((share, DigitChain(size=40, seed=n)) for n, share in enumerate(shares))
    mixture = Mixture(parts=parts, size=40)
    problems = [mixture[i] for i in range(40)]
    assert len({problem.uid for problem in problems}) == 40
    of_part = [problem.uid.split("/")[0] for problem in problems]
    assert [of_part.count(part) for part in "012"] == [20, 12, 8]
    assert of_part != sorted(of_part)  # mixed
    assert [mixture[i] for i in range(40)] == problems
    assert of_part != [Mixture(parts=parts, size=40, seed=1)[i].uid[0] for i in range(40)]
    with pytest.raises(IndexError):
        mixture[40]


def test_a_mixture_that_cannot_be_is_an_error():
    few = DigitChain(size=4)
    with pytest.raises(ValueError, match="shares of a mixture must add up to 1"):
        Mixture(parts=((0.5, few), (0.6, few)), size=4)[0]
    with pytest.raises(ValueError, match="part 1 of the mixture is to give 5 problems, it has 4"):
        Mixture(parts=((0.5, DigitChain(size=5)), (0.5, few)), size=10)[0]
