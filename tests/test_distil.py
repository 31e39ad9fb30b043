"""Distillation: what the teacher says is right in any layout, and a run of it is like any run."""

import dataclasses
import functools
import json
import math
import signal
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from logged_rows import rows, stop_after, timeless
from tiny_experiment import get_config
from tokenizers import Tokenizer as Core
from tokenizers.models import WordLevel
from toy_model import (
    ARCH,
    ToyTokenizer,
    mesh_of,
    one_a_row,
    policy_on,
    ragged_samples,
    toy_params,
)

from grpo import divergence, runinfo
from grpo.batch import RowShape, pack, to_device, totals
from grpo.build import start
from grpo.checkpoint import Checkpoints, params_sha256
from grpo.config import Config, ModelConfig, OptimConfig
from grpo.data.tokenizer import ByteTokenizer, HfTokenizer, difference
from grpo.loss import distil_loss
from grpo.model.arch import Arch
from grpo.model.logprobs import comparison, over_chunks
from grpo.model.params import map_table, param_table
from grpo.policy import Policy, lay_out
from grpo.source import Source, new_arch, open_source
from grpo.stages.distil import distil
from grpo.structs import Batch, Comparison, Totals
from grpo.teacher import check_tokens, make_teacher, taught
from grpo.update import decayed_params, init_state, make_optimizer

pytestmark = pytest.mark.usefixtures("compiled_once")

# ---- teacher and student in one program --------------------------------------------------------

OTHER = dataclasses.replace(ARCH, width=24, mlp_width=16, num_layers=3, vocab_size=40)
MODEL = ModelConfig(compute_dtype="float32", remat="none")
SAMPLES = ragged_samples(groups=4)
TOTALS = totals(SAMPLES)
SHAPE = RowShape(rows=8, tokens=24, completion_tokens=20)
TEMPERATURE = 0.7
JSD = partial(divergence.jsd, beta=0.3)
MESHES: dict[str, dict[str, Any]] = {
    "1": {},
    "auto": {"fsdp": 4, "tensor": 2},
    "explicit": {"fsdp": 4, "tensor": 2, "axis_types": "explicit"},
}

close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


@dataclasses.dataclass(frozen=True)
class Toy(Source):
    """A source of the toy's random weights."""

    def read(self, shardings, keep=None):
        def kept(path, array):
            return keep(jax.tree_util.keystr(path, simple=True, separator="/"), array)

        arrays = jax.device_put(toy_params(self.arch), shardings)
        return jax.tree_util.tree_map_with_path(kept, arrays) if keep else arrays


def toy(arch: Arch = ARCH, tokenizer: Any = None) -> Toy:
    return Toy(arch, tokenizer or ToyTokenizer(), None)


def pair(name: str = "1", kind: Any = JSD) -> Policy:
    """The toy with a teacher of another size, and of more ids than there are tokens."""
    student = policy_on(mesh_of(**MESHES[name]))
    teacher = make_teacher(toy(OTHER), student, MODEL)
    return taught(student, teacher, kind, temperature=TEMPERATURE, chunk=3)


def sums(policy: Policy) -> Any:
    """Loss, with its metrics, and gradients of the samples."""
    [batch] = pack(SAMPLES, SHAPE).microbatches

    def loss(params, base, batch):
        value, means, _ = distil_loss(*policy.logprobs(params, base, batch), batch, TOTALS)
        return value, means

    with jax.set_mesh(policy.mesh):
        given = policy.initial_params(), policy.base(), to_device(batch, policy.mesh)
        return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(loss, has_aux=True))(*given))


@pytest.fixture(scope="module")
def base() -> Any:
    (loss, means), gradients = sums(pair())
    assert loss > 0.01 and means["distil/divergence_nats"].count == TOTALS.tokens
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(gradients))
    return (loss, means), gradients


