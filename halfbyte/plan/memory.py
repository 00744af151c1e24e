"""What serving needs of a device's memory: weights, KV cache at a context and concurrency, and working space.

Per tensor-parallel rank, in bytes:

    weights      the artifact's tensors: linears and embeddings / tp, the rest on every rank
    KV cache     sequences · Σ over blocks of 2 · kv_heads/tp · head_dim · bytes · min(context, window)
    activations  the widest hidden states of one step in 16 bits, and FP32 logits (an estimate)
    overhead     the platform's data: context of the driver, captured graphs, communication buffers (an estimate)

vLLM gets device memory × gpu_memory_utilization for all of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

KV_BYTES = {"fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
"""Bytes of one KV-cache number by --kv-cache-dtype; every other type of ours is 16 bits wide."""
KV_BLOCK = 16
"""Tokens in a page of vLLM's KV cache: a sequence takes whole pages."""
FURTHEST = 1 << 24
"""Tokens that no context reaches."""


@dataclass(frozen=True)
class KVShape:
    """Keys and values of one rank: heads there, their size, the window of every block (None: all of the context)."""

    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]

    @classmethod
    def of(cls, model: dict[str, Any], windows: Sequence[int | None], tp: int = 1) -> KVShape:
        """A model's (`model_facts`): KV heads are spread over the ranks, and repeated where there are fewer."""
        return cls(max(1, model["kv_heads"] // tp), model["head_dim"], tuple(windows))

    def block_token_bytes(self, kv_cache_dtype: str) -> int:
        """Bytes of one token in one block."""
        return 2 * self.kv_heads * self.head_dim * KV_BYTES.get(kv_cache_dtype, 2)

    def token_bytes(self, kv_cache_dtype: str) -> int:
        """Bytes of one token over all blocks, while every block still keeps it."""
        return len(self.windows) * self.block_token_bytes(kv_cache_dtype)

    def kept(self, tokens: int) -> int:
        """Tokens that the blocks keep of a sequence, summed over the blocks."""
        return sum(tokens if window is None else min(tokens, window) for window in self.windows)

    def sequence_bytes(self, tokens: int, kv_cache_dtype: str) -> int:
        """Bytes of one sequence, in whole pages."""
        return self.block_token_bytes(kv_cache_dtype) * self.kept(math.ceil(tokens / KV_BLOCK) * KV_BLOCK)

    def longest(self, room: int, kv_cache_dtype: str) -> int:
        """Tokens of the longest sequence whose keys and values take at most `room` bytes (up to FURTHEST)."""
        low, high = 0, FURTHEST // KV_BLOCK
        while low < high:
            middle = (low + high + 1) // 2
            if self.sequence_bytes(middle * KV_BLOCK, kv_cache_dtype) <= room:
                low = middle
            else:
                high = middle - 1
        return low * KV_BLOCK


@dataclass(frozen=True)
class Device:
    """One device: bytes of memory (None: not known), the share that vLLM takes, and what is taken beside the model."""

    memory: int | None
    utilization: float
    overhead: int
    step_tokens: int

    @property
    def usable(self) -> int | None:
        return None if self.memory is None else int(self.memory * self.utilization)


def activation_bytes(model: dict[str, Any], context: int, concurrency: int, step_tokens: int, tp: int = 1) -> int:
    """Working space of a step: four hidden states and three MLP ones (the MLP is split over ranks), FP32 logits."""
    tokens = min(step_tokens, context * concurrency)
    width = 4 * model["hidden_size"] + 3 * (model["intermediate_size"] or 4 * model["hidden_size"]) // tp
    return 2 * tokens * width + 4 * concurrency * (model["vocab_size"] or 0)


def memory_estimate(
    model: dict[str, Any],
    kv: KVShape,
    weights: int,
    device: Device,
    context: int,
    concurrency: int,
    kv_cache_dtype: str,
    tp: int = 1,
) -> dict[str, Any]:
    """Bytes that serving takes on each rank, whether they fit, how many sequences would, and how long they may be.

    `fits`, `max_concurrency` and `max_context` are None where the device's memory is not known; `max_context` is at
    most the model's own limit.
    """
    per_sequence = kv.sequence_bytes(context, kv_cache_dtype)
    activations = activation_bytes(model, context, concurrency, device.step_tokens, tp)
    fixed = weights + activations + device.overhead
    total = fixed + per_sequence * concurrency
    room = None if device.usable is None else max(0, device.usable - fixed)
    longest = None if room is None else kv.longest(room // concurrency, kv_cache_dtype)
    if longest is not None and model["context_limit"]:
        longest = min(longest, model["context_limit"])
    return {
        "context": context,
        "concurrency": concurrency,
        "kv_bytes_per_sequence": per_sequence,
        "kv_bytes": per_sequence * concurrency,
        "activation_bytes": activations,
        "total_bytes": total,
        "fits": None if device.usable is None else total <= device.usable,
        "max_concurrency": None if room is None else room // max(1, per_sequence),
        "max_context": longest,
    }
