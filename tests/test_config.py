"""The configuration: what it refuses, what it says, and its whole surface."""

import functools
import json
import math
from typing import Any

import pytest
from tiny_experiment import get_config

from grpo import advantage, loss
from grpo.config import (
    AlgoConfig,
    Config,
    bind,
    check_all_read,
    check_types,
    describe,
    fields,
    help_text,
    sections,
    track_reads,
    validate,
)


def tiny(**changes: Any) -> Config:
    """The tiny experiment with changes: `tiny(algo__kl_coef=0.1)`."""
    config = get_config()
    for name, value in changes.items():
        *path, last = name.split("__")
        setattr(functools.reduce(getattr, path, config), last, value)
    return config


# Every field there is. A new one is a new promise to users: add it here when that is meant.
SURFACE = """
    config: seed num_steps
    config.model: source shape thinking width mlp_width num_layers num_heads num_kv_heads
      compute_dtype remat attention logprob_chunk base_dtype
    config.lora: rank alpha targets
    config.data: train held_out max_prompt_tokens check_reference
    config.sample: temperature max_new_tokens slots slots_per_prompt tail_slots draft_tokens
      tokens_per_dispatch stop_strings weights cache
    config.reward: functions workers deadline_s wait_s gold_format gold_check
    config.algo: problems_per_step group_size minibatches passes microbatch_tokens advantage
      objective aggregate correction clip_low clip_high dual_clip sapo_temperature_positive
      sapo_temperature_negative correction_cap correction_low correction_high sequence_gap_max
      pass_k kl kl_coef kl_in_reward ref_every ref_offload entropy_coef mask_truncated
      dynamic_rounds oversample overlong_buffer_tokens overlong_penalty curriculum
    config.optim: learning_rate warmup_updates decay end_share beta1 beta2 eps weight_decay
      clip_norm offload
    config.sft: num_steps source rows_per_step microbatch_tokens learning_rate warmup_updates
    config.rejection: num_problems num_samples chunk_problems asked_as filters keep bucket_share
      general general_share parquet
    config.distil: teacher divergence beta
    config.eval: every num_problems num_samples temperature top_k top_p min_p answer_of
    config.gates: max_bad_updates max_gap_nats_mean max_gap_nats_max max_sampler_kl_nats
      max_failure_rate max_timeout_rate max_repeated_share max_zero_id_share max_stuck_share
      degenerate_steps still_steps max_param_change min_adapter_change max_kl_old_nats
    config.log: save_every keep_checkpoints rollouts_every
    config.mesh: data fsdp tensor expert axis_types
    config.hosts: watch_s
"""


def test_the_surface_changes_only_on_purpose():
    wanted, section = [], ""
    for word in SURFACE.split():
        if word.endswith(":"):
            section = word[:-1]
        else:
            wanted.append(f"{section}.{word}")
    assert sorted(f"{path}.{field.name}" for path, field, _ in fields(Config())) == sorted(wanted)


def test_every_section_and_field_is_documented():
    for path, section in sections(Config()):
        assert section.__doc__ and not section.__doc__.startswith(type(section).__name__), path
    for path, field, _ in fields(Config()):
        assert len(field.metadata["doc"]) >= 4, f"{path}.{field.name}"


def test_the_help_shows_every_field_with_its_default():
    text = help_text(Config())
    for path, field, value in fields(Config()):
        shown = describe(value) if callable(value) else repr(value)
        assert f"{path}.{field.name}={shown}" in text
    assert "config.algo.advantage=grpo.advantage.grpo" in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_the_defaults_and_the_tiny_experiment_have_the_declared_types():
    check_types(Config())
    validate(get_config())


def test_sections_are_made_afresh():
    Config().algo.group_size = 3
    assert Config().algo.group_size == 8


def test_an_unknown_field_is_answered_with_those_that_exist():
    with pytest.raises(AttributeError) as refused:
        Config().algo.groupsize = 4
    message = str(refused.value)
    assert "AlgoConfig has no field 'groupsize'; it has ['advantage', 'aggregate'" in message
    assert message.endswith("Did you mean 'group_size'?")
    with pytest.raises(AttributeError, match=r"has no field 'zzz'; it has \[[^?]*\]\.$"):
        Config().algo.zzz = 4
    with pytest.raises(TypeError, match="groupsize"):
        AlgoConfig(groupsize=4)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_steps", 2.0),
        ("num_steps", True),
        ("num_steps", "3"),
        ("algo__mask_truncated", 1),
        ("algo__advantage", "grpo"),
        ("algo__objective", None),
        ("algo__correction", 2.0),
        ("algo__clip_low", "0.2"),
        ("algo__clip_low", False),
        ("sample__stop_strings", "</answer>"),
        ("sample__stop_strings", ("a", 1)),
        ("reward__functions", ((1.0,),)),
        ("reward__functions", ((1.0, "numeric_answer"),)),
        ("data__train", 3),
        ("eval__answer_of", "tagged_answer"),
        ("eval__temperature", "warm"),
        ("eval__top_k", 1.0),
        ("model", Config().algo),
    ],
)
def test_a_value_of_the_wrong_type_is_named(name, value):
    with pytest.raises(TypeError, match=f"config.{name.replace('__', '.')} is "):
        validate(tiny(**{name: value}))


