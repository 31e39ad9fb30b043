"""Plans: formulas against published figures, exchanges read from programs, what fits and would.

What the TPU compiler says of the reference runs is in tests/test_reference_plans.py.
"""

import dataclasses
import json
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from toy_model import mesh_of

from experiments.r1_zero_qwen2p5_1p5b import get_config as zero_1p5b
from experiments.r1_zero_qwen2p5_7b import get_config as zero_7b
from grpo.batch import RowShape
from grpo.config import ModelConfig
from grpo.model.arch import Arch
from grpo.model.params import num_params
from grpo.plan import describe
from grpo.planning import formulas
from grpo.planning.chips import CHIPS, GIB, chip_of, parse_topology
from grpo.planning.formulas import Split, Work
from grpo.planning.hlo import collectives
from grpo.planning.lower import Compiled, _extrapolated, _used_bytes, compile_one, device_bytes
from grpo.planning.make import Options, as_json, make_plan
from grpo.planning.predict import Assumptions, microbatches, view_shares
from grpo.planning.shapes import find_arch, known
from grpo.structs import Program

TINY = Arch(
    vocab_size=11, width=6, mlp_width=10, num_layers=3, num_heads=4, num_kv_heads=2, head_width=4
)
ONE = Split(batch=1, tensor=1, fsdp=1)


# ---- formulas --------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, milliseconds", [(4, 2.5), (256, 21.0)])
def test_a_decode_step_takes_what_the_scaling_book_says(rows, milliseconds):
    """Its quiz: 30B int8 parameters, 100 kB of cache a token, contexts of 8192, v5e 4x4."""
    work = Work(
        flops=2 * rows * 30e9 / 16, weight_bytes=30e9 / 16, cache_bytes=rows * 8192 * 100e3 / 16
    )
    seconds = formulas.seconds(work, CHIPS["v5e"])
    assert seconds * 1e3 == pytest.approx(milliseconds, rel=0.03)


def test_what_a_decode_step_waits_for():
    """Few rows wait for the weights, many compute; the cache is waited for by both."""
    chip, weights = CHIPS["v5e"], 1e9
    few = formulas.parts(Work(2 * 4 * weights, weights, 1e6), chip)
    many = formulas.parts(Work(2 * 4000 * weights, weights, 1e6), chip)
    assert few["compute"] == 0 and few["memory"] == (1e9 + 1e6) / chip.hbm_bandwidth
    assert many["memory"] == 1e6 / chip.hbm_bandwidth and many["compute"] > 0
    assert formulas.parts(Work(), chip, 9e10)["interconnect"] == 1.0


@pytest.mark.parametrize(
    "name, params, cache_kib",
    [
        ("Qwen2.5-1.5B", 1_543_714_304, 28),
        ("Qwen2.5-7B", 7_615_616_512, 56),
        ("Qwen2.5-32B", 32_763_876_352, 256),
        ("Qwen2.5-72B", 72_706_203_648, 320),
    ],
)
def test_known_shapes_have_the_published_sizes(name, params, cache_kib):
    arch = find_arch(ModelConfig(source=f"/not/here/{name}"))
    assert num_params(arch) == params
    assert formulas.kv_bytes(arch, width=2) == cache_kib * 1024
    assert name in known()


def test_operations_are_those_of_plain_loops():
    """Every product of every token, written out."""
    shape = RowShape(rows=2, tokens=7, completion_tokens=5)
    D, F, H, N, K, V = 6, 10, 4, 4, 2, 11
    layer = 0.0
    for slot in range(shape.tokens):
        layer += 2 * (D * N * H + 2 * D * K * H + N * H * D)  # q, k and v, o
        layer += 2 * 3 * D * F
        layer += (slot + 0.5) * N * 2 * 2 * H  # scores and mixing; half of the diagonal
    head = sum(2 * D * V for _ in range(shape.completion_tokens))
    forward = shape.rows * (3 * layer + head)
    assert formulas.logprobs(TINY, ONE, shape, width=2).flops == pytest.approx(forward)
    attention = shape.rows * 3 * sum((t + 0.5) * N * 2 * 2 * H for t in range(shape.tokens))
    for remat, again in {
        "none": 0.0,
        "full": shape.rows * 3 * layer,
        "attn": shape.rows * 3 * layer - attention,
        "products": attention,
    }.items():
        got = formulas.gradients(TINY, ONE, shape, width=2, remat=remat).flops
        assert got == pytest.approx(3 * forward + again + shape.rows * head)


