"""Which problems a run keeps."""

import pytest

from grpo.build import _usable
from grpo.data.tokenizer import ByteTokenizer
from rewards.api import Problem
from rewards.math_answer import check_reference

PROBLEMS = [
    Problem(uid="right", prompt="1+1=", reference="2"),
    Problem(uid="long", prompt="1+1+1+1+1=", reference="5"),
    Problem(uid="cut off", prompt="pi/2=", reference=r"\left( 3, \frac{\pi}{2} \right"),
]


def test_problems_with_long_prompts_or_bad_references_are_dropped_and_reported(capsys):
    kept = _usable(ByteTokenizer(), PROBLEMS, 8, check_reference, "train")
    assert [kept[i].uid for i in range(len(kept))] == ["right"]
    said = capsys.readouterr().out
    assert "train problems: 1; 1 dropped, their prompts exceed 8 tokens; 1 dropped for" in said
    assert "'cut off'" in said


def test_references_are_not_looked_at_unless_asked(capsys):
    assert len(_usable(ByteTokenizer(), PROBLEMS, 20, None, "train")) == 3
    assert capsys.readouterr().out == "train problems: 3\n"


def test_a_source_of_bad_references_only_is_refused():
    with pytest.raises(ValueError, match="none of the held-out problems is usable: 1 dropped"):
        _usable(ByteTokenizer(), PROBLEMS[2:], 20, check_reference, "held-out")
