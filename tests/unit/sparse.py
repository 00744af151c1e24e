"""Checkpoints of any size that are headers alone: the weights are a hole in a sparse file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
LLAMA_70B = {**LLAMA_8B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
             "num_attention_heads": 64}  # fmt: skip
QWEN_32B = {**LLAMA_8B, "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64,
            "num_attention_heads": 40, "vocab_size": 152064}  # fmt: skip
GEMMA2_9B = {
    "model_type": "gemma2",
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
}
MIXTRAL = {**LLAMA_8B, "model_type": "mixtral", "vocab_size": 32000, "num_local_experts": 8,
           "num_experts_per_tok": 2, "max_position_embeddings": 32768, "sliding_window": None}  # fmt: skip
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1000,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 4096,
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a model with that config."""
    hidden, width, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv = config["num_key_value_heads"] * head_dim
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    found["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", config["model_type"] == "gemma2"):
        found["lm_head.weight"] = (config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        block = f"model.layers.{index}."
        for name, out in (("q", heads * head_dim), ("k", kv), ("v", kv)):
            found[f"{block}self_attn.{name}_proj.weight"] = (out, hidden)
        found[f"{block}self_attn.o_proj.weight"] = (hidden, heads * head_dim)
        found[f"{block}input_layernorm.weight"] = found[f"{block}post_attention_layernorm.weight"] = (hidden,)
        experts = config.get("num_local_experts") or config.get("num_experts")
        if not experts:
            found |= _mlp(f"{block}mlp.", ("gate_proj", "up_proj", "down_proj"), hidden, width)
        elif config["model_type"] == "mixtral":
            found[f"{block}block_sparse_moe.gate.weight"] = (experts, hidden)
            for expert in range(experts):
                found |= _mlp(f"{block}block_sparse_moe.experts.{expert}.", ("w1", "w3", "w2"), hidden, width)
        else:
            found[f"{block}mlp.gate.weight"] = (experts, hidden)
            for expert in range(experts):
                names = ("gate_proj", "up_proj", "down_proj")
                found |= _mlp(f"{block}mlp.experts.{expert}.", names, hidden, config["moe_intermediate_size"])
    return found


def _mlp(prefix: str, names: tuple[str, str, str], hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    gate, up, down = (f"{prefix}{name}.weight" for name in names)
    return {gate: (width, hidden), up: (width, hidden), down: (hidden, width)}


def make_sparse(directory: Path, config: dict[str, Any]) -> Path:
    """A model directory with that config, its tensors BF16 and without contents; takes no room on the disk."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in shapes(config).items():
        size = 2
        for extent in shape:
            size *= extent
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return directory
