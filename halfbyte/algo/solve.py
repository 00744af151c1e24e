"""One group of linears that share an input, from weights and statistics to codes: where methods meet grids."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfbyte.algo.gptq import Factor, factorize, gptq
from halfbyte.algo.grid import dequantize, get_grid
from halfbyte.algo.rtn import assemble, rtn
from halfbyte.algo.stats import QuickError, Stats, output_error
from halfbyte.types import QuantizedLinear


@dataclass(frozen=True)
class Options:
    """How codes are chosen. rounding: rtn | gptq; effort: fast | default | max; damp: share of the mean diagonal."""

    grid: str
    rounding: str
    effort: str = "default"
    damp: float = 0.05
    act_order: bool = True


@dataclass(frozen=True)
class Solved:
    """One linear's result. `relative_error` is sqrt(tr(E H E^T) / tr(W H W^T)) to 1e-3 of itself, with the diagonal of
    H alone where the Gram matrix was not collected; `damp` is what the factorisation took, None for rtn."""

    q: QuantizedLinear
    relative_error: float
    damp: float | None


def solve_group(
    weights: list[torch.Tensor], stats: Stats, group_size: int, options: Options, factor: Factor | None = None
) -> tuple[list[Solved], Factor | None]:
    """Quantize linears that share an input (float [O_k, I] each): one Solved each, in order, and the Factor used.

    A Factor made before from the same statistics, damping and order can be passed in. Raises ValueError where
    rounding is gptq and the statistics have no Gram matrix.
    """
    grid = get_grid(options.grid)
    W_OI = torch.cat([w.float() for w in weights])
    fitted = grid.fit(W_OI, stats.second_moment_I, group_size, grid.global_scale([W_OI]), options.effort)
    if options.rounding == "gptq":
        if stats.gram_II is None:
            raise ValueError("gptq rounding needs the Gram matrix of the inputs")
        factor = factor or factorize(stats.gram_II, options.damp, options.act_order)
        q = assemble(gptq(W_OI, fitted.effective, fitted.zeros, factor, grid), fitted, grid, group_size)
    else:
        factor = None
        q = rtn(W_OI, fitted, grid, group_size)
    measure = QuickError(stats)
    error, power = measure(dequantize(q).sub_(W_OI)), measure(W_OI)
    solved = []
    sizes = [len(w) for w in weights]
    for part, e, p in zip(_rows(q, sizes), error.split(sizes), power.split(sizes)):
        relative = float((e.sum() / p.sum().clamp_min(1e-30)).clamp_min(0).sqrt())
        solved.append(Solved(part, relative, factor.damp if factor else None))
    return solved, factor


def relative_error(W_OI: torch.Tensor, q: QuantizedLinear, stats: Stats) -> float:
    """sqrt(tr(E H E^T) / tr(W H W^T)) of one linear."""
    W = W_OI.float()
    error, power = output_error(dequantize(q) - W, stats).sum(), output_error(W, stats).sum()
    return float((error / power.clamp_min(1e-30)).clamp_min(0).sqrt())


def _rows(q: QuantizedLinear, sizes: list[int]) -> list[QuantizedLinear]:
    """A stacked QuantizedLinear cut back into its linears."""
    zeros = [None] * len(sizes) if q.zeros is None else list(q.zeros.split(sizes))
    return [
        QuantizedLinear(c.contiguous(), s.contiguous(), q.group_size, q.grid, z, q.global_scale)
        for c, s, z in zip(q.codes.split(sizes), q.scales.split(sizes), zeros)
    ]
