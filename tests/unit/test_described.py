"""What transformers says of a model directory, asked here or by a process of its own."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import halfbyte.experiments.described as described_module
from halfbyte.artifact import ArtifactWriter
from halfbyte.calibration import CalibrationSet
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


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not imported transformers."""
    monkeypatch.setattr(described_module, "IMPORTED", "no.such.module")


def test_a_process_of_its_own_says_what_this_one_does(
    model: Path, apart: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Described(model)
    here.begin(apart=False)
    monkeypatch.setattr(described_module, "describe", None)
    with Described(model) as there:
        there.begin(apart=True)
        assert there.take() == here.take() == tokenizer_hash(model) and load_tokenizer(model)
        assert there.misfit(wait=True) is None and there._child is not None and there._child.returncode == 0


def test_it_says_what_is_wrong(model: Path, apart: None) -> None:
    name = reshaped(model)
    with pytest.raises(HalfbyteError, match=f"{name} is .* do they belong together"):
        Described(model).begin(apart=False)
    with Described(model) as there:
        there.begin(apart=True)
        assert there.misfit(wait=False) is None, "not known yet"
        assert there._child is not None
        while there._child.poll() is None:
            time.sleep(0.05)
        with pytest.raises(HalfbyteError, match=f"{name} is .* do they belong together"):
            there.take_if_ready()
        assert there.misfit(wait=False)


def test_a_tokenizer_that_cannot_be_loaded_is_no_misfit(model: Path, apart: None) -> None:
    (model / "tokenizer.json").write_text("{}")
    with Described(model) as there:
        there.begin(apart=True)
        with pytest.raises(HalfbyteError, match="no tokenizer that transformers can load"):
            there.take()
        assert there.misfit(wait=True) is None


def test_it_runs_nothing_of_the_working_directory(
    model: Path, apart: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A model's directory may be the working directory, and hold a stranger's Python."""
    for name in ("tokenizers", "transformers", "json", "halfbyte"):
        (model / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit(3)\n")
    monkeypatch.chdir(model)
    with Described(model) as there:
        there.begin(apart=True)
        assert there._child is not None and there._child.wait() == 0
        assert there.take() and not (tmp_path / "ran").exists()


def test_what_a_child_refuses_in_vain_is_asked_here(model: Path, apart: None, monkeypatch: pytest.MonkeyPatch) -> None:
    no = {"refused": "no memory", "misfit": False, "tokenizer_sha256": None}
    monkeypatch.setattr(Described, "_of_child", lambda self: no)
    with Described(model) as there:
        assert there.take() == tokenizer_hash(model)


def test_without_a_child_this_process_asks(
    model: Path, apart: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = tokenizer_hash(model)
    talker = tmp_path / "talker"
    talker.write_text("#!/bin/sh\necho '{}'\n")
    talker.chmod(0o755)
    for executable in (sys.executable + ".missing", "/bin/false", str(talker)):
        monkeypatch.setattr(sys, "executable", executable)
        with Described(model) as there:
            there.begin(apart=True)
            assert there.take() == expected


def test_a_child_that_is_not_waited_for_goes(model: Path, apart: None) -> None:
    with Described(model) as there:
        there.begin(apart=True)
        assert there._child is not None
        os.kill(there._child.pid, 0)
    assert there._child.returncode is not None


@pytest.mark.parametrize("late", [False, True])
def test_a_data_free_pass_over_a_misfit_leaves_nothing(
    late: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the answer comes when the weight files are there already."""
    name, out = reshaped(model), tmp_path / "out"
    if late:
        monkeypatch.setattr(Described, "begin", lambda self, apart: None)
    with pytest.raises(HalfbyteError, match=name):
        quantize(str(model), load_recipe("B3", DATA_FREE), out)
    assert not out.exists()


def test_a_misfit_is_the_reason_whatever_the_pass_raises(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: None
) -> None:
    monkeypatch.setattr(Described, "begin", _always_apart(Described.begin))
    monkeypatch.setattr(Described, "take_if_ready", lambda self: None)
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name][:, : tensors[name].shape[1] // 2].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HalfbyteError, match=f"{name} is .* do they belong together"):
        quantize(str(model), load_recipe("B3", [*DATA_FREE, "indivisible=smaller"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _always_apart(begin: Any) -> Any:
    return lambda self, apart: begin(self, True)


def test_a_tokenizer_that_fails_costs_no_block_and_no_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run: what is kept, and what the user put beside it, stays."""
    out, recipe = tmp_path / "out", load_recipe("B3", DATA_FREE)
    emit = ArtifactWriter.emit

    def once(self: ArtifactWriter, block: int, *rest: Any, **more: Any) -> None:
        if block:
            raise KeyboardInterrupt
        emit(self, block, *rest, **more)

    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(ArtifactWriter, "emit", once)
        quantize(str(model), recipe, out)
    (out / "notes.txt").write_text("mine")
    with monkeypatch.context() as broken, pytest.raises(HalfbyteError, match="sentencepiece"):
        broken.setattr(described_module, "load_tokenizer", _fails)
        quantize(str(model), recipe, out)
    assert (out / "notes.txt").read_text() == "mine"
    assert [file.name for file in (out / ".partial").glob("*.safetensors")] == ["block-00000.safetensors"]
    assert quantize(str(model), recipe, out)["resumed"]


def _fails(path: Path) -> None:
    raise HalfbyteError("sentencepiece is missing")


@pytest.mark.parametrize("overrides", [[*DATA_FREE, "group_size=32"], ["tune=none"]])
def test_force_gives_nothing_up_for_a_model_that_cannot_be_used(
    overrides: list[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    quantize(str(model), load_recipe("B3", DATA_FREE), out)
    data = CalibrationSet.of([torch.arange(2048) % 200], {}) if len(overrides) == 1 else None
    monkeypatch.setattr(described_module, "load_tokenizer", _fails)
    with pytest.raises(HalfbyteError, match="sentencepiece"):
        quantize(str(model), load_recipe("B3", overrides), out, data, force=True)
    assert (out / "halfbyte.json").is_file() and (out / "model.safetensors").is_file()