def whole_logits(policy: Policy, params: Any, base: Any, batch: Batch) -> np.ndarray:
    """[R, C, V] in float64, at the run's temperature."""
    hidden_RTD, head_DV, _ = jax.jit(policy.outputs)(params, base, batch)
    hidden_RCD = np.take_along_axis(
        np.asarray(hidden_RTD, np.float64), np.asarray(batch.contexts_RC)[..., None], axis=1
    )
    in_dtype_DV = np.asarray(head_DV.astype(hidden_RTD.dtype), np.float64)
    return hidden_RCD @ in_dtype_DV / TEMPERATURE


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_values_are_those_of_the_whole_vocabularies():
    """Of as many ids as both models have; whatever the teacher has beyond is no token."""
    student, both = policy_on(mesh_of()), pair(kind=divergence.reverse_kl)
    teacher = make_teacher(toy(OTHER), student, MODEL)
    batch, mask_RC = one_a_row(SAMPLES), one_a_row(SAMPLES).mask_RC
    with jax.set_mesh(student.mesh):
        params, base = student.initial_params(), both.base()
        compared, entropy_RC = jax.jit(both.logprobs)(params, base, batch)
        student_RCV = whole_logits(student, params, {}, batch)
        teacher_RCV = whole_logits(teacher, {}, base["teacher"], batch)
    assert student_RCV.shape[-1] == 32 and teacher_RCV.shape[-1] == 40
    p_RCV, q_RCV = log_softmax(student_RCV), log_softmax(teacher_RCV[..., :32])
    wanted_RC = (np.exp(p_RCV) * (p_RCV - q_RCV)).sum(-1)
    chosen = partial(np.take_along_axis, indices=batch.targets_RC[..., None], axis=-1)
    for got, wanted in (
        (compared.divergence_RC, wanted_RC),
        (compared.logprobs_RC, chosen(p_RCV)[..., 0]),
        (compared.teacher_logprobs_RC, chosen(q_RCV)[..., 0]),
        (entropy_RC, -(np.exp(p_RCV) * p_RCV).sum(-1)),
    ):
        np.testing.assert_allclose(np.asarray(got)[mask_RC], wanted[mask_RC], rtol=1e-4, atol=1e-5)
    assert wanted_RC[mask_RC].mean() > 0.1


def test_the_loss_by_hand():
    """Masked slots count nowhere, whatever stands in them; the sampler is held against."""
    nan = math.nan
    empty = jax.tree.map(lambda a: a[:1, :4], pack([], SHAPE).microbatches[0])
    batch = empty.replace(
        mask_RC=np.array([[True, True, False, True]]),
        sampler_logprobs_RC=np.array([[-1.0, -2.0, nan, -3.0]], np.float32),
    )

    def loss(divergence_RC):
        compared = Comparison(
            divergence_RC=divergence_RC,
            logprobs_RC=jnp.array([[-1.0, -2.5, nan, -3.0]]),
            teacher_logprobs_RC=jnp.array([[-4.0, -1.0, nan, -1.0]]),
        )
        entropy_RC = jnp.array([[0.5, 1.0, nan, 1.5]])
        value, means, maxima = distil_loss(compared, entropy_RC, batch, Totals(6, 2))
        return value, (means, maxima)

    (value, (means, maxima)), gradient = jax.value_and_grad(loss, has_aux=True)(
        jnp.array([[3.0, 1.0, nan, 2.0]])
    )
    assert value == pytest.approx(1.0)  # 6 nats over 6 tokens, half of them in another microbatch
    np.testing.assert_allclose(gradient, [[1 / 6, 1 / 6, 0, 1 / 6]], rtol=1e-6)
    assert means["distil/divergence_nats"] == (6, 3)
    assert means["distil/teacher_logprob_nats"] == (-6, 3)
    assert means["policy/entropy_nats"] == (3, 3)
    assert means["sampler/gap_nats_mean"] == (0.5, 3)
    assert maxima["sampler/gap_nats_max"] == 0.5


@pytest.mark.parametrize("name", ["explicit", pytest.param("auto", marks=pytest.mark.slow)])
def test_a_vocabulary_in_two_halves_changes_nothing(base, name):
    """Weights over four devices, vocabulary and heads over two; the teacher's ids are cut."""
    jax.tree.map(close, sums(pair(name)), base)