def test_whole_numbers_are_fine_where_fractions_are():
    validate(tiny(algo__clip_low=1, sample__temperature=2))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_steps": -1}, "num_steps is -1; it cannot be negative"),
        ({"seed": -1}, "seed is -1; it cannot be negative"),
        ({"algo__group_size": 1}, "a group needs at least 2"),
        ({"algo__problems_per_step": 0}, "algo.problems_per_step is 0; it must be positive"),
        ({"algo__microbatch_tokens": 0}, "algo.microbatch_tokens is 0; it must be positive"),
        ({"algo__passes": 0}, "algo.passes is 0; it must be positive"),
        ({"algo__minibatches": 3}, r"\(4\) x group_size \(4\) = 16 rows .* into 3 equal"),
        (
            {"algo__advantage": advantage.pass_at_k},
            r"algo.pass_k is 4, but must be below algo.group_size \(4\)",
        ),
        (
            {"algo__advantage": functools.partial(advantage.pass_at_k), "algo__pass_k": 9},
            "algo.pass_k is 9",
        ),
        (
            {"algo__advantage": advantage.maxrl, "algo__overlong_buffer_tokens": 8},
            "maxrl divides by the mean reward, which algo.overlong_buffer_tokens can make negative",
        ),
        (
            {"algo__advantage": advantage.maxrl, "reward__functions": ((1.0, min), (-0.1, max))},
            "maxrl .* a negative weight in reward.functions",
        ),
        (
            {
                "algo__advantage": advantage.maxrl,
                "algo__kl_in_reward": True,
                "algo__kl_coef": 0.1,
            },
            "maxrl .* algo.kl_in_reward",
        ),
        (
            {"algo__objective": loss.dual_clipped, "algo__dual_clip": 1.1},
            r"algo.dual_clip is 1.1; it must be above 1 \+ clip_high \(1.28\)",
        ),
        (
            {"algo__correction": loss.icepop, "algo__correction_low": 1.5},
            r"correction_low \(1.5\) and algo.correction_high \(5.0\) must lie on both sides",
        ),
        ({"algo__kl": loss.k1}, "algo.kl is k1, which cannot be a loss.*algo.kl_in_reward"),
        ({"algo__kl_in_reward": True}, "kl_in_reward is set, but algo.kl_coef is 0.0: nothing"),
        ({"algo__ref_every": 5}, "ref_every is set, but algo.kl_coef is 0.0: there is no ref"),
        ({"algo__entropy_coef": -0.1}, "algo.entropy_coef is -0.1; it cannot be negative"),
        ({"algo__sapo_temperature_positive": 0.0}, "sapo_temperature_positive is 0.0; it must be"),
        ({"algo__dynamic_rounds": -1}, "algo.dynamic_rounds is -1; it cannot be negative"),
        (
            {"algo__overlong_buffer_tokens": 49},
            "overlong_buffer_tokens is 49, but .* sample.max_new_tokens = 48",
        ),
        ({"algo__oversample": 1.5}, r"algo.oversample is 1.5; it must be in \[0, 1\]"),
        (
            {"algo__oversample": 0.01},
            r"oversample is 0.01, .*problems_per_step \(4\) is not one group",
        ),
        (
            {"algo__oversample": 0.5, "algo__dynamic_rounds": 1},
            r"oversample \(0.5\) and algo.dynamic_rounds \(1\) are both set",
        ),
        (
            {"algo__oversample": 0.5, "algo__correction": loss.uncorrected},
            "oversample is set, but algo.correction is loss.uncorrected: carried tokens",
        ),
        ({"lora__rank": -1}, "lora.rank is -1; it cannot be negative"),
        ({"lora__alpha": 0.0}, "lora.alpha is 0.0; it must be positive"),
        ({"lora__targets": ()}, "lora.targets is empty: no matrix would get an adapter"),
        ({"model__base_dtype": "nf4"}, r"model.base_dtype is 'nf4'; choose from \('float32'"),
        ({"sample__weights": "int4"}, r"sample.weights is 'int4'; choose from \('compute', 'int8'"),
        ({"sample__cache": "float32"}, r"sample.cache is 'float32'; choose from \('compute'"),
        (
            {"lora__rank": 2, "model__base_dtype": "int4", "sample__weights": "int8"},
            "sample.weights is 'int8', but model.base_dtype is 'int4': the sampler uses the base",
        ),
        ({"algo__curriculum": -1}, "algo.curriculum is -1; it cannot be negative"),
        ({"eval__temperature": -0.1}, "eval.temperature is -0.1; it must be a finite number, 0"),
        ({"eval__temperature": math.inf}, "eval.temperature is inf; it must be a finite number"),
        ({"eval__top_k": -1}, "eval.top_k is -1; it cannot be negative"),
        ({"eval__top_p": 0.0}, "eval.top_p is 0.0; it must be positive"),
        ({"eval__top_p": 1.1}, r"eval.top_p is 1.1; it must be in \[0, 1\]"),
        ({"eval__min_p": -0.1}, "eval.min_p is -0.1; it cannot be negative"),
        ({"eval__min_p": 1.1}, r"eval.min_p is 1.1; it must be in \[0, 1\]"),
        ({"algo__clip_low": 1.5}, r"algo.clip_low is 1.5; it must be in \[0, 1\]"),
        ({"algo__clip_high": -0.1}, "algo.clip_high is -0.1; it cannot be negative"),
        ({"algo__kl_coef": math.nan}, "algo.kl_coef is nan; it must be a finite number"),
        ({"sample__temperature": 0.0}, "needs a positive one"),
        ({"gates__max_gap_nats_mean": 0.0}, "gates.max_gap_nats_mean is 0.0; it must be pos"),
        ({"reward__functions": ()}, "nothing to learn from"),
        ({"reward__functions": ((math.inf, min),)}, "the weight of builtins.min is inf"),
        ({"reward__gold_format": "42"}, "gold_format must contain {gold}"),
        ({"gates__max_failure_rate": 2.0}, r"max_failure_rate is 2.0; it must be in \[0, 1\]"),
        ({"data__train": None}, "nothing to ask"),
        ({"data__held_out": None}, "eval.every is set, but data.held_out is not"),
        ({"distil__beta": 0.0}, "distil.beta is 0.0; it must be strictly between 0 and 1"),
        ({"distil__beta": math.nan}, "distil.beta is nan"),
        ({"optim__decay": "step"}, "optim.decay is 'step'; choose from .*'cosine'"),
        ({"optim__learning_rate": -1e-6}, "optim.learning_rate is -1e-06; it cannot be neg"),
        (
            {"optim__warmup_updates": 25, "algo__minibatches": 2, "algo__passes": 3},
            r"is 25, .* num_steps \(4\) x minibatches \(2\) x passes \(3\) = 24 updates",
        ),
        ({"sft__warmup_updates": 5}, r"sft.warmup_updates is 5, .* sft.num_steps = 4 updates"),
        ({"sft__microbatch_tokens": 0}, "sft.microbatch_tokens is 0; it must be positive"),
        ({"model__remat": "some"}, "model.remat is 'some'; choose from"),
        ({"model__thinking": "yes"}, "model.thinking is 'yes'; choose from .*'on', 'off'"),
        ({"model__compute_dtype": "float16"}, "model.compute_dtype is 'float16'; choose from"),
        ({"mesh__fsdp": 0}, "mesh.fsdp is 0; it must be positive, or -1"),
    ],
)
def test_numbers_that_cannot_work_are_refused_with_the_sum(changes, message):
    with pytest.raises(ValueError, match=message):
        validate(tiny(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"optim__warmup_updates": 4},
        {"num_steps": 0, "optim__warmup_updates": 4},  # the cold start alone
        {"sft__num_steps": 0, "sft__warmup_updates": 99},
        {"optim__learning_rate": 0.0},
        {"mesh__data": -1, "mesh__fsdp": 1},
        {"eval__temperature": 0, "eval__num_samples": 1},
        {"eval__top_k": 5, "eval__top_p": 0.9, "eval__min_p": 1},
        {"optim__warmup_updates": 8, "algo__passes": 2},
        {"algo__microbatch_tokens": 1},
        {"algo__dual_clip": 0.5, "algo__pass_k": 99},  # of functions that were not chosen
        {"algo__advantage": advantage.maxrl},
        {"algo__kl_coef": 0.1, "algo__kl_in_reward": True, "algo__ref_every": 3},
    ],
)
def test_what_is_unusual_but_works_passes(changes):
    validate(tiny(**changes))


