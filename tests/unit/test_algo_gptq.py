"""GPTQ's blocked loop against the plain column loop of the paper in float64, and its factor under hard Hessians."""

from __future__ import annotations

import pytest
import torch

from halfbyte.algo import Options, Stats, factorize, get_grid, gptq, solve_group
from halfbyte.types import GRIDS


def hessian(width: int, seed: int = 0, rank: int | None = None, tokens: int = 400) -> torch.Tensor:
    """E[x x^T] of correlated inputs with unequal magnitudes, float32."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank or width, width, generator=g, dtype=torch.float64)
    X = torch.randn(tokens, rank or width, generator=g, dtype=torch.float64) @ mix
    X = X * (0.2 + 2 * torch.rand(width, generator=g, dtype=torch.float64))
    return (X.T @ X / tokens).float()


def stats(H: torch.Tensor) -> Stats:
    return Stats(H.diagonal().clone(), H, 1.0, 400)


def problem(grid: str, width: int, group: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """W [O, I], scales and zeros spread over the columns."""
    W = torch.randn(24, width, generator=torch.Generator().manual_seed(seed)) * 0.1
    fitted = get_grid(grid).fit(W, torch.ones(width), group, get_grid(grid).global_scale([W]), "fast")
    zeros = None if fitted.zeros is None else fitted.zeros.repeat_interleave(group, 1)
    return W, fitted.effective.repeat_interleave(group, 1), zeros


def naive(
    W: torch.Tensor, S: torch.Tensor, Z: torch.Tensor | None, H: torch.Tensor, damp: float, grid: str, act_order: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The paper's loop: the inverse of the remaining Hessian is computed anew for each column.

    Returns codes [O, I] and, per row, how near any column came to a tie (in steps of the grid).
    """
    chosen = get_grid(grid)
    width = W.shape[1]
    H = H.double() + damp * H.double().diagonal().mean() * torch.eye(width, dtype=torch.float64)
    W, S = W.double().clone(), S.double()
    order = torch.argsort(H.diagonal(), descending=True, stable=True).tolist() if act_order else list(range(width))
    codes = torch.empty(W.shape, dtype=torch.float64)
    near = torch.full((len(W),), torch.inf, dtype=torch.float64)
    for place, j in enumerate(order):
        rest = order[place:]
        inverse = torch.linalg.inv(H[rest][:, rest])
        z = None if Z is None else Z[:, j].double()
        x = W[:, j] / S[:, j]
        values = chosen.decode(torch.arange(16.0), None if z is None else torch.zeros(16)).double()
        reach = values.expand(len(W), 16) - (0 if z is None else z[:, None])
        ladder = reach.sort(1).values.unique(dim=1)
        nearest = (x[:, None] - ladder).abs().sort(1).values
        near = torch.minimum(near, nearest[:, 1] - nearest[:, 0])
        codes[:, j] = (x[:, None] - reach).abs().argmin(1)
        q = reach.gather(1, codes[:, j, None].long())[:, 0] * S[:, j]
        error = (W[:, j] - q) / inverse[0, 0]
        W[:, rest] -= error[:, None] * inverse[0][None]
    return codes, near


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(
    ("grid", "width", "group", "block"),
    [
        ("int4_sym", 144, 36, 40),
        ("int4_sym", 72, 24, 1),
        ("int4_sym", 72, 72, 500),
        ("int4_asym", 96, 32, 36),
        ("nvfp4", 112, 16, 48),
        ("nvfp4", 64, 32, 13),
    ],
)
def test_the_blocked_loop_is_the_column_loop(grid: str, width: int, group: int, block: int, act_order: bool) -> None:
    W, S, Z = problem(grid, width, group)
    H = hessian(width)
    want, near = naive(W, S, Z, H, 0.02, grid, act_order)
    got = gptq(W, S, Z, factorize(H, 0.02, act_order), get_grid(grid), block)
    decided = near > 1e-4
    assert decided.float().mean() > 0.6
    assert torch.equal(got[decided].double(), want[decided])
    rounded = get_grid(grid).encode(W / S, Z)
    assert not torch.equal(got, rounded)


