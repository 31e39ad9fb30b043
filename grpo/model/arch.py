"""What a decoder looks like: the numbers that fix every shape, and nothing else."""

import dataclasses

REMAT_CHOICES = (
    "none",
    "full",
    "attn",
    "products",
)  # what the backward pass recomputes; see decoder.py
BASE_DTYPES = ("float32", "bfloat16", "int8", "int4")  # what frozen weights are stored in
ROLLOUT_CHOICES = ("compute", "int8")  # what the sampler's weights and its cache are in


@dataclasses.dataclass(frozen=True)
class Arch:
    """Shape of a pre-norm decoder of the Llama family (arXiv:2302.13971).

    RMSNorm, rotary positions, grouped-query attention, SwiGLU MLP. Letters as in
    `grpo.structs`.
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
    tied_head: bool = True  # the output head is the embedding, transposed
    max_positions: int = 1 << 20  # longest context the model was made for, tokens

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
