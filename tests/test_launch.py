"""The command line: what it sets, and one clear line for every mistake."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import logging
from absl.testing import flagsaver

from grpo import presets
from grpo.config import Config
from grpo.gates import GateError
from grpo.launch import load_experiment, main
from grpo.scoring import RewardFailure
from grpo.train import train

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny_experiment.py"


@pytest.fixture
def launch(monkeypatch, tmp_path):
    """Runs a command line in this process; gives what the command was called with."""
    verbosity = logging.get_verbosity()

    def call(*arguments, command=None, config=TINY):
        called = []
        line = [f"--config={config}", f"--workdir={tmp_path / 'run'}", *arguments]
        monkeypatch.setattr(sys, "argv", ["launch", *line])
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
            main(command or (lambda *args, **named: called.append((*args, named["baseline"]))))
        return called[0] if called else ended.value.code

    yield call
    logging.set_verbosity(verbosity)


def test_fields_are_set_and_the_baseline_keeps_what_the_file_says(launch, tmp_path):
    config, workdir, baseline = launch(
        "--config.algo.group_size=8",
        "--config.algo.mask_truncated=true",
        "--config.optim.learning_rate=3",
        "--config.sample.stop_strings=('a', 'b')",
        "--config.data.train.size=50",
    )
    assert workdir == tmp_path / "run"
    assert (config.algo.group_size, baseline.algo.group_size) == (8, 4)
    assert (config.algo.mask_truncated, baseline.algo.mask_truncated) == (True, False)
    assert config.optim.learning_rate == 3.0 and config.sample.stop_strings == ("a", "b")
    assert (config.data.train.size, baseline.data.train.size) == (50, 40)


# ---- Presets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_changes_the_experiment_and_the_baseline_alike(launch, name):
    config, _, baseline = launch(f"--preset={name}")
    expected = load_experiment(str(TINY))()
    presets.apply(expected, name)
    assert config.algo == baseline.algo == expected.algo


def test_without_a_preset_the_experiment_stands(launch):
    config, _, _ = launch()
    assert config.algo == load_experiment(str(TINY))().algo


@pytest.mark.parametrize("preset_first", [True, False])
def test_fields_set_on_the_command_line_win_over_the_preset(launch, preset_first):
    fields = ["--config.algo.clip_high=0.5", "--config.algo.minibatches=1"]
    fields += ["--config.algo.overlong_buffer_tokens=3", "--config.sample.stop_strings=('a',)"]
    arguments = ["--preset=dapo", *fields] if preset_first else [*fields, "--preset=dapo"]
    config, _, baseline = launch(*arguments)
    algo = config.algo
    assert (algo.clip_high, algo.minibatches, algo.overlong_buffer_tokens) == (0.5, 1, 3)
    assert algo.dynamic_rounds == 9  # the rest is the preset's
    assert config.sample.stop_strings == ("a",)
    assert (baseline.algo.clip_high, baseline.algo.minibatches) == (0.28, 4)


def test_a_preset_sees_the_numbers_of_the_command_line(launch):
    config, _, baseline = launch("--preset=dapo", "--config.sample.max_new_tokens=20")
    assert config.algo.overlong_buffer_tokens == 4  # a fifth
    assert baseline.algo.overlong_buffer_tokens == 48 // 5
    config, _, _ = launch("--preset=gspo", "--config.algo.passes=2")
    assert config.algo.minibatches == 1  # two updates already


@pytest.fixture
def only_built(monkeypatch):
    """A run ends where it would begin: everything has been checked by then."""

    def begin(*_):
        raise ValueError("it would begin")

    monkeypatch.setattr("grpo.runinfo.write", begin)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--preset=dapo", "--config.sample.max_new_tokens=20", "--config.algo.clip_low=0.1"],
        ["--preset=pass_at_k", "--config.algo.group_size=8"],  # pass_k: 4, of the baseline 2
        ["--preset=r1_zero", "--config.algo.ref_every=2", "--config.algo.curriculum=3"],
    ],
)
def test_what_a_preset_sets_is_used(launch, only_built, arguments):
    assert launch(*arguments, command=train).startswith("error: it would begin")


def test_samples_that_will_all_be_the_same_are_spoken_of(launch, only_built, capsys):
    launch("--config.eval.temperature=0", command=train)
    said = capsys.readouterr().out
    assert "the 4 samples of a held-out problem will be the same text; eval.num_samples=1" in said
    launch("--config.eval.temperature=0", "--config.eval.num_samples=1", command=train)
    assert "the same text" not in capsys.readouterr().out


def test_numbers_of_the_evaluation_may_be_set_or_left_to_the_run(launch):
    assert launch()[0].eval.temperature is None
    config, _, _ = launch("--config.eval.temperature=0.6", "--config.eval.top_p=0.95")
    assert (config.eval.temperature, config.eval.top_p) == (0.6, 0.95)


# ---- Mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--config.algo.groupsize=4"],
            "--config.algo.groupsize: AlgoConfig has no field 'groupsize'; it has ['advantage', "
            "'aggregate', 'clip_high', 'clip_low',",
        ),
        (["--config.algos.group_size=4"], "Config has no field 'algos'; it has ['algo', 'data',"),
        (["--config.data.train.sizes=4"], "DigitChain has no field 'sizes'; it has"),
        (["--config.seed.x=4"], "int has no field 'x'"),
        (["--config.algo.group_size=abc"], "--config.algo.group_size=abc: invalid literal for int"),
        (["--config.algo.group_size=4.5"], "--config.algo.group_size=4.5: invalid literal for int"),
        (["--config.eval.answer_of=f"], "config.eval.answer_of is not supported for overriding"),
        (
            ["--preset=dappo"],
            "flag --preset=dappo: value should be one of <grpo|r1_zero|dr_grpo|dapo|",
        ),
        (["--preset=dapo", "--config.algo.groupsize=4"], "AlgoConfig has no field 'groupsize'"),
        (["--preset=dapo", "--config.algo.group_size=abc"], "invalid literal for int"),
        (["--confg.seed=1"], "Unknown command line flag 'confg.seed'"),
        (["seed=1"], "unexpected arguments ['seed=1']; fields are set by --config.x=y"),
    ],
)
def test_a_mistyped_command_line(launch, arguments, message):
    said = launch(*arguments)
    assert said.startswith("error: ") and message in said and said.count("\n") <= 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.algo.minibatches=3"], "(4) x group_size (4) = 16 rows cannot be split into 3"),
        (["--config.sample.slots=6"], "sample.slots (6) must be a multiple of data x fsdp = 4"),
        (["--config.mesh.data=3"], "3 x 2 x 2 = 12 devices, there are 8"),
        (
            ["--config.model.num_heads=3"],
            "model.width (16) must be a multiple of model.num_heads (3)",
        ),
        (["--config.algo.problems_per_step=48"], "data.train has only 40 usable problems"),
        (["--config.sft.rows_per_step=48"], "there are only 40 worked problems"),
        (["--config.reward.gold_format={gold}!"], "config.reward.gold_format='{gold}!' (a right"),
        (
            ["--config.sft.num_steps=0", "--config.sft.learning_rate=1"],
            "config.sft.learning_rate=1.0 (peak",
        ),
        (["--config.optim.end_share=0.5"], "config.optim.end_share=0.5 (share of the peak"),
        (["--config.algo.dual_clip=4"], "config.algo.dual_clip=4.0 (loss.dual_clipped"),
        (["--preset=rloo", "--config.algo.clip_high=0.3"], "config.algo.clip_high=0.3 (how far"),
        (
            ["--config.algo.curriculum=11"],
            "algo.curriculum (11) x problems_per_step (4) = 44 problems to choose from, but "
            "data.train has only 40",
        ),
        (
            ["--config.eval.temperature=0", "--config.eval.top_k=4"],
            "config.eval.top_k=4 (only this many likeliest",
        ),
        (["--config.eval.every=0", "--config.eval.num_samples=8"], "config.eval.num_samples=8 ("),
        (["--config.model.source=/nowhere"], "/nowhere"),
    ],
)
def test_an_impossible_run_is_refused_before_it_begins(
    launch, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setattr("grpo.runinfo.write", lambda *_: pytest.fail("the run began"))
    said = launch(*arguments, command=train)
    assert said.startswith("error: ") and message in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [ValueError, OSError, RewardFailure, GateError])
def test_an_error_of_the_run_is_one_message_unless_more_is_asked_for(launch, error):
    def command(*_, **__):
        raise error("what went wrong")

    assert launch(command=command).startswith("error: what went wrong\n")
    with pytest.raises(error):
        launch("--verbosity=1", command=command)


def test_a_bug_keeps_its_traceback(launch):
    def command(*_, **__):
        raise AssertionError("a bug")

    with pytest.raises(AssertionError):
        launch(command=command)


# ---- Experiment files --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, message",
    [
        ("x = 1", "it defines no get_config()"),
        ("def get_config():\n  return {'a': 1}", "must return a grpo.config.Config, not {'a': 1}"),
        ("def get_config():\n  pass", "must return a grpo.config.Config, not None"),
        (
            "import absent_module",
            "it raises ModuleNotFoundError: No module named 'absent_module' (l",
        ),
        ("\n\nx = 1 / 0", "it raises ZeroDivisionError: division by zero (line 3)"),
        ("def get_config(:", "it raises SyntaxError: invalid syntax (mine.py, line 1)"),
        (
            "from grpo.config import Config\ndef get_config():\n  c = Config()\n  c.sed = 1",
            "Did you mean 'seed'? (line 4)",
        ),
    ],
)
def test_an_experiment_file_that_does_not_work(launch, tmp_path, source, message):
    path = tmp_path / "mine.py"
    path.write_text(source)
    said = launch(config=path)
    assert said.startswith(f"error: flag --config={path}: ") and message in said


def test_an_experiment_file_that_does_not_exist(launch):
    assert "absent.py: there is no Python file (looked from " in launch(config="absent.py")
    assert "there is no Python file" in launch(config=TINY.parent)


def test_an_experiment_may_define_dataclasses(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\nimport dataclasses\nfrom grpo.config import Config\n"
        "@dataclasses.dataclass\nclass Source:\n  size: int = 1\n"
        "def get_config() -> Config:\n  return Config()\n"
    )
    assert load_experiment(str(path))() == Config()


# ---- As a user starts it -----------------------------------------------------------------------


def run_module(module, *arguments):
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )


def test_a_missing_workdir_ends_with_an_exit_code_and_no_traceback():
    done = run_module("grpo.launch", f"--config={TINY}")
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.startswith("error: flag --workdir=None: Flag --workdir must have a value")
    assert "Traceback" not in done.stderr


def test_the_fields_can_be_listed():
    done = run_module("grpo.config")
    assert done.returncode == 0 and done.stderr == ""
    assert "config.algo.group_size=8" in done.stdout
