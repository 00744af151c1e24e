"""Statistics of a block's linear inputs, summed over batches while the block runs.

One Gram matrix per group of linears that share an input. On a GPU the product of bfloat16 inputs is taken with a
float32 output, so it is exact but for the order of summation, and the diagonal is the second moment. It is symmetric:
only the panels on and above the diagonal are computed (5/8 of it with four panels, 9/16 with eight). On a CPU the fast
bfloat16 product rounds its output: it is taken over `CHUNK` tokens at a time and summed in float32, which leaves a
relative error of about 1e-4 an entry, and the diagonal, which orders columns and weighs scales, is computed apart in
float32.

A token counts as often as `importance` says; its input is multiplied by the root of that, so that the sum stays
positive semidefinite. The output of an expert that every token goes through is scaled by its gate, and so a token
counts there by the square of the gate; experts that a router chooses are in experts.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from halfbyte.algo import Stats, product
from halfbyte.models import Mixture
from halfbyte.types import LinearGroup

CHUNK = 1024
"""Tokens of one bfloat16 product on a CPU."""
WIDE = 16384
"""A product of more columns is taken in panels on a CPU too, so that it never needs as much room as the sum itself."""
PANELS, NARROWEST = 8, 1024
"""A Gram matrix on a GPU is computed in at most so many panels, none narrower: products must stay large."""
LEAST = 1e-12
"""A sum of weights below this is that of no token."""


class Collector:
    """Running sums for one group. `gram` False collects the diagonal alone."""

    def __init__(self, width: int, gram: bool, device: torch.device):
        self.gram = torch.zeros(width, width, device=device) if gram else None
        self.panels = panels(width) if gram and device.type == "cuda" else []
        self.rows = panels(width) if width > WIDE else [slice(0, width)]
        self.moment = None if self.panels else torch.zeros(width, device=device)
        self.absmax = torch.zeros((), device=device)
        self.tokens = 0
        self.weight = torch.zeros((), device=device)

    def add(self, X_TI: torch.Tensor, weight_T: torch.Tensor | None = None) -> None:
        """Take in the inputs of T tokens; each counts `weight_T` (float32 [T]) times, or once."""
        self.tokens += len(X_TI)
        low, high = X_TI.aminmax()
        self.absmax = torch.maximum(self.absmax, torch.maximum(-low, high).float())
        self.weight += len(X_TI) if weight_T is None else weight_T.sum()
        if self.moment is not None:
            square = X_TI.float().square_()
            self.moment += (square if weight_T is None else square.mul_(weight_T[:, None])).sum(0)
        if self.gram is None:
            return
        if weight_T is not None:
            X_TI = X_TI * weight_T.sqrt().to(X_TI.dtype)[:, None]
        if self.panels:
            add_upper_gram_(self.gram, X_TI, self.panels)
            return
        for chunk in X_TI.split(CHUNK):
            for rows in self.rows:
                self.gram[rows] += chunk.T[rows] @ chunk

    def stats(self) -> Stats:
        """Weighted means over the tokens seen, the Gram matrix symmetric with the exact diagonal. Uses the sums up."""
        n = self.weight.clamp_min(LEAST)
        gram, moment = self.gram, self.moment
        self.gram = self.moment = None
        if gram is None:
            assert moment is not None
            return Stats(moment / n, None, float(self.absmax), self.tokens)
        if moment is None:
            mirror_upper_(gram, self.panels).div_(n)
            return Stats(gram.diagonal().clone(), gram, float(self.absmax), self.tokens)
        symmetrize_(gram).div_(2 * n)
        gram.diagonal().copy_(moment / n)
        return Stats(moment / n, gram, float(self.absmax), self.tokens)


def panels(width: int) -> list[slice]:
    """`width` rows in panels of one size, but for the last."""
    step = max(NARROWEST, -(-width // PANELS))
    return [slice(first, min(first + step, width)) for first in range(0, width, step)]


def add_upper_gram_(gram_II: torch.Tensor, X_TI: torch.Tensor, rows: list[slice]) -> None:
    """gram += X^T X in the panels `rows` from their diagonal on, with float32 sums; what is below is left alone."""
    for panel in rows:
        gram_II[panel, panel.start :] += product(X_TI[:, panel].T, X_TI[:, panel.start :])


def mirror_upper_(gram_II: torch.Tensor, rows: list[slice]) -> torch.Tensor:
    """Make the matrix symmetric from its panels `rows` on and above the diagonal; within a panel's own square the two
    halves are averaged."""
    for panel in rows:
        square = gram_II[panel, panel]
        square.copy_((square + square.T) / 2)
        gram_II[panel.stop :, panel] = gram_II[panel, panel.stop :].T
    return gram_II


def symmetrize_(matrix_II: torch.Tensor, step: int = 2048) -> torch.Tensor:
    """M + M^T in the place of M, bit for bit, a panel at a time."""
    for first in range(0, len(matrix_II), step):
        panel = slice(first, first + step)
        square, right, below = (
            matrix_II[panel, panel],
            matrix_II[panel, first + step :],
            matrix_II[first + step :, panel],
        )
        square.copy_(square + square.T)
        right.add_(below.T)
        below.copy_(right.T)
    return matrix_II


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
