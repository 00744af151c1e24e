"""Statistics of the experts of one block, collected an expert at a time.

What an expert e adds to the block's output is r_te f_e(x_t): its output for token t times the router's weight of it. An
error dz in one of its linears' outputs so costs r_te^2 |dz|^2 (times what follows, which is the same for all experts),
and its Hessian is

    H_e = sum_t n_t r_te^2 x_t x_t^T / sum_t n_t r_te^2        over the tokens t that were routed to e

with n_t how often a token counts in this block (importance.py). A token that an expert hardly contributes to hardly
counts in its rounding, and one that was not routed to it does not at all.

While the block runs, the experts' common inputs are kept with the router's choice: one more copy of the activations.
The Gram matrices are made afterwards for one expert at a time, so that 128 experts take no more room than one.

An expert that fewer than `FEW` calibration tokens reach tells too little. It is given the tokens of the whole block, as
if all had been routed to it with one weight (at most `MOST`, evenly spread), and the manifest and a notice say so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from halfbyte.algo import Stats
from halfbyte.engine.collect import Collector
from halfbyte.models import Experts

FEW = 32
"""Routed tokens below which an expert's own inputs are not trusted."""
MOST = 4096
"""Tokens that stand in for them."""
TOLD = 6
"""Experts that a notice names."""


class ExpertInputs:
    """Keeps what a block's experts are given while it runs (a context), then tells each expert's statistics.

    gram    whether Gram matrices are collected, or their diagonals alone
    Before each batch, `expect` says which tokens count, and how often.
    """

    def __init__(self, experts: Experts, gram: bool):
        self.experts, self.gram = experts, gram
        self.inputs: list[torch.Tensor] = []
        self.chosen: list[torch.Tensor] = []
        self.weights: list[torch.Tensor] = []
        self.counts: list[torch.Tensor] = []
        self._keep: torch.Tensor | None = None
        self._count: torch.Tensor | None = None
        self._handle: Any = None

    def expect(self, keep: torch.Tensor | None, counts: torch.Tensor) -> None:
        """The next batch: keep is bool [B*T] (None: no padding), counts float32 [B, T]."""
        self._keep, self._count = keep, counts.flatten()

    def __enter__(self) -> ExpertInputs:
        self._handle = self.experts.register_forward_pre_hook(self._take)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _take(self, _module: torch.nn.Module, args: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        assert self._count is not None
        for kept, given in zip((self.inputs, self.chosen, self.weights, self.counts), (*args, self._count)):
            kept.append(given if self._keep is None else given[self._keep])

    def tokens(self) -> list[int]:
        """How many of the calibration tokens went to each expert."""
        total = torch.zeros(len(self.experts), dtype=torch.int64)
        for chosen in self.chosen:
            total += torch.bincount(chosen.flatten(), minlength=len(total)).cpu()
        return total.tolist()

    def starved(self) -> list[int]:
        """The experts that too few tokens reached."""
        return [number for number, count in enumerate(self.tokens()) if count < FEW]

    @torch.no_grad()
    def stats(self, number: int, starved: bool = False) -> dict[str, Stats]:
        """Statistics of an expert's inputs by its groups' kinds; `starved`: from the tokens of all the block."""
        expert: Any = self.experts[number]
        hidden, width = (expert.get_submodule(expert.projections[i]).in_features for i in (0, 2))
        device = self.inputs[0].device
        into, middle = Collector(hidden, self.gram, device), Collector(width, self.gram, device)
        for x, count in self._everyone() if starved else self._routed(number):
            if len(x):
                into.add(x, count)
                middle.add(expert.middle(x), count)
        return {"gate_up": into.stats(), "down": middle.stats()}

    def _routed(self, number: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(inputs [n, D], how often each counts [n]) by batch, of the tokens that go to an expert."""
        for x, chosen, weights, count in zip(self.inputs, self.chosen, self.weights, self.counts):
            tokens, place = torch.where(chosen == number)
            yield x[tokens], count[tokens] * weights[tokens, place].float().square()

    def _everyone(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        step = max(1, sum(len(x) for x in self.inputs) // MOST)
        for x, count in zip(self.inputs, self.counts):
            yield x[::step], count[::step]

    def notice(self, name: str) -> str:
        """One line about the experts of the module `name` that too few tokens reached; empty where there are none."""
        counts, starved = self.tokens(), self.starved()
        if not starved:
            return ""
        told = ", ".join(f"{number} ({counts[number]})" for number in starved[:TOLD])
        more = f" and {len(starved) - TOLD} more" if len(starved) > TOLD else ""
        return (
            f"{name}: {len(starved)} of {len(counts)} experts got fewer than {FEW} calibration tokens ({told}{more}): "
            "they are rounded for all the block's tokens; more or more varied calibration text would reach them"
        )
