"""`run` climbs the ladder on a real tiny model: the best is what its recipe gives alone, and kills change nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import halfbyte.artifact.writer as writer
import halfbyte.engine.loop as loop
import halfbyte.evaluate.speed_machine as speed_machine
import halfbyte.experiments.ground as ground
import halfbyte.experiments.measurements as measurements
import halfbyte.experiments.served_measurements as served_measurements
from halfbyte.errors import HalfbyteError
from halfbyte.experiments.cards import card_results
from halfbyte.experiments.measurements import Measurement, Subject
from tests.tiny import make_tiny
from tests.unit.artifacts import digests, halfbyte, without_vllm
from tests.unit.fake_vllm import make_fake
from tests.unit.forked import SHARD_BYTES, run_forked

QUALITY = ["--gate", "ppl=off", "--gate", "top1=off"]
RUNGS = ["calibration", "group", "group", "boundary-projections", "boundary-blocks", "sensitive-linears"]
GENEROUS = ["--gate", "ppl=+100000%", "--gate", "top1=0%"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three blocks, a text, and a recipe with room above it on every rung."""
    root = tmp_path_factory.mktemp("climb")
    make_tiny("llama", root / "m", num_hidden_layers=3, max_position_embeddings=1024)
    paragraphs = (f"Paragraph {i} says: " + f"{i * 7} words and more, " * 20 for i in range(60))
    (root / "own.txt").write_text("\n\n".join(paragraphs))
    recipe = {"method": "gptq", "group_size": 128, "calibration": {"sequences": 40, "max_tokens": 64}}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No vLLM anywhere; one cache for this file."""
    without_vllm(monkeypatch, tmp_path_factory.getbasetemp() / "climb-cache")


def words(place: Path, out: Path, *more: str, on: str = "cpu") -> list[str]:
    request = ["run", str(place / "m"), "--on", on, "-r", str(place / "recipe.yaml"), "--text", str(place / "own.txt")]
    return [*request, "-o", str(out), *more]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def figures(directory: Path) -> dict[str, Any]:
    return {key: value for key, value in read(directory / "eval.json").items() if key != "seconds"}


def course(directory: Path) -> Any:
    """mitigation.json without its seconds and the key, which holds the text's time of change."""
    result = read(directory / "mitigation.json")
    for row in [*result["ladder"], result["final"]]:
        row["cost"].pop("seconds")
    return {name: value for name, value in result.items() if name != "key"}


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A climb to the top, with the number of blocks that each artifact took to solve."""
    out, solved, made = tmp_path_factory.mktemp("whole") / "run", [], ground.quantize
    solve_block = loop.solve_block

    def counting(*args: Any, **more: Any) -> Any:
        count[0] += 1
        return solve_block(*args, **more)

    def quantize(*args: Any, **more: Any) -> Any:
        count[0] = 0
        manifest = made(*args, **more)
        solved.append(count[0])
        return manifest

    count = [0]
    with pytest.MonkeyPatch.context() as patch:
        without_vllm(patch, tmp_path_factory.getbasetemp() / "climb-cache")
        patch.setattr(loop, "solve_block", counting)
        patch.setattr(ground, "quantize", quantize)
        code = halfbyte(*words(place, out, *QUALITY, "--gate", "kl=0.000001", "--budget", "12"))
    yield {"out": out, "code": code, "solved": solved}


def test_to_the_top(whole: dict[str, Any], place: Path, tmp_path: Path, capsys: Any) -> None:
    """Every rung is climbed, each from the best so far; the best is model/, and is what its recipe gives alone."""
    out, result = whole["out"], read(whole["out"] / "mitigation.json")
    assert whole["code"] == 3 and [row["rung"] for row in result["ladder"]] == RUNGS
    assert all(row["kept"] for row in result["ladder"][1:]), [row["verdict"] for row in result["ladder"]]
    assert whole["solved"] == [3, 3, 3, 2, 0, 1], "blocks solved at each step"
    told = [(row["cost"]["blocks_solved"], row["cost"]["blocks_reused"]) for row in result["ladder"]]
    assert told == [(3, 0), (3, 0), (3, 0), (2, 1), (0, 1), (1, 0)]
    best = result["start"]["gates"][0]["value"]
    for row in result["ladder"]:
        assert row["before"] == {"kl": best}
        best = row["after"]["kl"] if row["kept"] else best
    final = result["final"]
    assert final["verdict"] == "rejected" and final["values"] == {"kl": best} and best < 0.02
    manifest, gates = read(out / "model" / "halfbyte.json"), read(out / "gates.json")
    assert manifest["recipe"] == final["candidate"]["recipe"] == read(out / "plan.json")["recipe"]
    assert final["cost"]["bytes_added"] == manifest["bytes"] - result["start"]["bytes"] > 0
    assert gates["verdict"] == "rejected" and final["text"] in gates["text"]
    assert read(out / "plan.json")["reasons"][-1]["rule"] == "mitigation"
    assert not {"model-next", "model-best", "mitigation"} & {p.name for p in out.iterdir()}

    (tmp_path / "final.yaml").write_text(yaml.safe_dump(manifest["recipe"]))
    lone = words(place, tmp_path / "lone", "-r", str(tmp_path / "final.yaml"), *GENEROUS, "--no-mitigate")
    assert halfbyte(*lone) == 0
    assert digests(tmp_path / "lone" / "model") == digests(out / "model")
    assert figures(tmp_path / "lone") == figures(out)
    assert not (tmp_path / "lone" / "mitigation.json").exists()


def test_again_it_finds_everything(whole: dict[str, Any], place: Path, capsys: Any) -> None:
    before = {p: p.stat().st_mtime_ns for p in (whole["out"] / "model").iterdir() if p.name != "README.md"}
    again = words(place, whole["out"], *QUALITY, "--gate", "kl=0.000001", "--budget", "12", "--format", "json")
    assert halfbyte(*again) == 3
    assert json.loads(capsys.readouterr().out)["fresh"] == []
    assert before == {p: p.stat().st_mtime_ns for p in before}


def limit_of(whole: dict[str, Any], rung: str) -> str:
    """A gate that the last step of that rung just passes, and none before it."""
    rows = [row for row in read(whole["out"] / "mitigation.json")["ladder"] if row["rung"] == rung]
    return f"kl={rows[-1]['gates'][0]['high'] + 1e-9:.12f}"


@pytest.fixture(scope="module")
def counted(whole: dict[str, Any], place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A climb that the second step of smaller groups ends, and how many files it renamed into place."""
    out, replace, writes = tmp_path_factory.mktemp("counted") / "run", os.replace, [0]

    def counting(source: Any, target: Any) -> None:
        writes[0] += 1
        replace(source, target)

    gate = limit_of(whole, "group")
    with pytest.MonkeyPatch.context() as patch:
        without_vllm(patch)
        patch.setattr(writer, "SHARD_BYTES", SHARD_BYTES)
        patch.setattr(os, "replace", counting)
        code = halfbyte(*words(place, out, *QUALITY, "--gate", gate))
    yield {"out": out, "code": code, "writes": writes[0], "gate": gate}


