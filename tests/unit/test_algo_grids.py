"""The three grids: codes and values agree, and fitted scales are held against a brute-force search in float64."""

from __future__ import annotations

import math

import pytest
import torch

from halfbyte.algo import Options, Scales, Stats, dequantize, get_grid, rtn, solve_group
from halfbyte.algo.nvfp4 import snap_e2m1
from halfbyte.types import GRIDS, QuantizedLinear

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
LEVELS = {
    "int4_sym": [float(c - 8) for c in range(16)],
    "int4_asym": [float(c) for c in range(16)],
    "nvfp4": E2M1 + [-v for v in E2M1],
}
GROUPS = {"int4_sym": (32, 64, 128), "int4_asym": (32, 64, 128), "nvfp4": (16, 32, 64, 128)}
GRID_AND_GROUP = [(grid, group) for grid in GRIDS for group in GROUPS[grid]]


def levels(grid: str, zero: int = 0) -> list[float]:
    """What the 16 codes mean, before the scale."""
    return [v - zero for v in LEVELS[grid]] if grid == "int4_asym" else LEVELS[grid]


def zeros_of(grid: str) -> list[int | None]:
    return list(range(16)) if grid == "int4_asym" else [None]


def weights(out: int, width: int, seed: int = 0, kind: str = "normal") -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(out, width, generator=g) * 0.05
    if kind == "tailed":
        W = W.sign() * W.abs() ** 2 * 20
    if kind == "skewed":
        W = W.abs() + 0.01
    return W


def importance(width: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(width, generator=torch.Generator().manual_seed(seed)) ** 4 * 5 + 1e-2


@pytest.mark.parametrize("grid", GRIDS)
def test_every_code_means_what_the_format_says(grid: str) -> None:
    codes = torch.arange(16).float()
    for zero in zeros_of(grid):
        z = None if zero is None else torch.full((16,), float(zero))
        values = get_grid(grid).decode(codes, z)
        assert values.tolist() == levels(grid, zero or 0)
        back = get_grid(grid).encode(values, z).tolist()
        assert back == [0.0 if grid == "nvfp4" and c == 8 else float(c) for c in range(16)]


@pytest.mark.parametrize("grid", GRIDS)
def test_snap_is_decode_of_encode_and_the_nearest_value(grid: str) -> None:
    g = torch.Generator().manual_seed(3)
    special = [0.0, -0.0, 0.25, -0.25, 0.75, 1.25, 2.5, -2.5, 3.5, 5.0, -5.0, 6.0, 7.5, -8.5, 1e4, -1e4]
    x = torch.cat([torch.randn(2000, generator=g) * 5, torch.tensor(special)])
    for zero in zeros_of(grid):
        z = None if zero is None else torch.full_like(x, float(zero))
        before = x.clone()
        snapped, codes = get_grid(grid).snap(x, z), get_grid(grid).encode(x, z)
        assert torch.equal(x, before)
        assert torch.equal(codes, codes.round()) and codes.min() >= 0 and codes.max() <= 15
        assert torch.equal(snapped, get_grid(grid).decode(codes, z))
        table = torch.tensor(levels(grid, zero or 0), dtype=torch.float64)
        best = (x.double()[:, None] - table).abs().amin(1)
        assert torch.allclose((x.double() - snapped.double()).abs(), best, atol=1e-5)


def test_e2m1_is_rounded_as_division_by_its_steps_rounds() -> None:
    """By the definition, ties to the even code, on numbers of every exponent and beside every tie."""
    bits = torch.arange(0, 2**31, 1009, dtype=torch.int64).to(torch.int32).view(torch.float32)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0, 0.0])
    below, above = torch.nextafter(ties, torch.tensor(0.0)), torch.nextafter(ties, torch.tensor(9.0))
    a = torch.cat([bits[bits.isfinite()], ties, below, above, torch.tensor([torch.inf])])
    step = torch.where(a < 2, 0.5, torch.where(a < 4, 1.0, 2.0))
    want = (a.clamp(max=6) / step).round() * step
    kept = a.clone()
    assert torch.equal(snap_e2m1(a), want) and torch.equal(snap_e2m1(-a), -want)
    assert torch.equal(a, kept)
    assert torch.equal(snap_e2m1(a[:200].double()), want[:200])


