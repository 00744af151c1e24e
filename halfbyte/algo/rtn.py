"""Round to nearest: every weight to the closest value of its grid, scales fitted first.

With an importance (E[x_j^2] per input) the scales minimise the diagonal of the output error; without, the
plain weight error. The codes are the same either way once the scales stand.
"""

from __future__ import annotations

import torch

from halfbyte.algo.grid import Grid, Scales
from halfbyte.types import QuantizedLinear


def rtn(W_OI: torch.Tensor, scales: Scales, grid: Grid, group_size: int) -> QuantizedLinear:
    """Codes by rounding W_OI (float, [O, I]) to the nearest value under `scales`."""
    zeros = None if scales.zeros is None else scales.zeros[:, :, None]
    W_OGg = W_OI.float().unflatten(1, (-1, group_size))
    codes = grid.encode(W_OGg / scales.effective[:, :, None], zeros)
    return assemble(codes.flatten(1), scales, grid, group_size)


def assemble(codes_OI: torch.Tensor, scales: Scales, grid: Grid, group_size: int) -> QuantizedLinear:
    """Codes (float-valued 0..15) and their scales as a QuantizedLinear."""
    return QuantizedLinear(
        codes=codes_OI.to(torch.uint8),
        scales=scales.scales.contiguous(),
        group_size=group_size,
        grid=grid.name,
        zeros=None if scales.zeros is None else scales.zeros.to(torch.uint8),
        global_scale=scales.global_scale,
    )
