"""What transformers says of a model directory, asked here or by a process of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import halfbyte.experiments.described as described_module
from halfbyte.errors import HalfbyteError
from halfbyte.experiments.described import Described, tokenizer_hash
from halfbyte.experiments.quantize import quantize
from halfbyte.models.library import load_tokenizer
from halfbyte.recipe import load_recipe
from tests.tiny import make_tiny

DATA_FREE = ["rounding=rtn", "scaling=none"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny("llama", tmp_path / "model")


def reshaped(model: Path) -> str:
    """Takes half of a norm away; returns its name."""
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.input_layernorm.weight"
    tensors[name] = tensors[name][: len(tensors[name]) // 2].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return name


def child(model: Path, monkeypatch: pytest.MonkeyPatch) -> Described:
    """One that asks a process of its own, which this process cannot do for it."""
    monkeypatch.setattr(described_module, "IMPORTED", "no.such.module")
    monkeypatch.setattr(described_module, "describe", None)
    return Described(model, apart=True)


def test_a_process_of_its_own_says_what_this_one_does(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Described(model, apart=False)
    here.begin()
    with child(model, monkeypatch) as apart:
        apart.begin()
        digest = apart.take()
    assert digest == here.take() == tokenizer_hash(model) and load_tokenizer(model)
    assert not apart.refused and apart._child is not None and apart._child.returncode == 0


def test_it_says_what_is_wrong(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = reshaped(model)
    with pytest.raises(HalfbyteError, match=f"{name} is .* do they belong together"):
        Described(model, apart=False).begin()
    with child(model, monkeypatch) as apart:
        apart.begin()
        assert apart._child is not None
        apart._child.wait()
        with pytest.raises(HalfbyteError, match=f"{name} is .* do they belong together"):
            apart.look()
        assert apart.refused


def test_without_a_child_this_process_asks(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tokenizer_hash(model)
    monkeypatch.setattr(described_module, "IMPORTED", "no.such.module")
    for executable in (sys.executable + ".missing", "/bin/false"):
        monkeypatch.setattr(sys, "executable", executable)
        with Described(model, apart=True) as apart:
            apart.begin()
            assert apart.take() == expected


def test_a_child_that_is_not_waited_for_goes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with child(model, monkeypatch) as apart:
        apart.begin()
        assert apart._child is not None
        os.kill(apart._child.pid, 0)
    assert apart._child.returncode is not None


@pytest.mark.parametrize("late", [False, True])
def test_a_data_free_pass_over_a_misfit_leaves_nothing(
    late: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the answer comes when blocks are kept already."""
    name, out = reshaped(model), tmp_path / "out"
    if late:
        monkeypatch.setattr(Described, "begin", lambda self: None)
    with pytest.raises(HalfbyteError, match=name):
        quantize(str(model), load_recipe("B3", DATA_FREE), out)
    assert not out.exists()
