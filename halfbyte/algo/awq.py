"""AWQ: scale up the inputs that matter before rounding, and scale what precedes down by as much.

Lin, Tang, Tang, Yang, Chen, Xiao, Wang, Dang, Gan, Han: "AWQ", MLSys 2024 (arXiv 2306.00978). For any s > 0

    W x = (W diag(s)) (x / s),

and x / s costs nothing where it folds into a norm or a linear before. Rounding W diag(s) gives column j an error
relative to s_j w_j, so large s_j protect the inputs with large activations. The scales are

    s_j = E[x_j^2]^(alpha / 2) / mean |w_j|^beta,      normalised so that max(s) min(s) = 1,

with (alpha, beta) searched, the identity among the candidates. The loss is the layer's whole output error
tr(E H E^T), E = W - Q(W diag(s)) diag(1/s), not only its diagonal, with the final grid as the quantizer.
"""

from __future__ import annotations

import torch

from halfbyte.algo.grid import Grid
from halfbyte.algo.stats import Stats, output_error

POINTS = {"fast": 6, "default": 10, "max": 20}


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
    best, chosen = torch.inf, torch.ones_like(activation)
    for alpha, beta in candidates(effort):
        s = normalised(activation**alpha / weight**beta)
        loss = scaled_loss(W_OI, s, stats, grid, group_size)
        if loss < best:
            best, chosen = loss, s
    return chosen


def candidates(effort: str) -> list[tuple[float, float]]:
    """(alpha, beta) to try, the identity (0, 0) first."""
    points = POINTS[effort]
    plain = [(i / points, 0.0) for i in range(points)]
    return plain + [(i / points, 1 - i / points) for i in range(points // 2, points)]


def normalised(s: torch.Tensor) -> torch.Tensor:
    """s with max(s) * min(s) = 1 and a dynamic range that bfloat16 norms take."""
    s = s / (s.max() * s.min()).sqrt()
    return s.clamp(2.0**-8, 2.0**8)


def scaled_loss(W_OI: torch.Tensor, s_I: torch.Tensor, stats: Stats, grid: Grid, group_size: int) -> float:
    """Relative output error of rounding W diag(s) to nearest."""
    W = W_OI * s_I
    scaled = stats.scaled(s_I)
    outer = grid.global_scale([W])
    fitted = grid.fit(W, scaled.second_moment_I, group_size, outer, "probe")
    zeros = None if fitted.zeros is None else fitted.zeros[:, :, None]
    effective = fitted.effective[:, :, None]
    E = grid.snap(W.unflatten(1, (-1, group_size)) / effective, zeros).mul_(effective).flatten(1).sub_(W)
    return float(output_error(E, scaled).sum())


def _shared(values_I: torch.Tensor, repeat: tuple[int, int, int] | None) -> torch.Tensor:
    if repeat is None:
        return values_I
    mean = values_I.view(*repeat).mean(1, keepdim=True)
    return mean.expand(*repeat).reshape(-1)
