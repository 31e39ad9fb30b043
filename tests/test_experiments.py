"""The experiment files: each says where it comes from, and its numbers fit. None is run here."""

import ast
import json
from pathlib import Path

import pytest

from grpo.config import validate
from grpo.launch import load, load_experiment
from grpo.pipeline import Pipeline
from grpo.pipeline.chain import check_pipeline
from grpo.train import train

EXPERIMENTS = sorted((Path(__file__).parent.parent / "experiments").glob("[!_]*.py"))


def test_there_are_some():
    assert "tiny" in [path.stem for path in EXPERIMENTS]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_says_what_it_is_and_validates(path):
    told = ast.get_docstring(ast.parse(path.read_text())) or ""
    for part in ("Source:", "Command:", "Hardware:"):
        assert f"\n{part}" in told, part
    assert f"--config=experiments/{path.name}" in told
    if "def get_pipeline" in path.read_text():
        pipeline = load(str(path), "get_pipeline", Pipeline)()
        check_pipeline(pipeline)
        configs = [stage.config for stage in pipeline.stages]
        assert pipeline.scores is not None
        validate(pipeline.scores)
    else:
        configs = [load_experiment(str(path))()]
    for config in configs:
        validate(config, scored=bool(config.reward.functions))


@pytest.mark.slow
def test_the_tiny_experiment_learns(tmp_path):
    config = load_experiment(str(EXPERIMENTS[0].with_name("tiny.py")))()
    assert config.seed == 0
    train(config, tmp_path, baseline=config)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    held_out = [row["eval/pass_at_1"] for row in rows if "eval/pass_at_1" in row]
    assert held_out[0] <= 0.5, "the cold start left too little to learn"
    assert held_out[-1] >= 0.9
