"""Work and results as bytes between processes.

Tensors go as their own bytes: a view does not drag the storage behind it along, and one on a GPU arrives on the CPU.
They are laid out anew by torch's allocator, so that arithmetic on them is that of the sender, bit for bit.
"""

from __future__ import annotations

import io
import pickle
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from halfbyte.engine.workers import Errand, Seat
from halfbyte.errors import HalfbyteError
from halfbyte.types import Progress, Quiet


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if type(value) is not torch.Tensor:
            return NotImplemented
        flat: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return _tensor, (pickle.PickleBuffer(flat), value.dtype, tuple(value.shape))


def _tensor(data: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not len(data):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).clone().reshape(shape)


def pack(value: Any) -> bytes:
    """Plain data and tensors as bytes."""
    sink = io.BytesIO()
    _Pickler(sink, protocol=5).dump(value)
    return sink.getvalue()


def unpack(data: bytes) -> Any:
    """What `pack` was given. Only for bytes of this program's own making."""
    return pickle.loads(data)


@dataclass
class Outcome:
    """What became of an errand: its value, or the error it raised; notices: what it had to say."""

    value: Any = None
    error: Exception | None = None
    notices: list[str] = field(default_factory=list)


def packed(errand: Errand) -> bytes:
    """An errand for `perform`."""
    return pack((errand.function, errand.arguments))


def perform(work: bytes, device: str, threads: int) -> bytes:
    """Do a packed errand in this process, on `device`, with so many threads; returns its packed Outcome."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    said = Quiet()
    outcome = Outcome(notices=said.notices)
    try:
        function, arguments = unpack(work)
        outcome.value = function(Seat(device, said), *arguments)
        return pack(outcome)
    except Exception as error:
        return pack(Outcome(error=_portable(error), notices=said.notices))


def _portable(error: Exception) -> Exception:
    """The error, or one in its words where it cannot be sent."""
    try:
        return error if type(unpack(pack(error))) is type(error) else HalfbyteError(str(error))
    except Exception:
        return HalfbyteError(f"{type(error).__name__}: {error}")


def settle(answer: bytes, progress: Progress, future: Future[Any]) -> None:
    """Give a future what an errand's answer says, and pass on the notices."""
    outcome: Outcome = unpack(answer)
    for notice in outcome.notices:
        progress.say(notice)
    if outcome.error is None:
        future.set_result(outcome.value)
    else:
        future.set_exception(outcome.error)
