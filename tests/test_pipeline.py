"""A pipeline runs each stage once, in order, again when something it depends on has changed."""

import copy
import dataclasses
import functools
import json
import shutil
import sys

import pytest
from absl import flags, logging
from absl.testing import flagsaver

from grpo.config import Config, ModelConfig, SftConfig
from grpo.data.procedural import DigitChain
from grpo.data.sources import JsonlProblems
from grpo.data.tokenizer import ByteTokenizer
from grpo.model.params import active_params
from grpo.pipeline import Pipeline, Stage
from grpo.pipeline.__main__ import main, plan_lines
from grpo.pipeline.chain import check_pipeline
from grpo.pipeline.costs import expected_cost
from grpo.pipeline.manifest import Manifest, own_code, stage_key
from grpo.pipeline.run import run_pipeline
from grpo.pipeline.scores import Row, draw_scores, headings, scores_console, scores_markdown
from grpo.planning.chips import parse_topology
from grpo.source import new_arch
from grpo.stages.rejection import sample_traces
from grpo.stages.supervise import supervise
from grpo.train import train

RAN: list[str] = []


@pytest.fixture(autouse=True)
def _nothing_ran():
    RAN.clear()


def model(config, workdir, baseline):
    """A stage whose model is a digest of its seed and of the model it began from."""
    RAN.append(workdir.name)
    text = f"{config.seed} {config.model.source and _read(config.model.source)}"
    (workdir / "result.json").write_text(json.dumps({"params_sha256": text}))


def _read(folder):
    with open(f"{folder}/result.json") as file:
        return json.load(file)["params_sha256"]


def traces(config, workdir, baseline):
    RAN.append(workdir.name)
    row = {"uid": "a", "prompt": "1+1=", "answer": 2, "worked": _read(config.model.source)}
    (workdir / "traces.jsonl").write_text(json.dumps(row) + "\n")


def learner(config, workdir, baseline):
    RAN.append(workdir.name)
    text = config.sft.source[0].meta["worked"]
    (workdir / "result.json").write_text(json.dumps({"params_sha256": f"learnt {text}"}))


def chain(**seeds) -> Pipeline:
    learning = Config(sft=SftConfig(source=JsonlProblems(path="", answer_field="answer")))
    stages = (
        Stage("base", model, Config(seed=seeds.get("base", 1)), about="begins"),
        Stage("other", model, Config(seed=seeds.get("other", 2))),
        Stage("tuned", model, Config(seed=seeds.get("tuned", 3)), {"model.source": "base"}),
        Stage("data", traces, Config(), {"model.source": "tuned"}),
        Stage("child", learner, learning, {"sft.source.path": "data"}),
    )
    return Pipeline(stages)


ALL = ["base", "other", "tuned", "data", "child"]


def test_stages_run_in_order_and_take_what_earlier_ones_made(tmp_path):
    made = run_pipeline(chain(), tmp_path)
    assert ALL == RAN == list(made)
    assert made["tuned"].sha256 == "3 1 " and made["child"].sha256 == "learnt 3 1 "
    assert made["data"].path == tmp_path / "data" / "traces.jsonl"
    RAN.clear()
    again = run_pipeline(chain(), tmp_path)
    assert RAN == [] and again == made


def test_a_changed_stage_runs_again_and_so_does_what_depends_on_it(tmp_path):
    run_pipeline(chain(), tmp_path)
    RAN.clear()
    made = run_pipeline(chain(tuned=4), tmp_path)
    assert RAN == ["tuned", "data", "child"]
    assert made["child"].sha256 == "learnt 4 1 "
    kept = sorted(path.name for path in (tmp_path / "replaced").iterdir())
    assert kept == ["child.1", "data.1", "tuned.1"]
    assert _read(tmp_path / "replaced" / "tuned.1") == "3 1 "


def test_what_is_replaced_takes_the_first_free_name(tmp_path):
    def kept():
        return {path.name: _read(path) for path in (tmp_path / "replaced").glob("tuned.*")}

    for seed in (3, 4, 5):
        run_pipeline(chain(tuned=seed), tmp_path)
    assert kept() == {"tuned.1": "3 1 ", "tuned.2": "4 1 "}
    shutil.rmtree(tmp_path / "replaced" / "tuned.1")  # somebody makes room
    run_pipeline(chain(tuned=6), tmp_path)
    run_pipeline(chain(tuned=7), tmp_path)
    assert kept() == {"tuned.1": "5 1 ", "tuned.2": "4 1 ", "tuned.3": "6 1 "}


