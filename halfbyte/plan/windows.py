"""How far each block looks back, from config.json alone: what the KV cache of a block must hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FULL_EVERY = {"gemma2": 2, "gemma3_text": 6}
"""Families that alternate without saying so in layer_types: every n-th block is full (transformers' own defaults)."""
ALL_SLIDE = ("mistral", "phi3", "mixtral")
"""Families in which `sliding_window`, where it is a number, holds for every block."""
DEFAULT_WINDOW = {"gemma2": 4096, "gemma3_text": 4096}


def windows(config: Mapping[str, Any], blocks: int) -> list[int | None]:
    """The window of every block in tokens; None: the block keeps the whole context."""
    kind = str(config.get("model_type"))
    window = config.get("sliding_window", DEFAULT_WINDOW.get(kind))
    if type(window) is not int or window < 1 or config.get("use_sliding_window") is False:
        return [None] * blocks
    layers = config.get("layer_types")
    if isinstance(layers, list) and len(layers) == blocks:
        return [window if layer == "sliding_attention" else None for layer in layers]
    if kind in FULL_EVERY:
        every = config.get("sliding_window_pattern") or FULL_EVERY[kind]
        return [None if (index + 1) % every == 0 else window for index in range(blocks)]
    if kind in ALL_SLIDE:
        return [window] * blocks
    first = config.get("max_window_layers")
    if config.get("use_sliding_window") and type(first) is int:
        return [None if index < first else window for index in range(blocks)]
    return [None] * blocks
