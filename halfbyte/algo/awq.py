"""AWQ: scale up the inputs that matter before rounding, and scale what precedes down by as much.

Lin, Tang, Tang, Yang, Chen, Xiao, Wang, Dang, Gan, Han: "AWQ", MLSys 2024 (arXiv 2306.00978). For any s > 0

    W x = (W diag(s)) (x / s),

and x / s costs nothing where it folds into a norm or a linear before. Rounding W diag(s) gives column j an error
relative to s_j w_j, so large s_j protect the inputs with large activations. The scales are

    s_j = E[x_j^2]^(alpha / 2) / mean |w_j|^beta,      normalised so that max(s) min(s) = 1,

with (alpha, beta) searched, the identity among the candidates. The loss is the layer's whole output error
tr(E H E^T), E = W - Q(W diag(s)) diag(1/s), not only its diagonal, with the final grid as the quantizer.

The loss is smooth along each of two paths, beta = 0 and beta = 1 - alpha, but for a little noise: the search tries
every second point of the first up to alpha = 2/3 and one of the second, then walks from the best to its neighbours for
as long as that helps (7 candidates of 15, mostly). It looks at every k-th row, `ROWS` of them at least, and multiplies
in bfloat16. Effort max tries all candidates on all rows in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from halfbyte.algo.grid import Grid, in_groups
from halfbyte.algo.kernels import usable
from halfbyte.algo.stats import QuickError, Stats, output_error

POINTS = {"fast": 6, "default": 10, "max": 20}
ROWS = 512
"""The search looks at no fewer rows of a group of linears, where it has them: with half as many, the rounding of a few
weights behind a very large input decides."""


def find_scale(
    weights: list[torch.Tensor],
    stats: Stats,
    grid: Grid,
    group_size: int,
    effort: str = "default",
    repeat: tuple[int, int, int] | None = None,
) -> torch.Tensor:
    """Input scales for linears that share an input: float32 [I], all ones where scaling does not help.

    weights    float32 [O_k, I] each.
    repeat     (kv_heads, queries_per_kv, head_dim) where the inputs are value heads repeated over query heads:
               one scale per (kv head, channel) then serves every query head that shares it.
    """
    W_OI = torch.cat([w.float() for w in weights])
    activation = _shared(stats.second_moment_I, repeat).clamp_min(1e-12).sqrt()
    weight = _shared(W_OI.square().mean(0), repeat).clamp_min(1e-12).sqrt()
    largest_I = W_OI.abs().amax(0)
    careful = effort == "max"
    error = (lambda E: output_error(E, stats)) if careful else QuickError(stats)
    sample = W_OI if careful else every_kth_row(W_OI)

    def scale(alpha: float, beta: float) -> torch.Tensor:
        return normalised(activation**alpha / weight**beta)

    def loss(candidate: tuple[float, float]) -> torch.Tensor:
        s = scale(*candidate)
        E = rounding_error(sample, s, stats.second_moment_I, grid, group_size, grid.global_scale([largest_I * s]))
        return error(E).sum()

    def losses(some: list[tuple[float, float]]) -> list[float]:
        return torch.stack([loss(c) for c in some]).tolist()  # a GPU is waited for once

    tried = candidates(effort)
    if careful:
        found = losses(tried)
        best = tried[found.index(min(found))]
    else:
        best = walk(tried, losses)
    return torch.ones_like(activation) if best == (0.0, 0.0) else scale(*best)


def candidates(effort: str) -> list[tuple[float, float]]:
    """(alpha, beta) to try, the identity (0, 0) first."""
    points = POINTS[effort]
    plain = [(i / points, 0.0) for i in range(points)]
    return plain + [(i / points, 1 - i / points) for i in range(points // 2, points)]


def walk(
    tried: list[tuple[float, float]], losses: Callable[[list[tuple[float, float]]], list[float]]
) -> tuple[float, float]:
    """The candidate of the least of `losses`, or nearly: a few, then neighbours on its path of the best of all and of
    the best with beta = 0, for as long as one is better.

    Neither a neighbour of what is returned nor the first candidate is better than it.
    """
    paths = [[c for c in tried if c[1] == 0], [c for c in tried if c[1] != 0]]
    known: dict[tuple[float, float], float] = {}
    todo = paths[0][: len(paths[0]) * 2 // 3 + 1 : 2] + paths[1][:1]
    while todo:
        known |= zip(todo, losses(todo))
        best = min(known, key=lambda c: known[c])
        plain = min((c for c in known if c[1] == 0), key=lambda c: known[c])
        todo = [c for at in dict.fromkeys((best, plain)) for c in _around(at, paths[at[1] != 0]) if c not in known]
    return best


def _around(candidate: tuple[float, float], path: list[tuple[float, float]]) -> list[tuple[float, float]]:
    at = path.index(candidate)
    return path[max(0, at - 1) : at + 2]


def normalised(s: torch.Tensor) -> torch.Tensor:
    """s with max(s) * min(s) = 1 and a dynamic range that bfloat16 norms take."""
    s = s / (s.max() * s.min()).sqrt()
    return s.clamp(2.0**-8, 2.0**8)


def every_kth_row(W_OI: torch.Tensor, least: int = ROWS) -> torch.Tensor:
    """Every k-th row, at least `least` of them; k is odd, so that it does not keep step with the heads."""
    k = len(W_OI) // least
    return W_OI[:: max(1, k - (k + 1) % 2)]


def scaled_loss(W_OI: torch.Tensor, s_I: torch.Tensor, stats: Stats, grid: Grid, group_size: int) -> float:
    """Output error, E||e x||^2 summed over the rows, of rounding W diag(s) to nearest."""
    outer = grid.global_scale([W_OI * s_I])
    E = rounding_error(W_OI, s_I, stats.second_moment_I, grid, group_size, outer)
    return float(output_error(E, stats).sum())


def rounding_error(
    W_OI: torch.Tensor,
    s_I: torch.Tensor,
    second_moment_I: torch.Tensor,
    grid: Grid,
    group_size: int,
    global_scale: float | None,
) -> torch.Tensor:
    """(Q(W diag(s)) - W diag(s)) diag(1/s), float32 [O, I]: what the unscaled inputs see of it. W is float32 [O, I]."""
    importance_I = second_moment_I / s_I.square()
    if usable(W_OI, group_size):
        from halfbyte.algo.kernels.scales import scaled_errors

        W_OGg, h = in_groups(W_OI, importance_I, group_size)
        outer = 1.0 if global_scale is None else global_scale
        return scaled_errors(grid.name, W_OGg, h, s_I, torch.float32, outer=outer, **grid.search("probe"))
    W = W_OI * s_I
    fitted = grid.fit(W, importance_I, group_size, global_scale, "probe")
    zeros = None if fitted.zeros is None else fitted.zeros[:, :, None]
    effective = fitted.effective[:, :, None]
    snapped = grid.snap(W.unflatten(1, (-1, group_size)) / effective, zeros).mul_(effective).flatten(1)
    return snapped.sub_(W).div_(s_I)


def _shared(values_I: torch.Tensor, repeat: tuple[int, int, int] | None) -> torch.Tensor:
    if repeat is None:
        return values_I
    mean = values_I.view(*repeat).mean(1, keepdim=True)
    return mean.expand(*repeat).reshape(-1)