def test_an_output_that_stays_the_same_spares_what_depends_on_it(tmp_path):
    run_pipeline(chain(), tmp_path)
    first = chain()
    # Another configuration that makes the same bytes.
    changed = Config(seed=1, num_steps=7)
    stages = (dataclasses.replace(first.stages[0], config=changed), *first.stages[1:])
    RAN.clear()
    run_pipeline(Pipeline(stages), tmp_path)
    assert RAN == ["base"]


def test_what_was_tampered_with_is_made_again(tmp_path):
    run_pipeline(chain(), tmp_path)
    (tmp_path / "data" / "traces.jsonl").write_text("")
    RAN.clear()
    run_pipeline(chain(), tmp_path)
    assert RAN == ["data"]  # it makes the same bytes, so its child stays


def test_a_stage_that_fails_leaves_earlier_ones_finished(tmp_path):
    def fails(config, workdir, baseline):
        (workdir / "half.txt").write_text("done so far")
        raise ValueError("no disk")

    whole = chain()
    broken = Pipeline((*whole.stages[:3], dataclasses.replace(whole.stages[3], run=fails)))
    with pytest.raises(ValueError, match="no disk"):
        run_pipeline(broken, tmp_path)
    RAN.clear()
    assert "4. data: runs: was stopped half-way" in "\n".join(plan_lines(broken, tmp_path))
    with pytest.raises(ValueError, match="no disk"):
        run_pipeline(broken, tmp_path)
    assert RAN == [] and (tmp_path / "data" / "half.txt").exists()  # it goes on in its folder
    run_pipeline(whole, tmp_path)
    assert RAN == ["data", "child"]
    assert (tmp_path / "replaced" / "data.1" / "half.txt").exists()


def test_only_the_named_stages_run(tmp_path):
    run_pipeline(chain(), tmp_path, ["base", "tuned"])
    assert RAN == ["base", "tuned"]
    run_pipeline(chain(), tmp_path, ["data"])
    assert RAN == ["base", "tuned", "data"]
    with pytest.raises(ValueError, match="no stage 'dta'; there are base, other"):
        run_pipeline(chain(), tmp_path, ["dta"])


def test_a_named_stage_needs_what_it_takes(tmp_path):
    with pytest.raises(ValueError, match="'data' takes from tuned, to be run first"):
        run_pipeline(chain(), tmp_path, ["data"])


def test_a_dry_run_says_what_and_why_and_runs_nothing(tmp_path):
    text = "\n".join(plan_lines(chain(), tmp_path))
    assert "1. base: runs: was not run yet\n      begins\n" in text
    assert "3. tuned: runs: takes from base, to be run first" in text
    run_pipeline(chain(), tmp_path)
    RAN.clear()
    text = "\n".join(plan_lines(chain(tuned=5), tmp_path))
    assert "2. other: finished" in text and "took 0 s when it last ran" in text
    assert "3. tuned: runs: its configuration or code has changed" in text
    assert RAN == []


def test_a_dry_run_of_some_stages_tells_what_a_run_of_them_would_do(tmp_path):
    text = "\n".join(plan_lines(chain(), tmp_path, only=["base", "tuned"]))
    assert "1. base: runs: was not run yet\n" in text
    assert "2. other: left out; it was not run yet\n 3. tuned: runs: takes from base" in text
    assert text.endswith(" 5. child: left out; it takes from data, to be run first")
    for command in (
        lambda: list(plan_lines(chain(), tmp_path, only=["base", "data"])),
        lambda: run_pipeline(chain(), tmp_path, ["base", "data"]),
    ):
        with pytest.raises(ValueError, match="^stage 'data' takes from tuned, to be run first$"):
            command()
    text = "\n".join(plan_lines(chain(), tmp_path, only=["tuned"]))
    assert "1. base: finished" in text and "3. tuned: runs: was not run yet" in text
    with pytest.raises(ValueError, match="no stage 'dta'; there are base, other"):
        next(plan_lines(chain(), tmp_path, only=["dta"]))