def test_it_stops_when_the_gates_pass(counted: dict[str, Any], place: Path, capsys: Any) -> None:
    out, gate = counted["out"], counted["gate"]
    assert counted["code"] == 0
    assert [row["rung"] for row in read(out / "mitigation.json")["ladder"]] == RUNGS[:3]
    assert read(out / "model" / "config.json")["quantization_config"]["group_size"] == 32
    assert halfbyte(*words(place, out, *QUALITY, "--gate", gate)) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("Accepted: ") and "Mitigation changed" in shown.out.splitlines()[0]
    assert "group_size 64 -> 32: the gates pass (kl" in shown.out
    assert "Mitigation changed" in (out / "report.md").read_text()


def test_without_mitigation_the_recipe_stays(counted: dict[str, Any], place: Path, tmp_path: Path, capsys: Any) -> None:
    out = shutil.copytree(counted["out"], tmp_path / "run")
    assert halfbyte(*words(place, out, *QUALITY, "--gate", counted["gate"], "--no-mitigate")) == 3
    shown = capsys.readouterr()
    assert read(out / "model" / "config.json")["quantization_config"]["group_size"] == 128
    assert not (out / "mitigation.json").exists() and "choose a smaller group_size" in shown.out
    assert "the recipe that you named does not hold the gates" not in shown.err


