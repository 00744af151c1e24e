"""A bench that is stopped, by Ctrl-C or by --seconds: what was measured is told, and the same command goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from halfbyte.evaluate.speed import BASELINE, MODEL, BenchRequest, Variant
from halfbyte.evaluate.speed_evidence import write_evidence
from halfbyte.evaluate.speed_result import bench_result, write_bench
from halfbyte.evaluate.speed_runs import INTERRUPTED, OVER, measure
from halfbyte.evaluate.stability import Watch
from halfbyte.experiments.gate_kinds import parse_gate
from halfbyte.experiments.gate_readers import read
from halfbyte.platforms import load_platform
from halfbyte.platforms.evidence import read_table
from halfbyte.serving import find_vllm
from tests.tiny import make_tiny
from tests.unit.artifacts import edit_json
from tests.unit.fake_vllm import make_fake
from tests.unit.test_serving_process import gone


@pytest.fixture
def install(tmp_path: Path) -> Any:
    return find_vllm(str(make_fake(tmp_path / "env")))


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A BF16 model, and one whose config says gptq."""
    base = make_tiny("llama", tmp_path / "base")
    made = Path(shutil.copytree(base, tmp_path / "made"))
    stated = {"quant_method": "gptq", "bits": 4}
    edit_json(made / "config.json", lambda tree: tree.update(quantization_config=stated))
    return base, made


class Stopper:
    """A Progress in which Ctrl-C is pressed after so many runs."""

    def __init__(self, runs: int) -> None:
        self.left, self.stage = runs, ""

    def start(self, label: str, total: int) -> None:
        self.stage = label

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.left -= self.stage.startswith("measuring")
        if self.left == 0 and self.stage.startswith("measuring"):
            raise KeyboardInterrupt

    def say(self, message: str) -> None:
        pass


def asked(models: Any, **changes: Any) -> BenchRequest:
    variants = (Variant(BASELINE, models[0]), Variant(MODEL, models[1]), Variant("awq", models[1], ("--seed", "1")))
    return BenchRequest(variants, load_platform("cpu"), (1, 2), 8, 4, 4, 2, **changes)


def test_what_was_measured_before_an_interrupt_is_told(install: Any, models: Any, tmp_path: Path) -> None:
    request = asked(models)
    with pytest.raises(KeyboardInterrupt):
        measure(request, tmp_path / "other", install, progress=Stopper(1))
    found = measure(request, tmp_path / "out", install, progress=Stopper(10), partial=True)
    assert found.stopped == INTERRUPTED and gone(models[0]) and gone(models[1])
    result = bench_result(found)
    assert result["text"][-1] == "interrupted: 10 of 12 runs were done; the same command goes on where it was"
    one, two = result["points"]
    assert one["speedup"] and two["speedup"] and one["configs"]["awq"]["status"] == "ok"
    assert (
        two["configs"]["awq"]["status"] == "not measured" and two["configs"]["awq"]["output_tokens_per_second"] is None
    )
    left_out = write_evidence(tmp_path / "evidence.json", found, result)
    table = read_table(tmp_path / "evidence.json")
    assert left_out == ["awq: not measured at every concurrency"] and set(table.rows[0].seconds) == {1, 2}
    before = [(models[index] / "benched").read_text().count("\n") for index in (0, 1)]
    whole = measure(request, tmp_path / "out", install)
    after = [(models[index] / "benched").read_text().count("\n") for index in (0, 1)]
    assert not whole.stopped and [b - a for a, b in zip(before, after)] == [0, 2], "only what was left is done"
    assert write_evidence(tmp_path / "evidence.json", whole, bench_result(whole)) == []


def test_a_stopped_bench_does_not_replace_what_tells_more(install: Any, models: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = measure(asked(models), out, install)
    whole, _ = write_bench(out, found)
    assert write_evidence(out / "evidence.json", found, whole) == []
    rows = len(read_table(out / "evidence.json").rows)
    cut = measure(asked(models, seed=1), out, install, progress=Stopper(2), partial=True)
    result, _ = write_bench(out, cut)
    assert result["runs_done"] == 2 and json.loads((out / "bench.json").read_text()) == whole
    more = measure(asked(models, seed=1), out, install, progress=Stopper(7), partial=True)
    left_out = write_evidence(out / "evidence.json", more, bench_result(more))
    assert left_out[-1].endswith("is kept as it was") and len(read_table(out / "evidence.json").rows) == rows
    (out / "bench.json").write_text("{")
    write_bench(out, cut)
    assert json.loads((out / "bench.json").read_text()) == result
    gate = parse_gate("speed@1=+20%")
    absent = {**result, "points": [{"concurrency": 1, "model": {"status": "not measured"}, "baseline": {}}]}
    broken = {**result, "points": [{"concurrency": 1, "model": {"status": "crashed"}, "baseline": {}}]}
    for tree, passed in ((absent, None), (broken, False)):
        assert [read(gate, part, {"bench.json": tree}).passed for part in gate.kind.pieces().values()] == [passed]


def test_no_run_begins_after_the_time(install: Any, models: Any, tmp_path: Path, monkeypatch: Any) -> None:
    request = asked(models, watch=Watch(2, tokens=8, prompts=1))
    found = measure(request, tmp_path / "out", install, seconds=0)
    result, stable = write_bench(tmp_path / "out", found)
    assert found.stopped == OVER and not any(job.result for job in found.jobs) and stable is None
    assert not list((tmp_path / "out").rglob("vllm-*.log")), "no server was started"
    monkeypatch.setenv("FAKE", "hang")
    found = measure(request, tmp_path / "out", install, seconds=2)
    assert found.stopped == OVER and not any(job.result for job in found.jobs), "a slow start is no failure"
    assert result["points"][0]["model"]["status"] == "not measured"
