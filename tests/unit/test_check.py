"""The check: sound artifacts pass in every format, and each way of damaging one is named."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.artifact import load_fake_quantized
from halfbyte.artifact.check import check_artifact
from halfbyte.errors import UsageError
from halfbyte.formats import detect_format
from halfbyte.types import Quiet
from tests.handmade import make_artifact, reseal, save_shards, write
from tests.tiny import FAMILIES, make_tiny

DOWN = "model.layers.0.mlp.down_proj"
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"


def codes(directory: Path) -> set[str]:
    result = check_artifact(directory)
    assert (result["schema"], result["kind"], result["path"]) == (1, "check", str(directory))
    assert result["ok"] == (not result["findings"])
    for finding in result["findings"]:
        assert set(finding) == {"code", "where", "message"} and "\n" not in finding["message"]
    json.dumps(result, allow_nan=False)
    return {f["code"] for f in result["findings"]}


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of the single weight file, and its hash with it."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_shards(directory, tensors, 1)
    reseal(directory)


def edit_json(path: Path, change: Callable[[dict], object], seal: bool = True) -> None:
    contents = json.loads(path.read_text())
    change(contents)
    write(path, contents)
    if seal:
        reseal(path.parent)


@pytest.mark.parametrize(
    ("kind", "grid", "group", "activations"),
    [
        ("gptq", "int4_sym", 32, "bf16"),
        ("gptq", "int4_sym", -1, "bf16"),
        ("awq", "int4_asym", 64, "bf16"),
        ("modelopt", "nvfp4", 16, "bf16"),
        ("modelopt", "nvfp4", 64, "fp4"),
        ("compressed-tensors", "int4_sym", 32, "bf16"),
        ("compressed-tensors", "int4_asym", -1, "bf16"),
        ("compressed-tensors", "nvfp4", 32, "bf16"),
    ],
)
def test_sound_artifacts_pass(tmp_path: Path, kind: str, grid: str, group: int, activations: str) -> None:
    make_artifact(tmp_path, kind, grid, group, keep=r"layers\.1\.self_attn|lm_head", shards=3, activations=activations)
    result = check_artifact(tmp_path, progress=Quiet())
    assert result["findings"] == [] and result["ok"]
    assert result["bytes"] > 100_000 and result["tensors"] > 20


@pytest.mark.parametrize(("kind", "grid"), [("gptq", "int4_sym"), ("awq", "int4_asym"), ("modelopt", "nvfp4")])
def test_manifests_that_state_values_instead_of_codes_hold(tmp_path: Path, kind: str, grid: str) -> None:
    """As the first manifests did: the SHA-256 of a linear's float32 values."""
    import hashlib

    make_artifact(tmp_path, kind, grid, 16 if grid == "nvfp4" else 32)
    model = load_fake_quantized(tmp_path)

    def older(manifest: dict) -> None:
        for name, row in manifest["linears"].items():
            if row.get("fingerprint"):
                values = exact_values(tmp_path, name, kind)
                assert torch.equal(values.bfloat16(), model.get_parameter(f"{name}.weight"))
                row["fingerprint"] = hashlib.sha256(values.numpy().tobytes()).hexdigest()

    edit_json(tmp_path / "halfbyte.json", older)
    assert check_artifact(tmp_path)["findings"] == []
    edit_json(tmp_path / "halfbyte.json", lambda m: m["linears"][DOWN].update(fingerprint="0" * 64))
    assert codes(tmp_path) == {"dequantize"}


def exact_values(directory: Path, name: str, kind: str) -> torch.Tensor:
    from halfbyte.algo import dequantize
    from halfbyte.models import Checkpoint

    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    kept_as = detect_format(config)
    scheme = kept_as.parse(config, [name])[name]
    assert scheme is not None
    owned = {f"{name}.{n}": t for n, t in Checkpoint(directory).load_all(f"{name}.").items()}
    return dequantize(kept_as.unpack(name, owned, scheme))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes(tmp_path: Path, family: str) -> None:
    make_artifact(tmp_path, "gptq", "int4_sym", 32, family=family)
    assert check_artifact(tmp_path)["findings"] == []


def test_a_quantized_lm_head_passes_where_it_is_not_tied(tmp_path: Path) -> None:
    make_artifact(tmp_path / "own", "gptq", "int4_sym", 32, keep="$^", tie_word_embeddings=False)
    assert check_artifact(tmp_path / "own")["findings"] == []
    make_artifact(tmp_path / "tied", "modelopt", "nvfp4", 16)
    edit_json(tmp_path / "tied" / "config.json", lambda c: c["quantization_config"]["ignore"].clear())
    assert codes(tmp_path / "tied") == {"config"}


def test_a_path_that_is_no_directory_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a directory"):
        check_artifact(tmp_path / "nothing")


