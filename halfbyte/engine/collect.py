"""Statistics of a block's linear inputs, summed over batches while the block runs.

One Gram matrix per group of linears that share an input. On a GPU the product of bfloat16 inputs is taken with a
float32 output, so it is exact but for the order of summation. On a CPU the fast bfloat16 product rounds its output:
it is taken over `CHUNK` tokens at a time and summed in float32, which leaves a relative error of about 1e-4 an entry,
and the diagonal, which orders columns and weighs scales, is computed apart in float32.

The first token of a sequence counts FIRST_TOKEN times. It is the attention sink: most later tokens attend to it in
every block, so an error in its keys and values reaches all of them, and one token in 512 would hardly be heard.
Measured on SmolLM2-135M (docs/log.md): KL 0.137 -> 0.118; leaving it out altogether gives 0.185.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from halfbyte.algo import Stats
from halfbyte.types import LinearGroup

CHUNK = 1024
"""Tokens of one bfloat16 product on a CPU."""


FIRST_TOKEN = 16.0
"""Weight of a sequence's first token in the statistics."""


class Collector:
    """Running sums for one group. `gram` False collects the diagonal alone."""

    def __init__(self, width: int, gram: bool, device: torch.device):
        self.moment = torch.zeros(width, device=device)
        self.gram = torch.zeros(width, width, device=device) if gram else None
        self.absmax = torch.zeros((), device=device)
        self.tokens = 0
        self.weight = 0.0

    def add(self, X_TI: torch.Tensor) -> None:
        """Take in the inputs of T tokens."""
        self.tokens += len(X_TI)
        self.weight += len(X_TI)
        self.moment += X_TI.float().square_().sum(0)
        self.absmax = torch.maximum(self.absmax, X_TI.abs().max().float())
        if self.gram is None:
            return
        if X_TI.is_cuda:
            self.gram += torch.mm(X_TI.T, X_TI, out_dtype=torch.float32)
            return
        for chunk in X_TI.split(CHUNK):
            self.gram += chunk.T @ chunk

    def emphasize(self, X_TI: torch.Tensor, weight: float) -> None:
        """Let tokens that were taken in count `weight` times more."""
        X = X_TI.float()
        self.weight += weight * len(X)
        self.moment += weight * X.square().sum(0)
        if self.gram is not None:
            self.gram += weight * (X.T @ X)

    def stats(self) -> Stats:
        """Weighted means over the tokens seen, the Gram matrix symmetric with the exact diagonal."""
        n = max(self.weight, 1.0)
        gram = None
        if self.gram is not None:
            gram = (self.gram + self.gram.T).div_(2 * n)
            gram.diagonal().copy_(self.moment / n)
        return Stats(self.moment / n, gram, float(self.absmax), self.tokens)


class Collectors:
    """Hooks on a block's linears: a context in which running the block fills one Collector per group."""

    def __init__(self, block: nn.Module, groups: dict[LinearGroup, bool], device: torch.device):
        self.by_kind: dict[str, Collector] = {}
        self.keep: torch.Tensor | None = None
        self._block, self._groups, self._handles = block, groups, list[Any]()
        for group, gram in groups.items():
            width = block.get_parameter(f"{group.names[0]}.weight").shape[1]
            self.by_kind[group.kind] = Collector(int(width), gram, device)

    def __enter__(self) -> Collectors:
        for group in self._groups:
            linear = self._block.get_submodule(group.names[0])
            collector = self.by_kind[group.kind]
            self._handles.append(linear.register_forward_pre_hook(self._hook(collector)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, collector: Collector) -> Any:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            flat = args[0].flatten(0, -2)
            collector.add(flat if self.keep is None else flat[self.keep])
            collector.emphasize(args[0][:, 0], FIRST_TOKEN - 1)

        return hook

    def stats(self) -> dict[str, Stats]:
        """The finished statistics by group kind."""
        return {kind: collector.stats() for kind, collector in self.by_kind.items()}
