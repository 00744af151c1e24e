"""The served comparison, with a stand-in for the probe; the real one runs in the integration tests."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate import Windows, compare_served, score_reference, write_served
from halfbyte.evaluate.served import judge
from tests.tiny import make_tiny

KEYS = {
    "schema", "kind", "status", "reason", "vllm", "command", "ppl_served", "ppl_reference",
    "relative_difference", "limit", "weight_gib_reported", "artifact_gib", "completion", "load_seconds", "passed",
}  # fmt: skip


@pytest.fixture
def artifact(tmp_path):
    path = make_tiny("llama", tmp_path / "artifact")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def windows():
    ids = [torch.randint(5, 261, (n,), generator=torch.Generator().manual_seed(n)) for n in (20, 12)]
    return Windows(ids, [torch.arange(len(i)) > 0 for i in ids], "x", 20, 20)


def stand_in(monkeypatch, artifact, windows, factor=1.0, weight=None, error=None):
    def load(directory, **_):
        config = json.loads((Path(directory) / "config.json").read_text())
        config.pop("quantization_config", None)
        (Path(directory) / "config.json").write_text(json.dumps(config))
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def probe(directory, format_name, ids, **_):
        if error:
            raise error
        assert format_name == "gptq" and ids == [i.tolist() for i in windows.ids]
        served = score_reference(load(directory), windows)["perplexity"] * factor
        return {"ppl_served": served, "completion": "x", "weight_gib_reported": weight, "load_seconds": 1.0,
                "vllm": "0", "command": ["/some/where/vllm", "serve", str(directory), "--port", "1"]}  # fmt: skip

    monkeypatch.setattr("halfbyte.serving.find_vllm", lambda named=None: SimpleNamespace(version="0"))
    monkeypatch.setattr("halfbyte.serving.probe", probe)
    monkeypatch.setattr("halfbyte.artifact.load_fake_quantized", load, raising=False)


@pytest.mark.parametrize(("factor", "passed"), [(1.0, True), (1.004, True), (1.006, False), (float("nan"), False)])
def test_served_perplexity_within_the_limit(monkeypatch, artifact, windows, tmp_path, factor, passed):
    stand_in(monkeypatch, artifact, windows, factor)
    found = compare_served(artifact, windows, log_path=tmp_path / "log")
    assert found["status"] == "served" and found["passed"] is passed and bool(found["reason"]) is not passed
    assert set(found) == KEYS and found["limit"] == 0.005 and found["artifact_gib"] > 0
    assert found["command"] == ["vllm", "serve", "artifact", "--port", "1"], "it says where things lie"
    if passed:
        assert json.loads(write_served(tmp_path, found).read_text()) == found


def test_weights_that_are_too_large_fail():
    facts = {"ppl_served": 10.0, "artifact_gib": 5.4, "weight_gib_reported": 15.0}
    assert "not loaded in 4 bits" in judge(facts, 10.0)["reason"]
    assert judge({**facts, "weight_gib_reported": 5.5}, 10.0)["passed"]
    assert judge({**facts, "weight_gib_reported": None}, 10.0)["passed"]


def test_vllm_that_does_not_start_is_a_result(monkeypatch, artifact, windows, tmp_path):
    stand_in(monkeypatch, artifact, windows, error=HalfbyteError("vLLM died: no kernel"))
    found = compare_served(artifact, windows, log_path=tmp_path / "log")
    assert (found["status"], found["reason"], found["passed"]) == ("not served", "vLLM died: no kernel", False)
    assert set(found) == KEYS


def test_no_vllm_is_a_result_and_a_wrong_name_an_error(monkeypatch, artifact, windows, tmp_path):
    def missing(named=None):
        raise UsageError("--vllm: no") if named else HalfbyteError("no vLLM found")

    monkeypatch.setattr("halfbyte.serving.find_vllm", missing)
    found = compare_served(artifact, windows, log_path=tmp_path / "log")
    assert (found["status"], found["reason"], found["passed"]) == ("not served", "no vLLM found", False)
    with pytest.raises(UsageError):
        compare_served(artifact, windows, vllm="/nowhere", log_path=tmp_path / "log")
