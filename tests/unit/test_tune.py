"""Training scales and norms: it lowers the divergence, keeps the codes, and leaves a whole artifact."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import halfbyte.experiments.quantize as experiments
from halfbyte.artifact import check_artifact, load_fake_quantized, read_manifest
from halfbyte.calibration import CalibrationSet
from halfbyte.engine.rounding import Learning
from halfbyte.engine.tune import SCHEDULES, Schedule
from halfbyte.experiments.quantize import quantize
from halfbyte.models.library import load_model
from halfbyte.recipe.schema import Recipe
from tests.tiny import DENSE, VOCAB, make_tiny

GRIDS = {
    "sym": {"method": "gptq", "group_size": 64},
    "asym": {"method": "awq", "rounding": "gptq", "group_size": 64},
    "nvfp4": {"method": "nvfp4", "group_size": 16},
    "shared": {"method": "nvfp4", "group_size": 64},
}


def data(count: int = 24, length: int = 96) -> CalibrationSet:
    generator = torch.Generator().manual_seed(0)
    sequences = list(torch.randint(5, VOCAB, (count, length), generator=generator))
    return CalibrationSet.of(sequences, {"source": {"kind": "random"}})


def divergence(directory: Path, model: Path, ids: torch.Tensor) -> float:
    with torch.no_grad():
        p = torch.log_softmax(load_model(model)(ids).logits.float(), -1)
        q = torch.log_softmax(load_fake_quantized(directory)(ids).logits.float(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def made(model: Path, place: Path, effort: str, text: CalibrationSet | None = None, **settings: object) -> Path:
    quantize(str(model), Recipe.model_validate({**settings, "effort": effort}), place, text or data())
    return place


@pytest.mark.parametrize("grid", GRIDS)
def test_training_lowers_the_divergence_and_keeps_the_codes(
    grid: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCHEDULES, "full", replace(SCHEDULES["full"], learning=None))
    model = make_tiny("llama", tmp_path / "model")
    place = made(model, tmp_path / "tuned", "max", **GRIDS[grid])
    plain = made(model, tmp_path / "plain", "max", tune="none", **GRIDS[grid])
    assert check_artifact(place)["ok"]
    tuning = read_manifest(place)["tuning"]
    assert tuning["kept"] and tuning["kl_after"] < tuning["kl_before"]
    assert read_manifest(plain)["tuning"] is None
    ids = torch.stack(data().sequences)
    assert divergence(place, model, ids) < divergence(plain, model, ids)
    old, new = codes(plain), codes(place)
    assert old.keys() == new.keys() and all(torch.equal(old[n], new[n]) for n in old)


def test_auto_trains_where_there_is_text_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny("llama", tmp_path / "model")
    little = made(model, tmp_path / "little", "default", **GRIDS["sym"])
    assert read_manifest(little)["recipe"]["tune"] == "auto" and read_manifest(little)["tuning"] is None
    text = data(40)
    monkeypatch.setattr(experiments, "AUTO_TOKENS", text.tokens)
    place = made(model, tmp_path / "enough", "default", text, **GRIDS["sym"])
    tuning = read_manifest(place)["tuning"]
    assert tuning["schedule"] == "light" and tuning["kept"] and tuning["kl_after"] <= 1.05 * tuning["kl_before"]
    plain = made(model, tmp_path / "plain", "default", text, tune="none", **GRIDS["sym"])
    old, new = codes(plain), codes(place)
    assert all(torch.equal(old[n], new[n]) for n in old)
    trained = torch.stack(text.sequences)
    assert divergence(place, model, trained) < divergence(plain, model, trained)
    monkeypatch.setattr(experiments, "AUTO_WEIGHTS", 1000)
    assert read_manifest(made(model, tmp_path / "large", "default", text, **GRIDS["sym"]))["tuning"] is None


def codes(place: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    tensors = load_file(place / "model.safetensors")
    return {n: t for n, t in tensors.items() if n.endswith(("qweight", "qzeros")) or t.dtype == torch.uint8}


@pytest.mark.parametrize("family", (*DENSE, "qwen3_moe"))
def test_every_family_is_trained(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEDULES, "full", replace(SCHEDULES["full"], learning=Learning(20)))
    model = make_tiny(family, tmp_path / "model")
    place = made(model, tmp_path / "out", "max", method="gptq", group_size=64)
    tuning = read_manifest(place)["tuning"]
    assert tuning["kl_after"] < 1.05 * tuning["kl_before"]
    assert tuning["rounding"]["blocks"] > 0 and tuning["rounding"]["error_ratio"] < 1
    assert check_artifact(place)["ok"]


def test_blocks_that_stay_in_bf16_are_run_and_their_norms_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCHEDULES, "full", Schedule(4, learning=Learning(5)))
    model = make_tiny("llama", tmp_path / "model", num_hidden_layers=3)
    place = made(
        model, tmp_path / "out", "default", tune="full", boundary={"blocks": 1, "keep": "blocks"}, **GRIDS["sym"]
    )
    assert read_manifest(place)["tuning"]["kept"]
    assert check_artifact(place)["ok"]
    norms = [load_fake_quantized(place).get_parameter(f"model.layers.{i}.input_layernorm.weight") for i in range(3)]
    before = [load_model(model).get_parameter(f"model.layers.{i}.input_layernorm.weight") for i in range(3)]
    assert all(not torch.equal(a, b) for a, b in zip(norms, before, strict=True))


def test_a_kill_while_the_trained_blocks_are_kept_changes_nothing(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model")
    whole = made(model, tmp_path / "whole", "max", **GRIDS["sym"])
    data().save(tmp_path / "set")
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from halfbyte.experiments.quantize import quantize\n"
        "from halfbyte.recipe.schema import Recipe\n"
        "Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "r = Recipe(method='gptq', group_size=64, effort='max')\n"
        "quantize(sys.argv[1], r, sys.argv[2], [sys.argv[3]])\n"
    )
    words = [sys.executable, "-c", script, str(model), str(tmp_path / "out"), str(tmp_path / "set")]
    assert subprocess.run(words, capture_output=True, env=dict(os.environ)).returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "halfbyte.json").exists()
    place = tmp_path / "out"
    recipe = Recipe.model_validate({**GRIDS["sym"], "effort": "max"})
    quantize(str(model), recipe, place, data())
    assert (place / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
