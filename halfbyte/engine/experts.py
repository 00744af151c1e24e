"""Statistics of the experts of one block, collected an expert at a time.

What an expert e adds to the block's output is r_te f_e(x_t): its output for token t times the router's weight of it. An
error dz in one of its linears' outputs so costs r_te^2 |dz|^2 (times what follows, which is the same for all experts).
With n_t how often a token counts in this block (importance.py), and sums over the N tokens routed to e,

    R_e = sum_t n_t r_te^2 x_t x_t^T / sum_t n_t r_te^2.

A token that an expert hardly contributes to hardly counts in its rounding, and one that was not routed to it does not.

An expert sees a share of the calibration tokens, and rare experts see few: R_e then says too little, and the columns
that are compensated fit its noise. B_e, the same for the tokens of the whole block, as if all had been routed to e with
one weight, is known much better. So the Hessian is

    H_e = (N R_e + PRIOR B_e) / (N + PRIOR),

the block's statistics for an expert that got no token, its own where it got many. An expert with N < PRIOR is told of
in the manifest and in a notice. Measured on an MLP of SmolLM2 with tokens in 16 clusters as experts (docs/log.md),
output error of a cluster's own tokens:

    tokens of it        0       32       128      512      2048
    R alone, up         -     6.96 %   6.51 %   5.78 %   5.12 %
    H, up             6.42    6.26     6.00     5.57     5.15
    R alone, down       -     9.50     9.39     9.11     7.61
    H, down           9.02    8.90     8.70     8.19     7.32

So the prior costs an expert with very many tokens a little: 0.03 points of gate and up at 2,048.

While the block runs, the experts' common inputs are kept with the router's choice: one more copy of the activations.
The Gram matrices are made afterwards for one expert at a time, so that 128 experts take no more room than one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import torch

from halfbyte.algo import Stats
from halfbyte.engine.collect import Collector
from halfbyte.models import Experts

PRIOR = 256
"""So many tokens' worth of the block's statistics are in each expert's."""
SPREAD = 2048
"""At least so many tokens of the block, evenly spread, stand for all of them (where there are so many)."""
TOLD = 6
"""Experts that a notice names."""

Weighted = tuple[torch.Tensor, torch.Tensor]
"""Inputs [n, D] and how often each counts, float32 [n]."""


class ExpertInputs:
    """Keeps what a block's experts are given while it runs (a context), then tells each expert's statistics.

    gram    whether Gram matrices are collected, or their diagonals alone
    Before each batch, `expect` says which tokens count, and how often.
    """

    def __init__(self, experts: Experts, gram: bool):
        self.experts, self.gram = experts, gram
        self.kept: list[tuple[torch.Tensor, ...]] = []
        self._keep: torch.Tensor | None = None
        self._counts: torch.Tensor | None = None
        self._handle: Any = None

    def expect(self, keep: torch.Tensor | None, counts: torch.Tensor) -> None:
        """The next batch: keep is bool [B*T] (None: no padding), counts float32 [B, T]."""
        self._keep, self._counts = keep, counts.flatten()

    def __enter__(self) -> ExpertInputs:
        self._handle = self.experts.register_forward_pre_hook(self._take)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _take(self, _module: torch.nn.Module, args: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        assert self._counts is not None
        given = (*args, self._counts)
        self.kept.append(given if self._keep is None else tuple(t[self._keep] for t in given))

    @cached_property
    def tokens(self) -> list[int]:
        """How many of the calibration tokens went to each expert."""
        total = torch.zeros(len(self.experts), dtype=torch.int64)
        for _, chosen, _, _ in self.kept:
            total += torch.bincount(chosen.flatten(), minlength=len(total)).cpu()
        return [int(count) for count in total]

    @property
    def starved(self) -> list[int]:
        """The experts whose own tokens count less than those of the block."""
        return [number for number, count in enumerate(self.tokens) if count < PRIOR]

    @torch.no_grad()
    def stats(self, number: int) -> dict[str, Stats]:
        """H_e by the kinds of an expert's groups: of its inputs ("gate_up") and of what its down projection reads."""
        expert: Any = self.experts[number]
        routed = list(self._routed(number))
        into = blended(_collected(routed, self.gram), self._block, self.tokens[number])
        middle = _collected(((expert.middle(x), n) for x, n in routed), self.gram)
        block = _collected(((expert.middle(x), n) for x, n in self._everyone()), self.gram)
        return {"gate_up": into, "down": blended(middle, block, self.tokens[number])}

    @cached_property
    def _block(self) -> Stats:
        block = _collected(self._everyone(), self.gram)
        assert block is not None, "the block ran without a token"
        return block

    def _routed(self, number: int) -> Iterator[Weighted]:
        for x, chosen, weights, counts in self.kept:
            tokens, place = torch.where(chosen == number)
            if len(tokens):
                yield x[tokens], counts[tokens] * weights[tokens, place].float().square()

    def _everyone(self) -> Iterator[Weighted]:
        step = max(1, sum(len(x) for x, *_ in self.kept) // SPREAD)
        for x, _, _, counts in self.kept:
            yield x[::step], counts[::step]

    def forget(self) -> None:
        """Let go of the inputs, when the last expert's statistics are made: what tokens there were stays known."""
        assert self.tokens is not None
        self.kept = []

    def notice(self, name: str) -> str:
        """One line about the experts of the module `name` that few tokens reached; empty where there are none."""
        if not self.starved:
            return ""
        told = ", ".join(f"{number} ({self.tokens[number]})" for number in self.starved[:TOLD])
        more = f" and {len(self.starved) - TOLD} more" if len(self.starved) > TOLD else ""
        return (
            f"{name}: {len(self.starved)} of {len(self.tokens)} experts got fewer than {PRIOR} calibration tokens "
            f"({told}{more}): they are rounded for the tokens of the whole block more than for their own"
        )


def _collected(batches: Iterable[Weighted], gram: bool) -> Stats | None:
    """Statistics of weighted inputs; None where there are none."""
    collector: Collector | None = None
    for x, counts in batches:
        collector = collector or Collector(x.shape[1], gram, x.device)
        collector.add(x, counts)
    return collector.stats() if collector else None


def blended(own: Stats | None, block: Stats | None, tokens: int) -> Stats:
    """(tokens * own + PRIOR * block) / (tokens + PRIOR)."""
    assert block is not None
    if own is None:
        return Stats(block.second_moment_I, block.gram_II, block.absmax, 0)
    share = tokens / (tokens + PRIOR)
    gram = None
    if own.gram_II is not None and block.gram_II is not None:
        gram = block.gram_II.lerp(own.gram_II, share)
    moment = block.second_moment_I.lerp(own.second_moment_I, share)
    return Stats(moment, gram, max(own.absmax, block.absmax), tokens)
