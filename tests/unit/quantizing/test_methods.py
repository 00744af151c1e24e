"""`quantize` end to end on tiny models of every family: what is in the artifact is what the quantizer chose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import halfbyte
from halfbyte.models import Checkpoint
from halfbyte.recipe import load_recipe
from tests.tiny import FAMILIES, SPARSE
from tests.unit.artifacts import random_set
from tests.unit.quantizing.conftest import AWQ, GPTQ, RTN, Chosen, assert_sound, by_hand, kept, logits, make

LINEARS = {"phi3": 8, "mixtral": 2 * (4 + 4 * 3), "qwen2_moe": 2 * (4 + 3 + 3 * 3), "qwen3_moe": 2 * (4 + 4 * 3) + 7}


@pytest.mark.parametrize("recipe", [RTN, GPTQ], ids=["rtn", "gptq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, recipe: dict[str, Any], tiny: Any, tmp_path: Path, chosen: Chosen) -> None:
    model = tiny(family)
    finer = {"group_size": 32} if family in SPARSE else {}  # rounding also changes what a router chooses
    manifest = make(model, tmp_path / "out", {**recipe, **finer})
    assert_sound(model, tmp_path / "out", chosen)
    linears = {name for name, row in manifest["linears"].items() if row["scheme"]}
    assert linears == set(chosen.linears) and len(linears) == LINEARS.get(family, 14)


OTHERS = {
    "awq": (AWQ, "awq"),
    "awq-rtn": ({**AWQ, "rounding": "rtn", "group_size": 64}, "awq"),
    "gptq-scaled": ({**GPTQ, "scaling": "awq"}, "gptq"),
    "nvfp4": ({"method": "nvfp4", "group_size": 16}, "modelopt"),
    "nvfp4-rtn": ({"method": "nvfp4", "group_size": 64, "rounding": "rtn"}, "modelopt"),
    "nvfp4-fp4": ({"method": "nvfp4", "group_size": 32, "activations": "fp4"}, "modelopt"),
    "ct-int4": ({**GPTQ, "format": "compressed-tensors"}, "compressed-tensors"),
    "ct-asym": ({**AWQ, "format": "compressed-tensors"}, "compressed-tensors"),
    "ct-nvfp4": ({"method": "nvfp4", "group_size": 16, "format": "compressed-tensors"}, "compressed-tensors"),
    "rows": ({"method": "rtn", "group_size": -1}, "gptq"),
    "propagated": ({**GPTQ, "propagate": True}, "gptq"),
    "fast": ({**GPTQ, "effort": "fast"}, "gptq"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_every_method_and_format(family: str, name: str, tiny: Any, tmp_path: Path, chosen: Chosen) -> None:
    recipe, method = OTHERS[name]
    model = tiny(family)
    make(model, tmp_path / "out", recipe)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == method
    assert_sound(model, tmp_path / "out", chosen)


MIXED = {
    "mixtral": ("awq", "nvfp4", "ct-asym"),
    "qwen2_moe": ("awq", "gptq-scaled", "ct-int4", "ct-nvfp4"),
    "qwen3_moe": ("nvfp4-fp4", "propagated", "nvfp4-rtn", "rows"),
}


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, names in MIXED.items() for name in names])
def test_mixtures_of_experts_in_every_format(family: str, name: str, tiny: Any, tmp_path: Path, chosen: Chosen) -> None:
    recipe, method = OTHERS[name]
    manifest = make(tiny(family), tmp_path / "out", recipe)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == method
    assert_sound(tiny(family), tmp_path / "out", chosen)
    routers = {name: row for name, row in manifest["linears"].items() if row["kind"] == "router"}
    assert routers and all(row["scheme"] is None and "router" in row["reason"] for row in routers.values())


def test_awq_scales_are_folded_and_not_lost(tiny: Any, tmp_path: Path, chosen: Chosen) -> None:
    """The scaled norms differ from the model's, stand in the artifact, and undo what the linears took up."""
    model = tiny("qwen2")
    make(model, tmp_path / "out", {**AWQ, "group_size": 128})
    assert_sound(model, tmp_path / "out", chosen)
    source, written = Checkpoint(model), load_file(tmp_path / "out" / "model.safetensors")
    moved = [name for name in chosen.tensors if not torch.equal(source.load(name), chosen.tensors[name])]
    assert any(name.endswith("layernorm.weight") for name in moved), "this model would not test the folding"
    for name in moved:
        assert torch.equal(written[name], chosen.tensors[name])
    bf16, whole = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), by_hand(model, chosen))
    chosen.tensors = {}
    forgotten = by_hand(model, chosen)
    assert kept(logits(bf16), logits(whole)) > kept(logits(bf16), logits(forgotten)) + 0.1


def test_presets_by_name(tiny: Any, tmp_path: Path) -> None:
    manifest = halfbyte.quantize(str(tiny("llama")), "B3", tmp_path / "out", random_set())
    assert manifest["recipe"] == load_recipe("B3").identity()
