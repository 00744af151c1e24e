"""The searches for scales (halfbyte.algo.int4, halfbyte.algo.nvfp4) on a GPU: a program holds its groups in registers,
tries every candidate and keeps the best. The weights are read once, and nothing of their size is written."""

# mypy: allow-untyped-defs, allow-untyped-calls

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl

from halfbyte.algo.kernels.rounding import clip, e4m3_code, e4m3_value, nearest, snap, storable

TILE = 2048
"""Weights that a program of four warps holds."""


@triton.jit
def by_group(x, s):
    """Each group (row) of x divided by its scale, exactly rounded."""
    return tl.div_rn(x, tl.broadcast_to(s[:, None], x.shape))


@triton.jit
def _search_nvfp4(w, h, BELOW: tl.constexpr, ABOVE: tl.constexpr):
    amax = tl.max(tl.abs(w), axis=1)
    start = e4m3_code(tl.div_rn(amax, tl.full(amax.shape, 6.0, tl.float32)))
    best = tl.full(amax.shape, float("inf"), tl.float32)
    chosen = tl.full(amax.shape, 1.0, tl.float32)
    for step in range(BELOW + ABOVE + 1):
        s = e4m3_value(tl.minimum(tl.maximum(start + (step - BELOW), 1), 126))
        d = snap(by_group(w, s), 0.0, "nvfp4") * s[:, None] - w
        error = tl.sum(d * d * h, axis=1)
        better = (error < best) & (amax > 0.0)
        best = tl.where(better, error, best)
        chosen = tl.where(better, s, chosen)
    return chosen


@triton.jit
def _search_sym(w, h, ratios, STEPS: tl.constexpr):
    top, bottom = tl.max(w, axis=1), -tl.min(w, axis=1)
    reach = tl.maximum(
        tl.div_rn(top, tl.full(top.shape, 7.0, tl.float32)), tl.div_rn(bottom, tl.full(top.shape, 8.0, tl.float32))
    )
    best = tl.full(top.shape, float("inf"), tl.float32)
    chosen = tl.full(top.shape, 1.0, tl.float32)
    for step in range(STEPS):
        s = storable(reach * tl.load(ratios + step))
        d = snap(by_group(w, s), 0.0, "int4_sym")
        s = storable(tl.div_rn(tl.sum(w * h * d, axis=1), tl.maximum(tl.sum(d * h * d, axis=1), 1e-30)))
        d = w - snap(by_group(w, s), 0.0, "int4_sym") * s[:, None]
        error = tl.sum(d * d * h, axis=1)
        better = error < best
        best = tl.where(better, error, best)
        chosen = tl.where(better, s, chosen)
    return chosen


@triton.jit
def _search_asym(w, h, ratios, STEPS: tl.constexpr):
    top, bottom = tl.maximum(tl.max(w, axis=1), 0.0), tl.minimum(tl.min(w, axis=1), 0.0)
    best = tl.full(top.shape, float("inf"), tl.float32)
    chosen = tl.full(top.shape, 1.0, tl.float32)
    zero = tl.zeros(top.shape, tl.float32)
    for step in range(STEPS):
        first = storable((top - bottom) * tl.load(ratios + STEPS + step))
        rounded = nearest(clip(by_group(w, first), -16.0, 16.0))
        middle = nearest(clip(tl.div_rn(-bottom * tl.load(ratios + step), first), -2.0, 17.0))
        for offset in range(-1, 2):
            z = clip(middle + offset, 0.0, 15.0)
            low, high = -z[:, None], 15.0 - z[:, None]
            d = clip(rounded, low, high)
            s = storable(tl.div_rn(tl.sum(d * h * w, axis=1), tl.maximum(tl.sum(d * h * d, axis=1), 1e-30)))
            d = nearest(clip(by_group(w, s), low, high)) * s[:, None] - w
            error = tl.sum(d * d * h, axis=1)
            better = error < best
            best = tl.where(better, error, best)
            chosen = tl.where(better, s, chosen)
            zero = tl.where(better, z, zero)
    return chosen, zero


