"""One group of linears that share an input, from weights and statistics to codes: where methods meet grids."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from halfbyte.algo.gptq import Factor, factorize, gptq
from halfbyte.algo.grid import dequantize, get_grid
from halfbyte.algo.rtn import assemble, rtn
from halfbyte.algo.stats import QuickError, Stats, output_error
from halfbyte.types import QuantizedLinear

LARGE, PIECE = 1 << 27, 1 << 26
"""A group of more weights than LARGE (half a GiB in float32) is solved on a CPU in pieces of PIECE: solving
takes some eight times a piece's bytes. No linear of an 8B model is so large."""


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
    grid, measure = get_grid(options.grid), QuickError(stats)
    outer = grid.global_scale(weights)
    if options.rounding != "gptq":
        factor = None
    elif stats.gram_II is None:
        raise ValueError("gptq rounding needs the Gram matrix of the inputs")
    else:
        factor = factor or factorize(stats.gram_II, options.damp, options.act_order)

    def rounded(W_OI: torch.Tensor) -> _Rounded:
        fitted = grid.fit(W_OI, stats.second_moment_I, group_size, outer, options.effort)
        if factor is None:
            q = rtn(W_OI, fitted, grid, group_size)
        else:
            q = assemble(gptq(W_OI, fitted.effective, fitted.zeros, factor, grid), fitted, grid, group_size)
        return q, measure(dequantize(q).sub_(W_OI)), measure(W_OI)

    solved = []
    for q, error, power in _each(weights, rounded):
        relative = float((error.sum() / power.sum().clamp_min(1e-30)).clamp_min(0).sqrt())
        solved.append(Solved(q, relative, factor.damp if factor else None))
    return solved, factor


_Rounded = tuple[QuantizedLinear, torch.Tensor, torch.Tensor]
"""A linear, or some rows of it, and for each row its error and its power: float32 [O]."""


def _each(weights: list[torch.Tensor], rounded: Callable[[torch.Tensor], _Rounded]) -> Iterator[_Rounded]:
    """`rounded` (of float32 [O, I]) for each of the weights: all stacked at once, or where they are large and on a CPU
    some rows at a time, which needs less memory and gives the same, since rows do not know of each other."""
    if weights[0].is_cuda or sum(w.numel() for w in weights) <= LARGE:
        q, error, power = rounded(torch.cat([w.float() for w in weights]))
        sizes = [len(w) for w in weights]
        yield from zip(_rows(q, sizes), error.split(sizes), power.split(sizes))
        return
    for w in weights:
        parts, errors, powers = zip(*(rounded(rows.float()) for rows in w.split(max(1, PIECE // w.shape[1]))))
        zeros = None if parts[0].zeros is None else torch.cat([q.zeros for q in parts])
        codes, scales = torch.cat([q.codes for q in parts]), torch.cat([q.scales for q in parts])
        yield replace(parts[0], codes=codes, scales=scales, zeros=zeros), torch.cat(errors), torch.cat(powers)


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
