"""NVFP4: E2M1 values, a float8_e4m3 scale per block of 16, one float32 scale per tensor.

    w_hat = e2m1(c) * scale * global_scale,   e2m1 in +-{0, .5, 1, 1.5, 2, 3, 4, 6}

The block scale is itself a coarse number (three bits of mantissa), so it is searched over its own values: every E4M3
number from one that clips the block's largest weight to one that puts it at 4 instead of 6 ("4 over 6": the
steps below 4 are finer than the one above), and the importance-weighted error decides. A group size of 32, 64 or
128 gives 2, 4 or 8 neighbouring blocks the same scale.
"""

from __future__ import annotations

from typing import Any

import torch

from halfbyte.algo.grid import Scales, by_rows, in_groups
from halfbyte.algo.kernels import usable

LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
CODES = [float(LEVELS.index(abs(v) / 2) + 8 * (v < 0)) if abs(v) / 2 in LEVELS else 0.0 for v in range(-12, 13)]
"""The code of v / 2, from v = -12 on; 0 where there is none."""
E4M3_MAX, E4M3_MIN = 448.0, 2.0**-9
EXPONENT = 0x7F800000
"""Float32's exponent bits: alone, they are the power of two at or below a positive number."""
CLIP, LIFT = {"probe": 2, "fast": 4, "default": 6, "max": 10}, {"probe": 2, "fast": 5, "default": 6, "max": 8}
"""How many E4M3 numbers below and above amax / 6 a search tries."""


def e4m3(x: torch.Tensor) -> torch.Tensor:
    """The nearest positive float8_e4m3 numbers, as float32."""
    return x.clamp(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn).float()


def snap_e2m1(x: torch.Tensor) -> torch.Tensor:
    """The nearest E2M1 value (ties to the even code), saturating at +-6; float32, x itself is not touched.

    The spacing is half the power of two at or below max(|x|, 1). Adding 1.5 * 2^23 spacings and taking them off again
    leaves a multiple of the spacing: float32 holds no finer ones there, and rounds ties to even.
    """
    x = x.float().clamp(-6.0, 6.0)
    shift = x.abs().clamp_(min=1.0)
    shift.view(torch.int32).bitwise_and_(EXPONENT)
    shift.mul_(0.75 * 2**23)
    return x.add_(shift).sub_(shift)


class NVFP4:
    """e2m1(code) * scale * global_scale; code: bit 3 the sign, bits 0-2 the index into LEVELS."""

    name = "nvfp4"

    def encode(self, x: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
        doubled = snap_e2m1(x).mul_(2).add_(12).int()
        return torch.tensor(CODES, device=x.device).index_select(0, doubled.flatten()).view(x.shape)

    def decode(self, codes: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
        table = torch.tensor([*LEVELS, *(-v for v in LEVELS)], device=codes.device)
        return table[codes.long()]

    def snap(self, x: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
        return snap_e2m1(x)

    def global_scale(self, weights: list[torch.Tensor]) -> float | None:
        """amax / (6 * 448), as a float32 that is the reciprocal of a float32: compressed-tensors stores that one."""
        amax = max(float(w.abs().max()) for w in weights)
        outer = torch.tensor(max(amax, 1e-30) / (6 * 448), dtype=torch.float32)
        return float(1 / (1 / outer))

    def search(self, effort: str) -> dict[str, Any]:
        return {"reach": (CLIP[effort], LIFT[effort])}

    def fit(
        self, W_OI: torch.Tensor, importance_I: torch.Tensor, group_size: int, global_scale: float | None, effort: str
    ) -> Scales:
        outer = global_scale or self.global_scale([W_OI])
        assert outer is not None
        W_OGg, h = in_groups(W_OI, importance_I, group_size)
        if usable(W_OI, group_size):
            from halfbyte.algo.kernels.scales import fit_scales

            scales, _ = fit_scales(self.name, W_OGg, h, outer=outer, **self.search(effort))
            return Scales(scales, None, outer)
        (scales,) = by_rows(lambda w: (_search(w / outer, h, CLIP[effort], LIFT[effort]),), W_OGg)
        return Scales(scales, None, outer)


def _search(W_OGg: torch.Tensor, h: torch.Tensor, clip: int, lift: int) -> torch.Tensor:
    amax = W_OGg.abs().amax(-1)
    start = e4m3(amax / 6).to(torch.float8_e4m3fn).view(torch.uint8).int()
    best = torch.full_like(amax, torch.inf)
    chosen = torch.ones_like(amax)
    for offset in range(-clip, lift + 1):
        code = (start + offset).clamp(1, 126).to(torch.uint8)
        s = code.view(torch.float8_e4m3fn).float()
        error = (snap_e2m1(W_OGg / s[..., None]).mul_(s[..., None]).sub_(W_OGg)).square_().mul_(h).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, s, chosen)
    return torch.where(amax > 0, chosen, torch.ones_like(chosen))
