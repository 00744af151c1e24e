"""`quantize` end to end on tiny models of every family: what is in the artifact is what the quantizer chose."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import halfbyte
import halfbyte.artifact.writer as writer
from halfbyte.artifact import check_artifact, load_fake_quantized, read_manifest
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.models import Checkpoint
from halfbyte.plan import make_plan
from halfbyte.recipe import Recipe, load_recipe
from halfbyte.types import Quiet
from tests.tiny import FAMILIES, make_tiny
from tests.unit.artifacts import random_set, values

IDS = torch.randint(5, 300, (2, 40), generator=torch.Generator().manual_seed(9))
RTN = {"method": "rtn", "group_size": 64}
GPTQ = {"method": "gptq", "group_size": 32}
LEAST = 0.75
"""Correlation with the BF16 model's logits. Random weights amplify rounding, so a tiny model keeps 0.77 to 0.99 of
itself at 4 bits; weights in the wrong place keep next to nothing."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """tiny(family, **overrides): a model directory, made once."""
    made: dict[str, Path] = {}

    def get(family: str, **overrides: Any) -> Path:
        name = json.dumps([family, overrides], sort_keys=True)
        if name not in made:
            made[name] = make_tiny(family, tmp_path_factory.mktemp(family), **overrides)
        return made[name]

    return get


class Chosen:
    """What the quantizer handed to the writer."""

    def __init__(self) -> None:
        self.linears: dict[str, Any] = {}
        self.tensors: dict[str, torch.Tensor] = {}


@pytest.fixture()
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Chosen]:
    seen, emit = Chosen(), writer.ArtifactWriter.emit

    def record(self: Any, block: int, linears: Any, tensors: Any, *rest: Any) -> None:
        seen.linears |= {name: solved.q for name, solved in linears.items()}
        seen.tensors |= tensors
        emit(self, block, linears, tensors, *rest)

    monkeypatch.setattr(writer.ArtifactWriter, "emit", record)
    yield seen


def make(model: Path, output: Path, recipe: dict[str, Any], **more: Any) -> dict[str, Any]:
    needs = Recipe.model_validate(recipe).needs_calibration
    return halfbyte.quantize(str(model), Recipe.model_validate(recipe), output, random_set() if needs else None, **more)


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits.float()


def by_hand(model: Path, seen: Chosen) -> Any:
    """The BF16 model in float32 with what the quantizer chose put into it: transformers and this file alone."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if any(name == "lm_head" for name in seen.linears) and network.config.tie_word_embeddings:
        raise AssertionError("a tied lm_head was quantized")
    with torch.no_grad():
        for name, q in seen.linears.items():
            network.get_submodule(name).weight.copy_(values(q))
        for name, tensor in seen.tensors.items():
            network.get_parameter(name).copy_(tensor)
    return network


def kept(before: torch.Tensor, after: torch.Tensor) -> float:
    """Correlation of the logits, each position centred."""
    a, b = (x - x.mean(-1, keepdim=True) for x in (before, after))
    return float((a * b).sum() / (a.norm() * b.norm()))


def assert_sound(model: Path, output: Path, seen: Chosen) -> None:
    """Structure, numbers, and the same logits by the artifact's reader, by hand, and nearly by the BF16 model."""
    found = check_artifact(output)
    assert found["ok"], found["findings"]
    read = logits(load_fake_quantized(output, dtype=torch.float32))
    torch.testing.assert_close(read, logits(by_hand(model, seen)), rtol=1e-4, atol=1e-4)
    bf16 = logits(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    assert LEAST < kept(bf16, read) < 0.99999


@pytest.mark.parametrize("recipe", [RTN, GPTQ], ids=["rtn", "gptq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, recipe: dict[str, Any], tiny: Any, tmp_path: Path, chosen: Chosen) -> None:
    model = tiny(family)
    manifest = make(model, tmp_path / "out", recipe)
    assert_sound(model, tmp_path / "out", chosen)
    linears = {name for name, row in manifest["linears"].items() if row["scheme"]}
    assert linears == set(chosen.linears) and len(linears) == (8 if family == "phi3" else 14)


AWQ = {"method": "awq", "group_size": 32}
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
    facts = {"name": str(model), "hub_id": None, "path": str(model), "sha256": Checkpoint(model).fingerprint()}
    assert given["model"] == facts and "vllm" in given
    assert given["calibration"] == data.manifest and given["seeds"] == {"calibration": 4}
    assert given["command"] == "halfbyte quantize as given" and given["resumed"] is False and given["notices"] == []
    assert given["versions"]["torch"] == torch.__version__ and given["versions"]["halfbyte"]
    assert {"python", "transformers", "safetensors", "gpu", "driver", "cuda"} <= set(given["versions"])
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


def make_with(model: Path, output: Path, recipe: dict[str, Any], data: Any, **more: Any) -> dict[str, Any]:
    return halfbyte.quantize(str(model), Recipe.model_validate(recipe), output, data, **more)


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


def test_calibration_comes_from_a_directory_or_from_text(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    place = random_set().save(tmp_path / "set")
    first = make_with(model, tmp_path / "a", GPTQ, [place])
    assert first["work"] == make_with(model, tmp_path / "b", GPTQ, random_set())["work"]
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {i}: " + "words and words, " * 12 for i in range(30)))
    recipe = {**GPTQ, "calibration": {"sequences": 32, "max_tokens": 128}}
    from_text = make_with(model, tmp_path / "c", recipe, [text])
    assert from_text["calibration"]["source"]["kind"] == "text" and from_text["work"] != first["work"]


def test_the_model_writes_its_own_text_once(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    recipe = {**GPTQ, "calibration": {"sequences": 40, "max_tokens": 96}}
    first = make_with(tiny("llama"), tmp_path / "a", recipe, None)
    assert first["calibration"]["source"]["kind"] == "self-generated" and first["calibration"]["tokens"] >= 2048
    kept_sets = list((tmp_path / "cache" / "calibration").iterdir())
    assert len(kept_sets) == 1
    monkeypatch.setattr("halfbyte.experiments.quantize.load_model", None)
    assert make_with(tiny("llama"), tmp_path / "b", recipe, None)["work"] == first["work"]


def test_refusals(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    with pytest.raises(HalfbyteError, match=r"2,047 tokens: 2,048 are the least"):
        make_with(model, tmp_path / "a", GPTQ, random_set(tokens=2047))
    with pytest.raises(UsageError, match="nothing to quantize"):
        make(model, tmp_path / "b", {**RTN, "boundary": {"blocks": 1, "keep": "blocks"}})
    with pytest.raises(UsageError, match=r"group_size 128 does not divide the 96 inputs"):
        make(tiny("llama", intermediate_size=96), tmp_path / "c", {**RTN, "group_size": 128})
    assert not (tmp_path / "b").exists() and not (tmp_path / "c").exists()


@pytest.mark.parametrize("up", [".", ".."])
def test_the_model_itself_is_never_written_over(up: str, tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "models" / "m")
    before = sorted(p.name for p in model.iterdir())
    with pytest.raises(UsageError, match="holds the model"):
        make(model, model / up, RTN, force=True)
    assert sorted(p.name for p in model.iterdir()) == before


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
    from tests.unit.artifacts import digests

    for name in "ab":
        make(tiny("qwen3"), tmp_path / name, GPTQ)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_presets_by_name(tiny: Any, tmp_path: Path) -> None:
    manifest = halfbyte.quantize(str(tiny("llama")), "B3", tmp_path / "out", random_set())
    assert manifest["recipe"] == load_recipe("B3").identity()
