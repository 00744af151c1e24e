"""`reproduce`: bit-identical on the same machine; differences named; what is another model or other tokens refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte import Recipe, quantize
from halfbyte.artifact import read_manifest
from halfbyte.calibration import CalibrationSet
from halfbyte.experiments import reproduce as room
from halfbyte.experiments.reproduce import reproduce
from halfbyte.experiments.tokens import find_tokens
from tests.tiny import make_tiny
from tests.unit.artifacts import digests, edit_json, halfbyte, random_set, without_vllm

GPTQ = {"method": "gptq", "group_size": 32}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One cache for this file, and no vLLM, whose version takes seconds to find."""
    without_vllm(monkeypatch, tmp_path_factory.getbasetemp() / "reproduce-cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPTQ artifact made with other threads than the tests have, not to be changed."""
    threads = torch.get_num_threads()
    out = model.parent / "made"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HALFBYTE_CACHE", str(tmp_path_factory.getbasetemp() / "reproduce-cache"))
        torch.set_num_threads(threads + 1)
        quantize(str(model), Recipe.model_validate(GPTQ), out, random_set())
        torch.set_num_threads(threads)
    return out


@pytest.fixture()
def artifact(made: Path) -> Any:
    """A copy to damage, beside the first so that its manifest leads to the model."""
    copy = made.parent / "copy"
    yield Path(shutil.copytree(made, copy))
    shutil.rmtree(copy)


def test_the_same_bytes_come_again(made: Path, tmp_path: Path, capsys: Any) -> None:
    threads = torch.get_num_threads()
    assert halfbyte("reproduce", made, "-o", tmp_path / "again", "--format", "json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["result"] == "identical" and found["differences"] == [] and found["weights"] is None
    assert found["threads"] == threads + 1 and torch.get_num_threads() == threads
    assert {row["file"] for row in found["files"]} == set(read_manifest(made)["files"])
    assert digests(made) == digests(tmp_path / "again")
    assert read_manifest(tmp_path / "again")["threads"] == threads + 1
    assert halfbyte("reproduce", made, "-o", tmp_path / "again") == 2, "a directory in use"


def test_differences_are_named_first_and_the_manifest_alone_is_enough(made: Path, artifact: Path, capsys: Any) -> None:
    edit_json(artifact / "halfbyte.json", lambda m: m["versions"].update(torch="1.0", vllm="0.1"))
    for file in artifact.glob("*.safetensors"):
        file.unlink()
    assert halfbyte("reproduce", artifact / "halfbyte.json") == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("not as it was: torch: 1.0 then, ") and "vllm" not in shown.out
    assert "identical" in shown.out.splitlines()[-1] and "note: torch: 1.0 then" in shown.err


def nudge(artifact: Path, amount: float) -> None:
    """Change one linear's scales in an artifact's file, and its manifest to be its own."""
    file = artifact / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("o_proj.scales"))
    tensors[name] = (tensors[name].float() * (1 + amount)).to(tensors[name].dtype)
    save_file(tensors, file, metadata={"format": "pt"})

    def change(manifest: dict[str, Any]) -> None:
        manifest["files"]["model.safetensors"]["sha256"] = "0" * 64
        manifest["linears"][name.removesuffix(".scales")]["fingerprint"] = "0" * 64

    edit_json(artifact / "halfbyte.json", change)


@pytest.mark.parametrize(("amount", "result", "code"), [(0.01, "equal within tolerance", 0), (0.3, "different", 1)])
def test_weights_are_compared_where_bytes_differ(
    artifact: Path, capsys: Any, amount: float, result: str, code: int
) -> None:
    nudge(artifact, amount)
    assert halfbyte("reproduce", artifact, "--format", "json") == code
    found = json.loads(capsys.readouterr().out)
    weights = found["weights"]
    assert found["result"] == result and [r["file"] for r in found["files"] if not r["same"]] == ["model.safetensors"]
    assert weights["different"] == 1 and weights["where"].endswith("o_proj")
    assert weights["largest"] == pytest.approx(1 - 1 / (1 + amount), rel=0.05) == weights["mean"]
    assert halfbyte("reproduce", artifact, "--tolerance", "0.5" if code else "0.001") == 1 - code
    assert "counts as equal" in capsys.readouterr().out


def test_another_model_or_other_tokens_are_refused(made: Path, artifact: Path, tmp_path: Path, capsys: Any) -> None:
    other = make_tiny("llama", tmp_path / "other", seed=1)
    assert halfbyte("reproduce", made, "--model", other) == 1
    assert "another model than the artifact's" in capsys.readouterr().err
    random_set(seed=5).save(tmp_path / "set")
    assert halfbyte("reproduce", made, "--calibration", tmp_path / "set") == 1
    assert "gives other tokens" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HALFBYTE_CACHE", str(tmp_path / "empty"))
        assert halfbyte("reproduce", made) == 1
        assert "calibration tokens" in capsys.readouterr().err
        random_set().save(tmp_path / "right")
        assert halfbyte("reproduce", made, "--calibration", tmp_path / "right") == 0
    edit_json(artifact / "halfbyte.json", lambda m: m.pop("linears"))
    assert halfbyte("reproduce", artifact) == 2 and halfbyte("reproduce", tmp_path) == 2


def test_tokens_are_found_or_made_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    wanted = random_set(seed=3)
    nothing: Any = pytest.fail
    wanted.save(tmp_path / "run" / "calibration")
    assert find_tokens(wanted.manifest, tmp_path / "run" / "model", None, (), nothing, nothing).sha256 == wanted.sha256
    wanted.save(tmp_path / "named")
    (tmp_path / "x" / "y").mkdir(parents=True)
    assert (
        find_tokens(wanted.manifest, tmp_path / "x" / "y", "../../named", (), nothing, nothing).sha256 == wanted.sha256
    )
    wanted.save(tmp_path / "sweep" / "calibration" / "abc")
    assert (
        find_tokens(wanted.manifest, tmp_path / "sweep" / "cells" / "B1", None, (), nothing, nothing).sha256
        == wanted.sha256
    )
    own = CalibrationSet.of(
        wanted.sequences, {"source": {"kind": "self-generated"}, "asked": {"sequences": 3, "max_tokens": 64}, "seed": 4}
    )
    specs = []
    again = find_tokens(
        own.manifest, tmp_path / "elsewhere" / "model", None, (), lambda spec: specs.append(spec) or own, nothing
    )
    assert again is own and (specs[0].sequences, specs[0].max_tokens, specs[0].seed) == (3, 64, 4)
    with pytest.raises(room.HalfbyteError, match="writes other text"):
        find_tokens(own.manifest, tmp_path / "elsewhere" / "model", None, (), lambda spec: random_set(seed=9), nothing)


def test_a_set_s_directory_is_remembered(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    random_set(seed=6).save(tmp_path / "set")
    made = quantize(str(model), Recipe.model_validate(GPTQ), tmp_path / "out", [tmp_path / "set"])
    assert made["calibration_path"] == "../set" and not (tmp_path / "cache" / "tokens").exists(), "no second copy"
    assert reproduce(tmp_path / "out", model=str(model))["result"] == "identical"


def test_text_is_cut_again(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "corpus.txt"
    text.write_text("\n\n".join(f"Paragraph {i} says a little more than {i - 1}." * 3 for i in range(60)))
    recipe = {"method": "gptq", "group_size": 64, "calibration": {"sequences": 32, "max_tokens": 96, "seed": 2}}
    quantize(str(model), Recipe.model_validate(recipe), tmp_path / "out", [text])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HALFBYTE_CACHE", str(tmp_path / "empty"))
        with pytest.raises(room.HalfbyteError, match=r"made of corpus\.txt"):
            reproduce(tmp_path / "out", model=str(model))
        assert reproduce(tmp_path / "out", model=str(model), calibration=[text])["result"] == "identical"


def test_where_it_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {("cuda", "cuda:1"): "cuda:1", ("cpu", "cuda"): "cpu", ("cuda", "cpu"): "cpu", ("cpu", "cpu"): "cpu"}
    for (here, told), expected in cases.items():
        monkeypatch.setattr(room, "device_of", lambda _, here=here: here)
        assert room._device({"device": told}) == expected
