"""Operations, bytes and seconds by formula: arithmetic on shapes, nothing is compiled.

XLA counts the body of a loop once, whatever its trip count, so its own numbers are of no use here.
Sources: "How to Scale Your Model" (jax-ml.github.io/scaling-book), chapters "Transformers" and
"Inference"; letters as in `grpo.structs`.
"""

import dataclasses
from collections.abc import Sequence

from grpo.batch import RowShape
from grpo.model.arch import Arch, queries_at_once
from grpo.planning.chips import Chip

_F32 = 4


@dataclasses.dataclass(frozen=True)
class Split:
    """How a mesh splits a model: over `tensor` by heads and columns, over `batch` by rows."""

    batch: int  # data x fsdp
    tensor: int
    fsdp: int

    @property
    def devices(self) -> int:
        return self.batch * self.tensor


@dataclasses.dataclass(frozen=True)
class Work:
    """What one run of a program asks of each device.

    Attributes:
      flops: operations, rematerialised ones included.
      weight_bytes: read and written beside matrix products, which can hide behind them.
      cache_bytes: of keys and values; attention over a cache hides behind nothing.
    """

    flops: float = 0.0
    weight_bytes: float = 0.0
    cache_bytes: float = 0.0

    @property
    def hbm_bytes(self) -> float:
        return self.weight_bytes + self.cache_bytes


def mean(runs: Sequence[tuple[Work, float]]) -> Work:
    """What a run asks on average, where each of these is so large a share of all runs."""
    names = [field.name for field in dataclasses.fields(Work)]
    return Work(*(sum(share * getattr(work, name) for work, share in runs) for name in names))


def layer_params(arch: Arch) -> int:
    """Parameters in the matrix products of all layers."""
    attention = arch.width * arch.head_width * 2 * (arch.num_heads + arch.num_kv_heads)
    return arch.num_layers * (attention + 3 * arch.width * arch.mlp_width)


def head_params(arch: Arch) -> int:
    """Parameters of the output head, whether tied or not."""
    return arch.width * arch.vocab_size


def kv_bytes(arch: Arch, width: int, length: int = 1, at_once: int = 1) -> int:
    """Bytes of the cache of a sequence: 2 K H numbers of `width` bytes a token and layer.

    `length` and `at_once` are as in `Arch.cache_lengths`: sliding layers keep less.
    """
    tokens = sum(arch.cache_lengths(length, at_once))
    return 2 * arch.num_kv_heads * arch.head_width * width * tokens


def attention_flops(arch: Arch, pairs: float) -> float:
    """Operations for so many (query, key) pairs of every layer: 4 L N H each, forward."""
    return 4 * arch.num_layers * arch.num_heads * arch.head_width * pairs


def decode(
    arch: Arch,
    split: Split,
    *,
    rows: int,
    prompts: int,
    own: int,
    prompt: int,
    width: int,
    at_once: int = 1,
) -> Work:
    """One token for every row.

    Args:
      arch: shape of the model.
      split: of the decode form, whose weights each batch part has whole.
      rows: slots, over all devices.
      prompts: stored prompts, over all devices; each is read once for all its slots.
      own: places looked at of what each slot wrote; in a sliding layer, of no more than it caches.
      prompt: places looked at of each prompt; likewise.
      width: bytes of a weight or a cached number.
      at_once: as in `Arch.cache_lengths`.
    """
    params = layer_params(arch) + head_params(arch)
    here = rows / split.batch
    seen = sum(arch.cache_lengths(own, at_once)) + sum(arch.cache_lengths(prompt))
    flops = 2 * here * params + attention_flops(arch, here * seen / arch.num_layers)
    cached = here * kv_bytes(arch, width, own, at_once)
    cached += prompts / split.batch * kv_bytes(arch, width, prompt)
    return Work(flops / split.tensor, params * width / split.tensor, cached / split.tensor)


def prefill(arch: Arch, split: Split, *, rows: int, length: int, width: int) -> Work:
    """Keys and values of `rows` prompts. The rows are not split over the batch axes unless they
    divide; the head is not computed."""
    here = rows / split.batch if rows % split.batch == 0 else rows
    flops = 2 * here * length * layer_params(arch) + attention_flops(arch, here * length**2 / 2)
    weights = layer_params(arch) * width + here * length * _activation_traffic(arch) * width
    return Work(
        flops / split.tensor,
        weights / split.tensor,
        kv_bytes(arch, width, length) * here / split.tensor,
    )


def logprobs(arch: Arch, split: Split, shape: RowShape, *, width: int) -> Work:
    """Forward pass of a microbatch: layers over T slots, the head over C."""
    here = shape.rows / split.batch
    layers, head = _forward_flops(arch, shape)
    weights = (layer_params(arch) + head_params(arch)) * width
    traffic = here * shape.tokens * _activation_traffic(arch) * width
    return Work(here * (layers + head) / split.tensor, (weights + traffic) / split.tensor)


