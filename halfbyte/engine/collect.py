"""Statistics of a block's linear inputs, summed over batches while the block runs.

One Gram matrix per group of linears that share an input. On a GPU the product of bfloat16 inputs is taken with a
float32 output, so it is exact but for the order of summation. On a CPU the fast bfloat16 product rounds its output:
it is taken over `CHUNK` tokens at a time and summed in float32, which leaves a relative error of about 1e-4 an entry,
and the diagonal, which orders columns and weighs scales, is computed apart in float32.

A token counts as often as `importance` says; its input is multiplied by the root of that, so that the sum stays
positive semidefinite. The output of an expert that every token goes through is scaled by its gate, and so a token
counts there by the square of the gate; experts that a router chooses are in experts.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from halfbyte.algo import Stats
from halfbyte.models import Mixture
from halfbyte.types import LinearGroup

CHUNK = 1024
"""Tokens of one bfloat16 product on a CPU."""
LEAST = 1e-12
"""A sum of weights below this is that of no token."""


class Collector:
    """Running sums for one group. `gram` False collects the diagonal alone."""

    def __init__(self, width: int, gram: bool, device: torch.device):
        self.moment = torch.zeros(width, device=device)
        self.gram = torch.zeros(width, width, device=device) if gram else None
        self.absmax = torch.zeros((), device=device)
        self.tokens = 0
        self.weight = torch.zeros((), device=device)

    def add(self, X_TI: torch.Tensor, weight_T: torch.Tensor | None = None) -> None:
        """Take in the inputs of T tokens; each counts `weight_T` (float32 [T]) times, or once."""
        self.tokens += len(X_TI)
        self.absmax = torch.maximum(self.absmax, X_TI.abs().max().float())
        if weight_T is None:
            self.weight += len(X_TI)
            self.moment += X_TI.float().square_().sum(0)
        else:
            self.weight += weight_T.sum()
            self.moment += X_TI.float().square_().mul_(weight_T[:, None]).sum(0)
            X_TI = X_TI * weight_T.sqrt().to(X_TI.dtype)[:, None]
        if self.gram is None:
            return
        if X_TI.is_cuda:
            self.gram += torch.mm(X_TI.T, X_TI, out_dtype=torch.float32)
            return
        for chunk in X_TI.split(CHUNK):
            self.gram += chunk.T @ chunk

    def stats(self) -> Stats:
        """Weighted means over the tokens seen, the Gram matrix symmetric with the exact diagonal."""
        n = self.weight.clamp_min(LEAST)
        moment = self.moment / n
        gram = None
        if self.gram is not None:
            gram = (self.gram + self.gram.T).div_(2 * n)
            gram.diagonal().copy_(moment)
        return Stats(moment, gram, float(self.absmax), self.tokens)


class Collectors:
    """Hooks on a block's linears: a context in which running the block fills one Collector per group.

    groups    whether each collects its Gram matrix
    mixture   the block's, where it is one
    Before each batch, `expect` says which tokens count, and how often.
    """

    def __init__(
        self, block: nn.Module, groups: dict[LinearGroup, bool], device: torch.device, mixture: Mixture | None = None
    ):
        self.by_key: dict[str, Collector] = {}
        self._counts: dict[str, torch.Tensor] = {}
        self._keep: torch.Tensor | None = None
        self._gate: torch.Tensor | None = None
        self._block, self.groups, self._mixture, self._handles = block, groups, mixture, list[Any]()
        for group, gram in groups.items():
            width = block.get_parameter(f"{group.names[0]}.weight").shape[1]
            self.by_key[group.key] = Collector(int(width), gram, device)

    def expect(self, keep: torch.Tensor | None, counts: Mapping[str, torch.Tensor]) -> None:
        """The next batch: keep is bool [B*T] (None: no padding); counts by the groups' keys, float32 [B, T]."""
        self._keep = keep
        self._counts = {key: c.flatten() if keep is None else c.flatten()[keep] for key, c in counts.items()}

    def __enter__(self) -> Collectors:
        if self._mixture and any(group.owner for group in self.groups):
            shared = self._block.get_submodule(self._mixture.shared)
            self._handles.append(shared.register_forward_pre_hook(self._take_gate))
        for group in self.groups:
            linear = self._block.get_submodule(group.names[0])
            self._handles.append(linear.register_forward_pre_hook(self._hook(group)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _take_gate(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert self._mixture is not None
        gate = self._block.get_submodule(self._mixture.gate)(args[0]).float().sigmoid().square().flatten()
        self._gate = gate if self._keep is None else gate[self._keep]

    def _hook(self, group: LinearGroup) -> Any:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            flat = args[0].flatten(0, -2)
            counts = self._counts.get(group.key)
            if group.owner and self._gate is not None:
                counts = self._gate if counts is None else self._gate * counts
            self.by_key[group.key].add(flat if self._keep is None else flat[self._keep], counts)

        return hook

    def stats(self) -> dict[str, Stats]:
        """The finished statistics by the groups' keys."""
        return {key: collector.stats() for key, collector in self.by_key.items()}
