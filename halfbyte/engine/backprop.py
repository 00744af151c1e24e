"""Gradients of the whole model with one block in memory: blocks forward with their inputs kept, then blocks backward,
each computed again from its input.

What is asked for is a loss on the logits. The head is taken in pieces of `PIECE` tokens, so that a large vocabulary
costs little memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from halfbyte.engine.activations import Activations, Room
from halfbyte.engine.skeleton import Skeleton

PIECE = 256
"""Tokens whose logits are in memory at a time."""

Loader = Callable[[int], nn.Module]
Watcher = Callable[[int, nn.Module], AbstractContextManager[Any]]
Loss = Callable[[torch.Tensor, slice], torch.Tensor]


class Tape:
    """One batch on its way through the model: `kept` holds every block's input; `output` is the last block's output,
    [B, T, D]."""

    def __init__(
        self,
        skeleton: Skeleton,
        ids: torch.Tensor,
        load: Loader | None = None,
        keep: bool = True,
        room: Room | None = None,
    ):
        """Run tokens (int64 [B, T]) forward. `load` gives block i ready to run (default: the checkpoint's); without
        `keep` the output alone is kept, and there is no way back; room: for what is kept (None: memory)."""
        self.skeleton, self.load = skeleton, load
        (first,), arguments = skeleton.embed([ids])
        self.arguments = arguments[tuple(ids.shape)]
        self.kept = Activations(skeleton.device, room)
        self.output: torch.Tensor = first
        with torch.no_grad():
            for index in range(len(skeleton.blocks)):
                block = self._block(index, index + 1)
                if keep:
                    self.kept.append(self.output)
                self.output = call(block, self.output, self.arguments[index])
                skeleton.drop_block(index)

    def _block(self, index: int, then: int) -> nn.Module:
        """Block `index` ready to run; `then` is the next."""
        return self.load(index) if self.load else self.skeleton.load_block(index, then=then)

    def head(self, loss: Loss) -> tuple[torch.Tensor, float]:
        """(gradient of the summed loss by the last block's output [B, T, D], the sum).

        loss    gets float32 logits [t, V] of tokens and their place among the batch's B*T; returns a scalar
        """
        gradient = torch.zeros_like(self.output)
        total = 0.0
        flat, grads = self.output.flatten(0, 1), gradient.flatten(0, 1)
        for first in range(0, len(flat), PIECE):
            piece = slice(first, min(first + PIECE, len(flat)))
            with torch.enable_grad():
                h = flat[piece].detach().requires_grad_()
                value = loss(self.skeleton.logits(h), piece)
                value.backward()
            assert h.grad is not None
            grads[piece] = h.grad
            total += float(value.detach())
        return gradient, total

    def backward(self, gradient: torch.Tensor, watch: Watcher | None = None) -> None:
        """Carry a gradient by the last block's output [B, T, D] down through the blocks. `watch` is a context around
        each block's forward and backward, in which hooks stand and parameters may ask for gradients."""
        for index in reversed(range(len(self.skeleton.blocks))):
            block = self._block(index, index - 1)
            with (watch or _nothing)(index, block), torch.enable_grad():
                x = self.kept[index].detach().requires_grad_()
                call(block, x, self.arguments[index]).backward(gradient)
            assert x.grad is not None
            gradient = x.grad
            self.skeleton.drop_block(index)


def call(block: nn.Module, x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """A block's output, whether the family returns it alone or in a tuple."""
    out = block(x, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def equal_lengths(sequences: Sequence[torch.Tensor], size: int) -> Iterator[torch.Tensor]:
    """Sequences (int64 [t]) as batches [<= size, T] in their order; the longer ones are cut to the batch's shortest."""
    for first in range(0, len(sequences), size):
        some = sequences[first : first + size]
        length = min(len(s) for s in some)
        yield torch.stack([s[:length] for s in some])


def _nothing(_index: int, _block: nn.Module) -> AbstractContextManager[Any]:
    return nullcontext()
