"""The machine that a speed was measured on, as it calls itself."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from halfbyte.serving.bench_memory import device_name


def hardware(accelerator: bool) -> str:
    """The GPUs by their driver's name, or the processor with the cores that this process may use."""
    named = device_name() if accelerator else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return named or f"{_processor()}, {cores} cores"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