def test_nvfp4_negative_zero_is_read_as_zero_and_never_written() -> None:
    grid = get_grid("nvfp4")
    value = grid.decode(torch.tensor([8.0]), None)
    assert value.item() == 0.0 and math.copysign(1, value.item()) == -1
    assert grid.encode(torch.tensor([-0.0, -1e-9, -0.2]), None).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("grid", "group"), GRID_AND_GROUP)
def test_dequantize_matches_a_loop(grid: str, group: int) -> None:
    g = torch.Generator().manual_seed(group)
    codes = torch.randint(0, 16, (3, 256), generator=g, dtype=torch.uint8)
    codes[0, :16] = torch.arange(16)
    scales = (torch.rand(3, 256 // group, generator=g) + 0.1).to(torch.float8_e4m3fn).float()
    zeros = torch.randint(0, 16, scales.shape, generator=g, dtype=torch.uint8) if grid == "int4_asym" else None
    outer = 0.0123 if grid == "nvfp4" else None
    got = dequantize(QuantizedLinear(codes, scales, group, grid, zeros, outer))
    for o in range(3):
        for i in range(256):
            zero = 0 if zeros is None else int(zeros[o, i // group])
            want = levels(grid, zero)[int(codes[o, i])] * float(scales[o, i // group]) * (outer or 1.0)
            assert float(got[o, i]) == pytest.approx(want, rel=1e-6)


def brute_error(
    W_OGg: torch.Tensor, h: torch.Tensor, s: torch.Tensor, grid: str, z: torch.Tensor | None
) -> torch.Tensor:
    """Least importance-weighted error of each group under scale s [O, G], zeros z [O, G], in float64 [O, G]."""
    table = torch.tensor(LEVELS[grid], dtype=torch.float64)
    values = (table if z is None else table - z[..., None]) * s.double()[..., None]
    values = values.expand(*s.shape, 16)
    distance = (W_OGg.double()[..., None] - values[..., None, :]).abs().amin(-1)
    return (distance.square() * h.double()).sum(-1)


def absmax(W_OGg: torch.Tensor, grid: str, outer: float | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The textbook scale: the range of the group onto the range of the grid, rounded as it is stored."""
    if grid == "int4_sym":
        return torch.maximum(W_OGg.amax(-1) / 7, -W_OGg.amin(-1) / 8).bfloat16().float(), None
    if grid == "int4_asym":
        top, bottom = W_OGg.amax(-1).clamp_min(0), W_OGg.amin(-1).clamp_max(0)
        s = ((top - bottom) / 15).bfloat16().float()
        return s, (-bottom / s).round().clamp(0, 15).double()
    assert outer is not None
    return (W_OGg.abs().amax(-1) / 6 / outer).to(torch.float8_e4m3fn).float() * outer, None


def dense(W_OGg: torch.Tensor, h: torch.Tensor, grid: str, outer: float | None) -> torch.Tensor:
    """Least error over a dense set of scales (nvfp4: every E4M3 number; int4: 120 steps), every zero."""
    best = torch.full(W_OGg.shape[:2], torch.inf, dtype=torch.float64)
    if grid == "nvfp4":
        assert outer is not None
        for code in range(1, 127):
            s = torch.tensor([code], dtype=torch.uint8).view(torch.float8_e4m3fn).float() * outer
            best = torch.minimum(best, brute_error(W_OGg, h, s.expand(best.shape), grid, None))
        return best
    reach, _ = absmax(W_OGg, grid, outer)
    for ratio in torch.linspace(0.3, 1.05, 120).tolist():
        s = (reach * ratio).bfloat16().float()
        for zero in zeros_of(grid):
            z = None if zero is None else torch.full(best.shape, float(zero), dtype=torch.float64)
            best = torch.minimum(best, brute_error(W_OGg, h, s, grid, z))
    return best


def fitted_error(W: torch.Tensor, h: torch.Tensor, group: int, grid: str, effort: str) -> tuple[torch.Tensor, Scales]:
    chosen = get_grid(grid)
    fitted = chosen.fit(W, h, group, chosen.global_scale([W]), effort)
    z = None if fitted.zeros is None else fitted.zeros.double()
    return brute_error(W.unflatten(1, (-1, group)), h.unflatten(0, (-1, group)), fitted.effective, grid, z), fitted


SLACK = {"int4_sym": 1.01, "int4_asym": 1.20, "nvfp4": 1.03}
"""How far a fit may stay behind the dense search; the asymmetric one follows its zero from the range."""


@pytest.mark.parametrize("kind", ["normal", "tailed", "skewed"])
@pytest.mark.parametrize("grid", GRIDS)
def test_fits_beat_absmax_and_come_close_to_a_dense_search(grid: str, kind: str) -> None:
    group = 16 if grid == "nvfp4" else 32
    W, h = weights(24, 256, kind=kind), importance(256)
    W_OGg, h_Gg = W.unflatten(1, (-1, group)), h.unflatten(0, (-1, group))
    outer = get_grid(grid).global_scale([W])
    plain, zeros = absmax(W_OGg, grid, outer)
    reference, best = brute_error(W_OGg, h_Gg, plain, grid, zeros), dense(W_OGg, h_Gg, grid, outer)
    sums = {}
    for effort in ("fast", "default", "max"):
        error, _ = fitted_error(W, h, group, grid, effort)
        assert bool((error <= reference * (1 + 1e-4)).all()), effort
        sums[effort] = float(error.sum())
        assert sums[effort] <= SLACK[grid] * float(best.sum()), effort
    assert sums["max"] <= sums["fast"] * 1.001
    assert sums["default"] < 0.9 * float(reference.sum())


@pytest.mark.parametrize(("grid", "group"), GRID_AND_GROUP)
def test_weights_on_the_grid_come_back_exactly(grid: str, group: int) -> None:
    g = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 16, (8, 256 // group, group), generator=g)
    codes[..., :2] = torch.tensor([7, 15] if grid == "nvfp4" else [0, 15])
    table = torch.tensor(LEVELS[grid]) - (6 if grid == "int4_asym" else 0)
    scales = (torch.rand(8, 256 // group, generator=g) * 200 + 100).to(torch.float8_e4m3fn).float()
    scales[0, 0] = 448
    W = (table[codes] * scales[..., None] * 2.0**-12).flatten(1)
    q = rtn(
        W,
        get_grid(grid).fit(W, torch.ones(256), group, get_grid(grid).global_scale([W]), "fast"),
        get_grid(grid),
        group,
    )
    assert torch.allclose(dequantize(q), W, rtol=1e-5, atol=0)


@pytest.mark.parametrize("grid", GRIDS)
def test_importance_decides_where_the_error_goes(grid: str) -> None:
    group = 64
    W = weights(64, 64)
    h = torch.ones(64)
    h[:8] = 1000.0
    chosen = get_grid(grid)
    fits = [chosen.fit(W, i, group, chosen.global_scale([W]), "max") for i in (torch.ones(64), h)]
    error = [(dequantize(rtn(W, fitted, chosen, group)) - W)[:, :8].square().sum() for fitted in fits]
    assert error[1] < 0.9 * error[0]


@pytest.mark.parametrize("grid", ["int4_sym", "int4_asym"])
@pytest.mark.parametrize("magnitude", [1e-6, 1e-3, 1.0, 3e4])
def test_int4_scales_are_exact_in_float16_and_bfloat16(grid: str, magnitude: float) -> None:
    W = weights(16, 256, kind="tailed") * magnitude
    W[0, :64] = 0
    fitted = get_grid(grid).fit(W, importance(256), 64, None, "default")
    s = fitted.scales
    assert s.dtype == torch.float32 and bool((s > 0).all()) and bool(s.isfinite().all())
    assert torch.equal(s.half().float(), s) and torch.equal(s.bfloat16().float(), s)
    if fitted.zeros is not None:
        assert torch.equal(fitted.zeros, fitted.zeros.round())
        assert fitted.zeros.min() >= 0 and fitted.zeros.max() <= 15
    q = rtn(W, fitted, get_grid(grid), 64)
    assert bool((dequantize(q)[0, :64] == 0).all())


@pytest.mark.parametrize("group", GROUPS["nvfp4"])
@pytest.mark.parametrize("effort", ["probe", "fast", "default", "max"])
def test_nvfp4_scales_are_e4m3_and_a_zero_block_has_scale_one(group: int, effort: str) -> None:
    W = weights(8, 256, kind="tailed")
    W[2, :group] = 0
    W[3, group : 2 * group if group < 128 else 256] = 1e-9
    grid = get_grid("nvfp4")
    fitted = grid.fit(W, importance(256), group, grid.global_scale([W]), effort)
    s = fitted.scales
    assert s.shape == (8, 256 // group)
    assert torch.equal(s.to(torch.float8_e4m3fn).float(), s)
    assert float(s.min()) >= 2.0**-9 and float(s.max()) <= 448
    assert float(s[2, 0]) == 1.0
    assert bool((dequantize(rtn(W, fitted, grid, group))[2, :group] == 0).all())


def test_nvfp4_of_nothing_but_zeros() -> None:
    grid = get_grid("nvfp4")
    W = torch.zeros(4, 32)
    fitted = grid.fit(W, torch.ones(32), 16, grid.global_scale([W]), "default")
    assert fitted.global_scale and math.isfinite(1 / fitted.global_scale) and bool((fitted.scales == 1).all())
    assert bool((rtn(W, fitted, grid, 16).codes == 0).all())


def test_nvfp4_search_finds_the_best_e4m3_number_of_each_block() -> None:
    W, h = weights(16, 128), importance(128)
    error, fitted = fitted_error(W, h, 16, "nvfp4", "max")
    best = dense(W.unflatten(1, (-1, 16)), h.unflatten(0, (-1, 16)), "nvfp4", fitted.global_scale)
    assert (error <= best * (1 + 1e-4)).float().mean() > 0.98


@pytest.mark.parametrize(("grid", "group"), [*GRID_AND_GROUP, ("int4_sym", 256), ("int4_asym", 256)])
def test_gptq_never_leaves_the_grid(grid: str, group: int) -> None:
    g = torch.Generator().manual_seed(7)
    W = weights(24, 256, kind="tailed")
    X = torch.randn(300, 12, generator=g) @ torch.randn(12, 256, generator=g) + 0.01 * torch.randn(
        300, 256, generator=g
    )
    H = X.T @ X / 300
    (solved,), _ = solve_group([W], Stats(H.diagonal().clone(), H, 1.0, 300), group, Options(grid, "gptq", damp=0.01))
    q = solved.q
    assert q.codes.dtype == torch.uint8 and int(q.codes.max()) <= 15
    zeros = torch.zeros(q.scales.shape, dtype=torch.float64) if q.zeros is None else q.zeros.double()
    effective = (q.scales if q.global_scale is None else q.scales * q.global_scale).double()[..., None]
    ratio = dequantize(q).double().unflatten(1, (-1, group)) / effective
    allowed = torch.tensor(LEVELS[grid], dtype=torch.float64) - zeros[..., None]
    assert float((ratio[..., None] - allowed[..., None, :]).abs().amin(-1).max()) < 1e-5
    if grid == "nvfp4":
        assert torch.equal(q.scales.to(torch.float8_e4m3fn).float(), q.scales)
        assert not bool((q.codes == 8).any())


@pytest.mark.parametrize("grid", GRIDS)
def test_fit_and_rtn_leave_their_inputs_alone(grid: str) -> None:
    W, h = weights(8, 128), importance(128)
    W0, h0 = W.clone(), h.clone()
    fitted = get_grid(grid).fit(W, h, 32, get_grid(grid).global_scale([W]), "fast")
    s0 = fitted.scales.clone()
    rtn(W, fitted, get_grid(grid), 32)
    assert torch.equal(W, W0) and torch.equal(h, h0) and torch.equal(fitted.scales, s0)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_fit_by_slices_of_rows_is_the_fit_of_the_whole(grid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    W, h = weights(20, 128), importance(128)
    whole = get_grid(grid).fit(W, h, 32, get_grid(grid).global_scale([W]), "fast")
    monkeypatch.setattr("halfbyte.algo.grid.ROWS", 300)
    sliced = get_grid(grid).fit(W, h, 32, get_grid(grid).global_scale([W]), "fast")
    assert torch.equal(whole.scales, sliced.scales)
