"""What a run's gates on speed and stability have measured, on the stand-in for vLLM."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import HalfbyteError
from halfbyte.experiments import bench_rows
from halfbyte.experiments.gates import resolve_gates
from halfbyte.experiments.measurements import Subject, available
from halfbyte.files import locked
from halfbyte.platforms import load_platform
from halfbyte.types import Quiet
from tests.tiny import make_tiny
from tests.unit.artifacts import edit_json
from tests.unit.fake_vllm import make_fake


def subject(out: Path, gates: list[str], **more: Any) -> Subject:
    known: dict[str, Any] = dict.fromkeys(Subject.__dataclass_fields__)
    known |= {"path": out / "base", "artifact": out / "model", "out": out, "gates": tuple(resolve_gates(gates))}
    known |= {"platforms": (load_platform("h100"), load_platform("cpu")), "progress": Quiet(), "options": {}}
    return Subject(**{**known, **more})


def test_levels_are_those_of_the_gates(tmp_path: Path) -> None:
    def levels(gates: list[str], **more: Any) -> list[int]:
        return bench_rows.levels(subject(tmp_path, gates, **more))

    assert levels(["speed@4=+10%", "memory@2=1GiB", "speed@2=+5%"]) == [2, 4], "stated ones replace the default"
    assert levels([], concurrency=9) == [1, 9]
    assert levels([], options={"bench": ""}) == [1, 4]
    assert levels(["stability"]) == [1, 4]
    assert bench_rows.watch_of(subject(tmp_path, [])) is None
    with pytest.raises(HalfbyteError, match="no GPU and is none of h100"):
        bench_rows.here((load_platform("h100"),))


def test_a_run_measures_speed_and_stability_with_the_same_servers(tmp_path: Path, monkeypatch: Any) -> None:
    base = make_tiny("llama", tmp_path / "base", max_position_embeddings=512)
    made = Path(shutil.copytree(base, tmp_path / "model"))
    edit_json(made / "config.json", lambda tree: tree.update(quantization_config={"quant_method": "gptq", "bits": 4}))
    monkeypatch.setattr(bench_rows, "SECONDS", 0.1)
    asked = subject(tmp_path, ["speed@2=+60%", "stability"], concurrency=2, vllm=str(make_fake(tmp_path / "env")))
    rows = available()
    with locked(tmp_path):
        told = rows["bench.json"].make(asked)
        stable = rows["stability.json"].make(asked)
    assert [point["concurrency"] for point in told["points"]] == [2] and told["platform"] == "cpu"
    assert told["points"][0]["speedup"]["value"] == pytest.approx(1.7)
    assert stable["ok"] and stable["generations"] == 32 and stable["load"]["concurrency"] == 2
    assert [len((place / "starts").read_text().splitlines()) for place in (base, made)] == [1, 1]
    assert json.loads(json.dumps(rows["bench.json"].key(asked)))["concurrency"] == [2]


def test_without_a_vllm_it_is_a_reason(tmp_path: Path) -> None:
    with pytest.raises(HalfbyteError, match="does not exist"):
        bench_rows.bench(subject(tmp_path, ["speed@2=+60%"], vllm=str(tmp_path / "none")))
