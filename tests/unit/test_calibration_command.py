"""`halfbyte calibrate` as a user types it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import halfbyte.experiments.quantize as quantize
from halfbyte.calibration import CalibrationSet
from halfbyte.cli.calibrate import set_words
from tests.tiny import make_tiny
from tests.unit.artifacts import halfbyte
from tests.unit.test_calibration_curate import jsonl, prose


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("calibrate") / "tiny")


@pytest.fixture()
def texts(tmp_path: Path) -> tuple[Path, Path]:
    mine = tmp_path / "mine.txt"
    mine.write_text("\n\n".join(prose(1000 + i, 40) for i in range(40)))
    return jsonl(tmp_path / "c4.jsonl", [prose(i, 60) for i in range(60)] * 2), mine


def test_sources_with_weights(model: Path, texts: Any, tmp_path: Path, capsys: Any) -> None:
    web, mine = texts
    words = ["calibrate", "-m", model, f"{web}:0.7", f"{mine}:0.3:in-domain", "-o", tmp_path / "set"]
    words += ["--sequences", 32, "--context", 128]
    (tmp_path / "held.txt").write_text(prose(5000, 60))
    assert halfbyte(*words, "--held-out", tmp_path / "held.txt") == 0
    shown = capsys.readouterr().out
    table = [line.split() for line in shown.splitlines() if line.startswith(("source", "c4.jsonl", "mine.txt"))]
    assert table[0][:5] == ["source", "read", "exact", "duplicates", "joined"] and table[0][-2:] == ["share", "asked"]
    assert table[1][:3] == ["c4.jsonl", "120", "60"] and table[1][-1] == "70.0%"
    assert table[2][:3] == ["mine.txt", "(in-domain)", "40"] and table[2][-1] == "30.0%"
    assert "held-out text: 0 of" in shown and "warning: " in shown and "in-domain tokens" in shown
    assert shown.splitlines()[-1].startswith("too few for quantize") or "next: halfbyte quantize" in shown
    manifest = CalibrationSet.load(tmp_path / "set").manifest
    assert manifest["strategy"] == "curated" and manifest["asked"] == {"sequences": 32, "max_tokens": 128}
    assert halfbyte(*words) == 2 and "is not empty" in capsys.readouterr().err
    assert halfbyte(*words, "--force", "--format", "json") == 0
    assert json.loads(capsys.readouterr().out)["sha256"] == manifest["sha256"]


def test_one_yaml_file_and_a_recipe(model: Path, texts: Any, tmp_path: Path, capsys: Any) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: nvfp4\ngroup_size: 16\ncalibration: {sequences: 24, max_tokens: 96, seed: 3}\n")
    spec = tmp_path / "set.yaml"
    spec.write_text("sources:\n  - {path: c4.jsonl, weight: 3}\n  - {path: mine.txt, weight: 1}\nmax_tokens: 64\n")
    words = ["calibrate", "-m", model, spec, "-r", recipe, "-o", tmp_path / "set", "--format", "json"]
    assert halfbyte(*words) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert (manifest["asked"], manifest["seed"]) == ({"sequences": 24, "max_tokens": 64}, 3)
    assert [row["weight"] for row in manifest["sources"]] == [0.75, 0.25]
    codes = [warning["code"] for warning in manifest["warnings"]]
    assert codes[:2] == ["weights", "tokens"], "24 sequences are no matter for NVFP4"
    assert halfbyte(*words, "--force", "--max-tokens", 80, "--seed", 4) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert (manifest["asked"]["max_tokens"], manifest["seed"]) == (80, 4)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["c4.jsonl:0"], 2, "weight 0 of c4.jsonl"),
        (["no.jsonl"], 2, "does not exist"),
        (["c4.jsonl:field=txt"], 2, "c4.jsonl line 1 has no field 'txt': did you mean 'text'?"),
        (["c4.jsonl", "--held-out", "no.txt"], 2, "no.txt does not exist"),
        (["c4.jsonl", "--held-out", "c4.jsonl"], 1, "words in a row with c4.jsonl"),
        (["c4.jsonl", "--allow-contamination", "--drop-contaminated"], 2, "give one"),
        (["c4.jsonl", "--near-duplicates", "many"], 2, "give a similarity such as 0.8, or off"),
        (["c4.jsonl", "--language", "english"], 2, "'english' cannot be told apart"),
        (["c4.jsonl", "--sequences", "9999"], 1, "too few calibration tokens"),
        (["c4.jsonl", "-r", "B9"], 2, "there is no recipe"),
        (["garbage.jsonl"], 1, "garbage.jsonl line 1 is not UTF-8"),
        (["garbage.parquet"], 2, "is no Parquet file"),
    ],
)
def test_a_wrong_request_is_one_line(
    model: Path, texts: Any, tmp_path: Path, words: list[str], code: int, says: str, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("garbage.jsonl", "garbage.parquet"):
        (tmp_path / name).write_bytes(b"\xff" + random.Random(0).randbytes(5000))
    assert halfbyte("calibrate", "-m", model, *words, "--max-tokens", 128, "-o", "out") == code
    shown = capsys.readouterr()
    line = shown.err.splitlines()[-1]
    assert line.startswith("halfbyte: ") and says in line and "Traceback" not in shown.err and shown.out == ""
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_interrupted_write_leaves_no_set(model: Path, texts: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device", "x")

    words = ["calibrate", "-m", model, texts[0], "-o", tmp_path / "set", "--sequences", 8, "--max-tokens", 128]
    assert halfbyte(*words) == 0
    monkeypatch.setattr("halfbyte.files.os.replace", fail)
    assert halfbyte(*words, "--force", "--seed", 1) == 1
    assert not (tmp_path / "set" / "manifest.json").exists(), "an old manifest beside new tokens"


def test_the_summary_leaves_out_steps_that_changed_nothing() -> None:
    steps = [
        {"step": "read", "documents": 9},
        {"step": "exact duplicates", "documents": 9},
        {"step": "length", "documents": 7},
    ]
    row = {"name": "a", "in_domain": False, "steps": steps, "sequences": 3, "tokens": 99, "share": 1.0, "weight": 1.0}
    manifest = {
        "sequences": 3,
        "tokens": 99,
        "sha256": "0" * 64,
        "sources": [row],
        "histogram": [],
        "warnings": [{"code": "x", "message": "look"}],
        "contamination": None,
        "coverage": {"vocabulary": 0.1, "candidates": 0.9, "in_domain": None, "held_out": None},
        "diversity": {"distinct_4grams": 0.9, "compression": 2.5},
    }
    shown = set_words(manifest, Path("d"), "m", None)
    assert "exact duplicates" not in shown and "length" in shown and "warning: look" in shown
    assert "coverage: 10.0% of the vocabulary, 90.00% of the candidates' tokens\n" in shown


def test_the_model_writes_where_all_else_is_computed(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    where, load_model = [], quantize.load_model

    def load(path: Path, device: str = "cpu") -> Any:
        where.append(device)
        return load_model(path)

    monkeypatch.setattr("halfbyte.models.library.load_model", load)
    monkeypatch.setattr(quantize, "device_of", lambda asked: asked or "the GPU")
    words = ["calibrate", "-m", model, "--sequences", "4", "--max-tokens", "32"]
    assert (
        halfbyte(*words, "-o", tmp_path / "a") == 0 and halfbyte(*words, "-o", tmp_path / "b", "--device", "cpu") == 0
    )
    assert where == ["the GPU", "cpu"]
