"""Prompts of every family's chat template: the ids that `transformers` gives, to the last one."""

import json
import re
from pathlib import Path

import pytest

from grpo.config import Config, MeshConfig, ModelConfig
from grpo.data.prompts import encode_prompt, render_chat
from grpo.data.tokenizer import ByteTokenizer, load_tokenizer, with_thinking
from grpo.policy import make_policy
from rewards.api import Problem
from tools import tiny_models, tiny_tokenizers

GOLDEN_FOLDER = Path(__file__).parent / "golden"
FAMILIES = json.loads((GOLDEN_FOLDER / "chat_prompts.json").read_text())["families"]


def problem(conversation: str) -> Problem:
    return Problem("p", messages=tuple(tiny_tokenizers.CONVERSATIONS[conversation]))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_prompts_are_those_of_transformers(tmp_path, name):
    tokenizer = load_tokenizer(
        tiny_tokenizers.write_folder(tmp_path, tiny_tokenizers.FAMILIES[name])
    )
    for case in FAMILIES[name]:
        told, asked = tokenizer, problem(case["conversation"])
        if case["thinking"] is not None:
            told = with_thinking(tokenizer, case["thinking"])
        if "refusal" in case:
            with pytest.raises(ValueError, match=re.escape(case["refusal"])):
                encode_prompt(told, asked)
            continue
        assert render_chat(told, asked) == case["text"], case["conversation"]
        assert encode_prompt(told, asked) == case["ids"], case["conversation"]


def test_the_goldens_cover_what_they_should():
    """Every family and conversation, and a switch that matters where there is one."""
    assert set(FAMILIES) == set(tiny_tokenizers.FAMILIES)
    for name, cases in FAMILIES.items():
        assert {case["conversation"] for case in cases} == set(tiny_tokenizers.CONVERSATIONS)
        texts = {(case["conversation"], case["thinking"]): case.get("text") for case in cases}
        if ("asked", False) in texts:
            assert texts["asked", False] != texts["asked", True] == texts["asked", None], name


@pytest.mark.parametrize("choice, thinking", [("default", None), ("on", True), ("off", False)])
def test_the_config_switches_thinking(tmp_path, choice, thinking):
    golden = json.loads((GOLDEN_FOLDER / "families.json").read_text())["models"]["qwen3"]
    tiny_models.write_folder(tmp_path, **golden)
    tiny_tokenizers.write_folder(tmp_path, tiny_tokenizers.FAMILIES["qwen3"])
    model, mesh = ModelConfig(source=str(tmp_path), thinking=choice), MeshConfig(data=-1, fsdp=1)
    policy = make_policy(Config(model=model, mesh=mesh))
    expected = {"conversation": "asked", "thinking": thinking}
    case = next(case for case in FAMILIES["qwen3"] if expected.items() <= case.items())
    assert encode_prompt(policy.tokenizer, problem("asked")) == case["ids"]


def test_a_template_without_the_switch_refuses_it(tmp_path):
    family = tiny_tokenizers.FAMILIES["qwen2_5"]
    tokenizer = load_tokenizer(tiny_tokenizers.write_folder(tmp_path, family))
    for without in (tokenizer, ByteTokenizer()):
        with pytest.raises(ValueError, match=r"no enable_thinking.*model\.thinking"):
            with_thinking(without, False)
