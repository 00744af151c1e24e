"""What saves memory with very large linears gives what the plain way gives."""

from __future__ import annotations

import importlib

import pytest
import torch

import halfbyte.algo.solve as solve_module
import halfbyte.engine.collect as collect_module
from halfbyte.algo import Options, Stats, factorize, solve_group
from halfbyte.engine.collect import Collector, symmetrize_

gptq_module = importlib.import_module("halfbyte.algo.gptq")
"""The file: the package has the function under that name."""


def statistics(width: int, dead: bool = False) -> Stats:
    g = torch.Generator().manual_seed(1)
    X = torch.randn(4 * width, width, generator=g) @ torch.randn(width, width, generator=g)
    if dead:
        X[:, 3] = 0
    H = X.T @ X / len(X)
    return Stats(H.diagonal().clone(), H, float(X.abs().max()), len(X))


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_a_factor_made_in_place_is_the_factor(dead: bool, act_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    H = statistics(96, dead).gram_II
    assert H is not None
    before = H.clone()
    plain = factorize(H, 0.05, act_order)
    monkeypatch.setattr(gptq_module, "WIDE", 8)
    placed = factorize(H, 0.05, act_order)
    assert torch.equal(H, before), "the statistics serve other recipes"
    assert plain.damp == placed.damp
    torch.testing.assert_close(placed.feedback, plain.feedback, rtol=2e-4, atol=1e-6)
    assert torch.equal(placed.feedback.triu(), placed.feedback)
    order = torch.arange(96) if placed.order is None else placed.order
    D = H + torch.diag((H.diagonal() == 0).float())
    D = (D + torch.eye(96) * 0.05 * H.diagonal()[H.diagonal() > 0].mean())[order[:, None], order]
    inverse = torch.linalg.inv(placed.feedback.double())
    left = inverse @ D.double() @ inverse.T
    assert float((left - torch.diag(left.diagonal())).abs().max() / left.diagonal().min()) < 1e-2


def test_an_indefinite_hessian_takes_more_damping_in_place_too(monkeypatch: pytest.MonkeyPatch) -> None:
    H = statistics(48).gram_II
    assert H is not None
    H -= torch.eye(48) * H.diagonal().mean() * 0.4
    plain = factorize(H, 0.01)
    monkeypatch.setattr(gptq_module, "WIDE", 8)
    placed = factorize(H, 0.01)
    assert plain.damp == placed.damp > 0.01
    torch.testing.assert_close(placed.feedback, plain.feedback, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("grid", ["int4_sym", "int4_asym", "nvfp4"])
@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_rows_solved_in_pieces_have_the_same_codes(grid: str, rounding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(2)
    weights = [torch.randn(n, 256, generator=g).bfloat16() for n in (70, 33)]
    stats, options = statistics(256), Options(grid, rounding)
    whole, _ = solve_group(weights, stats, 32, options)
    monkeypatch.setattr(solve_module, "LARGE", 1000)
    monkeypatch.setattr(solve_module, "PIECE", 16 * 256)
    pieces, _ = solve_group(weights, stats, 32, options)
    assert len(whole) == len(pieces) == 2
    for one, other in zip(whole, pieces):
        assert torch.equal(one.q.codes, other.q.codes) and torch.equal(one.q.scales, other.q.scales)
        assert one.q.global_scale == other.q.global_scale and (one.q.zeros is None) == (other.q.zeros is None)
        assert one.q.zeros is None or torch.equal(one.q.zeros, other.q.zeros)  # type: ignore[arg-type]
        assert one.relative_error == pytest.approx(other.relative_error, rel=1e-3)


def test_a_gram_matrix_in_panels_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(3)
    M = torch.randn(70, 70, generator=g)
    assert torch.equal(symmetrize_(M.clone(), 32), M + M.T)
    X, counts = torch.randn(200, 64, generator=g).bfloat16(), torch.rand(200, generator=g)
    whole = Collector(64, True, torch.device("cpu"))
    monkeypatch.setattr(collect_module, "WIDE", 8)
    monkeypatch.setattr(collect_module, "NARROWEST", 16)
    panels = Collector(64, True, torch.device("cpu"))
    assert len(panels.rows) == 4
    for one in (whole, panels):
        one.add(X, counts)
    a, b = whole.stats(), panels.stats()
    assert a.gram_II is not None and b.gram_II is not None
    assert torch.equal(a.gram_II, a.gram_II.T) and torch.equal(a.second_moment_I, b.second_moment_I)
    torch.testing.assert_close(a.gram_II, b.gram_II, rtol=2e-2, atol=2e-2)
