"""Chat: what a reader sees of a completion, and what the model is asked."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_export import TEMPLATE
from tiny_experiment import get_config

from grpo import runinfo
from grpo.chat import answer, talk
from grpo.data.sources import PromptForm
from grpo.data.tokenizer import ByteTokenizer
from grpo.engine.engine import Request
from grpo.model.arch import Arch
from grpo.model.params import init_params
from grpo.sharding import make_mesh
from grpo.source import Source
from grpo.structs import Completion, Scores
from grpo.talk.group_view import Asking, asking, parse_reference, show_group, table
from grpo.talk.speaker import Conversation, Speaker, make_filters, make_speaker
from grpo.talk.terminal import Piece, TextStream, ThoughtStream, opens_thought, shown
from rewards.answers import last_number

# ---- text --------------------------------------------------------------------------------------


def test_text_comes_as_soon_as_it_is_certain():
    text = "ab é日\U0001f600 z"
    for size in (1, 2, 3, 100):
        stream, ids = TextStream(ByteTokenizer()), [*text.encode(), 257]
        said = [stream.add(ids[i : i + size]) for i in range(0, len(ids), size)]
        assert "".join(said) == text and stream.end() == ""
        assert not any("\ufffd" in piece for piece in said)
    stream = TextStream(ByteTokenizer())
    assert [stream.add([97]), stream.add([195]), stream.end()] == ["a", "", "\ufffd"]


THOUGHTS = [
    ("<think>a</think>b", [("<think>a</think>", True), ("b", False)]),
    ("x<thin <think>y", [("x<thin ", False), ("<think>y", True)]),
    ("</think>b<", [("</think>b<", False)]),
    ("<think><think></think></think>", [("<think><think></think>", True), ("</think>", False)]),
]


@pytest.mark.parametrize(("text", "expected"), THOUGHTS)
def test_thoughts_are_found_wherever_the_text_is_cut(text, expected):
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            stream = ThoughtStream()
            parts = (text[:first], text[first:second], text[second:])
            pieces = [piece for part in parts for piece in stream.add(part)]
            assert merged([*pieces, *stream.end()]) == expected


def merged(pieces: Sequence[Piece]) -> list[tuple[str, bool]]:
    """Neighbours of one kind as one piece."""
    found: list[tuple[str, bool]] = []
    for text, thought in pieces:
        if found and found[-1][1] == thought:
            found[-1] = (found[-1][0] + text, thought)
        else:
            found.append((text, thought))
    return found


def test_a_thought_that_the_prompt_opened_goes_on():
    assert opens_thought("<|model|><think>\n") and not opens_thought("<think>a</think>b")
    assert not opens_thought("hello")
    pieces = [*ThoughtStream(thinking=True).add("a</think>b")]
    assert pieces == [Piece("a</think>", True), Piece("b", False)]


def test_no_text_commands_the_terminal():
    assert shown(Piece("a\x1b[31m\r\tb\n", False), colour=True) == "a\\x1b[31m\\x0d    b\n"
    assert shown(Piece("a", True), colour=True) == "\x1b[2ma\x1b[0m"
    assert shown(Piece("a", True), colour=False) == "a"


# ---- conversation ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ChatTokenizer(ByteTokenizer):
    chat_template: str | None = TEMPLATE


def test_a_conversation_grows_and_forgets_its_oldest_turns():
    tokenizer = ChatTokenizer()
    talk = Conversation(tokenizer, max_prompt=70)
    assert tokenizer.decode(talk.ask("one")[0]) == "<|user|>one<|end|><|model|>"
    talk.answered("two")
    ids, forgotten = talk.ask("three")
    assert tokenizer.decode(ids) == (
        "<|user|>one<|end|><|user|>two<|end|><|user|>three<|end|><|model|>"
    )
    assert forgotten == 0
    talk.answered("four")
    ids, forgotten = talk.ask("five")
    assert tokenizer.decode(ids) == (
        "<|user|>three<|end|><|user|>four<|end|><|user|>five<|end|><|model|>"
    )
    assert forgotten == 2
    before = list(talk.turns)
    with pytest.raises(ValueError, match="that is 124 tokens, 70 are allowed"):
        talk.ask("x" * 100)
    assert talk.turns == before
    talk.system = "be"
    assert tokenizer.decode(talk.ask("six")[0]).startswith("<|user|>be<|end|>")


def test_without_a_template_each_line_stands_alone():
    talk = Conversation(ByteTokenizer(), max_prompt=8)
    assert talk.ask("1+9=") == ([49, 43, 57, 61], 0)
    talk.answered("10")
    assert talk.ask("2+2=")[0] == [50, 43, 50, 61]


# ---- a model that answers ----------------------------------------------------------------------

ARCH = Arch(
    vocab_size=258, width=16, mlp_width=32, num_layers=1, num_heads=2, num_kv_heads=2, head_width=8
)


class RandomSource(Source):
    """Random weights, not read from anywhere."""

    def read(self, shardings, keep=None):
        return jax.device_put(init_params(ARCH, jax.random.key(3)), shardings)


@pytest.fixture(scope="module")
def speaker() -> Iterator[Speaker]:
    source = RandomSource(ARCH, ChatTokenizer(), None)
    mesh = make_mesh(1, 1, 1, chosen=jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield make_speaker(source, mesh, group_size=3, max_prompt=1024, max_new=20, temperature=1.0)


def test_everything_heard_is_what_was_said(speaker):
    """Also where more samples are wanted than there are slots."""
    heard: dict[tuple[int, int], list[int]] = {}
    sizes = []

    def hear(request: int, sample: int, tokens: Sequence[int]) -> None:
        heard.setdefault((request, sample), []).extend(tokens)
        sizes.append(len(tokens))

    requests = [Request([1, 2, 3], 7, 4), Request([4, 5], 8, 2)]
    engine = speaker.engine(3)
    completions = list(
        engine.run(speaker.weights, requests, jax.random.key(0), temperature=1.0, heard=hear)
    )
    assert heard == {(c.problem, c.sample): list(c.tokens) for c in completions}
    assert len(completions) == 6 and max(sizes) <= 8 < max(len(c.tokens) for c in completions)


def test_prompts_get_an_engine_of_their_size(speaker):
    assert speaker.engine(3) is speaker.engine(256)
    assert [speaker.engine(n).max_prompt for n in (257, 1024)] == [1024, 1024]


def test_talking_streams_what_the_engine_says(speaker):
    lines = iter(["hello", "", "/system be brief", "again"])
    shown_text: list[str] = []

    def read() -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    conversation = Conversation(speaker.tokenizer, 256)
    talk(speaker, conversation, read, shown_text.append, colour=False)
    assert conversation.system == "be brief" and len(conversation.turns) == 2
    prompt, _ = Conversation(speaker.tokenizer, 256, "be brief").ask("again")
    said = speaker.say(prompt, 1, lambda tokens: None)
    assert conversation.turns[1]["content"] == speaker.tokenizer.decode(said.tokens)
    assert len(shown_text) > 4 and shown_text[-1] == "\n"
    assert sum("cut off at --max_new_tokens" in text for text in shown_text) >= 1


def test_an_answer_that_is_interrupted_is_kept(speaker, monkeypatch):
    def say(self, prompt, turn, heard):
        heard([104, 105])
        raise KeyboardInterrupt

    monkeypatch.setattr(Speaker, "say", say)
    written: list[str] = []
    assert answer(speaker, [1], 0, written.append, colour=False) == "hi"
    assert "".join(written) == "hi (cut off)\n"


def test_filters_are_off_where_nothing_is_filtered():
    assert make_filters(0, 1.0, 0.0) is None
    filters = make_filters(5, 1.0, 0.0)
    assert filters is not None and (filters.top_k, filters.top_p, filters.min_p) == (5, 1, 0)


# ---- a group -----------------------------------------------------------------------------------


def test_a_group_is_judged_and_shown(speaker):
    asked = Asking(PromptForm(raw=True), ((2.0, last_number),))
    lines: list[str] = []
    problem = asked.problem("1+9=", "10")
    assert (problem.prompt, problem.reference) == ("1+9=", 10)
    show_group(speaker, asked, problem, 3, lines.append, colour=False)
    assert lines[0] == "--- prompt, 4 tokens\n1+9="
    assert [line for line in lines if line.startswith("--- ")][1:] == ["--- 0", "--- 1", "--- 2"]
    assert "2 x last_number" in lines[-5] and lines[-1].split()[0] == "mean"
    judged = lines[2:7:2]
    plain: list[str] = []
    show_group(speaker, Asking(PromptForm(raw=True), ()), problem, 3, plain.append, colour=False)
    assert plain[2:7:2] == judged and "reward" not in plain[-4]


def test_the_table_by_hand():
    completions = [
        Completion(0, 0, (1, 2), np.zeros(2, np.float32), "eos"),
        Completion(0, 1, (1, 2, 3), np.zeros(3, np.float32), "length"),
    ]
    scores = Scores(
        reward_PG=np.array([[1.25, 0.0]], np.float32),
        valid_PG=np.array([[True, False]]),
        components={"right": np.array([[1.0, 0.0]]), "form": np.array([[0.5, 1.0]])},
        weights={"right": 1.0, "form": 0.5},
        statuses={"right": ["ok", "crash"], "form": ["ok", "ok"]},
    )
    assert table(completions, scores) == [
        "sample  tokens  ended by   reward  1 x right  0.5 x form",
        "     0       2       eos    1.250      1.000       0.500",
        "     1       3    length  invalid      crash       1.000",
        "  mean                      1.250",
    ]
    assert table(completions, None)[1] == "     0       2       eos"


def test_how_to_ask_comes_from_flags_experiment_or_run(tmp_path):
    plain = Source(ARCH, ByteTokenizer(), None)
    assert asking(plain) == Asking(PromptForm(raw=True), ())
    assert not asking(Source(ARCH, ChatTokenizer(), None)).form.raw
    named = asking(plain, rewards=["rewards.answers:last_number"])
    assert named.rewards == ((1.0, last_number),)

    experiment = Path(__file__).parent / "tiny_experiment.py"
    of_experiment = asking(plain, str(experiment))
    assert of_experiment.form.ask("1+1=") == {"prompt": "1+1="}
    assert [weight for weight, _ in of_experiment.rewards] == [1.0, 0.5]
    assert of_experiment.deadline_s == 10.0

    config = get_config()
    config.reward.functions = ((0.5, last_number),)
    runinfo.write(config, tmp_path)
    run = dataclasses.replace(plain, workdir=tmp_path)
    assert asking(run).rewards == ((0.5, last_number),)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["data"]["train"]["question_template"] = "Q: {question}"
    stored["reward"]["functions"] = [[1.0, "mine.get_config.<locals>.even"]]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"even cannot be found by its name .*--config=FILE"):
        asking(run)
    by_name = asking(run, rewards=["rewards.answers:last_number"])
    assert by_name.form.ask("2")["prompt"] == "Q: 2"


@pytest.mark.parametrize(
    ("text", "value"),
    [(None, None), ("5", 5), ("[1, 2]", [1, 2]), ('"5"', "5"), ("x + 1", "x + 1"), ("", "")],
)
def test_references_are_json_or_text(text, value):
    assert parse_reference(text) == value


def test_random_weights_are_what_is_sampled_from(speaker):
    """The decode form the speaker holds is that of its source, in the type of a CPU."""
    leaf = speaker.weights["embed"]
    expected = init_params(ARCH, jax.random.key(3))["embed"]
    assert leaf.dtype == jnp.float32
    np.testing.assert_array_equal(leaf, expected)
