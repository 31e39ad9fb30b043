"""What a decoder looks like: the numbers that fix every shape, and nothing else."""

import dataclasses
import math

from grpo.model.rope import Scaling

REMAT_CHOICES = (
    "none",
    "full",
    "attn",
    "products",
)  # what the backward pass recomputes; see decoder.py
BASE_DTYPES = ("float32", "bfloat16", "int8", "int4")  # what frozen weights are stored in
ROLLOUT_CHOICES = ("compute", "int8")  # what the sampler's weights and its cache are in
ATTENTION_CHOICES = ("auto", "xla", "cudnn", "splash")  # of the trainer; see attention.py

ACTIVATIONS = ("silu", "gelu_tanh")

# What a layer attends to: everything before, with rotary positions; the last `window` tokens; or
# everything, without positions.
LAYER_TYPES = ("global", "sliding", "unrotated")


SCORINGS = ("softmax", "sigmoid")


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP (DeepSeekMoE, arXiv:2401.06066; Qwen 3 MoE).

    Each token goes to the `per_token` experts with the highest scores, and their outputs are added
    up, each times its score.

    Attributes:
      count: experts there are, E.
      per_token: experts a token goes to, k.
      width: of one expert's MLP.
      shared_width: of an MLP that every token goes through beside its experts; 0: none.
      first_dense: this many layers at the start have an MLP of `Arch.mlp_width` instead.
      scoring: how the router's logits become scores: "softmax" over experts, or "sigmoid" of each.
      normalised: the scores of a token's experts are divided by their sum.
      scale: multiplies them after that.
      selection_bias: a bias that no gradient reaches is added to the scores to choose by them, not
        to weigh by them (balancing without a loss, arXiv:2408.15664).
      groups: the experts fall into so many equal groups of neighbours,
      groups_per_token: of which a token may go to the experts of so many,
      group_top: those in which its so many best scores have the highest sum.
    """

    count: int
    per_token: int
    width: int
    shared_width: int = 0
    first_dense: int = 0
    scoring: str = "softmax"
    normalised: bool = True
    scale: float = 1.0
    selection_bias: bool = False
    groups: int = 1
    groups_per_token: int = 1
    group_top: int = 1

    def __post_init__(self) -> None:
        if self.scoring not in SCORINGS:
            raise ValueError(f"scoring {self.scoring!r} is unknown; there are {SCORINGS}")
        if self.count > 32_767:
            raise ValueError(f"{self.count} experts: their numbers are kept as 16-bit integers")
        if self.count % self.groups or not 1 <= self.groups_per_token <= self.groups:
            raise ValueError(
                f"{self.count} experts in {self.groups} groups, of which a token may go to "
                f"{self.groups_per_token}: the groups must be equal, and that many"
            )
        reachable = self.count // self.groups * self.groups_per_token
        if not 1 <= self.per_token <= reachable:
            raise ValueError(
                f"a token goes to {self.per_token} experts, but only {reachable} are within its "
                "reach"
            )
        if self.group_top > self.count // self.groups:
            raise ValueError(
                f"the best {self.group_top} experts decide for a group of "
                f"{self.count // self.groups}"
            )


@dataclasses.dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Keys and values of all heads are made from one narrow vector a token, and only that is cached.
    With it, `Arch.head_width` is `plain_width` + `rope_width`, and every head has keys of its own.

    Attributes:
      kv_rank: width of that vector.
      q_rank: width of the one that queries are made from; None: from the residual stream.
      plain_width: of a head's query and key, the part without positions.
      rope_width: of the rotated part, whose key all heads share.
      value_width: of a head's value.
      interleaved: neighbouring rows are rotated together, (0, 1), (2, 3), ...; else halves are.
    """

    kv_rank: int
    q_rank: int | None
    plain_width: int
    rope_width: int
    value_width: int
    interleaved: bool = True

    @property
    def cached_width(self) -> int:
        """Numbers a layer that the cache keeps of a token."""
        return self.kv_rank + self.rope_width


