"""The command line of an evaluation: what --budget reads, and what it refuses."""

import pytest
from absl import flags
from absl.testing import flagsaver

from grpo.evaluate import _define_flags
from grpo.measure.forcing import BudgetSettings


def settings_of(*arguments: str) -> BudgetSettings | None:
    with flagsaver.flagsaver():
        read = _define_flags()
        flags.FLAGS(["evaluate", *arguments])
        return read()


def test_without_a_budget_there_is_only_the_evaluation():
    assert settings_of() is None


def test_the_defaults_are_those_of_the_settings():
    assert settings_of("--budget=8,16,32") == BudgetSettings((8, 16, 32))


def test_every_setting_has_its_flag():
    assert settings_of(
        "--budget=8",
        "--end_of_thought=;",
        "--force_answer=;A:",
        "--answer_tokens=5",
        "--answer_temperature=0.5",
        "--extend_with=Hmm",
        "--extensions=3",
        "--nobefore",
    ) == BudgetSettings((8,), ";", ";A:", 5, 0.5, "Hmm", 3, False)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--extensions=2"], "--extensions is set, but --budget is not"),
        (["--before"], "--before is set, but --budget is not"),
        (["--budget=8,x"], "--budget=8,x must be whole numbers with commas, such as 8,16,32"),
        (["--budget="], "must rise from 1"),
        (["--budget=16,8"], "must rise"),
        (["--budget=8", "--answer_tokens=0"], "--answer_tokens=0 must be positive"),
    ],
)
def test_mistakes_name_the_flag(arguments, message):
    with pytest.raises(ValueError, match=message):
        settings_of(*arguments)
