"""Several servers on one device: what each takes of it, and the words that hold vLLM to that.

By itself vLLM takes most of a device's memory, for keys and values that no load of ours fills. A server that shares the
device gets a KV cache of what the loads put into it at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

from halfbyte.models import family_of
from halfbyte.models.checkpoint import read_json
from halfbyte.plan.memory import KVShape
from halfbyte.plan.windows import windows
from halfbyte.platforms import Platform
from halfbyte.platforms.base import KV_FLAG
from halfbyte.serving import ServeCommand
from halfbyte.serving.bench import Load
from halfbyte.serving.bench_memory import load_nvml, visible_devices

GIB = 1 << 30
SPACE_FLAG = "--kv-cache-memory-bytes"
SHARE = ("--gpu-memory-utilization", "0.02")
"""What vLLM wants to find free when it starts; the KV cache has its own words."""
LEAST_TOKENS = 8192
"""Of a KV cache: a few of its blocks, however large a device makes them."""
SPARE = 1.1
"""KV cache for each token that is in flight: the last page of a sequence is not full."""
BESIDE = 7 * GIB // 2
"""What a server takes beside weights and KV cache: CUDA's context, activations, graphs."""
Item = TypeVar("Item")


def token_bytes(config: Mapping[str, Any], kv_cache_dtype: str, tp: int = 1) -> int:
    """Bytes of one token's keys and values on a rank, where every block keeps it."""
    family = family_of(dict(config))
    facts = {"kv_heads": family.num_kv_heads, "head_dim": family.head_dim}
    return KVShape.of(facts, windows(config, family.num_blocks), tp).token_bytes(kv_cache_dtype)


def cache_tokens(loads: Iterable[Load], context: int, room: int = 16) -> int:
    """Tokens that a KV cache must hold for each of these loads, and for one sequence of the whole context."""
    flight = [load.concurrency * (load.input_tokens + load.output_tokens + room) for load in loads]
    return max(LEAST_TOKENS, context, math.ceil(SPARE * max(flight, default=0)))


def space_words(command: ServeCommand, directory: Path, tokens: int) -> tuple[str, ...]:
    """Words for vLLM: a KV cache of so many tokens, and no more of the device."""
    tp = int(command.value("--tensor-parallel-size") or 1)
    config = read_json(directory / "config.json")
    space = tokens * token_bytes(config, command.value(KV_FLAG) or "auto", tp)
    return (SPACE_FLAG, str(space), *SHARE)


def taken(command: ServeCommand, directory: Path) -> int:
    """Bytes that the server of a command with `space_words` takes of a device."""
    tp = int(command.value("--tensor-parallel-size") or 1)
    weights = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    return weights // tp + int(command.value(SPACE_FLAG) or 0) + BESIDE


def free(platform: Platform) -> int:
    """Bytes that are free on the fullest visible device (as NVML tells, else all of the platform's), or of memory."""
    if not platform.capabilities.accelerator:
        return int(psutil.virtual_memory().available)
    nvml = load_nvml()
    handles = visible_devices(nvml) if nvml else []
    if handles:
        return min(int(nvml.nvmlDeviceGetMemoryInfo(handle).free) for handle in handles)
    return int((platform.memory_gib or 0) * GIB)


def fitting(items: Sequence[Item], sizes: Sequence[int], room: int, most: int) -> list[Item]:
    """The first of the items that have room together, `most` at most and one at least."""
    chosen: list[Item] = []
    for item, size in zip(items[:most], sizes):
        room -= size
        if chosen and room < 0:
            break
        chosen.append(item)
    return chosen
