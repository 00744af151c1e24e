"""Gram matrices by panels, as a GPU gets them."""

from __future__ import annotations

import pytest
import torch

from halfbyte.engine import collect
from halfbyte.engine.collect import add_upper_gram_, mirror_upper_, panels


@pytest.mark.parametrize(("width", "count"), [(7, 1), (1024, 1), (1536, 2), (4096, 4), (14336, 8), (28672, 8)])
def test_panels_cover_every_row_once(width: int, count: int) -> None:
    found = panels(width)
    assert len(found) == count
    assert [row for panel in found for row in range(panel.start, panel.stop)] == list(range(width))


@pytest.mark.parametrize("width", [5, 24, 37])
def test_upper_panels_make_the_whole_gram_matrix(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "NARROWEST", 5)
    X = torch.randn(64, width, generator=torch.Generator().manual_seed(width)).bfloat16()
    gram = torch.zeros(width, width)
    for part in X.split(20):
        add_upper_gram_(gram, part, panels(width))
    mirror_upper_(gram, panels(width))
    want = X.double().T @ X.double()
    torch.testing.assert_close(gram.double(), want, rtol=1e-5, atol=1e-4)
    assert torch.equal(gram, gram.T)