@triton.jit
def _fit(
    W, h, multiplier, ratios, scales, zeros, errors, total, groups, size, outer,
    GRID: tl.constexpr, BELOW: tl.constexpr, STEPS: tl.constexpr,
    SCALED: tl.constexpr, ERRORS: tl.constexpr, PER: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * PER + tl.arange(0, PER)
    column = tl.arange(0, PADDED)
    live = at < total
    inside = live[:, None] & (column < size)[None, :]
    place = at.to(tl.int64)[:, None] * size + column[None, :]
    inputs = (at % groups)[:, None] * size + column[None, :]
    whole = tl.load(W + place, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        m = tl.load(multiplier + inputs, mask=inside, other=1.0)
        whole = whole * m
    importance = tl.load(h + inputs, mask=inside, other=0.0)
    zero = tl.zeros([PER], tl.float32)
    effective = zero
    if GRID == "nvfp4":
        s = _search_nvfp4(tl.div_rn(whole, tl.full(whole.shape, 0.0, tl.float32) + outer), importance, BELOW, STEPS)
        effective = s * outer
    elif GRID == "int4_sym":
        s = _search_sym(whole, importance, ratios, STEPS)
        effective = s
    else:
        s, zero = _search_asym(whole, importance, ratios, STEPS)
        effective = s
        tl.store(zeros + at, zero, mask=live)
    tl.store(scales + at, s, mask=live)
    if ERRORS:
        e = snap(by_group(whole, effective), zero[:, None], GRID) * effective[:, None] - whole
        if SCALED:
            e = tl.div_rn(e, m)
        tl.store(errors + place, e.to(errors.dtype.element_ty), mask=inside)


def fit_scales(
    grid: str,
    W_OGg: torch.Tensor,
    h: torch.Tensor,
    *,
    ratios: Sequence[float] = (),
    reach: tuple[int, int] = (0, 0),
    outer: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and, on int4_asym, zeros (float32 [O, G] each) of W (float, [O, G, g]).

    h        float32 [1, G, g], as halfbyte.algo.grid.in_groups makes it
    ratios   int4: the shrunken ranges to try
    reach    nvfp4: how many E4M3 numbers below and above amax / 6 to try
    outer    nvfp4: the global scale
    """
    return _launch(grid, W_OGg, h, ratios, reach, outer, None, None)


def scaled_errors(
    grid: str,
    W_OGg: torch.Tensor,
    h: torch.Tensor,
    multiplier_I: torch.Tensor,
    dtype: torch.dtype,
    *,
    ratios: Sequence[float] = (),
    reach: tuple[int, int] = (0, 0),
    outer: float = 1.0,
) -> torch.Tensor:
    """(Q(W diag(m)) - W diag(m)) diag(1/m), [O, I] of `dtype`: the error of rounding scaled weights to nearest, under
    the scales that fit them, as the unscaled inputs see it. `multiplier_I` is float32 [I], the rest as in fit_scales.
    """
    errors = torch.empty(W_OGg.shape, dtype=dtype, device=W_OGg.device)
    _launch(grid, W_OGg, h, ratios, reach, outer, multiplier_I.contiguous(), errors)
    return errors.flatten(1)


def _launch(
    grid: str,
    W_OGg: torch.Tensor,
    h: torch.Tensor,
    ratios: Sequence[float],
    reach: tuple[int, int],
    outer: float,
    multiplier: torch.Tensor | None,
    errors: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows, groups, size = W_OGg.shape
    W, total, padded = W_OGg.contiguous(), rows * groups, triton.next_power_of_2(size)
    per = max(1, TILE // padded)
    scales = torch.empty(rows, groups, device=W.device)
    zeros = torch.empty_like(scales) if grid == "int4_asym" else None
    table = scales if grid == "nvfp4" else _table(tuple(ratios), W.device)
    below, steps = reach if grid == "nvfp4" else (0, len(ratios))
    with torch.cuda.device_of(W):
        _fit[(triton.cdiv(total, per),)](
            W, h.contiguous(), h if multiplier is None else multiplier, table, scales,
            scales if zeros is None else zeros, scales if errors is None else errors,
            total, groups, size, outer,
            GRID=grid, BELOW=below, STEPS=steps,
            SCALED=multiplier is not None, ERRORS=errors is not None, PER=per, PADDED=padded,
            num_warps=min(16, max(4, padded // 512)), enable_fp_fusion=True,
        )  # fmt: skip
    return scales, zeros


@cache
def _table(ratios: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """The ratios, and behind them what int4_asym multiplies a range by, as float32."""
    return torch.tensor([*ratios, *(r / 15 for r in ratios)], dtype=torch.float32, device=device)
