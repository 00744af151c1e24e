"""A small version of benchmarks/reliability/large.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.reliability import large
from benchmarks.reliability.large import ROWS, make, run, tables
from halfbyte.models import Checkpoint
from tests.unit.sparse import LLAMA_70B


def test_a_checkpoint_larger_than_its_file(tmp_path: Path) -> None:
    """Headers of 141 GB on a few kilobytes of disk, real numbers where they are promised."""
    small = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    checkpoint = Checkpoint(make(tmp_path / "m", {**LLAMA_70B, **small, "num_hidden_layers": 3}, 1))
    for name in checkpoint.tensors:
        value = checkpoint.load(name).float()
        if "norm" in name:
            assert bool((value == 1).all())
        elif ".layers." in name:
            real = name.startswith("model.layers.0.")
            assert 0.08 < float(value.std()) < 0.1 if real else bool((value == 0).all())
        else:
            assert bool(value[:ROWS].abs().sum(1).gt(0).all()) and not bool(value[ROWS:].any())
    assert len(checkpoint.files) == 3
    hole = (tmp_path / "m" / "model-00002.safetensors").stat()
    assert hole.st_blocks * 512 < hole.st_size / 10
    assert torch.isfinite(checkpoint.load("lm_head.weight")).all()


def test_the_benchmark_measures_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "apart", lambda function, *arguments: function(*arguments))
    result = run("small", 2, 2048, tmp_path, [])
    nvfp4, gptq = result.rows
    assert [recipe.needs_calibration for recipe in large.RECIPES.values()] == [False, True]
    assert (nvfp4.blocks, gptq.blocks) == (2, 1)
    assert all(0 < row.peak <= row.foretold for row in result.rows), "what is foretold is on the careful side"
    assert all(row.written > 0 and row.seconds > 0 for row in result.rows) and 0 < result.planned < 60
    text = tables(result)
    assert all(word in text for word in ("NVFP4 without data", "GPTQ", "reading a block's weights", "plain MB/s"))
