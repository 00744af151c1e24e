"""Round to nearest as anyone would write it, the yardstick of every row: no search, no data, nothing of halfbyte."""

from __future__ import annotations

import torch

LEVELS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def nearest(weight: torch.Tensor, grid: str, group_size: int) -> torch.Tensor:
    """`weight` [O, I] rounded on int4_sym, int4_asym or nvfp4 with scales from each group's extremes; BF16."""
    size = weight.shape[1] if group_size == -1 else group_size
    w = weight.float().unflatten(1, (-1, size))
    rounded = {"int4_sym": _symmetric, "int4_asym": _asymmetric, "nvfp4": _nvfp4}[grid](w)
    return rounded.flatten(1).bfloat16()


def _symmetric(w: torch.Tensor) -> torch.Tensor:
    s = (w.abs().amax(-1, keepdim=True) / 7.5).clamp_min(1e-8)
    return (w / s).round().clamp(-8, 7) * s


def _asymmetric(w: torch.Tensor) -> torch.Tensor:
    low, high = w.amin(-1, keepdim=True).clamp_max(0), w.amax(-1, keepdim=True).clamp_min(0)
    s = ((high - low) / 15).clamp_min(1e-8)
    z = (-low / s).round()
    return ((w / s).round() + z).clamp(0, 15).sub(z) * s


def _nvfp4(w: torch.Tensor) -> torch.Tensor:
    outer = w.abs().max() / (6 * 448)
    s = (w.abs().amax(-1, keepdim=True) / 6 / outer).clamp(2.0**-9, 448).to(torch.float8_e4m3fn).float() * outer
    x = (w / s).abs().clamp(max=6)
    middle = (LEVELS[1:] + LEVELS[:-1]) / 2
    return LEVELS[torch.bucketize(x, middle)].copysign(w) * s
