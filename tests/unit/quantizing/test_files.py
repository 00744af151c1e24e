"""The artifact's files: tokenizer, shards, manifest, bytes as planned, modes, the same bytes twice."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import halfbyte.artifact.writer as writer
from halfbyte.artifact import check_artifact, read_manifest
from halfbyte.errors import UsageError
from halfbyte.experiments.run import artifact_baseline
from halfbyte.models import Checkpoint
from halfbyte.plan import make_plan
from halfbyte.recipe import Recipe
from halfbyte.types import Quiet
from tests.tiny import make_tiny
from tests.unit.artifacts import digests, edit_json, random_set
from tests.unit.quantizing.conftest import AWQ, GPTQ, RTN, Chosen, assert_sound, make, make_with


def test_the_tokenizer_and_the_generation_settings_come_along(tiny: Any, tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model")
    GenerationConfig(temperature=0.25, do_sample=True).save_pretrained(model)
    (model / "LICENSE").write_text("do as you like\n")
    (model / "training_args.bin").write_bytes(b"pickled")
    make(model, tmp_path / "out", RTN)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes(), name
    assert not (tmp_path / "out" / "training_args.bin").exists()
    text = "half a byte"
    ours, theirs = (AutoTokenizer.from_pretrained(p) for p in (tmp_path / "out", model))
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert GenerationConfig.from_pretrained(tmp_path / "out").temperature == 0.25


def test_shards_with_an_index(tiny: Any, tmp_path: Path, chosen: Chosen, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    make(model, tmp_path / "one", RTN)
    monkeypatch.setattr(writer, "SHARD_BYTES", 60_000)
    make(model, tmp_path / "out", RTN)
    assert_sound(model, tmp_path / "out", chosen)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    whole = load_file(tmp_path / "one" / "model.safetensors")
    pieces = {file.name: load_file(file) for file in shards}
    assert index["weight_map"] == {name: file for file, held in pieces.items() for name in held}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    assert all(len(held) == 1 or sum(t.nbytes for t in held.values()) <= 60_000 for held in pieces.values())
    for name, tensor in whole.items():
        assert torch.equal(pieces[index["weight_map"][name]][name], tensor)


def test_a_sharded_model_is_read(tiny: Any, tmp_path: Path, chosen: Chosen) -> None:
    network = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.bfloat16)
    network.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(tmp_path / "model")
    make(tmp_path / "model", tmp_path / "out", GPTQ)
    assert_sound(tmp_path / "model", tmp_path / "out", chosen)


def test_the_manifest_is_complete(tiny: Any, tmp_path: Path) -> None:
    model, out = tiny("llama"), tmp_path / "out"
    data = random_set(seed=4)
    recipe = {**GPTQ, "calibration": {"seed": 4}}
    given = make_with(model, out, recipe, data, command="halfbyte quantize as given")
    assert given == read_manifest(out) == json.loads((out / "halfbyte.json").read_text())
    assert given["recipe"] == Recipe.model_validate(recipe).identity()
    facts = {"name": model.name, "hub_id": None, "path": os.path.relpath(model, out)}
    assert given["model"] == facts | {"sha256": Checkpoint(model).fingerprint()}
    assert given["calibration"] == data.manifest and given["seeds"] == {"calibration": 4}
    assert given["command"] == "halfbyte quantize as given" and given["resumed"] is False and given["notices"] == []
    assert given["versions"]["torch"] == torch.__version__ and given["versions"]["halfbyte"]
    assert {"python", "transformers", "safetensors", "gpu", "driver", "cuda", "vllm"} <= set(given["versions"])
    assert "vllm" not in given
    assert len(given["tokenizer_sha256"]) == 64 and len(given["work"]) == 64 and given["peak_rss_mib"] > 50
    assert given["seconds"] >= given["solving_seconds"] > 0 and given["device"] and given["threads"] >= 1
    for name, row in given["linears"].items():
        assert {"kind", "in_features", "out_features"} <= set(row)
        if name == "lm_head":
            assert row["scheme"] is None and row["reason"]
        else:
            assert row["scheme"] == {"grid": "int4_sym", "group_size": 32} and len(row["fingerprint"]) == 64
            assert 0 < row["error"]["relative"] < 0.2 and row["damp"] >= 0.05
    listed = {p.name for p in out.iterdir()} - {"halfbyte.json"}
    assert set(given["files"]) == listed and not any(name.startswith(".") for name in listed)
    assert all((out / name).stat().st_size == row["bytes"] for name, row in given["files"].items())


SIZED = {
    "gptq": GPTQ,
    "rtn": RTN,
    "awq": AWQ,
    "nvfp4": {"method": "nvfp4", "group_size": 16},
    "shared": {"method": "nvfp4", "group_size": 64},
    "fp4": {"method": "nvfp4", "group_size": 16, "activations": "fp4"},
    "ct": {**GPTQ, "format": "compressed-tensors"},
    "ct-asym": {**AWQ, "format": "compressed-tensors"},
    "ct-nvfp4": {"method": "nvfp4", "group_size": 16, "format": "compressed-tensors"},
    "head": {**RTN, "ignore": []},
    "boundary": {**RTN, "boundary": {"keep": "projections"}},
}


@pytest.mark.parametrize("name", SIZED)
def test_the_plan_told_the_bytes_exactly(name: str, tiny: Any, tmp_path: Path) -> None:
    model = tiny("qwen2", tie_word_embeddings=False)
    recipe = {"effort": "fast", **SIZED[name]}
    planned = make_plan(Checkpoint(model), Recipe.model_validate(recipe), [])["bytes"]
    manifest = make(model, tmp_path / "out", recipe)
    stored = sum(t.nbytes for f in (tmp_path / "out").glob("*.safetensors") for t in load_file(f).values())
    assert manifest["bytes"] == stored == planned["after"]
    assert manifest["bytes_bf16"] == planned["before"]
    assert manifest["bits_per_weight"] == pytest.approx(planned["bits_per_quantized_weight"], abs=1e-9)


def test_damping_raised_is_told_and_kept(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import halfbyte.engine.loop as loop

    solve = loop.solve_block

    def noisy(recipe: Any, family: Any, index: int, *rest: Any) -> Any:
        result = solve(recipe, family, index, *rest)
        result.notices.append(f"block {index} had trouble")
        return result

    monkeypatch.setattr(loop, "solve_block", noisy)
    shown = Quiet()
    manifest = make(tiny("llama"), tmp_path / "out", RTN, progress=shown)
    assert manifest["notices"] == shown.notices == ["block 0 had trouble", "block 1 had trouble"]


def test_files_follow_the_umask(tiny: Any, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        make(tiny("llama"), tmp_path / "out", RTN)
    finally:
        os.umask(before)
    modes = {p.name: oct(p.stat().st_mode & 0o777) for p in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {"0o640"}, modes


def test_the_same_work_gives_the_same_bytes(tiny: Any, tmp_path: Path) -> None:
    for name in "ab":
        make(tiny("qwen3"), tmp_path / name, GPTQ)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_the_manifest_names_no_place_on_this_machine(tiny: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(tiny("llama"), out, RTN)
    assert str(tmp_path) not in (out / "halfbyte.json").read_text()
    assert artifact_baseline(out) == str(tiny("llama").resolve())


def test_where_the_model_of_a_manifest_is_looked_for(tiny: Any, tmp_path: Path) -> None:
    """Beside the artifact, where an older manifest says, under its public name; else one line says what to name."""
    make(tiny("llama"), tmp_path / "out", RTN)

    def told(**model: Any) -> str:
        edit_json(tmp_path / "out" / "halfbyte.json", lambda manifest: manifest.update(model=model))
        return artifact_baseline(tmp_path / "out")

    assert told(name="smollm2-135m", path=str(tiny("llama"))) == str(tiny("llama").resolve())
    assert told(name="smollm2-135m", path="/gone/cache/smollm2-135m") == "smollm2-135m"
    assert told(name="org/model", hub_id="org/model", path=None) == "org/model"
    with pytest.raises(UsageError, match="name it with --baseline"):
        told(name="mine", path="../mine")


def test_a_model_in_float32_is_noticed(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "m")
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network.save_pretrained(tmp_path / "m32")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "m32")
    shown = Quiet()
    manifest = make(tmp_path / "m32", tmp_path / "out", RTN, progress=shown)
    assert manifest["notices"] == shown.notices and len(shown.notices) == 1
    assert "stored in F32" in shown.notices[0] and "rounded to BF16" in shown.notices[0]
    assert make(model, tmp_path / "b", RTN)["notices"] == []
    assert check_artifact(tmp_path / "out")["ok"]
