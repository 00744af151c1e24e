"""bench and tune: intervals that hold, runs that resume, failures that are results, evidence that serves."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import halfbyte.serving.bench_memory as bench_memory
from halfbyte.cli.bench_words import tune_words
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate.speed import BASELINE, MODEL, BenchRequest, Variant
from halfbyte.evaluate.speed_evidence import kernel_name, refuse_others, write_evidence
from halfbyte.evaluate.speed_result import RATE, bench_result, sentences, stability_result, write_bench
from halfbyte.evaluate.speed_runs import measure
from halfbyte.evaluate.speed_stats import median_interval, ratio_interval
from halfbyte.evaluate.speed_tune import served_alike, tune
from halfbyte.evaluate.stability import Watch
from halfbyte.experiments.bench_cells import bench_cells
from halfbyte.platforms import load_platform
from halfbyte.platforms.evidence import read_table
from halfbyte.serving import find_vllm, serve_command
from halfbyte.serving.bench import ended
from halfbyte.serving.bench_memory import PeakMemory, device_bytes, tree_bytes
from tests.tiny import make_tiny
from tests.unit.artifacts import edit_json
from tests.unit.fake_vllm import make_fake

CPU = load_platform("cpu")
SLOW = ("--linear-backend", "slow")


@pytest.fixture(scope="module")
def install(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return find_vllm(str(make_fake(tmp_path_factory.mktemp("fake") / "env")))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A BF16 model, and one whose config says gptq."""
    base = make_tiny("llama", tmp_path_factory.mktemp("speed") / "base")
    made = Path(shutil.copytree(base, base.with_name("made")))
    edit_json(made / "config.json", lambda tree: tree.update(quantization_config={"quant_method": "gptq", "bits": 4}))
    return base, made


def asked(models: tuple[Path, Path], *levels: int, **changes: Any) -> BenchRequest:
    variants = (Variant(BASELINE, models[0]), Variant(MODEL, models[1]))
    given = {"requests": 4, "repeats": 2, "input_tokens": 8, "output_tokens": 4, **changes}
    return BenchRequest(variants, CPU, levels, **given)


def alone(request: BenchRequest) -> BenchRequest:
    return replace(request, variants=request.variants[1:])


def starts(directory: Path) -> int:
    told = directory / "starts"
    return len(told.read_text().splitlines()) if told.exists() else 0


