"""One Grid stands between methods and formats: which values a weight may take and how its scales are fitted.

A Grid works elementwise on weights that are already divided into groups, with an *effective* scale (block scale
times global scale) per group, so that a rounding method can quantize any column with the scale of its group:

    codes = encode(w / s, z),   w_hat = decode(codes, z) * s

`fit` chooses the scales of a weight matrix by minimising  sum_j h_j (w_j - w_hat_j)^2  in each group, where h_j =
E[x_j^2] is the importance of input j. That is the diagonal of the layer's output error tr(E H E^T), H = E[x x^T].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from halfbyte.types import QuantizedLinear


@dataclass(frozen=True)
class Scales:
    """Fitted scales: `scales` float32 [O, G] as stored; `zeros` float32 [O, G] or None; `global_scale` or None."""

    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    global_scale: float | None = None

    @property
    def effective(self) -> torch.Tensor:
        """float32 [O, G]: what a decoded code is multiplied by."""
        return self.scales if self.global_scale is None else self.scales * self.global_scale


class Grid(Protocol):
    """What a code means. `x` = w / s, elementwise; `zeros` broadcast to x or None."""

    name: str

    def encode(self, x: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
        """Nearest codes 0..15, as float32 (int4) or uint8-valued float32, of x = w / s."""

    def decode(self, codes: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
        """float32 values of codes, before the scale."""

    def snap(self, x: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
        """decode(encode(x)), without the codes: the hot path of the fits and of GPTQ's column loop."""

    def fit(
        self, W_OI: torch.Tensor, importance_I: torch.Tensor, group_size: int, global_scale: float | None, effort: str
    ) -> Scales:
        """Scales that minimise the importance-weighted error of rounding to nearest."""

    def search(self, effort: str) -> dict[str, Any]:
        """How far `fit` looks, as halfbyte.algo.kernels.scales takes it."""

    def global_scale(self, weights: list[torch.Tensor]) -> float | None:
        """The scale that linears of one fused group share, or None where the grid has none."""


def get_grid(name: str) -> Grid:
    """The Grid by its name in halfbyte.types.GRIDS."""
    from halfbyte.algo.int4 import Int4Asym, Int4Sym
    from halfbyte.algo.nvfp4 import NVFP4

    grids: dict[str, type[Grid]] = {"int4_sym": Int4Sym, "int4_asym": Int4Asym, "nvfp4": NVFP4}
    return grids[name]()


def dequantize(q: QuantizedLinear) -> torch.Tensor:
    """The weight that a QuantizedLinear stands for: float32 [O, I]."""
    codes = q.codes.unflatten(1, (-1, q.group_size))
    zeros = None if q.zeros is None else q.zeros.float()[:, :, None]
    effective = Scales(q.scales, None, q.global_scale).effective
    return (get_grid(q.grid).decode(codes.float(), zeros) * effective[:, :, None]).flatten(1)


def in_groups(W_OI: torch.Tensor, importance_I: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[O, G, g] weights and [1, G, g] importances; importances have mean 1 in each group and are at least 1e-4."""
    h = importance_I.float().unflatten(0, (-1, group_size))
    mean = h.mean(-1, keepdim=True)
    h = torch.where(mean > 0, h / mean.clamp_min(1e-30), torch.ones_like(h)).clamp_min(1e-4)
    return W_OI.float().unflatten(1, (-1, group_size)), h[None]


ROWS = 1 << 17
"""Elements that a search works on at a time: what its temporaries need stays in the processor's cache."""


def by_rows(
    search: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], W_OGg: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Run `search` on slices of rows and join what it returns (each [rows, ...])."""
    if W_OGg.is_cuda:
        return search(W_OGg)
    step = max(1, ROWS // W_OGg[0].numel())
    parts = [search(piece) for piece in W_OGg.split(step)]
    return tuple(torch.cat(column) for column in zip(*parts))
