"""`check` names what is wrong with a damaged artifact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.unit.artifacts import edit_json, halfbyte
from tests.unit.fake_vllm import VERSION, make_fake


def shard(artifact: Path) -> Path:
    return artifact / "model.safetensors"


def rewrite(artifact: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    with safe_open(shard(artifact), framework="pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, shard(artifact), metadata={"format": "pt"})


def flip_a_bit(artifact: Path) -> None:
    raw = bytearray(shard(artifact).read_bytes())
    raw[len(raw) // 2] ^= 4
    shard(artifact).write_bytes(raw)


def poison_a_scale(artifact: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.scales"][0, 0] = float("nan")

    rewrite(artifact, change)


def drop_a_tensor(artifact: Path) -> None:
    rewrite(artifact, lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.qweight"))


def change_the_group_size(artifact: Path) -> None:
    edit_json(artifact / "config.json", lambda c: c["quantization_config"].update(group_size=64))


def lose_the_manifest(artifact: Path) -> None:
    (artifact / "halfbyte.json").unlink()


def truncate(artifact: Path) -> None:
    shard(artifact).write_bytes(shard(artifact).read_bytes()[:-1])


DAMAGES = {
    "hash": (flip_a_bit, "model.safetensors"),
    "not-finite": (poison_a_scale, "model.layers.1.mlp.up_proj.scales"),
    "tensor-missing": (drop_a_tensor, "model.layers.0.self_attn.q_proj.qweight"),
    "config": (change_the_group_size, "model.layers.0.self_attn.q_proj"),
    "manifest": (lose_the_manifest, "halfbyte.json"),
    "header": (truncate, "model.safetensors"),
}


@pytest.mark.parametrize("code", DAMAGES)
def test_check_names_the_damage(code: str, artifact: Path, capsys: Any, as_json: Any) -> None:
    damage, where = DAMAGES[code]
    assert halfbyte("check", artifact) == 0
    assert f"{artifact} is sound" in capsys.readouterr().out
    damage(artifact)
    assert halfbyte("check", artifact) == 1
    shown = capsys.readouterr()
    named = [line for line in shown.out.splitlines() if line.startswith(f"{code}: ") and where in line]
    assert named and "is damaged" in shown.out and "Traceback" not in shown.err
    result = as_json("check", artifact, code=1)
    assert not result["ok"] and code in {finding["code"] for finding in result["findings"]}


def test_check_writes_its_result(made: Path, tmp_path: Path, as_json: Any) -> None:
    result = as_json("check", made, "-o", tmp_path / "deep" / "place")
    written = json.loads((tmp_path / "deep" / "place" / "check.json").read_text())
    assert written["ok"] and result == {**written, "served": None} and written["path"] == made.name


def test_what_check_writes_names_no_place(artifact: Path, tmp_path: Path, as_json: Any) -> None:
    """A stand-in for vLLM, which scores nonsense."""
    fake, out = make_fake(tmp_path / "fake"), tmp_path / "out"
    as_json("check", artifact, "--serve", "--vllm", fake, "-o", out, code=1)
    served = json.loads((out / "served.json").read_text())
    assert served["status"] == "served" and served["vllm"] == VERSION
    assert served["command"][:3] == ["vllm", "serve", artifact.name]
    for name in ("check.json", "served.json"):
        assert str(tmp_path) not in (out / name).read_text() and str(artifact.parent) not in (out / name).read_text()
