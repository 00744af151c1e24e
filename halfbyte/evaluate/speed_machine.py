"""The machine that a speed was measured on, as it calls itself."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

from halfbyte.errors import HalfbyteError
from halfbyte.platforms import Platform, list_platforms, load_platform
from halfbyte.serving.bench_memory import device_name
from halfbyte.types import Progress

NODES = {"NVIDIA": "/dev/nvidiactl", "AMD": "/dev/kfd"}
"""What a driver makes in /dev, by the GPU's maker."""


def hardware(accelerator: bool, count: int | None = None) -> str:
    """The GPUs by their driver's name (`count` of those that can be seen; None: all), or the processor with the cores
    that this process may use."""
    named = device_name(count) if accelerator else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return named or f"{_processor()}, {cores} cores"


def nearness(platform: Platform) -> int:
    """Whether this machine is that platform: 2: it is; 1: its GPU is another of the same maker, or has no name that can
    be asked for; 0: it is not."""
    if not platform.capabilities.accelerator:
        return 2
    named = device_name()
    if named is None:
        return int(any(Path(node).exists() for maker, node in NODES.items() if platform.maker in ("", maker)))
    if not platform.device or re.search(rf"\b{re.escape(platform.device)}\b", named):
        return 2
    return int(platform.maker in named)


def measured_here(platforms: Sequence[Platform], progress: Progress) -> Platform:
    """The first of the platforms that this machine is; failing that, one that its GPU stands in for, which is said.

    Raises HalfbyteError where it is none of them: what is measured would be called by the wrong name.
    """
    best = max(platforms, key=nearness)
    if not nearness(best):
        names = " and ".join(platform.name for platform in platforms)
        raise HalfbyteError(
            f"this machine ({hardware(True)}) is not {names}: measure there, or name with --on what this machine is"
        )
    if nearness(best) == 1:
        progress.say(f"measured on {hardware(True)}, not on {best.name}: it is served with the flags of that")
    return best


def platform_here() -> str:
    """The platform of ours that this machine is by its GPU's name; cpu where it is none of them."""
    named = [name for name in list_platforms() if load_platform(name).capabilities.accelerator]
    return next((name for name in named if nearness(load_platform(name)) == 2), "cpu")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
