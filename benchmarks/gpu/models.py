"""Models of Qwen2's architecture: a small one with weights, and the shape of a large one without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

SMALL: Final = {
    "hidden_size": 1_024,
    "intermediate_size": 2_816,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 8_192,
}
TINY: Final = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 2_048,
}
"""For a CPU."""
SEVEN_B: Final = {
    "hidden_size": 3_584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152_064,
}
"""Qwen2.5-7B."""


def write_config(folder: Path, shape: dict[str, int]) -> Path:
    """A model for `load_format` dummy."""
    config: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
        **shape,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_model(folder: Path, shape: dict[str, int]) -> Path:
    """Random weights that let each token's KV show in the answer; vLLM's dummy weights are too small for that."""
    draw = torch.Generator().manual_seed(0)
    hidden, inner, words = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]

    def normal(*size: int, std: float) -> torch.Tensor:
        return (torch.randn(*size, generator=draw) * std).to(torch.bfloat16)

    weights = {
        "model.embed_tokens.weight": normal(words, hidden, std=1.0),
        "lm_head.weight": normal(words, hidden, std=3 * hidden**-0.5),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    for layer in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for part, size, gain in (("q", hidden, 2), ("k", kv, 1), ("v", kv, 1)):
            weights[f"{prefix}self_attn.{part}_proj.weight"] = normal(size, hidden, std=gain * hidden**-0.5)
            weights[f"{prefix}self_attn.{part}_proj.bias"] = normal(size, std=0.1)
        weights[f"{prefix}self_attn.o_proj.weight"] = normal(hidden, hidden, std=2 * hidden**-0.5)
        for part, out, into in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            weights[f"{prefix}mlp.{part}_proj.weight"] = normal(out, into, std=into**-0.5)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    write_config(folder, shape)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder
