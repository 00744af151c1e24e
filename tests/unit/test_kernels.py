"""Triton kernels against their torch oracles, under Triton's interpreter on the CPU.

What may differ: a float32 sum in another order may put a value on the other side of a rounding tie. So codes and
scales are the same in at least 99.9 %, and what they cost is the same to 1e-4. Without coupling between columns codes
are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from halfbyte.algo import Factor, Options, Scales, factorize, get_grid, gptq, kernels, solve_group
from halfbyte.algo.grid import in_groups
from halfbyte.types import GRIDS
from tests.unit.kernel_worker import SWITCH, fit, fit_scales, interpreter, round_columns, scaled_errors
from tests.unit.test_algo_gptq import hessian, stats

pytest.importorskip("triton", reason="the kernels' interpreter is a part of triton")
Call = Callable[..., Any]


@pytest.fixture(scope="module")
def call() -> Iterator[Call]:
    with interpreter() as function:
        yield function


@pytest.fixture(autouse=True)
def _oracle_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)


def weights(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.1


def fitted(grid: str, W: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    scales = get_grid(grid).fit(W, torch.ones(W.shape[1]), group, get_grid(grid).global_scale([W]), "fast")
    return scales.effective, scales.zeros


def decoded(grid: str, codes: torch.Tensor, S: torch.Tensor, Z: torch.Tensor | None) -> torch.Tensor:
    group = codes.shape[1] // S.shape[1]
    zeros = None if Z is None else Z.repeat_interleave(group, 1)
    return get_grid(grid).decode(codes.float(), zeros) * S.repeat_interleave(group, 1)


def output_loss(E: torch.Tensor, H: torch.Tensor) -> float:
    return float(torch.trace(E.double() @ H.double() @ E.double().T))


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(
    ("grid", "rows", "width", "group"),
    [
        ("int4_sym", 37, 576, 64),
        ("int4_sym", 8, 192, 192),
        ("int4_asym", 21, 192, 32),
        ("int4_asym", 33, 320, 64),
        ("nvfp4", 19, 576, 16),
        ("nvfp4", 5, 256, 128),
        ("nvfp4", 1, 48, 16),
    ],
)
def test_columns_are_rounded_as_the_oracle_does(
    call: Call, grid: str, rows: int, width: int, group: int, act_order: bool
) -> None:
    W, H = weights(rows, width), hessian(width, tokens=1200)
    S, Z = fitted(grid, W, group)
    factor = factorize(H, 0.03, act_order)
    kept = [t.clone() for t in (W, S, factor.feedback)]
    want = gptq(W, S, Z, factor, get_grid(grid))
    got = call(round_columns, W, S, Z, factor.feedback, factor.order, grid, rows=32)
    assert got.dtype == torch.uint8 and got.shape == W.shape
    assert (got == want).float().mean() >= 0.999
    assert (want != get_grid(grid).encode(W / S.repeat_interleave(group, 1), spread(Z, group))).float().mean() > 0.02
    before, after = (output_loss(decoded(grid, codes, S, Z) - W, H) for codes in (want, got))
    assert after == pytest.approx(before, rel=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(kept, (W, S, factor.feedback)))


def spread(Z: torch.Tensor | None, group: int) -> torch.Tensor | None:
    return None if Z is None else Z.repeat_interleave(group, 1)


TIES = {"int4_sym": [-8.5, -1.5, -0.5, 0.5, 2.5, 6.5, 7.5, 9.0, -30.0], "int4_asym": [-0.5, 0.5, 1.5, 8.5, 15.5, -3.0],
        "nvfp4": [-0.25, 0.25, -0.75, 0.75, 1.25, 1.75, 2.5, -2.5, 3.5, 5.0, -5.0, 6.5, -100.0]}  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS)
def test_without_coupling_codes_are_equal_ties_included(call: Call, grid: str) -> None:
    g = torch.Generator().manual_seed(5)
    S = (torch.rand(23, 3, generator=g) + 0.01).bfloat16().float()
    Z = torch.randint(0, 16, S.shape, generator=g).float() if grid == "int4_asym" else None
    ties = torch.tensor(TIES[grid])[torch.randint(0, len(TIES[grid]), (23, 192), generator=g)]
    x = torch.where(torch.rand(23, 192, generator=g) < 0.5, ties, torch.randn(23, 192, generator=g) * 4)
    W = x * S.repeat_interleave(64, 1)
    B = torch.eye(192)
    order = torch.randperm(192, generator=g)
    want = gptq(W, S, Z, Factor(B, order, 0.1), get_grid(grid))
    assert torch.equal(want, get_grid(grid).encode(W / S.repeat_interleave(64, 1), spread(Z, 64)))
    assert torch.equal(call(round_columns, W, S, Z, B, order, grid).float(), want)


def test_recipes_with_one_factor_can_be_stacked(call: Call) -> None:
    W, factor = weights(11, 192), factorize(hessian(192), 0.05)
    (a, za), (b, zb) = fitted("int4_asym", W, 64), fitted("int4_asym", W * 1.3, 64)
    assert za is not None and zb is not None
    arguments = (factor.feedback, factor.order, "int4_asym")
    both = call(round_columns, torch.cat([W, W]), torch.cat([a, b]), torch.cat([za, zb]), *arguments, rows=16)
    first = call(round_columns, W, a, za, *arguments, rows=16)
    second = call(round_columns, W, b, zb, *arguments, rows=16)
    assert not torch.equal(first, second) and torch.equal(both, torch.cat([first, second]))


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_programs_of_any_size_give_the_same_codes(call: Call, rows: int) -> None:
    W, factor = weights(3, 192), factorize(hessian(192), 0.05)
    S, _ = fitted("int4_sym", W, 32)
    wide = S.repeat_interleave(32, 1)
    plain = call(round_columns, W, S, None, factor.feedback, factor.order, "int4_sym")
    other = call(round_columns, W, wide, None, factor.feedback, factor.order, "int4_sym", rows=rows)
    assert torch.equal(plain, other)


def test_scales_by_group_or_by_column_are_the_same_to_the_oracle() -> None:
    W, factor = weights(9, 192), factorize(hessian(192), 0.05)
    S, Z = fitted("int4_asym", W, 32)
    by_group = gptq(W, S, Z, factor, get_grid("int4_asym"))
    assert torch.equal(by_group, gptq(W, spread(S, 32), spread(Z, 32), factor, get_grid("int4_asym")))


def error_of(grid: str, W: torch.Tensor, h: torch.Tensor, group: int, scales: Scales) -> torch.Tensor:
    """Importance-weighted error of each group, float64 [O, G]."""
    w, weight = in_groups(W, h, group)
    zeros = None if scales.zeros is None else scales.zeros[:, :, None]
    values = get_grid(grid).snap(w / scales.effective[:, :, None], zeros) * scales.effective[:, :, None]
    return ((values - w).double().square() * weight.double()).sum(-1)


@pytest.mark.parametrize("kind", ["normal", "skewed", "tailed", "bf16"])
@pytest.mark.parametrize(
    ("grid", "rows", "width", "group", "effort"),
    [
        ("int4_sym", 33, 256, 128, "default"),
        ("int4_sym", 40, 192, 64, "fast"),
        ("int4_sym", 7, 576, 576, "probe"),
        ("int4_asym", 33, 256, 128, "fast"),
        ("int4_asym", 21, 192, 32, "default"),
        ("int4_asym", 3, 96, 96, "probe"),
        ("nvfp4", 50, 256, 16, "default"),
        ("nvfp4", 17, 192, 32, "max"),
        ("nvfp4", 37, 256, 64, "probe"),
        ("nvfp4", 5, 384, 128, "fast"),
    ],
)
def test_scales_are_the_oracles(
    call: Call, grid: str, rows: int, width: int, group: int, effort: str, kind: str
) -> None:
    W = weights(rows, width, seed=3)
    W = {"skewed": W.abs() + 0.02, "tailed": W * W.abs() * 20, "bf16": W.bfloat16()}.get(kind, W)
    W[0, :group] = 0
    h = torch.rand(width, generator=torch.Generator().manual_seed(4)) ** 4 * 5
    h[3] = 0
    arguments = (grid, W, h, group, get_grid(grid).global_scale([W]), effort)
    want, got = fit(*arguments), call(fit, *arguments)
    assert (want.zeros is None) == (got.zeros is None) and want.global_scale == got.global_scale
    same = want.scales == got.scales
    if want.zeros is not None and got.zeros is not None:
        same &= want.zeros == got.zeros
    assert same.float().mean() >= 0.99 and (same.numel() < 1000 or same.float().mean() >= 0.999)
    before, after = error_of(grid, W, h, group, want), error_of(grid, W, h, group, got)
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-12)
    assert after.sum() == pytest.approx(float(before.sum()), rel=1e-5)


def test_block_scales_start_from_the_nearest_e4m3_number(call: Call) -> None:
    """With no reach the search returns its start: amax / 6, rounded as torch rounds it, subnormal numbers and all."""
    from halfbyte.algo.nvfp4 import e4m3

    exact = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (exact[1:] + exact[:-1]) / 2
    ends = torch.tensor([2.0**-14, 2.0**-10, 449.0, 1e5])
    amax = torch.cat([exact, between, between * (1 + 1e-6), between * (1 - 1e-6), ends]) * 6
    W = torch.zeros(len(amax), 1, 16)
    W[:, 0, 5] = -amax
    scales, zeros = call(fit_scales, "nvfp4", W, torch.ones(1, 1, 16))
    assert zeros is None and torch.equal(scales[:, 0], e4m3(amax / 6))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_errors_of_scaled_weights_are_told_in_one_pass(call: Call, grid: str, dtype: torch.dtype) -> None:
    W, m, h = weights(19, 192), torch.rand(192) * 3 + 0.1, torch.rand(192) + 0.1
    outer = get_grid(grid).global_scale([W * m])
    want = get_grid(grid).fit(W * m, h, 64, outer, "probe")
    zeros = None if want.zeros is None else want.zeros[:, :, None]
    w, weight = in_groups(W, h, 64)
    s = want.effective[:, :, None]
    E = ((get_grid(grid).snap((W * m).unflatten(1, (-1, 64)) / s, zeros) * s).flatten(1) - W * m) / m
    ratios = torch.linspace(0.75 if grid == "int4_sym" else 0.8, 1.0, 3).tolist()
    options = {"reach": (2, 2), "outer": outer} if grid == "nvfp4" else {"ratios": ratios}
    got = call(scaled_errors, grid, w, weight, m, dtype, **options)
    assert got.dtype == dtype and got.shape == W.shape
    exact = dtype == torch.float32  # the interpreter cuts bfloat16 off, a GPU rounds
    close = torch.isclose(got.float(), E, atol=1e-7, rtol=1e-4 if exact else 2**-7)
    assert close.float().mean() >= 0.98
    assert got.double().square().sum() == pytest.approx(float(E.double().square().sum()), rel=1e-4 if exact else 0.01)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_group_of_linears_is_solved_by_the_kernels_as_by_torch(call: Call, grid: str) -> None:
    """The whole way, scales and codes: the loss of each linear is the same, and nearly all codes."""
    linears, H = [weights(5, 192), weights(10, 192, seed=9)], hessian(192, tokens=1200)
    want, _ = solve_group(linears, stats(H), 64, Options(grid, "gptq"))
    got, factor = call(solve_group, linears, stats(H), 64, Options(grid, "gptq"))
    assert factor.damp == 0.05
    for a, b in zip(want, got):
        assert (a.q.codes == b.q.codes).float().mean() > 0.95
        assert b.relative_error == pytest.approx(a.relative_error, rel=0.01)


def test_kernels_are_for_gpus_and_the_interpreter(call: Call) -> None:
    tensor = torch.zeros(2)
    assert not kernels.usable(tensor)
    assert call(kernels.usable, tensor) and call(kernels.usable, tensor, kernels.WIDEST)
    assert not call(kernels.usable, tensor, kernels.WIDEST + 1)


def test_a_triton_that_does_not_run_is_told_once_and_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda = True

        @staticmethod
        def get_device() -> int:
            return 63

    kernels._works.cache_clear()
    with pytest.warns(UserWarning, match="Triton does not run on cuda:63, torch does its work slower: ") as told:
        assert not kernels.usable(OnGpu()) and not kernels.usable(OnGpu())  # type: ignore[arg-type]
    assert len(told) == 1
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    kernels._works.cache_clear()
    assert not kernels.usable(OnGpu())  # type: ignore[arg-type]
    kernels._works.cache_clear()
