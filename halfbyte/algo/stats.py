"""What a method may know of a linear's inputs: their Gram matrix, its diagonal, their largest magnitude.

All of it comes from the BF16 model in one pass and does not depend on the recipe. Dividing the inputs by s (AWQ's
folding) is a change of basis that needs no second pass:  H' = H / (s s^T).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Stats:
    """second_moment_I  E[x_j^2], float32 [I].
    gram_II          H = E[x x^T], float32 [I, I], or None where only the diagonal was collected.
    absmax           largest |x| seen.
    tokens           how many inputs were seen.
    """

    second_moment_I: torch.Tensor
    gram_II: torch.Tensor | None
    absmax: float
    tokens: int

    @staticmethod
    def uniform(width: int, device: torch.device | str = "cpu") -> Stats:
        """Nothing is known: all inputs matter alike (data-free methods)."""
        return Stats(torch.ones(width, device=device), None, 0.0, 0)

    def scaled(self, s_I: torch.Tensor) -> Stats:
        """The statistics of the inputs divided by s (float32 [I])."""
        gram = None if self.gram_II is None else self.gram_II / s_I / s_I[:, None]
        return Stats(self.second_moment_I / s_I.square(), gram, self.absmax, self.tokens)

    @cached_property
    def signal(self) -> float:
        """mean E[x_j^2], to normalise by."""
        return float(self.second_moment_I.mean())


def output_error(E_OI: torch.Tensor, stats: Stats) -> torch.Tensor:
    """E||e x||^2 for each row e of E: float32 [O]. With no Gram matrix: its diagonal's part."""
    if stats.gram_II is None:
        return (E_OI.square() * stats.second_moment_I).sum(1)
    return (E_OI @ stats.gram_II).mul_(E_OI).sum(1)


class QuickError:
    """`output_error` from a bfloat16 product, several times as fast: the diagonal of H stays in float32, the rest is
    rounded. Summed over a linear's rows it is off by less than 1e-3, relatively (5e-4 and less was seen).

    Made once for errors under the same statistics; holds half the Gram matrix's bytes.
    """

    def __init__(self, stats: Stats):
        self.diagonal_I = stats.second_moment_I
        self.rest_II: torch.Tensor | None = None
        if stats.gram_II is not None:
            self.diagonal_I, self.rest_II = stats.gram_II.diagonal(), stats.gram_II.bfloat16()
            self.rest_II.diagonal().zero_()

    def __call__(self, E_OI: torch.Tensor) -> torch.Tensor:
        """float32 [O], as `output_error`."""
        own = E_OI.square() @ self.diagonal_I
        if self.rest_II is None:
            return own
        e = E_OI.bfloat16()
        through = product(e, self.rest_II) if e.is_cuda else e @ self.rest_II
        return own.add_((through * E_OI).sum(1))


def product(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """A B in float32, with float32 sums, of bfloat16 or float16 matrices: exact but for their order."""
    if A.is_cuda and A.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(A, B, out_dtype=torch.float32)
    return A.float() @ B.float()