@dataclasses.dataclass(frozen=True)
class Arch:
    """Shape of a pre-norm decoder: Llama's (arXiv:2302.13971) and its relatives.

    RMSNorm, rotary positions, grouped-query attention, gated MLP. The fields without a default
    are every decoder's; the others say in what a family departs from Llama. Letters as in
    `grpo.structs`.

    Attributes:
      rope_theta: base of the rotary frequencies.
      rope_scaling: what stretches them.
      local_rope_theta: base in sliding layers, not stretched; None: as in the others.
      tied_head: the output head is the embedding, transposed.
      max_positions: longest context the model was made for, tokens.
      qkv_bias: queries, keys and values have a bias (Qwen 2).
      qk_norm: queries and keys are RMS-normed a head before they are rotated (Qwen 3, Gemma 3).
      query_scale: multiplies the scores; None: head_width ** -0.5.
      score_cap, logit_cap: c in c * tanh(x / c), of attention scores and of logits (Gemma 2).
      activation: of the MLP's gate.
      norm_offset: added to every norm's scale; Gemma stores scales as what they are above 1.
      sandwich_norm: what attention and MLP write is normed as well, before it is added (Gemma).
      embed_scale: multiplies the embeddings (Gemma's sqrt(D)); not the head they are tied to.
      layer_types: one of LAYER_TYPES a layer; () means all "global".
      window: how many tokens a sliding layer sees, the current one included.
      experts: a mixture of them takes the place of the MLP; None: all layers are dense.
      latent: keys and values come from a narrow vector; None: from the residual stream.
    """

    vocab_size: int  # V
    width: int  # D
    mlp_width: int  # F
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_width: int  # H
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied_head: bool = True
    max_positions: int = 1 << 20
    rope_scaling: Scaling | None = None
    local_rope_theta: float | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    query_scale: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    activation: str = "silu"
    norm_offset: float = 0.0
    sandwich_norm: bool = False
    embed_scale: float = 1.0
    layer_types: tuple[str, ...] = ()
    window: int | None = None
    experts: Experts | None = None
    latent: Latent | None = None

    @property
    def first_dense(self) -> int:
        """Dense layers before those with experts; 0 in a model without experts."""
        return self.experts.first_dense if self.experts else 0

    @property
    def routed_layers(self) -> int:
        """Layers with experts."""
        return self.num_layers - self.experts.first_dense if self.experts else 0

    @property
    def rope_width(self) -> int:
        """Of the rotated part of a query or key."""
        return self.latent.rope_width if self.latent else self.head_width

    def cache_lengths(self, length: int, at_once: int = 1) -> tuple[int, ...]:
        """How many tokens each layer caches of sequences of `length`: all that are seen again.

        In a sliding layer those are the last `window`. Where several tokens are fed `at_once`, the
        first of them must still find its window when the last has taken the place of another.
        """
        if self.window is None:
            return (length,) * self.num_layers
        sliding = min(length, self.window + at_once - 1)
        return tuple(sliding if kind == "sliding" else length for kind in self.layer_types)

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
                f"({self.num_kv_heads}): each key/value head serves an equal share of query heads"
            )
        if self.rope_width % 2:
            raise ValueError(
                f"head_width ({self.rope_width}) must be even: rotary positions rotate pairs"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation {self.activation!r} is unknown; there are {', '.join(ACTIVATIONS)}"
            )
        if self.layer_types and len(self.layer_types) != self.num_layers:
            raise ValueError(
                f"layer_types names {len(self.layer_types)} layers, num_layers is {self.num_layers}"
            )
        if unknown := sorted(set(self.layer_types) - set(LAYER_TYPES)):
            raise ValueError(
                f"layer type {unknown[0]!r} is unknown; there are {', '.join(LAYER_TYPES)}"
            )
        if ("sliding" in self.layer_types) != (self.window is not None):
            raise ValueError(
                f"window ({self.window}) goes with sliding layers, and they with it; "
                f"layer_types is {self.layer_types}"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window ({self.window}) must be at least 1: a token sees itself")
        if self.experts and not 0 <= self.experts.first_dense < self.num_layers:
            raise ValueError(
                f"first_dense ({self.experts.first_dense}) must leave at least one of the "
                f"{self.num_layers} layers to the experts"
            )
        if self.latent:
            self._check_latent(self.latent)

    def _check_latent(self, latent: Latent) -> None:
        width = latent.plain_width + latent.rope_width
        if self.head_width != width or self.num_kv_heads != self.num_heads:
            raise ValueError(
                f"head_width ({self.head_width}) must be plain_width + rope_width ({width}) and "
                f"num_kv_heads ({self.num_kv_heads}) num_heads ({self.num_heads})"
            )
        if self.qkv_bias or self.qk_norm or self.score_cap is not None:
            raise ValueError("latent attention has no qkv_bias, qk_norm or score_cap")


def queries_at_once(T: int) -> int:
    """Queries of a row of T slots whose attention scores exist at one time, but for kernels.

    128; more where there would be over 32 such blocks, each of which the compiler sees.
    """
    return 128 * math.ceil(T / (128 * 32))
