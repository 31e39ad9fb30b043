"""What a run is made of: which problems it keeps, and what follows from the algorithm."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tiny_experiment import get_config

from grpo import loss
from grpo.batch import RowShape
from grpo.build import Run, _objective, build, usable
from grpo.config import validate
from grpo.data.tokenizer import ByteTokenizer
from rewards.api import Problem
from rewards.math_answer import check_reference

PROBLEMS = [
    Problem(uid="right", prompt="1+1=", reference="2"),
    Problem(uid="long", prompt="1+1+1+1+1=", reference="5"),
    Problem(uid="cut off", prompt="pi/2=", reference=r"\left( 3, \frac{\pi}{2} \right"),
]


def test_problems_with_long_prompts_or_bad_references_are_dropped_and_reported(capsys):
    kept = usable(ByteTokenizer(), PROBLEMS, 8, check_reference, "train")
    assert [kept[i].uid for i in range(len(kept))] == ["right"]
    said = capsys.readouterr().out
    assert "train problems: 1; 1 dropped, their prompts exceed 8 tokens; 1 dropped for" in said
    assert "'cut off'" in said


def test_references_are_not_looked_at_unless_asked(capsys):
    assert len(usable(ByteTokenizer(), PROBLEMS, 20, None, "train")) == 3
    assert capsys.readouterr().out == "train problems: 3\n"


def test_a_source_of_bad_references_only_is_refused():
    with pytest.raises(ValueError, match="none of the held-out problems is usable: 1 dropped"):
        usable(ByteTokenizer(), PROBLEMS[2:], 20, check_reference, "held-out")


# ---- what follows from the algorithm ---------------------------------------------------------


def built(workdir: Path, **algo: Any) -> Run:
    """The parts of the tiny run, its reward workers gone again."""
    config = get_config()
    for name, value in algo.items():
        setattr(config.algo, name, value)
    with ExitStack() as stack:
        return build(config, workdir, stack, baseline=config)


@pytest.mark.parametrize(
    "algo, every_row, on_policy, keeps_reference",
    [
        ({}, False, True, False),
        ({"passes": 2}, False, False, False),
        ({"minibatches": 2}, False, False, False),
        ({"kl_coef": 0.1}, True, True, False),
        ({"kl_coef": 0.1, "ref_every": 2}, True, True, True),
        ({"kl_coef": 0.1, "kl_in_reward": True}, False, True, False),
        ({"entropy_coef": 0.1}, True, True, False),
    ],
)
def test_what_is_computed_follows_from_the_algorithm(
    tmp_path, algo, every_row, on_policy, keeps_reference
):
    """Completions without advantage only where they have a gradient; old log-probs likewise."""
    run = built(tmp_path, **algo)
    assert run.needs_every_row == every_row
    assert run.schedule.on_policy == on_policy
    assert (run.state_like.ref_params is not None) == keeps_reference
    assert run.schedule.updates == 4 * algo.get("passes", 1) * algo.get("minibatches", 1)


@pytest.mark.parametrize(
    "sample, algo, chosen",
    [
        ({}, {}, loss.uncorrected),
        ({"weights": "int8"}, {}, loss.truncated),
        ({"cache": "int8"}, {}, loss.truncated),
        ({"cache": "int8"}, {"correction": loss.icepop}, loss.icepop),
        ({"cache": "int8"}, {"correction": loss.uncorrected}, loss.uncorrected),
        ({}, {"passes": 2}, loss.truncated),
        ({}, {"oversample": 0.5}, loss.truncated),
    ],
)
def test_what_is_not_sampled_from_the_policy_is_corrected(sample, algo, chosen):
    config = get_config()
    for section, changes in ((config.sample, sample), (config.algo, algo)):
        for name, value in changes.items():
            setattr(section, name, value)
    validate(config)
    correction = _objective(config, algo.get("passes", 1) == 1).keywords["correction"]  # type: ignore[attr-defined]
    assert getattr(correction, "func", correction) is chosen


def test_what_is_only_for_adapters_may_not_be_set_without_them(tmp_path):
    config = get_config()
    config.lora.alpha, config.lora.targets, config.model.base_dtype = 8.0, ("q",), "int4"
    with ExitStack() as stack, pytest.raises(ValueError, match="does not use them") as refused:
        build(config, tmp_path, stack, baseline=get_config())
    for field in ("model.base_dtype='int4'", "lora.alpha=8.0", "lora.targets=('q',)"):
        assert f"config.{field}" in str(refused.value)


def test_rows_fit_the_budget_of_a_device_and_divide_over_the_mesh(tmp_path, capsys):
    """Four ways of data: a row of one completion of 48 tokens and its prompt of 8 each."""
    shape = RowShape(rows=4, tokens=56, completion_tokens=48)
    assert built(tmp_path).schedule.row_shape == shape
    assert "microbatches of 4 row(s) x 56 tokens" in capsys.readouterr().out


def test_minibatches_are_of_whole_groups(tmp_path):
    with pytest.raises(ValueError, match="16 rows cannot be split into 8 .* whole groups"):
        built(tmp_path, minibatches=8)