@pytest.mark.parametrize("width", [192, 144])
def test_blocks_of_any_width_give_the_same_codes(width: int) -> None:
    W, S, _ = problem("int4_sym", width, 48)
    factor = factorize(hessian(width), 0.05)
    runs = [gptq(W, S, None, factor, get_grid("int4_sym"), block) for block in (1, 7, 64, 128, 1000)]
    for other in runs[1:]:
        assert (runs[0] != other).float().mean() < 0.005


def test_order_and_blocks_do_not_leak_into_the_layout() -> None:
    """Permuting the inputs of the whole problem permutes the codes, when columns go by importance anyway."""
    W, S, _ = problem("int4_sym", 96, 96)
    H = hessian(96)
    shuffle = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    plain = gptq(W, S, None, factorize(H, 0.05), get_grid("int4_sym"))
    moved = gptq(W[:, shuffle], S[:, shuffle], None, factorize(H[shuffle][:, shuffle], 0.05), get_grid("int4_sym"))
    assert (plain[:, shuffle] != moved).float().mean() < 0.005


@pytest.mark.parametrize("act_order", [True, False])
def test_the_factor_is_unit_upper_and_leaves_a_diagonal(act_order: bool) -> None:
    H = hessian(80)
    factor = factorize(H, 0.01, act_order)
    damped = H.double() + 0.01 * H.double().diagonal().mean() * torch.eye(80, dtype=torch.float64)
    if act_order:
        assert factor.order is not None
        diagonal = H.diagonal()[factor.order]
        assert bool((diagonal[:-1] >= diagonal[1:]).all())
        damped = damped[factor.order][:, factor.order]
    else:
        assert factor.order is None
    assert torch.equal(factor.feedback, factor.feedback.triu()) and bool((factor.feedback.diagonal() == 1).all())
    assert_diagonal(factor.feedback, damped)
    assert factor.damp == 0.01


def assert_diagonal(B: torch.Tensor, H: torch.Tensor) -> None:
    """B^-1 H B^-T is diagonal and positive, so that B D B^T = H."""
    inverse = torch.linalg.inv(B.double())
    D = inverse @ H @ inverse.T
    assert bool((D.diagonal() > 0).all())
    root = D.diagonal().rsqrt()
    rest = (D - torch.diag(D.diagonal())) * root * root[:, None]
    assert float(rest.abs().max()) < 1e-3


@pytest.mark.parametrize("act_order", [True, False])
def test_dead_inputs_are_rounded_and_touch_nothing(act_order: bool) -> None:
    W, S, _ = problem("int4_sym", 96, 96)
    H = hessian(96)
    dead = [0, 17, 95]
    H[dead, :] = 0
    H[:, dead] = 0
    H[0, 3] = H[3, 0] = 0.05 * H[3, 3]  # what rounding in a product may leave
    grid = get_grid("int4_sym")
    factor = factorize(H, 0.05, act_order)
    assert factor.damp == 0.05
    codes = gptq(W, S, None, factor, grid)
    assert torch.equal(codes[:, dead], grid.encode(W / S, None)[:, dead])
    other = W.clone()
    other[:, dead] = 0
    alive = [j for j in range(96) if j not in dead]
    assert torch.equal(gptq(other, S, None, factor, grid)[:, alive], codes[:, alive])


def test_nothing_but_dead_inputs() -> None:
    W, S, _ = problem("int4_sym", 32, 32)
    codes = gptq(W, S, None, factorize(torch.zeros(32, 32), 0.05), get_grid("int4_sym"))
    assert torch.equal(codes, get_grid("int4_sym").encode(W / S, None))