FILE = """
from grpo.config import Config
from grpo.pipeline import Pipeline, Stage


def stage(config, workdir, baseline):
    (workdir / "result.json").write_text('{"params_sha256": "1"}')


def get_pipeline():
    return Pipeline((Stage("a", stage, Config()), Stage("b", stage, Config())))
"""


@pytest.fixture
def command_line(monkeypatch, tmp_path):
    """Runs a command line in this process; what it ended with."""
    (tmp_path / "file.py").write_text(FILE)
    verbosity = logging.get_verbosity()
    # Other commands that a test has imported may have flags of the same names.
    named = ("config", "workdir", "stages", "dry_run", "topology")
    others = {name: flags.FLAGS[name] for name in named if name in flags.FLAGS}
    for name in others:
        delattr(flags.FLAGS, name)

    def call(*arguments):
        line = [f"--config={tmp_path / 'file.py'}", f"--workdir={tmp_path / 'run'}", *arguments]
        monkeypatch.setattr(sys, "argv", ["pipeline", *line])
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code

    yield call
    logging.set_verbosity(verbosity)
    for name, flag in others.items():
        flags.FLAGS[name] = flag


def test_the_command_runs_the_named_stages_or_tells_of_them(command_line, tmp_path, capsys):
    assert not command_line("--dry_run", "--stages=b")
    said = capsys.readouterr().out
    assert "1. a: left out; it was not run yet" in said and "2. b: runs: was not" in said
    assert not (tmp_path / "run").exists()
    assert not command_line("--stages=b")
    assert (tmp_path / "run" / "b").is_dir() and not (tmp_path / "run" / "a").exists()


def test_a_topology_is_for_a_dry_run(command_line, tmp_path):
    said = command_line("--topology=v5e:4x4")
    assert said.startswith("error: --topology=v5e:4x4 is ") and "add --dry_run, or leave" in said
    assert not (tmp_path / "run").exists()


def test_the_manifest_tells_the_lineage(tmp_path):
    run_pipeline(chain(), tmp_path)
    lines = Manifest(tmp_path / "manifest.json").lineage("child")
    assert [line.strip().partition(":")[0] for line in lines] == [
        "child",
        "sft.source.path from",
        "data",
        "model.source from",
        "tuned",
        "model.source from",
        "base",
    ]
    assert (tmp_path / "lineage.txt").read_text().splitlines() == lines
    entry = Manifest(tmp_path / "manifest.json").entry("tuned")
    assert entry["inputs"] == {"model.source": {"stage": "base", "sha256": "1 "}}
    assert entry["output"] == {"kind": "model", "sha256": "3 1 "}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((Stage("a", model, Config()), Stage("a", model, Config())), "two stages 'a'"),
        ((Stage("a/b", model, Config()),), "'a/b': a name has letters"),
        ((Stage("a", model, Config(), {"model.source": "b"}),), "'b', which is no earlier stage"),
        (
            (Stage("a", model, Config()), Stage("b", model, Config(), {"model.sauce": "a"})),
            "'b': its configuration has no field 'model.sauce'",
        ),
        (
            (Stage("a", model, Config()), Stage("b", model, Config(), {"sft.source.path": "a"})),
            "no field 'sft.source.path'",
        ),
    ],
)
def test_a_pipeline_that_cannot_work_is_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        check_pipeline(Pipeline(stages))