def test_a_mesh_divides_the_work():
    shape = RowShape(rows=8, tokens=7, completion_tokens=5)
    whole = formulas.logprobs(TINY, ONE, shape, width=2)
    split = formulas.logprobs(TINY, Split(batch=4, tensor=2, fsdp=4), shape, width=2)
    assert whole.flops == pytest.approx(8 * split.flops)
    one = formulas.decode(TINY, ONE, rows=8, prompts=2, own=5, prompt=3, width=2)
    eight = formulas.decode(
        TINY, Split(batch=4, tensor=2, fsdp=1), rows=8, prompts=2, own=5, prompt=3, width=2
    )
    assert one.cache_bytes == 3 * 2 * 2 * 4 * 2 * (8 * 5 + 2 * 3)
    assert one.cache_bytes == pytest.approx(8 * eight.cache_bytes)
    assert one.weight_bytes == pytest.approx(2 * eight.weight_bytes)  # each data part has them
    assert formulas.optimizer(16, Split(4, 2, fsdp=2)).hbm_bytes == 16 / 4 * 28


def test_a_sliding_layer_is_looked_at_as_far_as_it_sees():
    """Layer by layer: two of three see four tokens, and have a slot more for a guess."""
    kinds = ("sliding", "global", "sliding")
    arch = dataclasses.replace(TINY, layer_types=kinds, window=4)
    N, K, H = TINY.num_heads, TINY.num_kv_heads, TINY.head_width
    for own, prompt in [(3, 2), (9, 2), (9, 7)]:
        cached, attention = 0, 0
        for kind in kinds:
            of_own, of_prompt = (
                (min(own, 5), min(prompt, 4)) if kind == "sliding" else (own, prompt)
            )
            cached += 2 * K * H * 2 * (8 * of_own + 2 * of_prompt)
            attention += 8 * N * (of_own + of_prompt) * 2 * 2 * H
        looked: dict[str, int] = {"rows": 8, "prompts": 2, "own": own, "prompt": prompt}
        got = formulas.decode(arch, ONE, **looked, width=2, at_once=2)
        assert got.cache_bytes == cached
        everything = formulas.decode(TINY, ONE, **looked, width=2)
        more = 8 * 3 * N * (own + prompt) * 2 * 2 * H - attention
        assert everything.flops - got.flops == pytest.approx(more)
    assert formulas.mean([(Work(4, 2, 0), 0.75), (Work(8, 0, 4), 0.25)]) == Work(5, 1.5, 1)


def test_activations_grow_with_what_remat_keeps():
    shape = RowShape(rows=2, tokens=7, completion_tokens=5)
    kept = [
        formulas.saved_activations(TINY, ONE, shape, width=2, remat=remat)
        for remat in ("full", "attn", "products", "none")
    ]
    assert kept == sorted(kept) and len(set(kept)) == 4
    assert kept[0] == 3 * 2 * 7 * 6 * 2  # L R T D numbers
    assert kept[1] - kept[0] == 3 * 2 * 7 * 16 * 2  # and N H


# ---- machines --------------------------------------------------------------------------------


def test_topologies():
    assert parse_topology("v5e:16x16").num_devices == 256
    assert parse_topology("v5p:4x4x8").num_devices == 128
    assert parse_topology("tpu7x:2x2x1").num_devices == 8  # a chip is two devices
    assert parse_topology("gpu:8xH100").chip is CHIPS["h100"]
    assert parse_topology("local").num_devices is None
    assert chip_of("TPU v5 lite") is CHIPS["v5e"] and chip_of("cpu") is None
    assert chip_of("NVIDIA H100 80GB HBM3") is CHIPS["h100"]


@pytest.mark.parametrize("text", ["v5e", "v9:4x4", "gpu:8xv5e", "gpu:0xh100", "v5e:4", "h100:2x2"])
def test_what_is_no_topology_is_refused(text):
    with pytest.raises(ValueError, match="is no topology: write a TPU slice such as v5e:16x16"):
        parse_topology(text)


# ---- collectives -----------------------------------------------------------------------------

# As TPUs write it: a loop that the partitioner made, groups named by mesh axes, started and done.
TPU_TEXT = """\
HloModule jit_f

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%loop_cond (p: (s32[], bf16[4,8])) -> pred[] {
  %limit.1 = s32[]{:T(128)} constant(6)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit.1), direction=LT
}

%loop_body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %ag = bf16[16,8]{1,0} all-gather(%x), replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
  ROOT %t = (s32[], bf16[4,8]) tuple(%i, %x)
}

%all-reduce-scatter.1 (p: f32[8]) -> f32[2] {
  %ar = f32[8]{0} all-reduce(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum
}

%until_cond (p: (s32[])) -> pred[] {
  ROOT %any = pred[] and(%q, %r)
}

%until_body (p: (s32[])) -> (s32[]) {
  %cp = (bf16[4]{0}, bf16[4]{0}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=1
}

ENTRY %main (x: bf16[4,8]) -> f32[2] {
  %w = (s32[], bf16[4,8]) while(%t0), condition=%loop_cond, body=%loop_body
  %u = (s32[]) while(%t1), condition=%until_cond, body=%until_body
  %ags = (f32[2]{0}, f32[8]{0}) all-gather-start(%y), replica_groups=[2,4]<=[8], dimensions={0}
  %agd = f32[8]{0} all-gather-done(%ags)
  ROOT %f = f32[2]{0} fusion(%agd), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_collectives_of_a_tpu_program():
    found = collectives(TPU_TEXT)
    assert found.counts == {
        "all-gather": 7,
        "collective-permute": 1,
        "reduce-scatter": 1,
    }
    assert found.link_bytes["all-gather"] == 6 * (16 * 8 * 2 * 3 / 4) + 8 * 4 * 3 / 4
    assert found.link_bytes["reduce-scatter"] == 8 * 4 * 3 / 4
    assert found.endless == 1  # counted as one turn; its permute's operand and u32 are not moved
    assert found.link_bytes["collective-permute"] == pytest.approx(4 * 2, abs=2)


def test_collectives_of_a_program_compiled_here():
    """Five turns of a loop, in each a sum over four devices of 32 numbers each."""
    mesh = mesh_of(fsdp=4)

    @partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec())
    def summed(x):
        def turn(carry, _):
            return carry + jax.lax.psum(x * carry[0, 0], "fsdp"), None

        start = jnp.ones((1, 32))
        return jax.lax.scan(turn, start, None, length=5)[0]

    x = jax.ShapeDtypeStruct(
        (4, 32), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp"))
    )
    done = compile_one(Program("sum", jax.jit(summed), (x,)), mesh)
    assert done.link_bytes == {"all-reduce": 5 * 2 * 32 * 4 * 3 / 4}
    assert done.argument_bytes == device_bytes(x) == 32 * 4
    assert not done.refused and not done.endless


# ---- what the compiler says ------------------------------------------------------------------


def test_a_program_too_large_by_itself_is_told_as_such():
    class Refusing:
        def lower(self, *arguments):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
                "space hbm. Used 17.50G of 15.75G hbm. Exceeded hbm capacity by 1.75G."
            )

    x = jax.ShapeDtypeStruct((1 << 28,), jnp.float32)
    done = compile_one(Program("decode", Refusing(), (x,)), mesh_of())
    assert done.refused.startswith("RESOURCE_EXHAUSTED")
    assert done.argument_bytes == GIB and done.temp_bytes == 16.5 * GIB
    assert _used_bytes("Used 512.0M of 1G hbm") == 512 * 2**20


def test_layers_are_extrapolated_linearly():
    low = Compiled("decode", "", 1.0, temp_bytes=100, link_bytes={"all-reduce": 4})
    high = Compiled("decode", "", 1.5, temp_bytes=130, link_bytes={"all-reduce": 6})
    whole = _extrapolated(low, high, 28)
    assert whole.temp_bytes == 100 + 26 * 30 and whole.seconds == 1 + 26 * 0.5
    assert whole.link_bytes == {"all-reduce": 4 + 26 * 2}
    untold = dataclasses.replace(high, link_bytes=None)
    assert _extrapolated(low, untold, 28).link_bytes is None


def test_a_program_that_cannot_be_printed_says_nothing_of_what_it_exchanges():
    class Silent:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: async-update instruction should have 1")

        def memory_analysis(self):
            return jax.jit(jnp.sin).lower(1.0).compile().memory_analysis()

    class Lowered:
        def lower(self, *arguments):
            return self

        def compile(self):
            return Silent()

    done = compile_one(Program("update", Lowered(), ()), mesh_of())
    assert done.link_bytes is None and done.output_bytes == 4


# ---- plans -----------------------------------------------------------------------------------


def plan_for(config, topology="gpu:8xh100", **assumed):
    machine = parse_topology(topology)
    options = Options(assumed=Assumptions(**assumed))
    return make_plan(config, find_arch(config.model), machine, options, print)


def on_eight(config):
    config.mesh.fsdp, config.mesh.tensor = 8, 1
    return config


def test_a_plan_by_formula(capsys):
    """8 H100s and Qwen2.5-1.5B: 16 bytes a parameter in eight parts, the reference 4 of them."""
    plan = plan_for(on_eight(zero_1p5b()))
    assert plan.fits and plan.suggestion is None and plan.compiled is None
    optimiser = next(f for f in plan.footprints if f.kind == "optimiser")
    share = 4 * 1_543_714_304 / 8
    for name in ("parameters", "reference"):
        assert optimiser.bytes[name] == pytest.approx(share, 0.01)
    assert optimiser.bytes["optimiser"] == pytest.approx(2 * share, 0.01)
    decode = next(f for f in plan.footprints if f.kind == "decode")
    assert decode.bytes["KV cache"] == pytest.approx(
        (512 * 2048 + 32 * 512) * 28 * 1024 / 8, rel=0.01
    )
    assert decode.bytes["decode weights"] == pytest.approx(2 * 1_543_714_304, rel=0.01)
    facts = as_json(plan, price=2.0)
    assert json.loads(json.dumps(facts)) == facts
    assert plan.step is not None
    assert facts["cost"] == pytest.approx(2 * 1000 * plan.step.seconds * 8 / 3600)
    assert sum(plan.step.split_s.values()) == pytest.approx(plan.step.seconds)
    assert plan.step.tokens_per_s_per_chip == pytest.approx(512 * 1024 / plan.step.seconds / 8)
    text = "\n".join(describe(plan, 2.0))
    assert "no compiler was asked" in text and "\nfits: " in text


def test_a_run_that_does_not_fit_is_refused_with_a_change_that_fits():
    """7B without remat in rows of ten completions: too much to keep for the backward pass."""
    config = on_eight(zero_7b())
    config.algo.microbatch_tokens, config.model.remat = 40960, "products"
    plan = plan_for(config)
    assert not plan.fits and plan.largest.kind == "gradients" and plan.suggestion
    assert "does not fit: gradients needs" in "\n".join(describe(plan))
    assert dict(plan.suggestion.fields).keys() == {"algo.microbatch_tokens"}
    assert plan_for(plan.suggestion.applied(config)).fits
    assert config.algo.microbatch_tokens == 40960  # the run itself is left alone


def test_slots_and_rows_can_be_too_many_at_once():
    config = on_eight(zero_7b())
    config.algo.microbatch_tokens, config.sample.slots = 40960, 16384
    config.model.remat = "products"
    plan = plan_for(config)
    assert not plan.fits and plan.suggestion
    assert dict(plan.suggestion.fields).keys() == {"algo.microbatch_tokens", "sample.slots"}
    assert plan_for(plan.suggestion.applied(config)).fits


def test_a_model_too_large_for_the_machine_has_no_suggestion():
    config = on_eight(zero_7b())
    config.model.source = "/models/Qwen2.5-72B"
    plan = plan_for(config)
    assert not plan.fits and plan.suggestion is None
    assert "take a larger slice" in describe(plan)[-1]


def test_what_a_step_repeats():
    """512 completions of 1000 tokens, eight rows of one completion: 64 microbatches."""
    parts = SimpleNamespace(
        row_shape=RowShape(rows=8, tokens=2560, completion_tokens=2048),
        schedule=SimpleNamespace(group_size=16, completions=512, minibatches=1),
        engine=SimpleNamespace(max_new=2048, max_prompt=512, num_slots=512),
    )
    few = Assumptions(mean_prompt=200, mean_tokens=2000)
    assert microbatches(parts, few) == 64  # type: ignore[arg-type]
    shorter = Assumptions(mean_prompt=200, mean_tokens=1000)  # two share a row and their prompt
    assert microbatches(parts, shorter) == 32  # type: ignore[arg-type]
    views = (64, 128, 256, 512, 1024, 2048)
    ahead = [next(v for v in views if v > t) for t in range(2048)]
    shares = {view: ahead.count(view) / 2048 for view in views}
    assert view_shares(parts, 512) == shares  # type: ignore[arg-type]
    assert view_shares(parts, 1024) == {2048: 1.0}  # type: ignore[arg-type]


def test_a_model_without_a_shape_is_refused():
    with pytest.raises(ValueError, match=r"--shape=CONFIG_JSON, or name one of Qwen2\.5-0\.5B"):
        find_arch(ModelConfig(source="/models/unheard-of"))