def test_a_hessian_that_is_not_positive_definite_raises_the_damping_and_says_so() -> None:
    H = hessian(48)
    H = H / H.diagonal().mean()
    values, vectors = torch.linalg.eigh(H.double())
    values[0] = -0.3
    H = (vectors @ torch.diag(values) @ vectors.T).float()
    factor = factorize(H, 0.001)
    assert factor.damp == pytest.approx(0.512)
    order = factor.order
    assert order is not None
    damped = H.double() + factor.damp * H.double().diagonal().mean() * torch.eye(48, dtype=torch.float64)
    assert_diagonal(factor.feedback, damped[order][:, order])
    (solved,), _ = solve_group([torch.randn(8, 48)], stats(H), 48, Options("int4_sym", "gptq", damp=0.001))
    assert solved.damp == pytest.approx(0.512)


def test_damping_of_nothing_can_still_be_raised() -> None:
    H = torch.ones(8, 8)
    H[0, 0] = 0.5
    assert factorize(H, 0.0).damp > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(3, 3), (2, 5)])
def test_a_hessian_that_is_not_finite_is_refused(bad: float, place: tuple[int, int]) -> None:
    H = hessian(16)
    H[place] = H[place[::-1]] = bad
    with pytest.raises(ValueError, match="finite"):
        factorize(H, 0.05)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_beats_rounding_where_inputs_are_correlated(grid: str, act_order: bool) -> None:
    W = torch.randn(48, 192, generator=torch.Generator().manual_seed(2)) * 0.1
    H = hessian(192, rank=40)
    plain, _ = solve_group([W], stats(H), 64, Options(grid, "rtn"))
    better, _ = solve_group([W], stats(H), 64, Options(grid, "gptq", act_order=act_order))
    assert better[0].relative_error < 0.7 * plain[0].relative_error


def test_relative_error_is_the_output_error() -> None:
    W = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    H = hessian(64)
    (solved,), _ = solve_group([W], stats(H), 32, Options("int4_sym", "gptq"))
    from halfbyte.algo import dequantize, relative_error

    E = (dequantize(solved.q) - W).double()
    want = (torch.trace(E @ H.double() @ E.T) / torch.trace(W.double() @ H.double() @ W.double().T)).sqrt()
    assert solved.relative_error == pytest.approx(float(want), rel=1e-3)
    assert relative_error(W, solved.q, stats(H)) == pytest.approx(float(want), rel=1e-3)


@pytest.mark.parametrize("grid", GRIDS)
def test_linears_of_a_group_are_solved_as_if_alone(grid: str) -> None:
    """Rows do not see each other; only the NVFP4 global scale is shared, as vLLM's fused linear wants it."""
    a, b = (torch.randn(n, 64, generator=torch.Generator().manual_seed(n)) * 0.1 for n in (12, 20))
    H = hessian(64)
    together, factor = solve_group([a, b], stats(H), 32, Options(grid, "gptq"))
    assert factor is not None
    assert [s.q.out_features for s in together] == [12, 20]
    if grid == "nvfp4":
        assert together[0].q.global_scale == together[1].q.global_scale
        return
    for weight, one in zip((a, b), together):
        (alone,), _ = solve_group([weight], stats(H), 32, Options(grid, "gptq"), factor)
        assert torch.equal(alone.q.codes, one.q.codes) and torch.equal(alone.q.scales, one.q.scales)


def test_gptq_without_a_gram_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="Gram"):
        solve_group([torch.ones(4, 32)], Stats.uniform(32), 32, Options("int4_sym", "gptq"))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("act_order", [True, False])
def test_inputs_are_not_mutated(grid: str, act_order: bool) -> None:
    W, S, Z = problem(grid, 96, 32)
    H = hessian(96)
    H[5] = H[:, 5] = 0
    kept = [t.clone() for t in (W, S, H)]
    Z0 = None if Z is None else Z.clone()
    factor = factorize(H, 0.05, act_order)
    U0 = factor.feedback.clone()
    gptq(W, S, Z, factor, get_grid(grid))
    given = Stats(H.diagonal().clone(), H, 1.0, 1)
    solve_group([W], given, 32, Options(grid, "gptq", act_order=act_order))
    assert all(torch.equal(a, b) for a, b in zip((W, S, H), kept))
    assert torch.equal(factor.feedback, U0) and (Z is None or (Z0 is not None and torch.equal(Z, Z0)))