def test_a_broken_manifest_is_named(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is no JSON"):
        run_pipeline(chain(), tmp_path)


def test_the_key_follows_configuration_inputs_and_the_users_code():
    def reward_of(text):
        names: dict = {}
        exec(compile(text, "x.py", "exec"), names)  # without a source that can be found
        return names["reward"]

    key = functools.partial(stage_key, model)
    assert key(Config(), {}) == key(Config(), {})
    assert key(Config(seed=1), {}) != key(Config(), {})
    assert key(Config(), {"model.source": "a"}) != key(Config(), {"model.source": "b"})
    assert list(own_code(reward_of("def reward(c, p): return 1.0"))) == []
    assert list(own_code(DigitChain())) == []  # this package's own
    [source] = own_code(functools.partial(traces, workdir=(model_again := None)))
    assert source.startswith("def traces(") and model_again is None
    assert [text.splitlines()[1] for text in own_code({"a": Thing(learner)})] == [
        "    RAN.append(workdir.name)",
        "class Thing:",
    ]


@dataclasses.dataclass
class Thing:
    function: object


# ---- Scores ------------------------------------------------------------------------------------

ROWS = [
    Row("zero", "pure RL", {"eval/pass_at_1": 0.5, "eval/full/form": 0.25}, 61.0),
    Row(
        "one",
        "",
        {
            "eval/pass_at_1": 0.75,
            "eval/pass_at_1_low": 0.7,
            "eval/pass_at_1_high": 0.8,
            "eval/pass_at_2": 0.8,
            "eval/pass_at_4": 0.9,
            "eval/maj_at_4": 0.85,
            "eval/full/form": 1.0,
            "eval/length_tokens_mean": 31.26,
        },
        3600.0,
    ),
]
COLUMNS = {"format": "eval/full/form"}


def test_the_table_of_scores():
    assert list(headings(ROWS, COLUMNS)) == ["pass@1", "pass@4", "maj@4", "format", "tokens"]
    lines = scores_markdown(ROWS, COLUMNS).splitlines()
    assert lines[0] == "| stage | pass@1 | pass@4 | maj@4 | format | tokens | took |"
    assert lines[2] == "| zero | 0.500 | - | - | 0.250 | - | 0:01:01 |"
    assert lines[3] == "| one | 0.750 [0.700, 0.800] | 0.900 | 0.850 | 1.000 | 31.3 | 1:00:00 |"
    assert lines[5] == "- zero: pure RL"
    assert len({len(line) for line in scores_console(ROWS, COLUMNS).splitlines()}) == 1


def test_the_picture_of_scores(tmp_path):
    draw_scores(ROWS, COLUMNS, tmp_path / "scores.png")
    assert (tmp_path / "scores.png").read_bytes()[:4] == b"\x89PNG"


def test_the_configuration_of_a_pipeline_is_left_as_it_was(tmp_path):
    whole = chain()
    before = copy.deepcopy(whole)
    run_pipeline(whole, tmp_path)
    assert whole.stages[2].config.model == before.stages[2].config.model == ModelConfig()


# ---- Costs -------------------------------------------------------------------------------------


def rl_config() -> Config:
    config = Config(num_steps=10)
    config.algo.problems_per_step, config.algo.group_size = 4, 8
    config.sample.max_new_tokens, config.data.max_prompt_tokens = 100, 20
    return config


def test_what_stages_cost():
    arch = new_arch(ModelConfig(), ByteTokenizer().vocab_size)
    N = active_params(arch)
    rl = expected_cost(train, rl_config(), arch)
    assert (rl.completions, rl.sampled_tokens, rl.updates) == (320, 16_000, 10)
    assert rl.learnt_tokens == 16_000 + 40 * 10
    assert rl.flops == pytest.approx(8 * N * rl.learnt_tokens)
    config = rl_config()
    config.algo.kl_coef = 0.1  # one more pass forward, of the reference
    assert expected_cost(train, config, arch).flops == pytest.approx(10 * N * rl.learnt_tokens)
    config.sft.num_steps, config.sft.rows_per_step = 5, 2
    sft = expected_cost(supervise, config, arch)
    assert (sft.completions, sft.updates, sft.learnt_tokens) == (0, 5, 600)
    assert sft.flops == pytest.approx(6 * N * 600)
    config.rejection.num_problems, config.rejection.num_samples = 7, 3
    config.data.train = DigitChain()
    sampled = expected_cost(sample_traces, config, arch)
    assert (sampled.completions, sampled.sampled_tokens) == (21, 1_050)
    assert sampled.flops == pytest.approx(2 * N * (1_050 + 70))
    assert str(expected_cost(model, config, arch)) == "no model work"
    assert "320 completions, about 16k tokens sampled" in str(rl)


def test_hours_follow_the_chips_speed():
    arch = new_arch(ModelConfig(), ByteTokenizer().vocab_size)
    config = Config()
    config.sft.num_steps = 1_000
    slow = expected_cost(supervise, config, arch, parse_topology("v5e:2x2"))
    fast = expected_cost(supervise, config, arch, parse_topology("v5e:4x4"))
    assert slow.hours is not None and fast.hours is not None
    assert slow.hours == pytest.approx(4 * fast.hours)
    assert fast.hours == pytest.approx(fast.flops / (16 * 1.97e14 * 0.4) / 3600)
