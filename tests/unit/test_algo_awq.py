"""AWQ's search: never worse than leaving the inputs alone, and statistics that follow the scaled inputs."""

from __future__ import annotations

import pytest
import torch

from halfbyte.algo import Stats, find_scale, get_grid, output_error
from halfbyte.algo.awq import ROWS, candidates, every_kth_row, normalised, rounding_error, scaled_loss, walk
from halfbyte.algo.stats import QuickError
from halfbyte.types import GRIDS
from tests.unit.kernel_worker import interpreter


def inputs(width: int, seed: int = 0, tokens: int = 300) -> torch.Tensor:
    """Correlated inputs, a few of them much larger than the rest."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, width, generator=g) @ (torch.eye(width) + 0.3 * torch.randn(width, width, generator=g))
    large = torch.ones(width)
    large[:: max(1, width // 5)] = 20.0
    return X * large


def stats(X: torch.Tensor) -> Stats:
    H = (X.double().T @ X.double() / len(X)).float()
    return Stats(H.diagonal().clone(), H, float(X.abs().max()), len(X))


def weight(out: int, width: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("grid", GRIDS)
def test_the_scale_found_is_never_worse_than_the_identity(grid: str, seed: int) -> None:
    width, group = 128, 32
    Ws = [weight(32, width, seed), weight(16, width, seed + 50)]
    known = stats(inputs(width, seed) if seed else torch.randn(300, width))
    s = find_scale(Ws, known, get_grid(grid), group)
    assert s.shape == (width,) and s.dtype == torch.float32
    assert bool((s > 0).all()) and bool(s.isfinite().all())
    W = torch.cat(Ws)
    found, identity = (scaled_loss(W, t, known, get_grid(grid), group) for t in (s, torch.ones(width)))
    assert found <= identity
    if grid == "int4_asym" and seed:
        assert found < 0.95 * identity


def test_the_identity_is_returned_where_nothing_helps() -> None:
    """Weights that lie on the grid are rounded without error: no scale can be better."""
    codes = torch.randint(0, 16, (32, 64), generator=torch.Generator().manual_seed(0))
    codes[:, ::32] = 0
    W = (codes - 8).float() * 2.0**-6
    s = find_scale([W], stats(inputs(64)), get_grid("int4_sym"), 32)
    assert bool((s == 1).all())


@pytest.mark.parametrize("effort", ["fast", "default", "max"])
def test_the_identity_is_a_candidate_and_the_first(effort: str) -> None:
    tried = candidates(effort)
    assert tried[0] == (0.0, 0.0) and len(tried) == len(set(tried))
    assert all(0 <= a <= 1 and 0 <= b <= 1 for a, b in tried)


def test_normalised_balances_and_bounds_the_range() -> None:
    s = normalised(torch.tensor([0.1, 1.0, 4.0]))
    assert float(s.max() * s.min()) == pytest.approx(1.0)
    wild = normalised(torch.tensor([1e-9, 1.0, 1e9]))
    assert float(wild.min()) == 2.0**-8 and float(wild.max()) == 2.0**8


@pytest.mark.parametrize("gram", [True, False])
def test_scaled_statistics_are_those_of_the_scaled_inputs(gram: bool) -> None:
    X = inputs(48)
    s = torch.rand(48, generator=torch.Generator().manual_seed(3)) * 4 + 0.25
    known = stats(X)
    if not gram:
        known = Stats(known.second_moment_I, None, known.absmax, known.tokens)
    scaled, want = known.scaled(s), stats(X / s)
    assert torch.allclose(scaled.second_moment_I, want.second_moment_I, rtol=1e-4)
    assert scaled.tokens == len(X)
    if gram:
        assert scaled.gram_II is not None and want.gram_II is not None
        assert float((scaled.gram_II - want.gram_II).norm() / want.gram_II.norm()) < 1e-5
    else:
        assert scaled.gram_II is None


def test_output_error_is_that_of_the_outputs() -> None:
    X, E = inputs(48), weight(8, 48)
    known = stats(X)
    want = (X.double() @ E.double().T).square().mean(0)
    assert torch.allclose(output_error(E, known).double(), want, rtol=1e-4)
    diagonal = Stats(known.second_moment_I, None, 1.0, 1)
    assert torch.allclose(output_error(E, diagonal), (E.square() * known.second_moment_I).sum(1), rtol=1e-4)


def test_scaling_cancels_in_the_loss() -> None:
    """The loss of a scale is the output error in the unscaled basis: E diag(1/s) under H is E under H / (s s^T)."""
    X, E = inputs(32), weight(4, 32)
    s = torch.rand(32, generator=torch.Generator().manual_seed(4)) + 0.5
    assert torch.allclose(output_error(E / s, stats(X)), output_error(E, stats(X).scaled(s)), rtol=1e-4)


@pytest.mark.parametrize(("kv_heads", "queries", "head_dim"), [(2, 3, 32), (1, 4, 16), (4, 1, 16)])
def test_repeat_gives_one_scale_for_each_kv_head_and_channel(kv_heads: int, queries: int, head_dim: int) -> None:
    width = kv_heads * queries * head_dim
    g = torch.Generator().manual_seed(0)
    shared = inputs(kv_heads * head_dim).view(-1, kv_heads, 1, head_dim).expand(-1, -1, queries, -1).reshape(-1, width)
    X = shared * (0.5 + torch.rand(300, width, generator=g))
    s = find_scale([weight(24, width)], stats(X), get_grid("int4_asym"), 16, repeat=(kv_heads, queries, head_dim))
    heads = s.view(kv_heads, queries, head_dim)
    assert bool((s != 1).any())
    assert torch.equal(heads, heads[:, :1].expand_as(heads))
    if kv_heads > 1:
        assert not torch.equal(heads[0], heads[1])


def test_inputs_are_not_mutated() -> None:
    W, known = weight(16, 64), stats(inputs(64))
    W0, m0 = W.clone(), known.second_moment_I.clone()
    assert known.gram_II is not None
    H0 = known.gram_II.clone()
    find_scale([W], known, get_grid("int4_asym"), 32)
    assert torch.equal(W, W0) and torch.equal(known.second_moment_I, m0) and torch.equal(known.gram_II, H0)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("effort", ["fast", "default", "max"])
def test_the_search_finds_nearly_the_best_candidate(grid: str, effort: str) -> None:
    """More rows than the search looks at. Effort max looks at all of them and at all candidates."""
    W, known = weight(3 * ROWS + 7, 96), stats(inputs(96))
    activation, size = known.second_moment_I.sqrt(), W.square().mean(0).sqrt()
    scales = [normalised(activation**a / size**b) for a, b in candidates(effort)]
    losses = [scaled_loss(W, s, known, get_grid(grid), 32) for s in scales]
    found = find_scale([W[:100], W[100:]], known, get_grid(grid), 32, effort)
    loss = scaled_loss(W, found, known, get_grid(grid), 32)
    assert loss == pytest.approx(min(losses), rel=1e-6) if effort == "max" else loss <= 1.01 * min(losses)
    assert loss < 0.95 * losses[0]


@pytest.mark.parametrize("effort", ["fast", "default", "max"])
@pytest.mark.parametrize("place", [0.0, 0.1, 0.35, 0.7, 0.95])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_walk_ends_at_the_bottom_of_a_smooth_valley(effort: str, place: float, mixed: bool) -> None:
    tried, seen = candidates(effort), []

    def losses(some: list[tuple[float, float]]) -> list[float]:
        seen.extend(some)
        return [(alpha - place) ** 2 + (0.0 if (beta > 0) == mixed else 0.3) for alpha, beta in some]

    found = walk(tried, losses)
    assert len(seen) == len(set(seen)) and (0.0, 0.0) in seen
    path = [c for c in tried if (c[1] > 0) == mixed]
    assert found == min(path, key=lambda c: (c[0] - place) ** 2)
    if place == 0.35 and not mixed:
        assert len(seen) < 0.7 * len(tried)


def test_a_walk_never_ends_above_the_identity() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        losses = dict(zip(candidates("default"), torch.rand(15, generator=g).tolist()))
        found = walk(list(losses), lambda some: [losses[c] for c in some])  # noqa: B023
        assert losses[found] <= losses[0.0, 0.0]


@pytest.mark.parametrize("rows", [1, 511, 512, 1023, 1024, 1536, 3072, 28672])
def test_rows_are_left_out_evenly_and_not_in_step_with_heads(rows: int) -> None:
    kept = every_kth_row(torch.arange(rows)[:, None])[:, 0]
    step = int(kept[1] - kept[0]) if rows > 1 else 1
    assert step % 2 == 1 and torch.equal(kept, torch.arange(0, rows, step))
    assert min(rows, ROWS) <= len(kept) < 3 * ROWS


@pytest.mark.parametrize("grid", GRIDS)
def test_the_error_seen_by_the_unscaled_inputs_is_that_of_the_scaled_ones(grid: str) -> None:
    """No statistics are rescaled in the search: (E diag(1/s)) under H is E under H / (s s^T)."""
    W, known = weight(24, 96), stats(inputs(96))
    s = normalised(known.second_moment_I.sqrt() ** 0.4)
    chosen, scaled = get_grid(grid), known.scaled(s)
    outer = chosen.global_scale([W * s])
    assert outer == chosen.global_scale([W.abs().amax(0) * s])
    fitted = chosen.fit(W * s, scaled.second_moment_I, 32, outer, "probe")
    zeros = None if fitted.zeros is None else fitted.zeros[:, :, None]
    effective = fitted.effective[:, :, None]
    E = (chosen.snap((W * s).unflatten(1, (-1, 32)) / effective, zeros) * effective).flatten(1) - W * s
    assert torch.allclose(rounding_error(W, s, known.second_moment_I, chosen, 32, outer), E / s, atol=1e-6)
    assert scaled_loss(W, s, known, chosen, 32) == pytest.approx(float(output_error(E, scaled).sum()), rel=1e-4)


@pytest.mark.parametrize("gram", [True, False])
def test_the_quick_error_is_the_output_error_to_a_thousandth(gram: bool) -> None:
    X, E = inputs(256, tokens=200), weight(64, 256) * 0.01
    known = stats(X) if gram else Stats(stats(X).second_moment_I, None, 1.0, 1)
    kept = known.second_moment_I.clone(), known.gram_II if known.gram_II is None else known.gram_II.clone(), E.clone()
    got, want = QuickError(known)(E), output_error(E, known)
    assert got.shape == want.shape and got.dtype == torch.float32
    assert float(got.sum()) == pytest.approx(float(want.sum()), rel=1e-3 if gram else 1e-5)
    assert torch.allclose(got, want, rtol=0.02)
    assert torch.equal(known.second_moment_I, kept[0]) and torch.equal(E, kept[2])
    assert kept[1] is None or torch.equal(known.gram_II, kept[1])  # type: ignore[arg-type]


def test_the_kernels_find_the_scales_that_torch_finds() -> None:
    pytest.importorskip("triton")
    W, known = weight(40, 96), stats(inputs(96))
    with interpreter() as call:
        for grid in GRIDS:
            s = normalised(known.second_moment_I.sqrt() ** 0.4)
            outer = get_grid(grid).global_scale([W * s])
            want = rounding_error(W, s, known.second_moment_I, get_grid(grid), 32, outer)
            got = call(rounding_error, W, s, known.second_moment_I, get_grid(grid), 32, outer)
            assert torch.isclose(got, want, atol=1e-7, rtol=1e-4).float().mean() >= 0.98
        scale = find_scale([W], known, get_grid("int4_sym"), 32)
        assert bool((scale != 1).any())
        assert torch.equal(call(find_scale, [W], known, get_grid("int4_sym"), 32), scale)
