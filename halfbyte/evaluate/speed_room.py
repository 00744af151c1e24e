"""Several servers on one device: what each takes of it, and the words that hold vLLM to that.

By itself vLLM takes most of a device's memory, for keys and values that no load of ours fills. A server that shares the
device gets a KV cache of what the loads put into it at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from halfbyte.errors import UsageError
from halfbyte.models import FAMILIES, family_of
from halfbyte.models.checkpoint import read_json
from halfbyte.plan.memory import KVShape
from halfbyte.plan.windows import windows
from halfbyte.platforms import Platform
from halfbyte.platforms.base import KV_FLAG
from halfbyte.serving import ServeCommand
from halfbyte.serving.bench import Load
from halfbyte.serving.bench_memory import load_nvml, visible_devices
from halfbyte.serving.cards import visible

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


def ranks(command: ServeCommand) -> int:
    """How many devices share the model's weights."""
    return command.tensor_parallel * command.number("--pipeline-parallel-size", "-pp")


def devices(command: ServeCommand) -> int:
    """How many devices a server takes."""
    return ranks(command) * command.number("--data-parallel-size", "-dp")


def space_words(command: ServeCommand, directory: Path, tokens: int) -> tuple[str, ...]:
    """Words for vLLM: a KV cache of so many tokens, and no more of the device."""
    config = read_json(directory / "config.json")
    if config.get("model_type") not in FAMILIES:
        raise UsageError(
            f"how large the KV cache of {directory} must be is not known ({config.get('model_type')}): load its "
            "servers one by one, without --together"
        )
    space = tokens * token_bytes(config, command.value(KV_FLAG) or "auto", command.tensor_parallel)
    return (SPACE_FLAG, str(space), *SHARE)


def taken(command: ServeCommand, directory: Path) -> int:
    """Bytes that the server of a command with `space_words` takes of a device."""
    weights = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    return weights // ranks(command) + int(command.value(SPACE_FLAG) or 0) + BESIDE


@dataclass(frozen=True)
class Lane:
    """Devices that servers share: their names for CUDA_VISIBLE_DEVICES (none: whatever this process sees), and the
    bytes that are free on the fullest of them."""

    cards: tuple[str, ...]
    free: int


def lanes(platform: Platform, width: int) -> list[Lane]:
    """The visible devices, `width` to a lane, as far as they go; one lane where NVML does not tell of them."""
    nvml = load_nvml()
    handles = visible_devices(nvml) if nvml else []
    if not handles:
        return [Lane((), int((platform.memory_gib or 0) * GIB))]
    rooms = [int(nvml.nvmlDeviceGetMemoryInfo(handle).free) for handle in handles]
    names = visible()
    if len(names) != len(rooms) or len(rooms) < 2 * width:
        return [Lane((), min(rooms[:width]))]
    starts = range(0, len(rooms) - width + 1, width)
    return [Lane(tuple(names[i : i + width]), min(rooms[i : i + width])) for i in starts]


def spread(items: Sequence[Item], sizes: Sequence[int], rooms: Sequence[int], most: int) -> list[list[Item]]:
    """The first of the items that have room together, by lane: `most` to a lane, and one at least. They are dealt out
    in turn, so that no lane waits for another longer than it must."""
    dealt: list[list[Item]] = [[] for _ in rooms]
    left, space = list(zip(items, sizes)), list(rooms)
    for _ in range(most):
        for lane, own in enumerate(dealt):
            if left and (not own or left[0][1] <= space[lane]):
                item, size = left.pop(0)
                own.append(item)
                space[lane] -= size
    return dealt