def test_a_directory_that_is_no_artifact_is_one_line(tmp_path: Path) -> None:
    """Not a heap of findings: nobody meant it as an artifact."""
    empty, half, run = (tmp_path / name for name in ("empty", "half", "run"))
    bf16 = make_tiny("llama", tmp_path / "bf16")
    empty.mkdir()
    (empty / "notes.txt").write_text("x")
    (half / ".partial").mkdir(parents=True)
    write(half / ".partial" / "work.json", {"work": "0"})
    make_artifact(run / "model", "gptq", "int4_sym")
    told = {
        empty: "is no artifact",
        bf16: "is not quantized",
        half: "half-done",
        run: f"its artifact is {run / 'model'}",
    }
    for directory, says in told.items():
        with pytest.raises(UsageError, match=re.escape(says)) as caught:
            check_artifact(directory)
        assert str(caught.value).startswith(str(directory)) and "\n" not in str(caught.value)
    assert check_artifact(run / "model")["ok"]


def test_an_artifact_that_lost_a_file_is_still_one(tmp_path: Path) -> None:
    make_artifact(tmp_path, "gptq", "int4_sym")
    manifest, config = (tmp_path / name for name in ("halfbyte.json", "config.json"))
    kept = manifest.read_text()
    manifest.unlink()
    assert codes(tmp_path) == {"manifest"}
    config.write_text("{")
    assert {"manifest", "config"} <= codes(tmp_path)
    manifest.write_text(kept)
    config.unlink()
    assert {"config", "hash"} <= codes(tmp_path)


def test_a_flipped_bit(tmp_path: Path) -> None:
    make_artifact(tmp_path, "gptq", "int4_sym")
    file = tmp_path / "model.safetensors"
    raw = bytearray(file.read_bytes())
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    raw[8 + int.from_bytes(raw[:8], "little") + header[f"{DOWN}.qweight"]["data_offsets"][0] + 5] ^= 4
    file.write_bytes(raw)
    findings = check_artifact(tmp_path)["findings"]
    assert [(f["code"], f["where"]) for f in findings] == [("hash", "model.safetensors"), ("dequantize", DOWN)]
    reseal(tmp_path)
    assert codes(tmp_path) == {"dequantize"}


@pytest.mark.parametrize(
    ("kind", "grid", "part", "value"),
    [
        ("gptq", "int4_sym", "scales", float("nan")),
        ("gptq", "int4_sym", "scales", float("inf")),
        ("modelopt", "nvfp4", "weight_scale", float("nan")),
        ("compressed-tensors", "nvfp4", "weight_global_scale", float("inf")),
    ],
)
def test_a_scale_that_is_no_number(tmp_path: Path, kind: str, grid: str, part: str, value: float) -> None:
    make_artifact(tmp_path, kind, grid)
    edit(tmp_path, lambda t: t[f"{DOWN}.{part}"].view(-1)[-1:].copy_(torch.tensor([value])))
    (finding,) = check_artifact(tmp_path)["findings"]
    assert (finding["code"], finding["where"]) == ("not-finite", f"{DOWN}.{part}")


def test_a_bf16_weight_that_is_no_number(tmp_path: Path) -> None:
    make_artifact(tmp_path, "gptq", "int4_sym")
    edit(tmp_path, lambda t: t["model.norm.weight"].fill_(float("inf")))
    assert codes(tmp_path) == {"not-finite"}


@pytest.mark.parametrize(
    ("kind", "grid", "part", "value", "bad"),
    [
        ("gptq", "int4_sym", "scales", -0.5, True),
        ("awq", "int4_asym", "scales", 0.0, True),
        ("modelopt", "nvfp4", "weight_scale", -1.0, True),
        ("modelopt", "nvfp4", "weight_scale", 0.0, False),
        ("modelopt", "nvfp4", "weight_scale_2", 0.0, True),
    ],
)
def test_the_sign_of_scales(tmp_path: Path, kind: str, grid: str, part: str, value: float, bad: bool) -> None:
    make_artifact(tmp_path, kind, grid)
    edit(tmp_path, lambda t: t[f"{DOWN}.{part}"].view(-1)[0:1].copy_(torch.tensor([value])))
    assert ("scale-sign" in codes(tmp_path)) == bad