def benched(directory: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (directory / "benched").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(install: Any, models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A bench of everything: two levels, long prompts, another configuration, stability; and where it lies."""
    watch = Watch(2, seconds=0.1, tokens=40, prompts=2)
    request = asked(models, 1, 4, prefill=16, watch=watch)
    request = replace(request, variants=(*request.variants, Variant("slow", models[1], SLOW)))
    out = tmp_path_factory.mktemp("out")
    return measure(request, out, install), out


def test_every_point_is_measured_against_bf16(whole: Any) -> None:
    found, out = whole
    result, stable = write_bench(out, found)
    assert json.loads((out / "bench.json").read_text()) == result and result["kind"] == "bench"
    assert [point["concurrency"] for point in result["points"]] == [1, 4]
    for point in result["points"]:
        level = point["concurrency"]
        base, model = point["baseline"], point["model"]
        assert base["status"] == model["status"] == "ok" and (model["completed"], model["failed"]) == (8, 0)
        assert base["output_tokens_per_second"]["value"] == pytest.approx(100 * level, rel=0.01)
        assert point["speedup"]["value"] == pytest.approx(1.7)
        assert point["speedup"]["low"] < 1.7 < point["speedup"]["high"]
        assert point["configs"]["slow"]["speedup"]["value"] == pytest.approx(0.85)
        assert point["configs"]["slow"]["against_model"]["value"] == pytest.approx(0.5)
        assert model["ttft_ms"] == {"p50": 50 / level, "p95": 95 / level, "p99": round(99 / level, 3)}
    assert result["prefill"]["prompts"] == 4 and result["prefill"]["model"]["itl_ms"]["p50"] is None
    assert result["memory"]["model"]["kv_cache_tokens"] == 1024 and result["memory"]["model"]["peak_device_bytes"] > 1e6
    assert result["memory"]["model"]["weight_bytes"] == (1 << 30) // 4
    assert result["text"][0] == "+60 % tokens/s over BF16 holds at concurrency 1, 4"
    assert "4-bit is fastest: 2.00x the speed of slow" in result["text"][1]
    assert "/" not in result["commands"]["model"] and "--no-enable-prefix-caching" in result["commands"]["model"]
    assert stable is not None and stable["ok"] and stable["generations"] == 4
    assert stable["repetition"] == {"baseline": 0.0, "model": 0.0} and stable["length_ratio"]["value"] == 1.0
    assert stable["load"]["status"] == "ok" and stable["load"]["requests"] >= 2


def test_both_models_get_the_same_prompts_and_no_prompt_twice(whole: Any, models: tuple[Path, Path]) -> None:
    ours, theirs = benched(models[1])[:6], benched(models[0])[:6]
    what = (
        "--seed",
        "--max-concurrency",
        "--num-prompts",
        "--random-input-len",
        "--random-output-len",
        "--num-warmups",
    )
    assert [[run[key] for key in what] for run in ours] == [[run[key] for key in what] for run in theirs]
    assert len({run["--seed"] for run in ours}) == 6
    assert [run["--num-warmups"] for run in ours] == ["1", "0", "4", "0", "4", "0"]
    assert all(run["--metric-percentiles"] == "50,95,99" for run in ours)


def test_a_bench_goes_on_where_it_was(whole: Any, install: Any, models: tuple[Path, Path]) -> None:
    found, out = whole
    before = starts(models[0]), starts(models[1]), len(benched(models[1]))
    assert bench_result(measure(found.request, out, install)) | {"seconds": 0} == bench_result(found) | {"seconds": 0}
    assert (starts(models[0]), starts(models[1]), len(benched(models[1]))) == before
    (out / "bench" / "model" / "c4-r1.json").unlink()
    edit_json(out / "bench" / "model" / "c1-r0.json", lambda tree: tree.update(status="crashed"))
    again = bench_result(measure(found.request, out, install))
    assert again["points"] == bench_result(found)["points"]
    assert (starts(models[0]), starts(models[1])) == (before[0], before[1] + 1)
    assert [run["--seed"] for run in benched(models[1])[before[2] :]] == ["100", "401"]
    assert [run["--num-warmups"] for run in benched(models[1])[before[2] :]] == ["1", "4"], "a new server is cold"


def test_evidence_makes_serve_name_the_fastest_flags(whole: Any, models: tuple[Path, Path], tmp_path: Path) -> None:
    found, _ = whole
    file = tmp_path / "own" / "speed.json"
    assert write_evidence(file, found, bench_result(found)) == []
    platform = load_platform("cpu", [file])
    (table,) = platform.speed
    assert table.model.parameters > 1000 and table.covers("0.32.5") and table.prefill.prompts == 4
    rows = {row.kernel: row for row in table.rows}
    slow = rows["FakeLinearKernel (slow)"]
    assert slow.flags == {"--linear-backend": "slow"} and rows["FakeLinearKernel"].flags == {}
    assert table.speedup(slow, 4) == pytest.approx(0.85, rel=1e-3)
    assert rows["BF16"].seconds[4] == pytest.approx(4 * 4 / 400, rel=0.01)
    line = serve_command(models[1], "gptq", platform, vllm_version="0.32.0", concurrency=4)
    assert "--linear-backend" not in line.argv
    assert any("1.70x the speed of BF16 at concurrency 4" in n and "2.00x that of" in n for n in line.notes)
    edit_json(
        file, lambda tree: [row["seconds"].update({"4": 0.001}) for row in tree["rows"] if "slow" in row["kernel"]]
    )
    line = serve_command(models[1], "gptq", load_platform("cpu", [file]), vllm_version="0.32.0", concurrency=4)
    assert line.value("--linear-backend") == "slow"
    with pytest.raises(HalfbyteError, match="bench with --baseline"):
        write_evidence(file, replace_request(found, alone(found.request)), {})


def test_evidence_says_what_its_repeats_do_not_tell(
    whole: Any, install: Any, models: tuple[Path, Path], tmp_path: Path
) -> None:
    """Repeats far apart, and a flag that makes BF16 faster as well."""
    found, out = whole
    more = Variant("servers", models[1], ("--api-server-count", "4"))
    asked_for = replace(found.request, variants=(*found.request.variants, more))
    also = measure(asked_for, out, install)
    result = bench_result(also)
    (left_out,) = write_evidence(tmp_path / "a.json", also, result)
    assert left_out.startswith("servers: --api-server-count is no kernel's")
    assert len(read_table(tmp_path / "a.json").rows) == 3
    for job in also.jobs:
        if job.point == "c4" and job.turn == 0 and job.file.stem.endswith("-r1"):
            assert job.result is not None
            job.result = {**job.result, RATE: job.result[RATE] * 1.9}
    told = write_evidence(tmp_path / "b.json", also, bench_result(also))
    assert told[-1] == "what tells kernels apart at concurrency 4, for repeats lie too far apart (more --repeats)"


def test_evidence_of_another_model_is_not_replaced(whole: Any, models: tuple[Path, Path], tmp_path: Path) -> None:
    found, file = whole[0], tmp_path / "speed.json"
    refuse_others(file, found.request, found.install)
    write_evidence(file, found, bench_result(found))
    first = file.read_text()
    edit_json(file, lambda tree: (tree.update(device="CPU"), tree["model"].pop("vocab_size")))
    refuse_others(file, found.request, found.install)
    write_evidence(file, found, bench_result(found))
    assert file.read_text() == first, "the same in other words"
    for change, says in (
        (lambda tree: tree.update(device="h100"), "on h100, vLLM 0.32.0.*: another device.*kept: name another file"),
        (lambda tree: tree["model"].update(blocks=99), "another blocks"),
        (lambda tree: tree.update(tensor_parallel=2, output_tokens=9), "another tensor_parallel and output_tokens"),
        (lambda tree: tree.update(vllm="0.26.0"), "another vLLM"),
        (lambda tree: tree["rows"].append({**tree["rows"][1], "format": "awq"}), r"holds awq \(KV cache auto\) too"),
        (lambda tree: tree["rows"][1].update(kv_cache="fp8"), r"gptq \(KV cache fp8\) too, which would be lost"),
        (lambda tree: [row["seconds"].update({"9": 1}) for row in tree["rows"]], "holds concurrency 9 too"),
        (lambda tree: tree.update(kind="bench"), "is there, and is no evidence"),
        (lambda tree: tree.update(unknown=1), "is there, and is no evidence"),
    ):
        file.write_text(first)
        edit_json(file, change)
        there = file.read_bytes()
        with pytest.raises(UsageError, match=says):
            refuse_others(file, found.request, found.install)
        with pytest.raises(HalfbyteError, match=says):
            write_evidence(file, found, bench_result(found))
        assert file.read_bytes() == there


def replace_request(found: Any, request: BenchRequest) -> Any:
    return replace(found, request=request)


def test_a_bench_names_the_work_that_it_measured(
    whole: Any, install: Any, models: tuple[Path, Path], tmp_path: Path
) -> None:
    assert bench_result(whole[0])["work"] is None, "a directory that halfbyte did not make"
    made = Path(shutil.copytree(models[1], tmp_path / "made"))
    (made / "halfbyte.json").write_text('{"work": "w"}')
    found = measure(asked((models[0], made), 1, watch=Watch(1, tokens=8, prompts=1)), tmp_path / "out", install)
    stable = stability_result(found)
    assert stable is not None and bench_result(found)["work"] == stable["work"] == "w"


def test_a_cell_may_be_called_as_the_sides_are(install: Any, models: tuple[Path, Path], tmp_path: Path) -> None:
    blank = {"same_as": None, "work": "w"}
    rows = [{"name": name, "path": name, **blank} for name in ("baseline", "model", "B1")]
    for row in rows:
        shutil.copytree(models[1], tmp_path / row["path"])
    load = {"input_tokens": 8, "output_tokens": 4, "requests": 4, "repeats": 2}
    found = bench_cells(tmp_path, rows, models[0], "cpu", 2, install, **load)
    assert {name: row["status"] for name, row in found.items()} == dict.fromkeys(("baseline", "model", "B1"), "ok")
    for name, row in found.items():
        assert row["cell"] == name and 1.6 < row["speedup"]["value"] < 1.8, name
        assert json.loads((tmp_path / "results" / f"{name}.bench.json").read_text()) == {**row, "work": "w"}


def test_running_out_of_memory_is_a_result(
    install: Any, models: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("FAKE", "oom")
    result = bench_result(measure(alone(asked(models, 1, 16, prefill=4)), tmp_path, install))
    one, many = result["points"]
    assert one["model"]["status"] == "ok" and result["prefill"]["model"]["status"] == "ok", "it was started again"
    assert many["model"]["status"] == "out of memory" and "OutOfMemoryError" in many["model"]["reason"]
    assert many["model"]["output_tokens_per_second"] is None and many["speedup"] is None
    assert any("concurrency 16, 4-bit: out of memory" in text for text in result["text"])


def test_a_server_that_does_not_start_is_a_result(
    install: Any, models: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("FAKE", "die")
    before = starts(models[1])
    request = alone(asked(models, 1, 4, watch=Watch(1, tokens=8)))
    found = measure(request, tmp_path, install)
    assert starts(models[1]) == before + 1
    for point in bench_result(found)["points"]:
        assert point["model"]["status"] == "crashed"
        assert point["model"]["reason"].startswith("ValueError: the weights are wrong")
    stable = stability_result(found)
    assert stable and not stable["ok"] and "no answer could be had: ValueError" in stable["reasons"][0]


def test_a_server_that_ends_at_once_is_not_started_for_ever(
    install: Any, models: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("FAKE", "brief")
    monkeypatch.setattr("halfbyte.serving.client.RETRY_AFTER_S", 0.01)
    before = starts(models[1])
    result = bench_result(measure(alone(asked(models, 1, 4)), tmp_path, install))
    assert starts(models[1]) == before + 2, "once for each point"
    for point in result["points"]:
        assert (point["model"]["status"], point["model"]["reason"]) == ("crashed", "RuntimeError: gone again")


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("refusing", "1 of 4 requests failed: boom at x"),
        ("broken", "vllm bench serve failed: ValueError: no such dataset"),
    ],
)
def test_failures_are_results(
    install: Any, models: tuple[Path, Path], tmp_path: Path, monkeypatch: Any, mode: str, reason: str
) -> None:
    monkeypatch.setenv("FAKE", mode)
    entry = bench_result(measure(alone(asked(models, 1)), tmp_path, install))["points"][0]["model"]
    assert (entry["status"], entry["reason"]) == ("failed", reason)


@pytest.mark.parametrize(
    ("mode", "reason"), [("looping", "100.0% of the answers run into a loop"), ("nan", "no numbers")]
)
def test_what_is_not_stable_is_told(
    install: Any, models: tuple[Path, Path], tmp_path: Path, monkeypatch: Any, mode: str, reason: str
) -> None:
    monkeypatch.setenv("FAKE", mode)
    monkeypatch.setattr("halfbyte.serving.client.RETRY_AFTER_S", 0.01)
    request = asked(models, 1, watch=Watch(4, tokens=40, prompts=3))
    request = request if mode == "looping" else alone(request)
    stable = stability_result(measure(request, tmp_path, install))
    assert stable and not stable["ok"] and any(reason in text for text in stable["reasons"])
    assert len(stable["bad"]) == 6


def test_turns_start_every_server_again(install: Any, models: tuple[Path, Path], tmp_path: Path) -> None:
    before = starts(models[0]), starts(models[1])
    found = measure(asked(models, 1, turns=2), tmp_path, install)
    assert (starts(models[0]), starts(models[1])) == (before[0] + 2, before[1] + 2)
    assert [len(found.runs(name, "c1")) for name in (BASELINE, MODEL)] == [2, 2]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"repeats": 1}, "two or more"),
        ({"turns": 3}, "3 turns want as many repeats"),
        ({"output_tokens": 9999}, "the model takes"),
        ({"extra": ("--dtype", "bf16")}, "write --dtype bfloat16"),
    ],
)
def test_what_cannot_be_asked(
    install: Any, models: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        measure(asked(models, 1, **changes), tmp_path / "out", install)
    assert not (tmp_path / "out").exists()


def test_tune_keeps_what_is_surely_faster(install: Any, models: tuple[Path, Path], tmp_path: Path) -> None:
    knobs = [
        {"flag": "--linear-backend", "values": ["slow", "quick"], "formats": ["gptq"]},
        {"flag": "--linear-backend", "values": ["none"], "formats": ["awq"]},
    ]
    evidence = CPU.hardware.model_dump(mode="json")
    known = type(CPU).model_validate(
        CPU.model_dump(mode="json") | {"tune": [{**knob, "evidence": evidence} for knob in knobs]}
    )
    request = replace(asked(models, 2), platform=known, extra=())
    result = tune(request, models[1], tmp_path, install)
    (knob,) = result["knobs"]
    assert [row["value"] for row in knob["tried"]] == [None, "slow", "quick"] and knob["kept"] == "quick"
    assert [row["against"] and round(row["against"]["value"], 6) for row in knob["tried"]] == [None, 0.5, 1.25]
    assert result["words"] == ["--linear-backend", "quick"] and result["gain"]["value"] == pytest.approx(1.25)
    assert "--linear-backend quick is 1.25x as fast as without" in result["text"]
    assert "--linear-backend quick" in result["command"] and "--no-enable-prefix-caching" not in result["command"]
    changing = [{**knobs[0], "values": ["slow", "quick"], "changes": "what is said", "evidence": evidence}]
    careful = replace(request, platform=type(CPU).model_validate(CPU.model_dump(mode="json") | {"tune": changing}))
    wary = tune(careful, models[1], tmp_path, install)
    assert wary["knobs"][0]["tried"] == knob["tried"] and wary["knobs"][0]["kept"] is None and wary["words"] == []
    assert "no flag is surely faster" in wary["text"]
    result = tune(request, models[1], tmp_path, install)
    assert json.loads((tmp_path / "tune.json").read_text()) == result
    with pytest.raises(HalfbyteError, match="no flag is known to matter"):
        tune(replace(request, extra=SLOW), models[1], tmp_path, install)


def test_tune_tries_some_flags_from_a_concurrency_on(install: Any, models: tuple[Path, Path], tmp_path: Path) -> None:
    evidence = CPU.hardware.model_dump(mode="json")
    knobs = [{"flag": "--api-server-count", "values": ["4"], "least": 4, "evidence": evidence}]
    known = type(CPU).model_validate(CPU.model_dump(mode="json") | {"tune": knobs})
    few, many = (replace(asked(models, level), platform=known, extra=()) for level in (3, 4))
    with pytest.raises(HalfbyteError, match="no flag is known to matter"):
        tune(few, models[1], tmp_path / "few", install)
    (knob,) = tune(many, models[1], tmp_path / "many", install)["knobs"]
    assert [row["value"] for row in knob["tried"]] == [None, "4"]


def test_tune_tries_without_what_the_platform_measured(install: Any, models: tuple[Path, Path], tmp_path: Path) -> None:
    """`serve` takes Humming there by the platform's figures. Not so what `tune` compares it with."""
    model = shutil.copytree(models[1], tmp_path / "nvfp4")
    declared = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
    edit_json(model / "config.json", lambda tree: tree.update(quantization_config=declared))
    h100, older = load_platform("h100"), replace(install, version="0.26.0")
    request = replace(asked(models, 2), platform=h100, extra=())
    assert "--linear-backend humming" in serve_command(model, "modelopt", h100, vllm_version="0.26.0").shell()
    result = tune(request, model, tmp_path / "out", older)
    backend = next(row for row in result["knobs"] if row["flag"] == "--linear-backend")
    assert [row["value"] for row in backend["tried"]] == [None, "humming"] and backend["stands"] is None
    started = [(log.parent.name, log.read_text()) for log in (tmp_path / "out").rglob("vllm-0.log")]
    assert any(name == "default" and "--linear-backend" not in log for name, log in started)
    assert backend["known"] and backend["kept"] == "humming", "as fast here, and it was faster where it was measured"
    assert "surely faster here than none: --linear-backend humming stands by the platform's" in result["text"]
    assert "--linear-backend humming" in result["command"]
    cache = next(row for row in result["knobs"] if row["flag"] == "--kv-cache-dtype")
    assert cache["stands"] == "fp8" and cache["kept"] is None
    assert served_alike(result, model, h100, older)
    words = tune_words(model, tmp_path / "out", result, "my h100.yaml")
    last = words.splitlines()[-1]
    assert last == f"next: halfbyte serve {model} --on 'my h100.yaml' --concurrency 2 -- --linear-backend humming"
    further = tune(replace(request, extra=("--max-model-len", "64")), model, tmp_path / "further", older)
    assert "--max-model-len 64" in further["command"] and not served_alike(further, model, h100, older)
    assert "(fp8)" in words and "kept by the platform's measurements" in words
    tree = h100.model_dump(mode="json", by_alias=True)
    for row in (row for table in tree["speed"] for row in table["rows"] if row["flags"]):
        row["flags"] = dict(zip(SLOW[::2], SLOW[1::2]))
    tree["tune"] = [tree["tune"][0]]
    wrong = type(h100).model_validate(tree)
    result = tune(replace(request, platform=wrong), model, tmp_path / "wrong", older)
    assert result["words"] == [] and "--linear-backend" not in result["command"], "surely slower here"
    assert not served_alike(result, model, wrong, older), "serve would take it all the same"


def test_tune_starts_no_server_for_a_flag_that_the_declaration_ignores(
    install: Any, models: tuple[Path, Path], tmp_path: Path
) -> None:
    older, h100 = replace(install, version="0.26.0"), load_platform("h100")
    backend = h100.model_copy(update={"tune": h100.tune[:1]})
    request = replace(asked(models, 2), platform=backend, extra=())

    def declaring(**declared: str) -> Path:
        model = shutil.copytree(models[1], tmp_path / "model", dirs_exist_ok=True)
        edit_json(model / "config.json", lambda tree: tree.update(quantization_config=declared))
        return model

    model = declaring(quant_method="modelopt", quant_algo="W4A16_NVFP4")
    with pytest.raises(HalfbyteError, match="no flag is known to matter for modelopt/W4A16_NVFP4 on h100"):
        tune(request, model, tmp_path / "out", older)
    assert not (tmp_path / "out").exists()
    model = declaring(quant_method="compressed-tensors", format="nvfp4-pack-quantized")
    (knob,) = tune(request, model, tmp_path / "out", older)["knobs"]
    assert [row["value"] for row in knob["tried"]] == [None, "humming"] and knob["kept"] == "humming"


def test_the_interval_of_a_median_holds_for_few_repeats() -> None:
    """Simulated: lognormal figures whose true median is known. 95 in 100 intervals hold it, and not all of them."""
    rng = np.random.default_rng(0)
    for n in (2, 3, 5):
        draws = np.exp(0.1 * rng.standard_normal((600, 2, n)))
        held = [(m := median_interval(list(a)))["low"] <= 1 <= m["high"] for a, _ in draws]
        ratios = [(m := ratio_interval(list(1.6 * a), list(b)))["low"] <= 1.6 <= m["high"] for a, b in draws]
        assert 0.93 <= np.mean(held) <= 0.995, n
        assert 0.93 <= np.mean(ratios) <= 0.999, n


def test_intervals_by_hand() -> None:
    assert median_interval([2.0, 2.0, 2.0]) == {"value": 2.0, "low": 2.0, "high": 2.0}
    one = median_interval([math.exp(-0.1), 1.0, math.exp(0.1)])
    assert one["high"] == pytest.approx(math.exp(4.3027 * 1.2533 * 0.1 / math.sqrt(3)), rel=1e-4)
    assert ratio_interval([3.0, 3.0], [2.0, 2.0]) == {"value": 1.5, "low": 1.5, "high": 1.5}
    same = [math.exp(-0.1), 1.0, math.exp(0.1)]
    both = ratio_interval(same, same)
    assert both["high"] == pytest.approx(math.exp(2.7764 * 1.2533 * 0.1 / math.sqrt(3) * math.sqrt(2)), rel=1e-4)


def test_the_promise_in_words() -> None:
    def point(level: int, low: float, high: float) -> dict[str, Any]:
        ok = {"status": "ok", "reason": ""}
        gain = {"value": (low + high) / 2, "low": low, "high": high}
        return {"concurrency": level, "baseline": ok, "model": ok, "speedup": gain}

    told = sentences([point(1, 1.61, 1.7), point(16, 1.5, 1.59), point(64, 1.5, 1.7), point(256, 0.8, 0.9)])
    assert told[0] == (
        "+60 % tokens/s over BF16 holds at concurrency 1; does not hold at 16, 256; "
        "cannot be decided from these repeats at 64"
    )
    assert told[1].startswith("slower than BF16 at concurrency 256")


def test_reasons_that_mean_no_memory() -> None:
    for reason in (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
        "ValueError: No available memory for the cache blocks.",
        "ValueError: Free memory on device (1/79 GiB) on startup is less than desired GPU memory utilization",
        "killed by the system, as it does when memory runs out; last word: INFO",
    ):
        assert ended(reason) == "out of memory"
    assert ended("ValueError: the weights are wrong") == "crashed"


def test_memory_is_that_of_all_processes_and_visible_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    mine = tree_bytes(os.getpid())
    assert mine is not None and mine > 10 << 20 and tree_bytes(2**30) is None

    class Nvml:
        def nvmlDeviceGetCount(self) -> int:
            return 2

        def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
            if index in lost:
                raise self.NVMLError
            return index

        def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
            return type("Info", (), {"used": 100 + handle})

        def nvmlDeviceGetUUID(self, handle: int) -> str:
            return ("GPU-a1", "GPU-b2")[handle]

        def nvmlDeviceGetName(self, handle: int) -> bytes:
            return b"NVIDIA H100"

        NVMLError = RuntimeError

    lost = list[int]()
    monkeypatch.setattr(bench_memory, "load_nvml", Nvml)
    for seen, used, name in (
        (None, 201, "2 x NVIDIA H100"),
        ("1", 101, "NVIDIA H100"),
        ("GPU-b2", 101, "NVIDIA H100"),
        ("GPU-b", 101, "NVIDIA H100"),
        ("GPU-", None, None),
        ("-1", None, None),
        ("1,0", 201, "2 x NVIDIA H100"),
        ("0,GPU-x,1", 100, "NVIDIA H100"),
        ("", None, None),
    ):
        if seen is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
        assert device_bytes(Nvml()) == used and bench_memory.device_name() == name
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    lost.append(1)
    assert device_bytes(Nvml()) == 100, "the other one is of no concern"
    monkeypatch.setattr(Nvml, "nvmlDeviceGetMemoryInfo", lambda *_: Nvml().nvmlDeviceGetHandleByIndex(1))
    assert device_bytes(Nvml()) is None
    readings = iter([5, None, 9, 7])
    with PeakMemory(lambda: next(readings, None), interval=0.001) as memory:
        while next(readings, "over") != "over":
            pass
    assert memory.peak in (5, 7, 9)


def test_kernels_are_called_as_the_platform_calls_them() -> None:
    h100 = load_platform("h100")
    assert kernel_name(h100, "gptq", None, ["MacheteLinearKernel"]) == "Machete"
    assert kernel_name(CPU, "gptq", None, ["CPUWNA16LinearKernel"]) == "CPUWNA16LinearKernel"
    assert kernel_name(h100, "gptq", None, []) == "vLLM's own choice"


def test_knobs_of_the_platforms_are_for_formats_that_load() -> None:
    for name in ("h100", "mi325x", "cpu"):
        platform = load_platform(name)
        assert platform.tune
        for knob in platform.tune:
            known = {name for key in platform.formats for name in (key, key.split("/")[0])}
            assert knob.flag.startswith("--") and set(knob.formats) <= known