def test_killed_in_the_climb_it_ends_the_same(counted: dict[str, Any], place: Path, tmp_path: Path) -> None:
    """All in children with one thread each. The points lie behind the first evaluation."""
    more = [*QUALITY, "--gate", counted["gate"]]
    jobs: list[dict[str, Any]] = [{"words": words(place, tmp_path / "whole", *more)}]
    points = [counted["writes"] * share // 100 for share in (40, 75, 90)]
    for at in points:
        mine = words(place, tmp_path / str(at), *more)
        jobs += [{"words": mine, "act": "kill", "at": at}, {"words": mine}]
    whole, *ended = run_forked(tmp_path, jobs)
    assert whole["status"] == 0, whole["stderr"]
    assert "the recipe that you named does not hold the gates" in whole["stderr"]
    for i, at in enumerate(points):
        out = tmp_path / str(at)
        assert ended[2 * i]["status"] == -9 and ended[2 * i + 1]["status"] == 0, (at, ended[2 * i + 1]["stderr"])
        assert "mitigation: " in ended[2 * i]["stderr"] and ended[2 * i + 1]["writes"] < whole["writes"], at
        assert course(out) == course(tmp_path / "whole"), at
        assert digests(out / "model") == digests(tmp_path / "whole" / "model"), at
        assert figures(out) == figures(tmp_path / "whole"), at
        assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}, at