def test_a_tensor_missing_or_too_many_or_of_another_kind(tmp_path: Path) -> None:
    make_artifact(tmp_path, "gptq", "int4_sym")
    sound = load_file(tmp_path / "model.safetensors")
    for change, code, where in (
        (lambda t: t.pop(f"{DOWN}.scales"), "tensor-missing", f"{DOWN}.scales"),
        (lambda t: t.pop("model.norm.weight"), "tensor-missing", "model.norm.weight"),
        (lambda t: t.update(extra=torch.ones(1)), "tensor-unexpected", "extra"),
        (lambda t: t.update({f"{DOWN}.scales": t[f"{DOWN}.scales"].float()}), "dtype", f"{DOWN}.scales"),
        (lambda t: t.update({f"{DOWN}.scales": t[f"{DOWN}.scales"][1:].clone()}), "shape", f"{DOWN}.scales"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64)}), "shape", "model.norm.weight"),
    ):
        save_file(sound, tmp_path / "model.safetensors")
        edit(tmp_path, change)
        assert [(f["code"], f["where"]) for f in check_artifact(tmp_path)["findings"]] == [(code, where)]


def test_an_input_scale_is_needed_where_nvfp4_activations_are_declared(tmp_path: Path) -> None:
    make_artifact(tmp_path, "modelopt", "nvfp4", 16, activations="fp4")
    edit(tmp_path, lambda t: t.pop(f"{DOWN}.input_scale"))
    assert codes(tmp_path) == {"tensor-missing"}


def test_a_wrong_group_size_in_the_config(tmp_path: Path) -> None:
    make_artifact(tmp_path, "gptq", "int4_sym", 32)
    for file in ("config.json", "quantize_config.json"):
        edit_json(tmp_path / file, lambda c: c.get("quantization_config", c).update(group_size=64))
    findings = check_artifact(tmp_path)["findings"]
    assert {f["code"] for f in findings} == {"config", "shape"}
    assert any("groups of 64" in f["message"] and "32" in f["message"] for f in findings)
    assert any("more like these" in f["message"] for f in findings) and len(findings) < 50


