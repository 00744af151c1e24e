"""The hidden states between blocks: on the compute device as far as they fit, then in host memory, then on disk.

A store behaves like a list of tensors. Every place in it has one home from the beginning, because a batch keeps its
shape from block to block; what is read is bit for bit what was put there, wherever it lies. The pass goes through the
list in order, so reading one place starts the next one on its way: from host memory to a GPU on a stream of its own,
from disk in a thread. The disk's part is one file without a name, written and read from front to back; it goes with the
process, however that ends. It is not memory-mapped: mapped pages would count as the memory that it is there to spare.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.files import make_directory, refused


@dataclass(frozen=True)
class Room:
    """Bytes that hidden states may take: on the compute device where that has memory of its own, and of the host's;
    None: as many as there are. What fits in neither goes to disk in `scratch` (None: the system's temporary place)."""

    device: int | None = None
    host: int | None = None
    scratch: Path | None = None


class Activations:
    """A list of hidden states ([B, T, D] each) that lies where there is room. A context: `close` lets go of all."""

    def __init__(self, device: torch.device | str = "cpu", room: Room | None = None):
        self.device, self.room = torch.device(device), room or Room()
        self._left = {"host": self.room.host}
        self._homes: list[_Here | _Pinned | _Filed] = []
        self._last = -1
        self._file: _File | None = None
        self._lanes = _Lanes(self.device) if self.device.type == "cuda" else None
        if self._lanes:
            self._left["device"] = self.room.device

    def __len__(self) -> int:
        return len(self._homes)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Batch `index` on the compute device; where they are read in order, the one after it is fetched meanwhile."""
        value = self._homes[index].get()
        if index in (0, self._last + 1) and index + 1 < len(self):
            self._homes[index + 1].begin()
        self._last = index
        return value

    def __setitem__(self, index: int, value: torch.Tensor) -> None:
        """Replace batch `index` by one of the same shape and type."""
        self._homes[index].put(value)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[index] for index in range(len(self)))

    def append(self, value: torch.Tensor) -> None:
        """One more batch at the end; it stays in the fastest place that has room for it."""
        home: _Here | _Pinned | _Filed
        if self._lanes is None:
            home = _Here() if self._take("host", value.nbytes) else self._filed(value)
        elif self._take("device", value.nbytes):
            home = _Here()
        else:
            home = _Pinned(self._lanes, value) if self._take("host", value.nbytes) else self._filed(value)
        self._homes.append(home)
        home.put(value)

    @property
    def spilled(self) -> int:
        """Bytes on disk."""
        return self._file.size if self._file else 0

    def close(self) -> None:
        """Forget everything, the file too."""
        self._homes.clear()
        if self._file:
            self._file.close()

    def __enter__(self) -> Activations:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, tier: str, size: int) -> bool:
        left = self._left[tier]
        if left is None:
            return True
        if size > left:
            return False
        self._left[tier] = left - size
        return True

    def _filed(self, value: torch.Tensor) -> _Filed:
        self._file = self._file or _File(self.room.scratch)
        return _Filed(self._file, value, self.device)


class _Here:
    """A place on the compute device."""

    value: torch.Tensor

    def get(self) -> torch.Tensor:
        return self.value

    def put(self, value: torch.Tensor) -> None:
        self.value = value

    def begin(self) -> None:
        pass


class _Lanes:
    """A GPU's streams to and from the host."""

    def __init__(self, device: torch.device):
        self.device = device
        self.to_host, self.to_device = torch.cuda.Stream(device), torch.cuda.Stream(device)


class _Pinned:
    """A place in page-locked host memory. Copies are asynchronous: events keep their order."""

    def __init__(self, lanes: _Lanes, like: torch.Tensor):
        self.lanes = lanes
        self.buffer = torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
        self.written: torch.cuda.Event | None = None
        self.coming: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def put(self, value: torch.Tensor) -> None:
        lane, self.coming = self.lanes.to_host, None
        lane.wait_stream(torch.cuda.current_stream(self.lanes.device))
        lane.wait_stream(self.lanes.to_device)  # what still reads the buffer comes first
        with torch.cuda.stream(lane):
            self.buffer.copy_(value, non_blocking=True)
        value.record_stream(lane)
        self.written = lane.record_event()

    def begin(self) -> None:
        if self.coming is None:
            assert self.written is not None
            lane = self.lanes.to_device
            lane.wait_event(self.written)
            with torch.cuda.stream(lane):
                value = self.buffer.to(self.lanes.device, non_blocking=True)
            self.coming = value, lane.record_event()

    def get(self) -> torch.Tensor:
        self.begin()
        assert self.coming is not None
        (value, ready), self.coming = self.coming, None
        here = torch.cuda.current_stream(self.lanes.device)
        here.wait_event(ready)
        value.record_stream(here)
        return value


class _File:
    """A file without a name, and the one thread that reads and writes it: in the order in which it is told to."""

    def __init__(self, scratch: Path | None):
        self.place = make_directory(scratch or Path(tempfile.gettempdir()))
        try:
            self.handle: Any = tempfile.TemporaryFile(dir=self.place, buffering=0)  # noqa: SIM115  closed by `close`
        except OSError as error:
            raise refused(self.place, error) from error
        self.thread = ThreadPoolExecutor(1)
        self.writing: Future[None] | None = None
        self.failed: Exception | None = None
        self.size = 0

    def reserve(self, size: int) -> int:
        """The place of `size` more bytes."""
        self.size += size
        return self.size - size

    def write(self, at: int, value: torch.Tensor) -> None:
        """Begin to write a tensor on the CPU, once the one before it is written. Raises what writing that one raised;
        so does reading."""
        if self.writing:
            self.writing.result()
        self.writing = self.thread.submit(self._write, at, value)

    def read(self, at: int, buffer: torch.Tensor) -> Future[torch.Tensor]:
        """Begin to fill `buffer`; the future gives it."""
        return self.thread.submit(self._read, at, buffer)

    def close(self) -> None:
        self.thread.shutdown(cancel_futures=True)
        self.handle.close()

    def _write(self, at: int, value: torch.Tensor) -> None:
        left = memoryview(_raw(value))
        try:
            while left:
                done = os.pwrite(self.handle.fileno(), left, at)
                left, at = left[done:], at + done
        except OSError as error:
            self.failed = refused(self.place / "activations", error)
            raise self.failed from error

    def _read(self, at: int, buffer: torch.Tensor) -> torch.Tensor:
        if self.failed:
            raise self.failed
        left = memoryview(_raw(buffer))
        try:
            while left:
                done = os.preadv(self.handle.fileno(), [left], at)
                if done == 0:
                    raise OSError(f"the file of activations in {self.place} ends early")
                left, at = left[done:], at + done
        except OSError as error:
            raise refused(self.place / "activations", error) from error
        return buffer


class _Filed:
    """A place in the file."""

    def __init__(self, file: _File, like: torch.Tensor, device: torch.device):
        self.file, self.device, self.shape, self.dtype = file, device, like.shape, like.dtype
        self.at = file.reserve(like.nbytes)
        self.coming: Future[torch.Tensor] | None = None

    def put(self, value: torch.Tensor) -> None:
        self.coming = None
        self.file.write(self.at, value.detach().to("cpu").contiguous())

    def begin(self) -> None:
        self.coming = self.coming or self.file.read(self.at, torch.empty(self.shape, dtype=self.dtype))

    def get(self) -> torch.Tensor:
        self.begin()
        assert self.coming is not None
        coming, self.coming = self.coming, None
        return coming.result().to(self.device)


def _raw(value: torch.Tensor) -> Any:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    return value.view(-1).view(torch.uint8).numpy()
