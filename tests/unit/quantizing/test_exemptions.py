"""What stays in BF16: protected boundaries, ignored linears, the head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from halfbyte.models import Checkpoint
from tests.unit.quantizing.conftest import GPTQ, RTN, Chosen, assert_sound, make

KEEPS = {
    "blocks": {f"model.layers.{i}." for i in (0, 3)},
    "projections": {f"model.layers.{i}.{n}" for i in (0, 3) for n in ("self_attn.o_proj", "mlp.down_proj")},
}


@pytest.mark.parametrize("keep", KEEPS)
def test_boundaries(keep: str, tiny: Any, tmp_path: Path, chosen: Chosen) -> None:
    model = tiny("llama", num_hidden_layers=4)
    manifest = make(model, tmp_path / "out", {**GPTQ, "boundary": {"blocks": 1, "keep": keep}})
    assert_sound(model, tmp_path / "out", chosen)
    rows = {n: r for n, r in manifest["linears"].items() if n != "lm_head"}
    for name, row in rows.items():
        protected = any(name.startswith(prefix) for prefix in KEEPS[keep])
        assert (row["scheme"] is None) == protected, name
        assert not protected or row["reason"].startswith("boundary")
    written, source = load_file(tmp_path / "out" / "model.safetensors"), Checkpoint(model)
    name = "model.layers.3.mlp.down_proj.weight"
    assert torch.equal(written[name], source.load(name))
    assert "model.layers.1.mlp.down_proj.weight" not in written


def test_ignored_linears_stay_as_they_were(tiny: Any, tmp_path: Path, chosen: Chosen) -> None:
    model = tiny("llama")
    make(model, tmp_path / "out", {**RTN, "ignore": ["lm_head", "re:.*down_proj", "model.layers.1.self_attn"]})
    assert_sound(model, tmp_path / "out", chosen)
    names = {name.rpartition(".layers.")[2] for name in chosen.linears}
    assert names == {
        *(f"0.self_attn.{n}_proj" for n in "qkvo"),
        *(f"{i}.mlp.{n}_proj" for i in (0, 1) for n in ("gate", "up")),
    }


@pytest.mark.parametrize("recipe", [RTN, GPTQ, {"method": "nvfp4", "group_size": 16}], ids=["rtn", "gptq", "nvfp4"])
def test_an_untied_head_can_be_quantized(recipe: dict[str, Any], tiny: Any, tmp_path: Path, chosen: Chosen) -> None:
    model = tiny("llama", tie_word_embeddings=False)
    manifest = make(model, tmp_path / "out", {**recipe, "ignore": []})
    assert "lm_head" in chosen.linears and manifest["linears"]["lm_head"]["scheme"]
    assert_sound(model, tmp_path / "out", chosen)


def test_a_tied_head_stays(tiny: Any, tmp_path: Path, chosen: Chosen) -> None:
    manifest = make(tiny("llama"), tmp_path / "out", {**RTN, "ignore": []})
    assert "lm_head" not in chosen.linears
    assert manifest["linears"]["lm_head"]["reason"] == "tied to the embeddings"