def gradients(arch: Arch, split: Split, shape: RowShape, *, width: int, remat: str) -> Work:
    """Forward and backward pass of a microbatch: 3 x forward, and what is computed again.

    The head's logits always are; of the layers, "full" everything, "attn" all but the attention,
    "products" the attention and "none" nothing (arXiv:2205.05198).
    """
    here = shape.rows / split.batch
    layers, head = _forward_flops(arch, shape)
    attention = attention_flops(arch, shape.tokens**2 / 2)
    again = {"none": 0.0, "full": layers, "attn": layers - attention, "products": attention}[remat]
    flops = here * (3 * layers + again + 4 * head) / split.tensor
    params = layer_params(arch) + head_params(arch)
    traffic = here * shape.tokens * _activation_traffic(arch) * width
    passes = 3 if again == 0 else 4
    # Sums of gradients are read and written in float32, each device its share.
    own = 2 * _F32 * params / (split.tensor * split.fsdp)
    return Work(flops, passes * (params * width + traffic) / split.tensor + own)


def optimizer(num_params: int, split: Split) -> Work:
    """AdamW in float32: parameter, gradient and two moments read, all but the gradient written."""
    return Work(0.0, 7 * _F32 * num_params / (split.tensor * split.fsdp))


def hand_over(num_params: int, split: Split, *, width: int) -> Work:
    """Train form to decode form: a share of float32 is read, the gathered weights are written."""
    share = num_params / split.tensor
    return Work(0.0, share / split.fsdp * _F32 + share * width)


def seconds(work: Work, chip: Chip, link_bytes: float = 0.0) -> float:
    """Roofline: cache / bandwidth + max(operations / speed, weights / bandwidth) + exchange.

    Source: scaling book, "Inference", general formula of a decode step; exchange is not assumed to
    hide behind anything.
    """
    return sum(parts(work, chip, link_bytes).values())


def parts(work: Work, chip: Chip, link_bytes: float = 0.0) -> dict[str, float]:
    """The same by what takes the seconds: "compute", "memory", "interconnect"."""
    compute, memory = work.flops / chip.flops, work.weight_bytes / chip.hbm_bandwidth
    cache = work.cache_bytes / chip.hbm_bandwidth
    return {
        "compute": compute if compute >= memory else 0.0,
        "memory": cache + (memory if memory > compute else 0.0),
        "interconnect": link_bytes / chip.link_bandwidth,
    }


# ---- memory ----------------------------------------------------------------------------------


def saved_activations(
    arch: Arch, split: Split, shape: RowShape, *, width: int, remat: str
) -> float:
    """Bytes a device keeps from the forward for the backward pass of a microbatch.

    The residual stream between layers always (not split over `tensor`), and of each layer what
    `model.remat` keeps (arXiv:2205.05198, section 4, with our names).
    """
    D, F, H = arch.width, arch.mlp_width, arch.head_width
    N, K = arch.num_heads, arch.num_kv_heads
    products = (2 * N * H + 2 * K * H + 2 * F) / split.tensor + D
    kept = {
        "full": 0.0,
        "attn": N * H / split.tensor,
        "products": products,
        # Norms in float32 and the gated product.
        "none": products + 4 * D + 2 * F / split.tensor,
    }[remat]
    here = shape.rows / split.batch * shape.tokens
    return arch.num_layers * here * (D + kept) * width


def update_workspace(arch: Arch, split: Split, shape: RowShape, *, width: int, chunk: int) -> float:
    """Rough bytes beside the saved activations: one layer, one block of attention, one chunk."""
    here = shape.rows / split.batch
    layer = layer_params(arch) / arch.num_layers / split.tensor * (width + _F32)
    head = head_params(arch) / split.tensor * (width + _F32)
    block = queries_at_once(shape.tokens) * shape.tokens
    scores = here * arch.num_heads / split.tensor * block * 3 * _F32
    wide = here * shape.tokens * (3 * arch.mlp_width / split.tensor + 4 * arch.width) * width
    logits = here * min(chunk, shape.completion_tokens) * arch.vocab_size / split.tensor * 3 * _F32
    return 2 * layer + head + max(scores, wide, logits)


def decode_workspace(arch: Arch, split: Split, *, rows: int, places: int) -> float:
    """Rough bytes of a decode step: scores of one layer, the logits and what samples from them."""
    here = rows / split.batch
    scores = here * arch.num_heads / split.tensor * places * 3 * _F32
    return max(scores, here * arch.vocab_size / split.tensor * 4 * _F32)


def _forward_flops(arch: Arch, shape: RowShape) -> tuple[float, float]:
    """Of one row: all layers (half of the attention square is never made), and the head."""
    layers = 2 * shape.tokens * layer_params(arch) + attention_flops(arch, shape.tokens**2 / 2)
    return layers, 2 * shape.completion_tokens * head_params(arch)


def _activation_traffic(arch: Arch) -> int:
    """Numbers that go into and come out of a layer's seven products, a token, all layers."""
    heads = 2 * arch.head_width * (arch.num_heads + arch.num_kv_heads)
    return arch.num_layers * (7 * arch.width + heads + 3 * arch.mlp_width)