def test_configs_that_say_something_else(tmp_path: Path) -> None:
    make_artifact(tmp_path, "modelopt", "nvfp4", 16, keep=r"layers\.1\.mlp|lm_head")
    sound = (tmp_path / "config.json").read_text()
    changes: list[tuple[Callable[[dict], object], set[str]]] = [
        (lambda c: c.pop("quantization_config"), {"config"}),
        (lambda c: c["quantization_config"].update(quant_method="fp8"), {"config"}),
        (lambda c: c["quantization_config"].update(group_size="x"), {"config"}),
        (lambda c: c["quantization_config"].update(ignore=7), {"config"}),
        (lambda c: c["quantization_config"].update(quant_algo="NVFP4"), {"config"}),
        (lambda c: c["quantization_config"]["ignore"].pop(0), {"config"}),
        (lambda c: c.update(hidden_size=64), {"shape"}),
        (lambda c: c.update(vocab_size=100), {"shape", "tokenizer"}),
        (lambda c: c.update(num_hidden_layers=3), {"tensor-missing"}),
        (lambda c: c.update(num_hidden_layers=10**9), {"config"}),
        (lambda c: c.update(model_type="mamba"), {"config"}),
        (lambda c: c.pop("hidden_size"), {"config"}),
    ]
    for change, expected in changes:
        (tmp_path / "config.json").write_text(sound)
        edit_json(tmp_path / "config.json", change)
        assert expected <= codes(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config" in codes(tmp_path)


def test_the_second_config_file_must_be_there_and_agree(tmp_path: Path) -> None:
    make_artifact(tmp_path, "modelopt", "nvfp4")
    edit_json(tmp_path / "hf_quant_config.json", lambda c: c["quantization"].update(exclude_modules=[]))
    assert codes(tmp_path) == {"config"}
    (tmp_path / "hf_quant_config.json").unlink()
    reseal(tmp_path)
    assert codes(tmp_path) == {"config"}


def test_scales_that_vllm_takes_once_must_be_equal(tmp_path: Path) -> None:
    make_artifact(tmp_path, "modelopt", "nvfp4", 16, activations="fp4")
    edit(tmp_path, lambda t: t[f"{K}.input_scale"].mul_(2))
    (finding,) = check_artifact(tmp_path)["findings"]
    assert finding["code"] == "sharing" and Q in finding["message"] and "input_scale" in finding["message"]
    edit(tmp_path, lambda t: t[f"{K}.weight_scale_2"].mul_(2))
    assert codes(tmp_path) == {"sharing", "dequantize"}


def test_blocks_of_one_group_must_share_their_scale(tmp_path: Path) -> None:
    make_artifact(tmp_path, "modelopt", "nvfp4", 64)
    edit(tmp_path, lambda t: t[f"{DOWN}.weight_scale"].view(torch.uint8)[0, 1:2].add_(1))
    assert codes(tmp_path) == {"sharing", "dequantize"}


def test_zero_points_and_groups_that_vllm_ignores_must_say_the_same(tmp_path: Path) -> None:
    make_artifact(tmp_path, "gptq", "int4_sym")
    edit(tmp_path, lambda t: (t[f"{DOWN}.g_idx"].zero_(), t[f"{Q}.qzeros"].zero_()))
    findings = check_artifact(tmp_path)["findings"]
    assert {(f["code"], f["where"]) for f in findings} == {("dequantize", DOWN), ("dequantize", Q)}


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_a_truncated_file(tmp_path: Path, keep: int) -> None:
    make_artifact(tmp_path, "gptq", "int4_sym")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert codes(tmp_path) == {"header", "hash"}


def test_a_truncated_shard_hides_nothing_else(tmp_path: Path) -> None:
    make_artifact(tmp_path, "gptq", "int4_sym", shards=3)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    findings = check_artifact(tmp_path)["findings"]
    assert {(f["code"], f["where"]) for f in findings} == {("header", shard.name), ("hash", shard.name)}
    shard.unlink()
    assert codes(tmp_path) == {"index", "hash"}


@pytest.mark.parametrize(
    "header", [b"[]", b"{", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}']
)
def test_malformed_headers(tmp_path: Path, header: bytes) -> None:
    make_artifact(tmp_path, "gptq", "int4_sym")
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    reseal(tmp_path)
    assert codes(tmp_path) == {"header"}


def test_the_index_and_the_files_must_agree(tmp_path: Path) -> None:
    make_artifact(tmp_path, "gptq", "int4_sym", shards=3)
    index = tmp_path / "model.safetensors.index.json"
    sound = index.read_text()
    changes: list[Callable[[dict], object]] = [
        lambda c: c["weight_map"].pop("model.norm.weight"),
        lambda c: c["weight_map"].update({"model.norm.weight": "model-00001-of-00003.safetensors", "ghost": "x"}),
        lambda c: c["weight_map"].update(ghost="model-00001-of-00003.safetensors"),
        lambda c: c["weight_map"].update(ghost="../elsewhere.safetensors"),
        lambda c: c["metadata"].update(total_size=5),
        lambda c: c.update(weight_map=[]),
    ]
    for change in changes:
        index.write_text(sound)
        edit_json(index, change)
        assert codes(tmp_path) == {"index"}
    index.write_text(sound)
    (tmp_path / "stray.safetensors").write_bytes((tmp_path / "model-00001-of-00003.safetensors").read_bytes())
    reseal(tmp_path)
    assert codes(tmp_path) == {"index"}


def test_manifests_that_say_nothing_or_something_else(tmp_path: Path) -> None:
    make_artifact(tmp_path, "gptq", "int4_sym")
    manifest = tmp_path / "halfbyte.json"
    sound = manifest.read_text()
    changes: list[tuple[Callable[[dict], object], set[str]]] = [
        (lambda m: m.pop("files"), {"manifest"}),
        (lambda m: m.pop("linears"), {"manifest"}),
        (lambda m: m["linears"].update({DOWN: 1}), {"manifest"}),
        (lambda m: m["linears"].pop(DOWN), {"manifest"}),
        (lambda m: m["linears"][DOWN].pop("fingerprint"), {"manifest"}),
        (lambda m: m["linears"][DOWN].update(scheme=None), {"config"}),
        (lambda m: m["linears"][DOWN].update(fingerprint="0" * 64), {"dequantize"}),
        (lambda m: m["files"].update({"../x": {}}), {"hash"}),
        (lambda m: m["files"].update({"gone.json": {"sha256": "", "bytes": 1}}), {"hash"}),
        (lambda m: m["files"].update({"config.json": None}), {"hash"}),
    ]
    for change, expected in changes:
        manifest.write_text(sound)
        edit_json(manifest, change, seal=False)
        assert codes(tmp_path) == expected


def test_tokenizers(tmp_path: Path) -> None:
    make_artifact(tmp_path, "gptq", "int4_sym")
    edit_json(tmp_path / "tokenizer.json", lambda t: t["model"]["vocab"].update(far=400))
    assert codes(tmp_path) == {"tokenizer"}
    edit_json(tmp_path / "tokenizer.json", lambda t: t.update(model=3))
    assert codes(tmp_path) == {"tokenizer"}
    (tmp_path / "tokenizer.json").unlink()
    reseal(tmp_path)
    assert codes(tmp_path) == {"tokenizer"}


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "halfbyte.json", "tokenizer.json"])
def test_random_damage_never_raises(tmp_path: Path, file: str) -> None:
    make_artifact(tmp_path, "gptq", "int4_sym")
    sound = (tmp_path / file).read_bytes()
    chance = random.Random(file)
    for _ in range(12):
        damaged = bytearray(sound)
        for _ in range(chance.choice((1, 3, 40))):
            damaged[chance.randrange(min(len(sound), 4000))] = chance.randrange(256)
        (tmp_path / file).write_bytes(damaged)
        assert bytes(damaged) == sound or codes(tmp_path)
