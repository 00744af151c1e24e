"""The main job on a real model: SmolLM2-135M in BF16 in, 4-bit checkpoints that real vLLM serves out."""

from __future__ import annotations

import argparse
import decimal
import email.message
import json
import logging
import os
import statistics
import subprocess
import unittest
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from halfbyte import Recipe, quantize
from halfbyte.artifact import check_artifact
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate import Windows, compare_served, text_windows
from halfbyte.evaluate.speed import MODEL, BenchRequest, Variant
from halfbyte.evaluate.speed_result import write_bench
from halfbyte.evaluate.speed_runs import measure
from halfbyte.evaluate.stability import Watch
from halfbyte.models import Checkpoint, resolve_model
from halfbyte.models.library import load_tokenizer
from halfbyte.plan import make_plan
from halfbyte.platforms import load_platform
from halfbyte.serving import find_vllm

DATA = Path(os.environ.get("HALFBYTE_DATA") or Path(__file__).parents[3] / "shared" / "data")
WINDOW, WINDOWS = 512, 9
CALIBRATION = {"sequences": 16, "max_tokens": 256}
RECIPES = {
    "gptq": {"method": "gptq", "scaling": "none", "group_size": 64, "calibration": CALIBRATION},
    "awq": {"method": "awq", "rounding": "rtn", "group_size": 64, "calibration": CALIBRATION},
}


@pytest.fixture(scope="module")
def model() -> Path:
    try:
        return resolve_model("smollm2-135m")
    except HalfbyteError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def vllm() -> Any:
    try:
        return find_vllm()
    except HalfbyteError as error:
        pytest.skip(str(error))


def prose(modules: tuple[ModuleType, ...]) -> str:
    """English that every Python carries."""
    return "\n\n".join(getattr(value, "__doc__", None) or "" for module in modules for value in vars(module).values())


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    c4 = DATA / "calibration" / "c4.txt"
    if c4.is_file():
        return c4
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(prose((subprocess, email.message, statistics, decimal)))
    return path


@pytest.fixture(scope="module")
def windows(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Windows:
    path = tmp_path_factory.mktemp("text") / "judged.txt"
    path.write_text(prose((argparse, logging, unittest, subprocess, statistics, decimal)))
    found = text_windows([path], load_tokenizer(model), window=WINDOW).first(WINDOWS)
    assert sum(len(ids) - 1 for ids in found.ids) >= 4096
    return found


@pytest.fixture(scope="module", params=RECIPES)
def artifact(request: Any, model: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / request.param
    quantize("smollm2-135m", Recipe.model_validate(RECIPES[request.param]), out, [calibration])
    return out


def test_the_artifact_is_sound(artifact: Path, model: Path) -> None:
    found = check_artifact(artifact)
    assert found["ok"], found["findings"]
    manifest = json.loads((artifact / "halfbyte.json").read_text())
    planned = make_plan(Checkpoint(model), Recipe.model_validate(RECIPES[artifact.name]), [])["bytes"]
    assert manifest["bytes"] == planned["after"] < 0.5 * manifest["bytes_bf16"]
    assert manifest["bits_per_weight"] == pytest.approx(planned["bits_per_quantized_weight"], abs=1e-9)
    assert 4.25 < manifest["bits_per_weight"] < 4.4
    errors = [row["error"]["relative"] for row in manifest["linears"].values() if row["scheme"]]
    assert len(errors) == 210 and max(errors) < 0.2
    assert all("damping raised" in notice for notice in manifest["notices"])
    assert manifest["peak_rss_mib"] < 4096


@pytest.mark.vllm
def test_real_vllm_computes_what_the_artifact_says(artifact: Path, windows: Windows, vllm: Any, tmp_path: Path) -> None:
    served = compare_served(artifact, windows, platform="cpu", vllm=str(vllm.executable), log_path=tmp_path / "log")
    assert served["status"] == "served", served["reason"]
    print(f"{artifact.name}: served {served['ppl_served']:.4f}, reference {served['ppl_reference']:.4f}")
    assert served["passed"] and served["relative_difference"] <= 0.005, served["reason"]
    assert served["vllm"] == vllm.version and 5 < served["ppl_served"] < 60
    assert served["completion"].strip()


@pytest.mark.vllm
@pytest.mark.parametrize("artifact", ["gptq"], indirect=True)
def test_real_vllm_is_benched(artifact: Path, vllm: Any, tmp_path: Path) -> None:
    """One server, a few requests: vLLM takes the load's words, its result and its log are read."""
    watch = Watch(2, seconds=1.0, tokens=48, prompts=2)
    variants = (Variant(MODEL, artifact),)
    request = BenchRequest(
        variants, load_platform("cpu"), (1, 2), input_tokens=32, output_tokens=16, requests=2, repeats=2, watch=watch
    )
    result, stable = write_bench(tmp_path, measure(request, tmp_path, vllm))
    for point in result["points"]:
        entry = point["model"]
        assert entry["status"] == "ok", entry["reason"]
        assert (entry["completed"], entry["failed"]) == (4, 0)
        rate = entry["output_tokens_per_second"]
        assert 0 < rate["low"] < rate["value"] < rate["high"]
        assert rate["value"] == pytest.approx(16 * entry["requests_per_second"]["value"], rel=0.02)
        assert entry["total_tokens_per_second"]["value"] == pytest.approx(3 * rate["value"], rel=0.1)
        for name in ("ttft_ms", "itl_ms", "e2el_ms"):
            assert 0 < entry[name]["p50"] <= entry[name]["p95"] <= entry[name]["p99"]
        assert entry["ttft_ms"]["p50"] < entry["e2el_ms"]["p50"]
    assert result["kernels"]["model"] == ["CPUWNA16LinearKernel"]
    assert result["memory"]["model"]["kv_cache_tokens"] > request.context
    assert result["memory"]["model"]["peak_device_bytes"] > 1 << 28
    assert stable is not None and stable["generations"] == 4 and stable["empty"]["model"] == 0
    assert stable["load"]["status"] == "ok" and stable["load"]["requests"] >= 2, stable["load"]
    assert stable["ok"], stable["reasons"]
