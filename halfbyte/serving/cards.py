"""The GPUs that this process may see, as CUDA_VISIBLE_DEVICES calls them, and programs that see only some of them."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from halfbyte.serving import bench_memory

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU that torch sees. A UUID becomes a number where NVML knows it: vLLM reads
    numbers alone."""
    number, named = torch.cuda.device_count(), os.environ.get(VISIBLE)
    if named is None:
        return [str(i) for i in range(number)]
    words = [word.strip() for word in named.split(",")][:number]
    nvml = None if all(word.isdecimal() for word in words) else bench_memory.load_nvml()
    if nvml is None:
        return words
    found = [str(nvml.nvmlDeviceGetIndex(handle)) for handle in bench_memory.visible_devices(nvml)]
    return found if len(found) == number else words


def on_cards(cards: Sequence[str]) -> dict[str, str]:
    """The environment of a program that sees these GPUs (of `visible`) alone; without any, nothing is said."""
    if not cards:
        return {}
    named = os.environ.get(VISIBLE)
    known = [] if named is None else [word.strip() for word in named.split(",")]
    by_nvml = named is not None and not set(cards) <= set(known)
    order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if by_nvml else {}  # as NVML numbers them
    return {**order, VISIBLE: ",".join(cards)}
