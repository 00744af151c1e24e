"""The most memory that a server held while it was measured: on GPUs as NVML tells, else of its processes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

import psutil
import torch

INTERVAL_S = 0.5


class PeakMemory:
    """`with PeakMemory(read) as memory:` calls `read()` (bytes, or None) in a thread; `memory.peak` is the largest.

    None until something was read.
    """

    def __init__(self, read: Callable[[], int | None], interval: float = INTERVAL_S) -> None:
        self._read, self._interval = read, interval
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak: int | None = None

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            now = self._read()
            if now is not None:
                self.peak = max(self.peak or 0, now)
            if self._over.wait(self._interval):
                return


def reader(accelerator: bool, pid: int) -> Callable[[], int | None]:
    """What to read: memory in use on all visible devices, or the resident memory of `pid` and all below it.

    Where NVML is not there (no NVIDIA GPU, or nvidia-ml-py is not installed) a GPU's memory is not known: None.
    """
    if not accelerator:
        return lambda: tree_bytes(pid)
    nvml = load_nvml()
    if nvml is None:
        return lambda: None
    return lambda: device_bytes(nvml)


def tree_bytes(pid: int) -> int | None:
    """Resident bytes of a process and all below it; None where it is gone."""
    total = None
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.Error):
                total = (total or 0) + process.memory_info().rss
    return total


def device_bytes(nvml: Any) -> int | None:
    """Bytes in use on all visible devices together; None where none is found."""
    try:
        used = [int(nvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in visible_devices(nvml)]
    except nvml.NVMLError:  # not every device tells
        return None
    return sum(used) if used else None


def visible_devices(nvml: Any) -> list[Any]:
    """NVML's handles of the devices that CUDA_VISIBLE_DEVICES lets a program see, by number or (the beginning of) a
    UUID; all where it is not set. NVML numbers by the bus, as CUDA does where all are alike or as it is told."""
    handles = {}
    for number in range(nvml.nvmlDeviceGetCount()):
        with suppress(nvml.NVMLError):  # one that is lost is not seen
            handles[number] = nvml.nvmlDeviceGetHandleByIndex(number)
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return list(handles.values())
    seen = []
    for word in (word.strip() for word in named.split(",")):
        if word.isdigit():
            found = [handle for number, handle in handles.items() if number == int(word)]
        else:
            uuids = {number: _text(nvml.nvmlDeviceGetUUID(handle)) for number, handle in handles.items()}
            found = [handle for number, handle in handles.items() if word and uuids[number].startswith(word)]
        if len(found) != 1:
            break  # as CUDA does: what follows an unknown one is not seen
        seen += found
    return seen


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def device_name(most: int | None = None) -> str | None:
    """The visible GPUs (`most` of them) as their driver calls them ("2 x NVIDIA H100 80GB HBM3"), of NVML or else of
    torch; None where neither knows any."""
    nvml = load_nvml()
    if nvml is not None and (handles := visible_devices(nvml)):
        count, name = len(handles), _text(nvml.nvmlDeviceGetName(handles[0]))
    elif torch.cuda.is_available():  # also what torch calls AMD's
        count, name = torch.cuda.device_count(), torch.cuda.get_device_name()
    else:
        return None
    count = min(count, most or count)
    return name if count == 1 else f"{count} x {name}"


def load_nvml() -> Any:
    """NVML, begun; None where it is not there (no NVIDIA GPU, or nvidia-ml-py is not installed)."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
