"""Each command does what it says: results for people on stdout, JSON that is JSON, the next command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import make_tiny
from tests.unit.artifacts import halfbyte
from tests.unit.fake_vllm import VERSION, make_fake


def test_plan(model: Path, capsys: Any, as_json: Any) -> None:
    result = as_json("plan", model, "--on", "h100", "--on", "mi325x", "--context", "128", "--concurrency", "4")
    assert result["kind"] == "plan" and set(result["commands"]) == {"h100", "mi325x"}
    assert result["bytes"]["after"] < result["bytes"]["before"] and result["request"]["context"] == 128
    given = as_json("plan", model, "--on", "cpu", "-r", "B3", "--set", "ignore+=re:.*down_proj")
    assert given["recipe"]["group_size"] == 64 and given["recipe"]["ignore"] == ["lm_head", "re:.*down_proj"]
    assert halfbyte("plan", model, "--on", "h100") == 0
    shown = capsys.readouterr()
    assert "vllm serve" in shown.out and f"next: halfbyte run {model} --on h100" in shown.out and shown.err == ""
    assert "the model writes its own calibration text" in shown.out


def test_plan_takes_the_words_of_run(model: Path, tmp_path: Path, capsys: Any, as_json: Any) -> None:
    text = tmp_path / "own.txt"
    text.write_text("words")
    words = ["plan", model, "--on", "cpu", "--text", text]
    assert as_json(*words)["request"]["text_given"] is True
    assert halfbyte(*words) == 0
    shown = capsys.readouterr().out
    assert f"--text {text}" in shown and "the model writes its own" not in shown


def test_plan_names_the_model_as_it_was_typed(
    model: Path, tmp_path: Path, capsys: Any, as_json: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfbyte.models.resolve_model", lambda *_: model)
    plan = as_json("plan", "smollm2-135m", "--on", "cpu")["model"]
    assert (plan["name"], plan["path"]) == ("smollm2-135m", str(model))
    assert halfbyte("plan", "smollm2-135m", "--on", "cpu") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("smollm2-135m: llama") and str(model) not in shown


def test_calibrate(model: Path, tmp_path: Path, capsys: Any, as_json: Any) -> None:
    text = tmp_path / "t.txt"
    text.write_text("\n\n".join(f"Paragraph {i}: " + "words and words, " * 12 for i in range(30)))
    words = ["calibrate", "-m", model, text, "--sequences", 20, "--max-tokens", 64]
    manifest = as_json(*words, "-o", tmp_path / "a")
    assert manifest == json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["source"]["kind"] == "text" and manifest["longest"] <= 64
    assert halfbyte(*words, "-o", tmp_path / "a") == 2
    assert halfbyte(*words, "-o", tmp_path / "a", "--force", "--strategy", "stream") == 0
    assert "20 sequences, 1,280 tokens" in capsys.readouterr().out
    own = as_json("calibrate", "-m", model, "-o", tmp_path / "own", "--sequences", 8, "--max-tokens", 48)
    assert own["source"]["kind"] == "self-generated" and own["tokens"] >= 200


def test_quantize_and_eval(model: Path, calibration: Path, tmp_path: Path, capsys: Any, as_json: Any) -> None:
    words = ["quantize", model, "-r", "B3", "--calibration", calibration, "-o", tmp_path / "out"]
    manifest = as_json(*words)
    assert manifest["kind"] == "manifest" and manifest["command"].startswith(f"halfbyte quantize {model.name} -r B3")
    assert halfbyte(*words) == 0
    last = capsys.readouterr().out.splitlines()
    assert str(tmp_path / "out") in last[0] and "bits a quantized weight" in last[0] and "worst" in last[1]
    assert last[2] == f"next: halfbyte check {tmp_path / 'out'} --serve"
    text = tmp_path / "t.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    scored = ["eval", tmp_path / "out", "--text", text, "--window", 64, "--windows", 4, "-o", tmp_path / "e"]
    result = as_json(*scored)
    assert result == json.loads((tmp_path / "e" / "eval.json").read_text()) and result["baseline"] == model.name
    assert result["text"]["windows"] == 4 and result["metrics"]["kl_mean"]["value"] > 0
    assert halfbyte(*scored) == 0
    assert "top-1 agreement" in capsys.readouterr().out


def test_serve_prints_the_command(made: Path, no_vllm: None, capsys: Any, as_json: Any) -> None:
    assert halfbyte("serve", made, "--on", "cpu", "--print", "--port", 8123, "--", "--seed", "3") == 0
    line = capsys.readouterr().out
    assert f"vllm serve {made}" in line and "--port 8123" in line and line.rstrip().endswith("--seed 3")
    told = " ".join(as_json("serve", made, "--on", "h100", "--print", "--", "-tp", "2")["notes"])
    assert "a measurement on a model of another size" in told and "x the speed of BF16" not in told
    value = as_json("serve", made, "--on", "h100", "--print", "--context", "64", "--", "--seed", "3")
    assert value["argv"][:3] == ["vllm", "serve", str(made)] and value["argv"][-2:] == ["--seed", "3"]
    assert value["argv"][value["argv"].index("--max-model-len") + 1] == "64"


def test_ls(capsys: Any, as_json: Any) -> None:
    expected = {"recipes": "B1", "platforms": "h100", "methods": "gptq"}
    for what, one in expected.items():
        rows = as_json("ls", what)
        assert one in rows and all(isinstance(line, str) and line for line in rows.values())
        assert halfbyte("ls", what) == 0
        shown = capsys.readouterr().out.splitlines()
        assert len(shown) == len(rows) and [line.split()[0] for line in shown] == list(rows)


def test_env(no_vllm: None, tmp_path: Path, capsys: Any, as_json: Any) -> None:
    found = as_json("env")
    assert found["torch"] == torch.__version__ and found["vllm"] is None and "no vLLM found" in found["vllm_facts"]
    assert as_json("env", "--vllm", make_fake(tmp_path / "fake"))["vllm"] == VERSION
    assert halfbyte("env") == 0
    assert "torch" in capsys.readouterr().out


def test_report_of_a_run_directory(made: Path, tmp_path: Path, as_json: Any) -> None:
    shutil.copytree(made, tmp_path / "run" / "model")
    result = as_json("report", tmp_path / "run")
    assert result == {"html": str(tmp_path / "run" / "report.html"), "markdown": str(tmp_path / "run" / "report.md")}
    assert all(Path(path).is_file() for path in result.values())


def test_report_of_an_artifact_goes_beside_it(
    made: Path, tmp_path: Path, as_json: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made, tmp_path / "mine")
    before = sorted(p.name for p in (tmp_path / "mine").iterdir())
    expected = {kind: tmp_path / f"mine-report.{end}" for kind, end in (("html", "html"), ("markdown", "md"))}
    assert as_json("report", tmp_path / "mine") == {kind: str(path) for kind, path in expected.items()}
    monkeypatch.chdir(tmp_path / "mine")
    assert as_json("report", ".") == {kind: str(path) for kind, path in expected.items()}
    assert all(path.is_file() for path in expected.values())
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == before and as_json("check", ".")["ok"]


def test_another_group_size_than_the_recipes_is_said(tmp_path: Path, calibration: Path, capsys: Any) -> None:
    """B1 wants 128 and takes 64 where that does not divide; sweep and plan say so too."""
    odd = make_tiny("llama", tmp_path / "odd", hidden_size=192, num_attention_heads=4, num_key_value_heads=2)
    words = ("-r", "B1", "--set", "method=rtn", "--calibration", calibration, "-o", tmp_path / "out")
    assert halfbyte("quantize", odd, *words) == 0
    said = "group 128 does not divide 192 inputs: groups of 64 there"
    assert said in capsys.readouterr().err
    assert said in json.loads((tmp_path / "out" / "halfbyte.json").read_text())["notices"]


def test_each_command_names_the_next_one(made: Path, model: Path, tmp_path: Path, capsys: Any) -> None:
    text = Path(__file__)
    results = tmp_path / "results"
    assert halfbyte("check", made, "--text", text, "-o", results) == 0
    assert capsys.readouterr().out.endswith(f"next: halfbyte eval {made} --text {text} -o {results}\n")
    assert halfbyte("check", made) == 0
    assert capsys.readouterr().out.endswith(f"next: halfbyte eval {made}\n")
    words = ("eval", made, "--baseline", model, "--text", text, "--window", 16, "--windows", 2)
    assert halfbyte(*words, "-o", results) == 0
    assert capsys.readouterr().out.endswith(f"next: halfbyte report {made}\n")


def test_check_says_at_once_what_a_platform_cannot_load(
    tmp_path: Path, model: Path, monkeypatch: Any, as_json: Any, refused: Any
) -> None:
    """No text is written, and nothing is started, for what is refused anyway."""
    out = tmp_path / "nvfp4"
    assert halfbyte("quantize", model, "-r", "A1", "--set", "rounding=rtn", "--set", "scaling=none", "-o", out) == 0
    monkeypatch.setattr("halfbyte.experiments.run.own_windows", lambda *_: pytest.fail("it wrote its own text"))
    vllm = make_fake(tmp_path / "env")
    served = as_json("check", out, "--serve", "--on", "cpu", "--vllm", vllm, code=1)["served"]
    assert served["status"] == "not served" and "no CPU kernel for NVFP4" in served["reason"]
    monkeypatch.setattr("halfbyte.evaluate.speed_machine.device_name", lambda *_: "AMD Instinct MI325X")
    assert "is not h100" in refused(1, "check", out, "--serve", "--on", "h100", "--vllm", vllm)
