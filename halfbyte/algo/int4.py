"""Signed and unsigned 4-bit integers with a scale per group.

int4_sym:   w_hat = (c - 8) s,  c in 0..15           (GPTQ's grid)
int4_asym:  w_hat = (c - z) s,  c and z in 0..15     (AWQ's grid)

The scale is searched over shrunken ranges: clipping the few largest weights of a group makes every other one finer.
Each candidate range r is rounded, then its scale refitted in closed form to the codes that it gave,

    s = sum_j h_j w_j d_j / sum_j h_j d_j^2,    d = c - z,

and the candidate with the least importance-weighted error wins. Scales are rounded to values that float16 and
bfloat16 both hold, because files store float16 and vLLM multiplies in the model's dtype: what is searched is served.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from halfbyte.algo.grid import Grid, Scales, by_rows, in_groups
from halfbyte.algo.kernels import usable

SMALLEST, LARGEST = 2.0**-14, 65024.0
"""The normal range of float16, at bfloat16's precision."""
STEPS = {"probe": 3, "fast": 12, "default": 20, "max": 48}
STEPS_ASYM = {"probe": 3, "fast": 8, "default": 12, "max": 48}
"""Candidate ranges a search tries; with a zero, each is tried with three of them."""

Search = Callable[[torch.Tensor, torch.Tensor, list[float]], tuple[torch.Tensor, ...]]
"""Groups of weights [O, G, g], importances and candidate ranges to scales [O, G], and zeros where the grid has them."""


def storable(scales: torch.Tensor) -> torch.Tensor:
    """The nearest positive scales that float16 and bfloat16 both represent exactly; float32."""
    return scales.bfloat16().float().clamp(SMALLEST, LARGEST)


def _fitted(
    grid: Grid, search: Search, W_OI: torch.Tensor, importance_I: torch.Tensor, group_size: int, effort: str
) -> Scales:
    """Scales (and zeros) of every group, by the kernel or by `search`."""
    W_OGg, h = in_groups(W_OI, importance_I, group_size)
    ways = grid.search(effort)
    if usable(W_OI, group_size):
        from halfbyte.algo.kernels.scales import fit_scales

        return Scales(*fit_scales(grid.name, W_OGg, h, **ways))
    scales, *zeros = by_rows(lambda w: search(w, h, ways["ratios"]), W_OGg)
    return Scales(scales, zeros[0] if zeros else None)


class Int4Sym:
    """(code - 8) * scale."""

    name = "int4_sym"

    def encode(self, x: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
        return x.round().clamp_(-8, 7).add_(8)

    def decode(self, codes: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
        return codes - 8

    def snap(self, x: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
        return x.round().clamp_(-8, 7)

    def global_scale(self, weights: list[torch.Tensor]) -> float | None:
        return None

    def search(self, effort: str) -> dict[str, Any]:
        return {"ratios": torch.linspace(0.45 if effort != "probe" else 0.75, 1.0, STEPS[effort]).tolist()}

    def fit(
        self, W_OI: torch.Tensor, importance_I: torch.Tensor, group_size: int, global_scale: float | None, effort: str
    ) -> Scales:
        return _fitted(self, _search_symmetric, W_OI, importance_I, group_size, effort)


def _search_symmetric(W_OGg: torch.Tensor, h: torch.Tensor, ratios: list[float]) -> tuple[torch.Tensor]:
    top, bottom = W_OGg.amax(-1), -W_OGg.amin(-1)
    reach = torch.maximum(top / 7, bottom / 8)
    best = torch.full_like(reach, torch.inf)
    chosen = torch.ones_like(reach)
    hw = W_OGg * h
    for ratio in ratios:
        s = storable(reach * ratio)
        d = (W_OGg / s[..., None]).round_().clamp_(-8, 7)
        hd = d * h
        cross, square = (hw * d).sum(-1), (hd * d).sum(-1)
        s = storable(cross / square.clamp_min(1e-30))
        d = (W_OGg / s[..., None]).round_().clamp_(-8, 7)
        error = (W_OGg - d * s[..., None]).square_().mul_(h).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, s, chosen)
    return (chosen,)


class Int4Asym:
    """(code - zero) * scale."""

    name = "int4_asym"

    def encode(self, x: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
        assert zeros is not None
        return (x + zeros).round_().clamp_(0, 15)

    def decode(self, codes: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
        assert zeros is not None
        return codes - zeros

    def snap(self, x: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
        assert zeros is not None
        return self.encode(x, zeros).sub_(zeros)

    def global_scale(self, weights: list[torch.Tensor]) -> float | None:
        return None

    def search(self, effort: str) -> dict[str, Any]:
        return {"ratios": torch.linspace(0.5 if effort != "probe" else 0.8, 1.0, STEPS_ASYM[effort]).tolist()}

    def fit(
        self, W_OI: torch.Tensor, importance_I: torch.Tensor, group_size: int, global_scale: float | None, effort: str
    ) -> Scales:
        return _fitted(self, _search_asymmetric, W_OI, importance_I, group_size, effort)


def _search_asymmetric(W_OGg: torch.Tensor, h: torch.Tensor, ratios: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Shrunken ranges, each with the zero that fits it and its neighbours; the scale refitted each time."""
    top, bottom = W_OGg.amax(-1).clamp_min(0), W_OGg.amin(-1).clamp_max(0)
    best = torch.full_like(top, torch.inf)
    chosen, zero = torch.ones_like(top), torch.zeros_like(top)
    for ratio in ratios:
        first = storable((top - bottom) * (ratio / 15))
        steps = (W_OGg / first[..., None]).round_()
        middle = (-bottom * ratio / first).round_()
        for offset in (-1, 0, 1):
            z = (middle + offset).clamp_(0, 15)
            low, high = -z[..., None], 15 - z[..., None]
            d = _between(steps, low, high)
            hd = d * h
            s = storable((hd * W_OGg).sum(-1) / hd.mul_(d).sum(-1).clamp_min(1e-30))
            error = _between((W_OGg / s[..., None]).round_(), low, high).mul_(s[..., None])
            error = error.sub_(W_OGg).square_().mul_(h).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            chosen = torch.where(better, s, chosen)
            zero = torch.where(better, z, zero)
    return chosen, zero


def _between(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """x.clamp(low, high), which torch does more slowly."""
    x = torch.maximum(x, low)
    return torch.minimum(x, high, out=x)