@pytest.fixture()
def done(place: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """A copy of an accepted run for an H100."""
    kept = tmp_path_factory.getbasetemp() / "climb-done"
    if not kept.exists():
        assert halfbyte(*words(place, kept, *GENEROUS, on="h100")) == 0
    return Path(shutil.copytree(kept, tmp_path / "run"))


def producer(name: str, result: Any, climbs: bool = False) -> Measurement:
    """A measurement that says what it is told; each call is counted in `calls`."""

    def make(subject: Subject) -> dict[str, Any]:
        calls.append(subject)
        if isinstance(result, Exception):
            raise result
        return result

    calls: list[Subject] = []
    row = Measurement(name, f"{name.replace('-', '_')}.json", lambda subject: {"asked": subject.options}, make, climbs)
    object.__setattr__(row, "calls", calls)
    return row


def metric(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def test_fp8_kv_goes_when_long_context_drifts(done: Path, place: Path, monkeypatch: Any, capsys: Any) -> None:
    drift = {"4bit": metric(0.01), "4bit+fp8kv": metric(0.2)}
    growth = {"4bit": metric(0.0), "4bit+fp8kv": metric(0.01)}
    row = producer("long-context", {"kind": "long_context", "drift": drift, "ppl_drift": growth}, climbs=True)
    monkeypatch.setattr(measurements, "MEASUREMENTS", [row])
    before = digests(done / "model")
    assert "--kv-cache-dtype fp8" in (done / "serve.sh").read_text()
    more = [*GENEROUS, "--gate", "long_context=5%"]
    assert halfbyte(*words(place, done, *more, on="h100")) == 0
    shown = capsys.readouterr()
    result, gates, plan = (read(done / f"{name}.json") for name in ("mitigation", "gates", "plan"))
    assert [(r["rung"], r["verdict"]) for r in result["ladder"]] == [("fp8-kv-off", "the gates pass")]
    assert result["final"]["changes"] == {"--kv-cache-dtype": [None, "auto"]}
    assert digests(done / "model") == before and result["ladder"][0]["cost"]["bytes_added"] == 0
    for file in ("serve.sh", "model/README.md", "report.md"):
        assert "--kv-cache-dtype auto" in (done / file).read_text(), file
        assert "--kv-cache-dtype fp8" not in (done / file).read_text(), file
    assert plan["kv_cache"][0]["kv_cache_dtype"] == plan["memory"][0]["kv_cache_dtype"] == "auto"
    assert "drifted" in plan["kv_cache"][0]["reason"]
    names = [g["name"] for g in gates["gates"] if g["measured_in"] == "long_context.json"]
    assert names == ["long_context:retrieval", "long_context:ppl"]
    assert shown.out.rstrip().endswith("--on h100 -- --kv-cache-dtype auto")
    assert halfbyte(*words(place, done, *more, "--format", "json", on="h100")) == 0
    assert json.loads(capsys.readouterr().out)["fresh"] == []


def bench(speedup: float) -> dict[str, Any]:
    point = {"concurrency": 1, "model": {"status": "ok"}, "baseline": {"status": "ok"}, "speedup": metric(speedup)}
    return {"kind": "bench", "platform": "h100", "points": [point], "confidence": 0.95}


def test_a_stated_gate_has_its_measurement_run(done: Path, place: Path, monkeypatch: Any, capsys: Any) -> None:
    row = producer("bench", bench(1.7))
    monkeypatch.setattr(measurements, "MEASUREMENTS", [row])
    plain = words(place, done, *GENEROUS, "--format", "json", on="h100")
    assert halfbyte(*plain) == 0 and not row.calls  # type: ignore[attr-defined]
    capsys.readouterr()
    assert halfbyte(*plain, "--gate", "speed@1=+60%") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["fresh"] == ["bench"] and row.calls[0].arguments("speed") == ["1"]  # type: ignore[attr-defined]
    judged = {g["name"]: g for g in result["gates"]["gates"]}["speed@1"]
    assert judged["status"] == "passed" and judged["required"] and judged["measured_in"] == "bench.json"
    assert halfbyte(*plain) == 0
    known = {g["name"]: g for g in json.loads(capsys.readouterr().out)["gates"]["gates"]}["speed@1"]
    assert known["status"] == "passed", "what is there under its key counts without being asked for"
    assert halfbyte(*plain, "--gate", "speed@1=+90%") == 3 and len(row.calls) == 1  # type: ignore[attr-defined]
    assert not (done / "mitigation.json").exists()
    assert halfbyte(*plain, "--bench") == 0 and len(row.calls) == 2, "its key changed"  # type: ignore[attr-defined]
    (done / "tasks.json").write_text("{}")
    assert halfbyte(*plain, "--set", "group_size=64") == 0
    assert not (done / "bench.json").exists(), "it told of another artifact"
    assert (done / "tasks.json").exists(), "no stage of this run made it"


def test_a_bench_of_another_artifact_does_not_count(done: Path, place: Path, monkeypatch: Any, capsys: Any) -> None:
    row, work = producer("bench", bench(1.7)), read(done / "model" / "halfbyte.json")["work"]
    monkeypatch.setattr(measurements, "MEASUREMENTS", [row])
    for name, kept in ((work, True), (None, True), ("another", False)):
        (done / "bench.json").write_text(json.dumps({**bench(1.7), "work": name}))
        assert halfbyte("report", done) == 0
        told = "tells of another artifact and was left out" in (done / "report.md").read_text()
        assert told != kept, name
        assert ("bench" in card_results(done, work)) == kept
        assert halfbyte(*words(place, done, *GENEROUS, on="h100")) == 0
        assert (done / "bench.json").exists() == kept and not row.calls  # type: ignore[attr-defined]
    assert halfbyte(*words(place, done, *GENEROUS, "--bench", on="h100")) == 0
    assert len(row.calls) == 1 and read(done / "bench.json")["work"] == work  # type: ignore[attr-defined]


def test_what_cannot_be_measured_is_told_and_does_not_pass(
    done: Path, place: Path, monkeypatch: Any, capsys: Any
) -> None:
    plain = words(place, done, *GENEROUS, on="h100")
    monkeypatch.setattr(measurements, "MEASUREMENTS", [])
    assert halfbyte(*plain, "--gate", "speed@1=+60%", "--tasks", "default") == 3
    shown = capsys.readouterr()
    assert "speed@1=+60%: it cannot be measured here: this halfbyte makes no bench.json" in shown.err
    assert "--tasks: it cannot be measured here: this halfbyte makes no tasks.json" in shown.err
    assert shown.out.startswith("Incomplete: tasks, speed@1 not measured")
    monkeypatch.setattr(measurements, "MEASUREMENTS", [producer("bench", HalfbyteError("vLLM did not start"))])
    assert halfbyte(*plain, "--bench") == 3
    assert "bench.json was not measured: vLLM did not start" in capsys.readouterr().err
    row = {g["name"]: g for g in read(done / "gates.json")["gates"]}["speed@1"]
    assert row["required"] and row["text"].endswith("not measured (vLLM did not start)")


def test_memory_comes_from_the_plan(done: Path, place: Path, capsys: Any) -> None:
    plain = words(place, done, *GENEROUS, on="h100")
    assert halfbyte(*plain, "--gate", "memory@48=fits", "--gate", "memory@3=60GiB") == 0
    rows = {g["name"]: g for g in read(done / "gates.json")["gates"]}
    plan = read(done / "plan.json")
    asked = {level["concurrency"]: level for level in plan["memory"][0]["asked"]}
    assert rows["memory@48"]["value"] == pytest.approx(asked[48]["total_bytes"] / 2**30)
    assert rows["memory@48"]["measured_in"] == "plan.json" and "estimate" in rows["memory@3"]["text"]
    assert halfbyte(*plain, "--gate", "memory@3=0.5GiB") == 3
    assert "serve fewer sequences" in capsys.readouterr().out


def test_speed_and_stability_in_a_run(done: Path, place: Path, monkeypatch: Any, tmp_path: Path) -> None:
    """The registry's own rows, with a stand-in for vLLM: it scores nonsense, so that `served` rejects."""
    monkeypatch.setattr(served_measurements, "LOAD_SECONDS", 0.2)
    monkeypatch.setattr(speed_machine, "device_name", lambda *_: "2 x NVIDIA H100 80GB HBM3")
    fake = make_fake(tmp_path / "fake")
    gates = ["--gate", "speed@1=-99%", "--gate", "speed@2=-99%", "--gate", "stability", "--gate", "memory@2=fits"]
    assert halfbyte(*words(place, done, *GENEROUS, *gates, "--vllm", str(fake), on="h100")) == 3
    rows = {row["name"]: row for row in read(done / "gates.json")["gates"]}
    assert [rows[name]["status"] for name in ("speed@1", "speed@2", "memory@2")] == ["passed"] * 3
    assert rows["memory@2"]["measured_in"] == "plan.json, bench.json"
    assert rows["stability"]["measured_in"] == "stability.json" and rows["stability"]["status"] != "not measured"
    benched = (done / "model" / "benched").read_text().splitlines()
    assert len(benched) == 2 * 3, "stability takes the runs of the bench: two levels, three repeats, once each"
    bench = read(done / "bench.json")
    assert [point["concurrency"] for point in bench["points"]] == [1, 2] and str(tmp_path) not in json.dumps(bench)


def test_a_gate_on_stability_alone_measures_no_speed(done: Path, place: Path, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(served_measurements, "LOAD_SECONDS", 0.2)
    fake = make_fake(tmp_path / "fake")
    gates = ["--gate", "stability", "--concurrency", "2", "--vllm", str(fake)]
    assert halfbyte(*words(place, done, *GENEROUS, *gates, on="cpu")) == 3
    rows = {row["name"]: row for row in read(done / "gates.json")["gates"]}
    assert rows["stability"]["status"] != "not measured"
    assert read(done / "stability.json")["load"]["concurrency"] == 2
    assert not (done / "bench.json").exists() and not (done / "model" / "benched").exists()
    assert not list((done / "serving").rglob("c*-r*.json")), "runs of a bench that nobody asked for"


def test_speed_is_measured_on_the_platform_that_this_machine_is(
    done: Path, place: Path, monkeypatch: Any, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(speed_machine, "device_name", lambda *_: None)
    monkeypatch.setattr(speed_machine, "NODES", {})
    fake = make_fake(tmp_path / "fake")
    gates = [*GENEROUS, "--gate", "speed@1=-99%", "--vllm", str(fake)]
    assert halfbyte(*words(place, done, *gates, on="h100")) == 3
    row = {row["name"]: row for row in read(done / "gates.json")["gates"]}["speed@1"]
    assert row["status"] == "not measured" and "is not h100: measure there" in row["text"]
    assert not (done / "model" / "benched").exists(), "figures of a CPU under the name of a GPU"
    assert halfbyte(*words(place, done, *gates, "--on", "cpu", on="h100")) == 3
    assert read(done / "bench.json")["platform"] == "cpu"
