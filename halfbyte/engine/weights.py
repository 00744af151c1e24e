"""The blocks' weights as the checkpoint holds them, one block after the other, without a model around them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from halfbyte.models import Checkpoint, Family, family_of


class _Ahead:
    """One block's tensors on their way to a GPU, on a stream of their own, while another block is worked on there."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.stream = torch.cuda.Stream(device)
        self.thread = ThreadPoolExecutor(1)
        self.coming: tuple[int, Future[dict[str, torch.Tensor]]] | None = None

    def begin(self, index: int, load: Callable[[], dict[str, torch.Tensor]]) -> None:
        """Have block `index` brought; one that was not taken is given up."""
        if self.coming is None or self.coming[0] != index:
            self.coming = (index, self.thread.submit(self._bring, load))

    def take(self, index: int) -> dict[str, torch.Tensor] | None:
        """The block's tensors, or None where another or none was begun. Raises what loading them raised."""
        if self.coming is None or self.coming[0] != index:
            return None
        tensors = self.coming[1].result()
        self.coming = None
        for tensor in tensors.values():
            tensor.record_stream(torch.cuda.current_stream(self.device))
        return tensors

    def _bring(self, load: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        with torch.cuda.stream(self.stream):
            tensors = {name: tensor.to(self.device, self.dtype) for name, tensor in load().items()}
        self.stream.synchronize()
        return tensors


class Weights:
    """A checkpoint's blocks in `dtype` on `device`; a GPU is sent the next one while this one is worked on."""

    def __init__(self, checkpoint: Checkpoint, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16):
        self.checkpoint, self.device, self.dtype = checkpoint, torch.device(device), dtype
        self.family: Family = family_of(checkpoint.config)
        self._ahead = _Ahead(self.device, dtype) if self.device.type == "cuda" else None

    def block(self, index: int, then: int | None = None) -> dict[str, torch.Tensor]:
        """Block `index`'s tensors by name within the block. then: the block that is asked for next."""
        tensors = self._ahead.take(index) if self._ahead else None
        if tensors is None:
            found = self.checkpoint.load_all(self.family.block(index) + ".")
            tensors = {name: tensor.to(self.device, self.dtype) for name, tensor in found.items()}
        if self._ahead and then is not None and 0 <= then < self.family.num_blocks:
            coming = self.family.block(then) + "."
            self._ahead.begin(then, lambda: self.checkpoint.load_all(coming))
        return tensors
