"""What serving needs of a device's memory: weights, KV cache at a context and concurrency, and working space."""

from __future__ import annotations

from typing import Any

KV_BYTES = {"fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
"""Bytes of one KV-cache number by --kv-cache-dtype; every other type of ours is 16 bits wide."""
STEP_TOKENS = 8192
"""Tokens in the largest step of a vLLM server unless told otherwise (--max-num-batched-tokens)."""


def kv_bytes_per_token(model: dict[str, Any], kv_cache_dtype: str) -> int:
    """KV-cache bytes that one token takes over all blocks: keys and values, of the KV heads alone."""
    return 2 * model["blocks"] * model["kv_heads"] * model["head_dim"] * KV_BYTES.get(kv_cache_dtype, 2)


def kv_bytes_per_sequence(model: dict[str, Any], config: dict[str, Any], context: int, kv_cache_dtype: str) -> int:
    """KV-cache bytes of one sequence of `context` tokens; a block with a sliding window keeps its window alone.

    Only `layer_types` of config.json says which blocks slide; without it all are counted in full (an upper bound).
    """
    per_block = kv_bytes_per_token(model, kv_cache_dtype) // model["blocks"]
    window = config.get("sliding_window")
    kinds = config.get("layer_types")
    if not isinstance(kinds, list) or not isinstance(window, int):
        return per_block * model["blocks"] * context
    return per_block * sum(min(context, window) if kind == "sliding_attention" else context for kind in kinds)


def activation_bytes(model: dict[str, Any], context: int, concurrency: int) -> int:
    """Working space of a step, an estimate: the widest hidden states of a block in 16 bits and FP32 logits."""
    tokens = min(STEP_TOKENS, context * concurrency)
    width = 4 * model["hidden_size"] + 3 * (model["intermediate_size"] or 4 * model["hidden_size"])
    return 2 * tokens * width + 4 * concurrency * (model["vocab_size"] or 0)


def memory_estimate(
    model: dict[str, Any],
    config: dict[str, Any],
    weights: int,
    device_bytes: int | None,
    usable: float,
    context: int,
    concurrency: int,
    kv_cache_dtype: str,
) -> dict[str, Any]:
    """Bytes that serving takes, whether they fit in `usable` of the device, and how many sequences would.

    `fits` and `max_concurrency` are None where the device's memory is not known.
    """
    per_sequence = kv_bytes_per_sequence(model, config, context, kv_cache_dtype)
    activations = activation_bytes(model, context, concurrency)
    total = weights + per_sequence * concurrency + activations
    budget = None if device_bytes is None else int(device_bytes * usable)
    room = None if budget is None else budget - weights - activations
    return {
        "kv_cache_dtype": kv_cache_dtype,
        "kv_bytes_per_token": kv_bytes_per_token(model, kv_cache_dtype),
        "kv_bytes_per_sequence": per_sequence,
        "weights_bytes": weights,
        "kv_bytes": per_sequence * concurrency,
        "activation_bytes": activations,
        "total_bytes": total,
        "device_bytes": device_bytes,
        "usable_bytes": budget,
        "fits": None if budget is None else total <= budget,
        "max_concurrency": None if room is None else max(0, room // max(1, per_sequence)),
    }