def places(chunk: int, kind: Any, same: bool = False) -> Any:
    """Mean divergence of 2 x 7 places, and its gradients by hidden states and head."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    hidden, head, other, other_head = draw(2, 7, 5), draw(5, 11), draw(2, 7, 3), draw(3, 11)
    if same:
        other, other_head = hidden, head
    targets_RC = jnp.asarray(rng.integers(0, 11, (2, 7)), jnp.int32)

    def mean(hidden_RCD, head_DV):
        compared, _ = over_chunks(
            partial(comparison, divergence=kind),
            [hidden_RCD, other],
            [head_DV, other_head],
            targets_RC,
            temperature=0.8,
            chunk=chunk,
            logit_caps=[None, 2.0 if not same else None],
        )
        return compared.divergence_RC.mean()

    return jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))(hidden, head)


@pytest.mark.parametrize("kind", [divergence.reverse_kl, divergence.sampled_reverse_kl])
def test_chunks_change_nothing(kind):
    whole, *others = (places(chunk, kind) for chunk in (100, 1, 3))
    assert float(jnp.abs(whole[1][1]).max()) > 0.01
    for other in others:
        jax.tree.map(close, other, whole)


@pytest.mark.parametrize("kind", [divergence.forward_kl, partial(divergence.jsd, beta=0.5)])
def test_a_teacher_like_its_student_teaches_nothing(kind):
    value, gradients = places(3, kind, same=True)
    assert abs(float(value)) < 1e-6
    assert max(float(jnp.abs(leaf).max()) for leaf in gradients) < 1e-6


def test_a_teacher_in_bfloat16_says_what_its_float32_weights_say():
    """Blocks compute in it anyway: only half of the memory is gone."""
    student = policy_on(mesh_of())
    low = dataclasses.replace(MODEL, compute_dtype="bfloat16")
    teacher = make_teacher(toy(OTHER), student, low)
    plain = lay_out(OTHER, ToyTokenizer(), student.mesh, low, temperature=1.0)
    batch = one_a_row(SAMPLES[:4])
    with jax.set_mesh(student.mesh):
        kept = teacher.base()
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), kept)
        stated = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), teacher.base_like)
        assert like == stated
        assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype("bfloat16")}
        got = whole_logits(teacher, {}, kept, batch)
        wanted = whole_logits(plain, toy_params(OTHER), {}, batch)
    np.testing.assert_array_equal(got[batch.mask_RC], wanted[batch.mask_RC])


def test_routers_of_a_teacher_stay_float32():
    shape = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    shape |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 4}
    more = {"model_type": "qwen3_moe", "num_attention_heads": 4, "num_key_value_heads": 2}
    text = json.dumps(shape | more | {"norm_topk_prob": True, "tie_word_embeddings": True})
    config = Config(model=ModelConfig(shape=text, compute_dtype="bfloat16"))
    arch = new_arch(config.model, 32)
    teacher = make_teacher(toy(arch), policy_on(mesh_of()), config.model)
    layers = teacher.base_like["layers"]
    assert layers["router"].dtype == jnp.float32 and layers["expert_up"].dtype == jnp.bfloat16


# ---- tokens mean the same ----------------------------------------------------------------------


def words(*tokens: str, eos: tuple[int, ...] = (0,)) -> HfTokenizer:
    core = Core(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    return HfTokenizer(core=core, vocab_size=len(tokens), eos_ids=eos, pad_id=0)


@pytest.mark.parametrize(
    "one, other, found",
    [
        (ByteTokenizer(), words("<eos>", "a"), "a ByteTokenizer against a HfTokenizer"),
        (words("<eos>", "a"), words("<eos>", "a", "b"), "2 ids against 3"),
        (words("a", "b"), words("a", "b", eos=(1,)), r"stop ids \[0\] against \[1\]"),
        (words("a", "b", "c"), words("a", "c", "b"), "id 1 is 'b' against 'c'"),
    ],
)
def test_what_differs_between_tokenizers_is_said(one, other, found):
    student = dataclasses.replace(policy_on(mesh_of()), tokenizer=one)
    with pytest.raises(ValueError, match=f"different tokenizers: {found}.*same family"):
        check_tokens(toy(tokenizer=other), student)


def test_equal_tokenizers_have_no_difference():
    assert difference(words("a", "b"), words("a", "b")) is None
    assert difference(ByteTokenizer(), ByteTokenizer()) is None


def test_every_id_needs_a_logit_of_both():
    small = dataclasses.replace(ARCH, vocab_size=16)
    with pytest.raises(ValueError, match="32 ids, but the policy's model 32 and .*teacher 16"):
        check_tokens(toy(small), policy_on(mesh_of()))


# ---- the stage ---------------------------------------------------------------------------------


STEPS = 8


def save_teacher(workdir: Path) -> Path:
    """A run's folder whose newest checkpoint is of random weights with strong opinions."""
    config = get_config()
    config.model = dataclasses.replace(config.model, width=32, num_layers=1, num_heads=4)
    config.seed = 7
    with ExitStack() as stack:
        _, _, policy = start(config, workdir, stack, scored=False)
        params = policy.initial_params()
        params["embed"] = params["embed"] * 2  # what is tied to it are the logits
        optimizer = make_optimizer(OptimConfig(), lambda step: 0.0, decayed_params(policy))
        with Checkpoints(workdir / "checkpoints", 1) as checkpoints:
            checkpoints.save(init_state(policy, params, optimizer))
        runinfo.write(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def tiny(teacher: Path, **changes: Any) -> Config:
    """The tiny experiment, taught: `tiny(teacher, num_steps=2)`."""
    config = get_config()
    config.sft.num_steps, config.num_steps, config.eval.every = 0, STEPS, STEPS // 2
    config.distil.teacher = str(teacher)
    for name, value in changes.items():
        *path, last = name.split("__")
        setattr(functools.reduce(getattr, path, config), last, value)
    return config


def run(config: Config, workdir: Path) -> Any:
    return distil(config, workdir, baseline=config)


@pytest.fixture(scope="module")
def straight(teacher, tmp_path_factory):
    """A run that nothing disturbs: its folder and its final state."""
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, run(tiny(teacher), workdir)


def test_a_run_leaves_what_others_read(straight):
    workdir, state = straight
    digest = params_sha256(state.params)
    assert json.loads((workdir / "result.json").read_text()) == {
        "params_sha256": digest,
        "steps": STEPS,
    }
    source = open_source(str(workdir))
    shardings = map_table(
        lambda spec: jax.sharding.SingleDeviceSharding(jax.devices()[0]), param_table(source.arch)
    )
    assert source.step == STEPS and params_sha256(source.read(shardings)) == digest
    assert len(rows(workdir / "rollouts.jsonl")) == STEPS * 16
    for name in ("curves.png", "before_after.md"):
        assert (workdir / name).stat().st_size > 0
    metrics = rows(workdir / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(STEPS + 1))
    assert [row["step"] for row in metrics if "eval/pass_at_1" in row] == [0, STEPS // 2, STEPS]


def test_the_student_comes_nearer_to_its_teacher(straight):
    metrics = rows(straight[0] / "metrics.jsonl")[:STEPS]
    nats = [row["distil/divergence_nats"] for row in metrics]
    assert nats[-1] < 0.9 * nats[0]


def test_sampler_and_trainer_agree_and_nothing_is_compiled_later(straight):
    metrics = rows(straight[0] / "metrics.jsonl")[:STEPS]
    assert all(row["sampler/gap_nats_max"] <= 1e-5 for row in metrics)
    assert len({row["engine/compiled"] for row in metrics}) == 1
    assert all(row["gates/warnings"] == 0 for row in metrics)


def test_a_run_stopped_half_way_ends_as_one_that_never_stopped(
    straight, teacher, tmp_path, monkeypatch
):
    config = tiny(teacher, log__save_every=50)  # nothing is saved but by the signal
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        stop_after(2, patch)
        run(config, tmp_path)
    assert stopped.value.code == 128 + signal.SIGTERM
    # Killed after the third step was logged and before it was saved, it would leave this.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "optim/bad_updates": 0}\n{"step": 3')
    state = run(config, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, state, straight[1])
    assert timeless(tmp_path / "metrics.jsonl") == timeless(straight[0] / "metrics.jsonl")
    for path in (
        "rollouts.jsonl",
        *(f"evaluations/step_{n:06d}.jsonl" for n in (0, STEPS // 2, STEPS)),
    ):
        assert (tmp_path / path).read_bytes() == (straight[0] / path).read_bytes()


def test_rewards_may_be_left_out(straight, teacher, tmp_path):
    """They are only logged: without them the same is written and learnt."""
    state = run(tiny(teacher, eval__every=0, reward__functions=()), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, state.params, straight[1].params)
    metrics = rows(tmp_path / "metrics.jsonl")
    assert not [name for row in metrics for name in row if name.startswith("reward/")]


def test_adapters_learn_from_sampled_tokens(teacher, tmp_path):
    config = tiny(teacher, lora__rank=4, eval__every=0, num_steps=2)
    config.distil.divergence = divergence.sampled_reverse_kl
    state = run(config, tmp_path)
    names = {jax.tree_util.keystr(path)[-5:] for path, _ in jax.tree.leaves_with_path(state.params)}
    assert names == {"['a']", "['b']"}
    metrics = rows(tmp_path / "metrics.jsonl")
    assert metrics[0]["lora/weight_change"] > 0
    # The mean over what was sampled of log student - log teacher.
    assert metrics[0]["distil/divergence_nats"] > 0.1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"distil__teacher": ""}, "distil.teacher is not set: there is nobody to learn from"),
        ({"distil__teacher": "/nowhere"}, "nowhere"),
        ({"data__train": None}, "data.train is not set"),
        ({"reward__functions": ()}, "eval.every is set, but reward.functions is empty"),
        ({"algo__minibatches": 2}, "algo.minibatches is 2, but distillation makes one update"),
        ({"algo__curriculum": 2}, "algo.curriculum is 2, but .* set it to 1"),
        ({"algo__problems_per_step": 64}, "data.train has only 40 usable problems"),
        ({"algo__clip_low": 0.1}, "does not use them.*config.algo.clip_low=0.1"),
        ({"gates__max_stuck_share": 0.1}, "does not use them.*max_stuck_share"),
        ({"distil__beta": 0.1}, "does not use them.*config.distil.beta=0.1"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_compiled(teacher, tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}"):
        distil(tiny(teacher, **changes), tmp_path, baseline=tiny(teacher))
    assert not (tmp_path / "config.json").exists()


def test_a_mesh_that_does_not_divide_the_teacher_is_refused():
    odd = dataclasses.replace(OTHER, width=18)
    student = policy_on(mesh_of(fsdp=4, tensor=2))
    with pytest.raises(ValueError, match=r"distil.teacher: the model's 'embed' axis \(18\)"):
        make_teacher(toy(odd), student, MODEL)
