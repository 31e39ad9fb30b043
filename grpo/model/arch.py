"""What a decoder looks like: the numbers that fix every shape, and nothing else."""

import dataclasses

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

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
                f"({self.num_kv_heads}): each key/value head serves an equal share of query heads"
            )
        if self.head_width % 2:
            raise ValueError(
                f"head_width ({self.head_width}) must be even: rotary positions rotate pairs"
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
