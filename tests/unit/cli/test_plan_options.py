"""`plan`: levels, budgets, ranks, versions, evidence and platform files reach the plan and its commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from halfbyte.platforms import load_platform
from tests.unit.artifacts import halfbyte
from tests.unit.sparse import LLAMA_8B, MIXTRAL, make_sparse


def test_levels_budgets_and_ranks(model: Path, as_json: Any) -> None:
    result = as_json("plan", model, "--on", "h100", "--concurrency", "64,1", "--gate", "ppl=+1%", "--tp", "2")
    asked = result["request"]
    assert (asked["levels"], asked["concurrency"], asked["tp"]) == ([1, 64], 64, 2)
    assert asked["gates"] == {"ppl": 0.01, "top1": 0.9}, "run measures no others unless they are stated"
    assert result["recipe"]["boundary"]["keep"] == "projections"
    line = " ".join(result["commands"]["h100"].replace("\\\n", " ").split())
    assert "--tensor-parallel-size 2" in line and "--max-num-seqs 64" in line and f"runs/{model.name}/model" in line


def test_a_command_keeps_within_the_models_positions(model: Path, as_json: Any) -> None:
    assert "--max-model-len 256" in as_json("plan", model, "--on", "cpu")["commands"]["cpu"]


def test_the_command_takes_the_kernel_that_measured_fastest(tmp_path: Path, as_json: Any) -> None:
    large = make_sparse(tmp_path / "m", LLAMA_8B)
    result = as_json("plan", large, "--on", "h100", "--concurrency", "1,64")
    assert "--linear-backend humming" in result["commands"]["h100"]
    assert [gain["kernel"] for gain in result["speed"][0]["served"]] == ["Humming"] * 2
    (own,) = load_platform("h100").speed
    best = ("modelopt", "Marlin, FP8 KV cache")
    rows = tuple(
        row.model_copy(update={"seconds": dict.fromkeys(row.seconds, 0.2 if (row.format, row.kernel) == best else 1.0)})
        for row in own.rows
    )
    newer = own.model_copy(update={"rows": rows, "date": own.date.replace(year=own.date.year + 1)})
    (tmp_path / "own.json").write_text(newer.model_dump_json(by_alias=True))
    other = as_json("plan", large, "--on", "h100", "--concurrency", "1,64", "--evidence", tmp_path / "own.json")
    assert "--linear-backend" not in other["commands"]["h100"]
    assert {gain["gain"] for gain in other["speed"][0]["served"]} == {5.0}


def test_nvfp4_of_compressed_tensors_is_told_once(tmp_path: Path, as_json: Any) -> None:
    large = make_sparse(tmp_path / "m", LLAMA_8B)
    words = ["-r", "A1", "--set", "format=compressed-tensors", "--on", "h100", "--concurrency", "64"]
    result = as_json("plan", large, *words)
    told = [(row["method"], row["kernel"]) for row in result["speed"][0]["rows"]]
    assert len(told) == len(set(told)) and ("nvfp4", "Humming") in told
    assert "--linear-backend humming" in result["commands"]["h100"]


def test_figures_of_another_size_are_not_the_other_recipes_reasons(model: Path, tmp_path: Path, as_json: Any) -> None:
    large = make_sparse(tmp_path / "m", LLAMA_8B)
    far, near = (as_json("plan", path, "--on", "h100", "--concurrency", "64") for path in (model, large))
    assert "1.18x at 64 (Machete, FP8 KV cache, measured on Llama-3.1-8B shape)" in near["alternatives"][0]["reason"]
    assert not any("measured" in other["reason"] + other["source"] for other in far["alternatives"])
    told = {warning["rule"]: warning["text"] for warning in far["warnings"]}
    assert "another size" in told["kernel-flag"] and "1.29x" not in told["kernel-flag"] and "slower" not in told
    mine = {**json.loads(load_platform("h100").speed[0].model_dump_json(by_alias=True)), "date": "2027-01-01"}
    mine["rows"] = [row for row in mine["rows"] if row["format"] in ("bf16", "modelopt")]
    mine["model"]["name"] = "mine"
    (tmp_path / "own.json").write_text(json.dumps(mine))
    words = ("--on", "h100", "--concurrency", "64", "--evidence", tmp_path / "own.json")
    (gptq, *_) = as_json("plan", large, *words)["alternatives"]
    assert "2026-11-25" in gptq["source"] and "2027" not in gptq["source"], "a figure's source is the file it stands in"


def test_evidence_in_the_cache_is_found(model: Path, tmp_path: Path, monkeypatch: Any, as_json: Any) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path))
    own = load_platform("h100").speed[0].model_copy(update={"vllm": "9.0.0", "since": "9.0", "before": "9.1"})
    words = ["plan", model, "--on", "h100", "--vllm-version", "9.0.0"]
    assert as_json(*words)["speed"][0]["evidence"] is None
    (tmp_path / "evidence").mkdir()
    (tmp_path / "evidence" / "own.json").write_text(own.model_dump_json(by_alias=True))
    assert "vLLM 9.0.0" in as_json(*words)["speed"][0]["evidence"]


def test_a_platform_file(model: Path, tmp_path: Path, as_json: Any) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("like: h100\nname: mine\nmemory_gib: 141\nbandwidth_gbs: 4800\n")
    result = as_json("plan", model, "--on", file)
    assert result["request"]["platforms"] == ["mine"] and "mine" in result["commands"]
    assert result["speed"][0]["served"][0]["basis"] == "roofline"


def test_a_mixture_of_experts_has_a_next_step(tmp_path: Path, capsys: Any) -> None:
    assert halfbyte("plan", make_sparse(tmp_path / "m", MIXTRAL), "--on", "h100", "--explain") == 0
    shown = capsys.readouterr().out
    assert "8 experts a block" in shown and "next: halfbyte run" in shown


def test_wrong_values_are_one_line(model: Path, refused: Any) -> None:
    for option, value, says in (
        ("--concurrency", "1,x", "write whole numbers"),
        ("--concurrency", "0", "above 0"),
        ("--tp", "3", "does not divide the 4 attention heads"),
        ("--vllm-version", "new", "no vLLM version"),
        ("--gate", "ppl", "ppl=+5%"),
        ("--on", "x.yaml", "cannot be read"),
    ):
        assert says in refused(2, "plan", model, "--on", "h100", option, value)