# ---- Fields nobody reads -----------------------------------------------------------------------


def test_a_changed_field_that_is_not_read_is_an_error():
    config = Config()
    config.algo.kl_coef = 0.1
    track_reads(config)
    with pytest.raises(ValueError, match=r"config\.algo\.kl_coef=0\.1 \(weight of the KL"):
        check_all_read(config, Config())
    _ = config.algo.kl_coef
    check_all_read(config, Config())


def test_a_field_read_before_tracking_began_does_not_count():
    config = Config()
    config.algo.kl_coef = 0.1
    _ = config.algo.kl_coef  # as validate() does
    track_reads(config)
    with pytest.raises(ValueError, match="kl_coef"):
        check_all_read(config, Config())


def test_a_field_that_equals_the_baseline_need_not_be_read():
    config, baseline = Config(), Config()
    config.algo.kl_coef = Config().algo.kl_coef  # set, but to what it was
    config.sft.learning_rate = baseline.sft.learning_rate = 0.5  # as the experiment file says
    track_reads(config)
    check_all_read(config, baseline)


def test_functions_that_get_config_makes_anew_are_not_changes():
    config = get_config()
    assert config.eval.answer_of is not get_config().eval.answer_of
    track_reads(config)
    check_all_read(config, get_config())


# ---- Numbers of the chosen functions -----------------------------------------------------------


def test_bind_reads_the_numbers_a_function_asks_for_and_no_others():
    config = Config()
    config.algo.clip_low, config.algo.clip_high, config.algo.dual_clip = 0.1, 0.4, 7.0
    track_reads(config)
    bound: Any = bind(config.algo.objective, config.algo)
    assert bound.func is loss.clipped and bound.keywords == {"clip_low": 0.1, "clip_high": 0.4}
    with pytest.raises(ValueError, match=r"dual_clip=7\.0") as refused:
        check_all_read(config, Config())
    assert "clip_low" not in str(refused.value)


def test_bind_looks_through_the_sections_in_order():
    config = Config()
    config.sample.max_new_tokens = 77
    bound: Any = bind(loss.by_length, config.algo, config.sample)
    assert bound.keywords == {"max_new_tokens": 77}


def test_bind_leaves_functions_without_numbers_as_they_are():
    assert bind(loss.uncorrected, Config().algo) is loss.uncorrected


def test_bind_lets_a_partial_and_a_default_win():
    algo = AlgoConfig(clip_low=0.1, clip_high=0.4)
    fixed: Any = bind(functools.partial(loss.clipped, clip_low=0.3), algo)
    assert fixed.keywords == {"clip_low": 0.3, "clip_high": 0.4}

    def own(log_ratio_RC, batch, *, sharpness=2.0):
        return sharpness

    assert bind(own, algo)(None, None) == 2.0


def test_bind_names_a_number_that_no_section_has():
    def own(log_ratio_RC, batch, *, sharpness):
        return sharpness

    with pytest.raises(
        ValueError, match="own wants a number 'sharpness', but AlgoConfig or Sample"
    ):
        bind(own, Config().algo, Config().sample)


# ---- What is written down ----------------------------------------------------------------------


def test_a_description_is_json_and_says_everything():
    plain = describe(get_config())
    assert json.loads(json.dumps(plain)) == plain
    assert plain["algo"]["group_size"] == 4
    assert plain["data"]["train"]["class"] == "DigitChain" and plain["data"]["train"]["size"] == 40
    weight, name = plain["reward"]["functions"][0]
    assert weight == 1.0 and name.endswith("get_config.<locals>.even")
    assert plain["eval"]["answer_of"].startswith("tiny_experiment.")


def test_a_description_is_the_same_in_every_process():
    def reward(completion, problem, scale):
        return scale

    descriptions = [describe(functools.partial(reward, scale=s)) for s in (0.5, 0.5, 0.7)]
    assert descriptions[0] == descriptions[1] != descriptions[2]
    assert "0x" not in descriptions[0]
