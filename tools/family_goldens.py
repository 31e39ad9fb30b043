"""Writes tests/golden/families.{json,npz}: what `transformers` says of the tiny models.

    python -m tools.family_goldens OUT_FOLDER

Needs torch and transformers (made with 2.13.0 and 5.23.0), not jax. The JSON has, for each model,
its config.json and the names and shapes of its tensors, as transformers saves them, and the
rotary frequencies of some published models; the npz has the logits [T, V] of each row of
`tools.tiny_models.TOKENS`, float32, eager attention, on a CPU.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tools import tiny_models


def build(config: Any, shapes: dict[str, list[int]]) -> Any:
    """The model with the weights that go with the names of its tensors."""
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    gemma = config.model_type.startswith("gemma")
    values = {k: torch.from_numpy(v) for k, v in tiny_models.weights(shapes, gemma).items()}
    missing = model.load_state_dict(values, strict=False)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    assert missing.missing_keys == tied and not missing.unexpected_keys, missing
    model.tie_weights()
    return model.eval()


def stored_shapes(config: Any) -> dict[str, list[int]]:
    """Names and shapes of what a checkpoint of this model stores; a tied head is not."""
    model = transformers.AutoModelForCausalLM.from_config(config)
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


@torch.no_grad()
def logits(model: Any, row: tuple[int, ...]) -> np.ndarray:
    """Logits [T, V] of one row; padding it left or right, or a cache, must not change them."""
    ids = torch.tensor([row])
    plain = model(ids).logits[0]
    zeros, ones = torch.zeros((1, 3), dtype=torch.long), torch.ones_like(ids)
    left = model(torch.cat([zeros, ids], 1), attention_mask=torch.cat([zeros, ones], 1))
    right = model(torch.cat([ids, zeros], 1), attention_mask=torch.cat([ones, zeros], 1))
    for padded in (left.logits[0, 3:], right.logits[0, : len(row)]):
        torch.testing.assert_close(padded, plain, rtol=0, atol=2e-5)
    first = model(ids[:, :4], use_cache=True)
    steps, cache = [first.logits[0]], first.past_key_values
    for t in range(4, len(row)):
        out = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        steps.append(out.logits[0])
    torch.testing.assert_close(torch.cat(steps), plain, rtol=0, atol=2e-5)
    return plain.float().numpy()


# Rotary positions of Llama 3.2 1B, of Qwen 2.5 stretched as its card says, of Gemma 3 4B.
ROPES = (
    (
        64,
        131_072,
        {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0}
        | {
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    (
        128,
        32_768,
        {"rope_type": "yarn", "rope_theta": 1_000_000.0, "factor": 4.0}
        | {"original_max_position_embeddings": 32_768},
    ),
    (
        128,
        32_768,
        {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 16.0, "truncate": False}
        | {"original_max_position_embeddings": 2048, "attention_factor": 1.5},
    ),
    (256, 131_072, {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0}),
)


def frequencies(head_width: int, positions: int, rope: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of one description of rotary positions."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    sizes = {"hidden_size": 2 * head_width, "num_attention_heads": 2, "head_dim": head_width}
    config = transformers.LlamaConfig(
        **sizes, max_position_embeddings=positions, rope_parameters=rope
    )
    values, gain = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    return {
        "config": {**sizes, "max_position_embeddings": positions, "rope_parameters": rope},
        "frequencies": [float(f"{value:.8g}") for value in values],
        "gain": gain,
    }


def main(out: Path) -> None:
    """Writes both files."""
    models, arrays = {}, {}
    for name, wanted in tiny_models.CONFIGS.items():
        fields = dict(wanted)
        config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
        classes = transformers.AutoModelForCausalLM._model_mapping
        config.architectures = [classes[type(config)].__name__]
        shapes = stored_shapes(config)
        model = build(config, shapes)
        models[name] = {"config": json.loads(config.to_json_string()), "shapes": shapes}
        for number, row in enumerate(tiny_models.TOKENS):
            arrays[f"{name}_{number}"] = logits(model, tuple(row))
        print(name, np.abs(arrays[f"{name}_0"]).max(), len(shapes), "tensors")
    source = f"transformers {transformers.__version__}, torch {torch.__version__}"
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in models.items())
    ropes = json.dumps([frequencies(*rope) for rope in ROPES])
    (out / "families.json").write_text(
        f'{{"source": "{source}",\n"ropes": {ropes},\n"models": {{\n{lines}\n}}}}\n'
    )
    np.savez_compressed(out / "families.npz", **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
