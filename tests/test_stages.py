"""Stages alone and in a chain: what one leaves another reads, and stopping changes nothing."""

import json

import jax
import pytest
from logged_rows import rows, stop_after
from tiny_experiment import get_config

from grpo.checkpoint import params_sha256
from grpo.config import Config
from grpo.model.params import param_table
from grpo.pipeline import Pipeline, Stage
from grpo.pipeline.run import run_pipeline
from grpo.sharding import make_mesh, param_shardings
from grpo.source import open_source
from grpo.stages.release import release
from grpo.stages.supervise import supervise
from grpo.train import train

pytestmark = pytest.mark.usefixtures("compiled_once")


def supervised() -> Config:
    config = get_config()
    return Config(
        model=config.model,
        data=config.data,
        sample=config.sample,
        sft=config.sft,
        log=config.log,
        mesh=config.mesh,
    )


def chain() -> Pipeline:
    rl = get_config()
    rl.num_steps, rl.sft.num_steps, rl.eval.every = 2, 0, 0
    rl.model = type(rl.model)(compute_dtype="float32", logprob_chunk=16)
    asked = Config(data=rl.data, sample=rl.sample)
    stages = (
        Stage("base", supervise, supervised()),
        Stage("rl", train, rl, {"model.source": "base"}),
        Stage("child", release, asked, {"model.source": "rl"}),
    )
    scores = get_config()
    scores.model = rl.model
    scores.sft.num_steps = 0
    return Pipeline(stages, scores, {"digits": "eval/component/digits"})


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A chain that nothing disturbs: its folder and what its stages made."""
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, run_pipeline(chain(), workdir)


def test_a_supervised_run_leaves_a_model_that_others_read(straight):
    workdir, made = straight
    source = open_source(str(workdir / "base"))
    mesh = make_mesh(1, 1, 1, chosen=jax.devices()[:1])
    params = source.read(param_shardings(param_table(source.arch), mesh))
    assert params_sha256(params) == made["base"].sha256
    losses = [row["sft/loss_nats"] for row in rows(workdir / "base" / "metrics.jsonl")]
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_every_model_of_a_chain_is_measured(straight):
    workdir, made = straight
    table = (workdir / "scores.md").read_text()
    assert table.startswith("| stage | pass@1 | pass@4 | maj@4 | digits | tokens | took |")
    assert "| base |" in table and "| rl |" in table and "| child |" not in table
    assert (workdir / "scores.png").stat().st_size > 0
    assert made["rl"].sha256 != made["base"].sha256


def test_what_is_released_has_its_size_and_speed(straight):
    workdir, made = straight
    facts = json.loads((workdir / "child" / "result.json").read_text())
    assert set(facts["bytes"]) == {"model.safetensors", "model.gguf"}
    assert facts["tokens_per_s"] > 0 and facts["sha256"] == made["child"].sha256
    source = open_source(str(workdir / "child" / "hf"))
    assert facts["parameters"] * 4 <= facts["bytes"]["model.safetensors"]
    assert source.arch == open_source(str(workdir / "rl")).arch


@pytest.mark.parametrize("rows_logged", [2, 5], ids=["in_the_first_stage", "in_the_second"])
def test_a_chain_that_was_stopped_makes_the_same(straight, tmp_path, monkeypatch, rows_logged):
    with monkeypatch.context() as patch:
        stop_after(rows_logged, patch)
        with pytest.raises(SystemExit):
            run_pipeline(chain(), tmp_path)
    assert run_pipeline(chain(), tmp_path).keys() == straight[1].keys()
    for name, output in straight[1].items():
        if name == "child":  # its model card names the folder it was made in
            continue
        assert json.loads((tmp_path / "manifest.json").read_text())["stages"][name]["output"] == {
            "kind": output.kind,
            "sha256": output.sha256,
        }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c.sft, "num_steps", 0), "sft.num_steps is 0"),
        (lambda c: setattr(c.data, "train", None), "sft.source is not set"),
        (lambda c: setattr(c.sft, "rows_per_step", 41), "only 40 worked problems"),
    ],
)
def test_supervised_runs_that_cannot_work(tmp_path, change, message):
    config = supervised()
    change(config)
    with pytest.raises(ValueError, match=message):
        supervise(config, tmp_path, config)


def test_a_field_that_a_supervised_run_does_not_read_is_an_error(tmp_path):
    config = supervised()
    config.algo.group_size = 16
    with pytest.raises(ValueError, match=r"config\.algo\.group_size=16"):
        supervise(config, tmp_path, supervised())


def test_a_release_needs_a_model_and_something_to_ask(tmp_path):
    with pytest.raises(ValueError, match=r"model\.source and data\.train"):
        release(Config(), tmp_path)


def test_a_field_that_a_release_does_not_read_is_an_error(tmp_path):
    config = Config()
    config.model.source, config.data.train = "none", get_config().data.train
    config.sample.max_new_tokens, config.sample.temperature = 8, 0.5
    with pytest.raises(ValueError, match="these fields are set but .*") as told:
        release(config, tmp_path)
    assert "config.sample.temperature=0.5" in str(told.value)
    assert str(told.value).count("config.") == 1  # those that are read may be set
