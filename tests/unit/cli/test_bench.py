"""bench, tune, and serve with what they measured, on the stand-in for vLLM."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from halfbyte.cli.bench import beside
from halfbyte.report.front import cell_rates
from halfbyte.report.sweep import with_benches
from tests.unit.artifacts import edit_json, halfbyte
from tests.unit.fake_vllm import make_fake

FEW = ("--concurrency", "2", "--requests", 2, "--repeats", 2, "--input", 8, "--output", 4)


@pytest.fixture(scope="session")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fake(tmp_path_factory.mktemp("fake") / "env")


def test_bench_writes_evidence_that_serve_and_plan_use(
    artifact: Path, model: Path, fake: Path, tmp_path: Path, as_json: Any, capsys: Any
) -> None:
    file, out = tmp_path / "speed.json", tmp_path / "out"
    config = ("--config", "slow: --linear-backend slow")
    words = ("--baseline", model, "--on", "cpu", *FEW, "--prefill", 0, "--vllm", fake, "-o", out, "--evidence", file)
    assert halfbyte("bench", artifact, *words, *config) == 0
    shown = capsys.readouterr().out
    assert "2 at once, BF16" in shown and "+60 % tokens/s over BF16 holds at concurrency 2." in shown
    result = as_json("bench", artifact, *words, *config)
    assert result == json.loads((out / "bench.json").read_text()) | {"stability": None}
    assert result["points"][0]["speedup"]["value"] == pytest.approx(1.7) and result["prefill"] is None
    served = as_json("serve", artifact, "--on", "cpu", "--print", "--evidence", file, "--concurrency", 2)
    assert any("1.70x the speed of BF16 at concurrency 2, 2.00x that of" in note for note in served["notes"])
    plan = as_json("plan", model, "--on", "cpu", "-r", "B3", "--evidence", file, "--concurrency", "2")
    gain = plan["speed"][0]["served"][0]
    assert (gain["basis"], gain["gain"], gain["measured_at"]) == ("measured", 1.7, 2)


def test_a_bench_in_which_nothing_runs_fails(
    artifact: Path, fake: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("FAKE", "die")
    words = ("--alone", "--on", "cpu", *FEW, "--prefill", 0, "--vllm", fake, "-o", tmp_path / "out")
    assert halfbyte("bench", artifact, *words) == 1
    assert "Concurrency 2, 4-bit: crashed: ValueError: the weights are wrong" in capsys.readouterr().out


def test_a_bench_that_is_stopped_tells_what_there_is(
    artifact: Path, model: Path, fake: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Nothing was ready within a second: the table, one line of why there is no evidence; then it goes on."""
    out, file = tmp_path / "out", tmp_path / "speed.json"
    words = ("--baseline", model, "--on", "cpu", *FEW, "--prefill", 0, "--vllm", fake, "-o", out, "--evidence", file)
    monkeypatch.setenv("FAKE", "hang")
    assert halfbyte("bench", artifact, *words, "--seconds", 1) == 1
    said = capsys.readouterr()
    assert "not measured" in said.out and "The time was over: 0 of 4 runs were done" in said.out
    assert "no evidence" in said.err.strip().splitlines()[-1] and not file.exists()
    monkeypatch.setenv("FAKE", "ok")
    assert halfbyte("bench", artifact, *words, "--seconds", 600) == 0
    assert "were done" not in capsys.readouterr().out and file.is_file()
    monkeypatch.setattr("halfbyte.evaluate.speed_work.Work.sit", lambda *_: interrupt())
    assert halfbyte("bench", artifact, *words, "--force") == 1
    said = capsys.readouterr()
    assert "Interrupted: 0 of 4 runs" in said.out and "interrupted; the same command goes on" in said.err


def test_an_artifact_without_weights_is_told_before_anything_starts(
    artifact: Path, model: Path, fake: Path, tmp_path: Path, capsys: Any, as_json: Any
) -> None:
    other = shutil.copytree(artifact, tmp_path / "other")
    (weights,) = artifact.glob("*.safetensors")
    weights.rename(tmp_path / "elsewhere")
    words = ("--baseline", model, "--on", "cpu", "--vllm", fake)
    broken = [("bench", artifact, *words), ("bench", other, *words, "--config", f"a: {artifact}")]
    broken.append(("tune", artifact, "--on", "cpu", "--concurrency", 1, "--vllm", fake))
    for command in broken:
        assert halfbyte(*command) in (1, 2)
        said = capsys.readouterr().err.strip().splitlines()
        assert "safetensors" in said[-1] and not any("starting vLLM" in line for line in said), said
    notes = as_json("serve", artifact, "--on", "cpu", "--print")["notes"]
    assert any(note.startswith("it cannot be served as it is: ") for note in notes)


def test_a_quantized_baseline_is_refused(artifact: Path, fake: Path, capsys: Any) -> None:
    for command in (("bench", artifact, "--on", "cpu", "--vllm", fake), ("eval", artifact)):
        assert halfbyte(*command, "--baseline", artifact) == 2
        assert "is quantized itself (gptq): name the BF16 model with --baseline" in capsys.readouterr().err


def interrupt() -> None:
    raise KeyboardInterrupt


def test_an_unstable_model_is_exit_code_3(
    artifact: Path, fake: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("FAKE", "nan")
    words = ("--alone", "--on", "cpu", *FEW, "--prefill", 0, "--vllm", fake, "-o", tmp_path / "out")
    monkeypatch.setattr("halfbyte.serving.client.RETRY_AFTER_S", 0.01)
    assert halfbyte("bench", artifact, *words, "--stability", 0, "--long", 8) == 3
    assert "Not stable: 100.0% of the answers hold probabilities that are no numbers." in capsys.readouterr().out


def test_tune_prints_a_command(artifact: Path, fake: Path, tmp_path: Path, monkeypatch: Any, as_json: Any) -> None:
    import halfbyte.platforms.loader as loader

    known = loader._known("cpu")
    few = known.model_copy(update={"tune": known.tune[:1]})
    monkeypatch.setattr(loader, "_known", lambda name: few)
    words = ("--on", "cpu", *FEW, "--vllm", fake, "-o", tmp_path / "out")
    result = as_json("tune", artifact, *words)
    assert [row["value"] for row in result["knobs"][0]["tried"]] == [None, "512", "4096"]
    assert result["command"].startswith("VLLM_CPU_KVCACHE_SPACE=1") and "--max-num-seqs 2" in result["command"]
    assert halfbyte("tune", artifact, *words) == 0


def test_a_sweep_measures_its_cells(
    artifact: Path, model: Path, fake: Path, tmp_path: Path, monkeypatch: Any, as_json: Any
) -> None:
    """The sweep itself, and that it reads the files written here, is tested in tests/unit/test_sweep.py."""
    out, base = tmp_path / "out", Path(shutil.copytree(model, tmp_path / "base"))
    for directory in (base, artifact):
        edit_json(directory / "config.json", lambda tree: tree.update(max_position_embeddings=512))
    fp4 = {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}
    for name in ("int4", "fp4"):
        shutil.copytree(artifact, out / "cells" / name)
    edit_json(out / "cells" / "fp4" / "config.json", lambda tree: tree.update(quantization_config=fp4))
    rows = [
        {"name": "int4", "path": "cells/int4", "same_as": None, "status": "failed", "stage": "", "reason": ""},
        {"name": "again", "path": "cells/again", "same_as": "int4", "status": "failed", "stage": "", "reason": ""},
        {"name": "fp4", "path": "cells/fp4", "same_as": None, "status": "failed", "stage": "", "reason": ""},
    ]
    spent: dict[str, Any] = {
        "sharing": dict.fromkeys(("cells", "distinct", "parts", "distinct_parts"), 0),
        "seconds": {},
    }
    result = {"cells": rows, "verdict": "accepted", "best": None, "cost": None, **spent}
    asked: list[bool] = []
    monkeypatch.setattr("halfbyte.experiments.sweep.sweep", lambda *_, force, **__: asked.append(force) or result)
    as_json("sweep", base, "--matrix", "strategy", "--on", "cpu", "-o", out, "--bench", 2, "--vllm", fake, "--force")
    assert asked == [True, False], "a second look at what is there, with the speeds; nothing is made anew"
    told = {name: json.loads((out / "results" / f"{name}.bench.json").read_text()) for name in ("int4", "again", "fp4")}
    assert told["int4"] == told["again"] and told["int4"]["tokens_per_second"] == pytest.approx(340, rel=0.01)
    assert told["int4"]["speedup"]["value"] == pytest.approx(1.7)
    shown = with_benches({"cells": [{"name": "int4", "tokens_per_second": 340.0}]}, out)["cells"][0]
    rates = {side: cell_rates(shown, side) for side in ("model", "baseline")}
    assert list(rates["model"]) == list(rates["baseline"]) == [("cpu", 2)], (
        "the report names the platform, and has BF16"
    )
    assert told["fp4"]["tokens_per_second"] is None
    assert told["fp4"]["status"] == "failed" and "no CPU kernel for NVFP4" in told["fp4"]["reason"]


def test_the_kv_cache_of_the_evidence_is_never_served_for_its_speed(
    artifact: Path, model: Path, fake: Path, tmp_path: Path, as_json: Any
) -> None:
    file = tmp_path / "speed.json"
    words = ("--baseline", model, "--on", "cpu", *FEW, "--prefill", 0, "--vllm", fake, "-o", tmp_path / "out")
    config = ("--config", "fp8: --kv-cache-dtype fp8", "--config", "slow: --linear-backend slow --kv-cache-dtype fp8")
    as_json("bench", artifact, *words, *config, "--evidence", file)
    rows = {row["kernel"]: row for row in json.loads(file.read_text())["rows"]}
    assert {name: (row["kv_cache"], list(row["flags"])) for name, row in rows.items()} == {
        "BF16": ("auto", []),
        "FakeLinearKernel": ("auto", []),
        "FakeLinearKernel (fp8)": ("fp8", []),
        "FakeLinearKernel (slow)": ("fp8", ["--linear-backend"]),
    }
    assert list(json.loads(file.read_text())["apart"]) == ["2"]
    fast = {"2": 1e-6}
    edit_json(file, lambda tree: [row["seconds"].update(fast) for row in tree["rows"] if row["kv_cache"] == "fp8"])
    served = as_json("serve", artifact, "--on", "cpu", "--print", "--evidence", file, "--concurrency", 2)
    assert served["argv"][served["argv"].index("--kv-cache-dtype") + 1] == "auto"


@pytest.mark.parametrize("command", ["bench", "tune", "sweep"])
def test_what_is_measured_here_is_not_called_by_another_machines_name(
    command: str, artifact: Path, model: Path, fake: Path, tmp_path: Path, monkeypatch: Any, refused: Any
) -> None:
    monkeypatch.setattr("halfbyte.evaluate.speed_machine.device_name", lambda *_: "AMD Instinct MI325X")
    out = tmp_path / "out"
    words = {
        "bench": (artifact, "--alone", *FEW),
        "tune": (artifact, "--concurrency", 2),
        "sweep": (model, "--matrix", "strategy", "--bench", 2),
    }
    told = refused(1, command, *words[command], "--on", "h100", "--vllm", fake, "-o", out)
    assert "this machine (AMD Instinct MI325X) is not h100: measure there" in told
    assert not list(out.rglob("*.log"))


def test_evidence_that_cannot_be_is_refused_before_anything_is_measured(
    artifact: Path, model: Path, fake: Path, tmp_path: Path, refused: Any
) -> None:
    words = (*FEW, "--on", "cpu", "--vllm", fake, "-o", tmp_path / "out", "--evidence")
    assert "leave out --alone" in refused(2, "bench", artifact, "--alone", *words, tmp_path / "a.json")
    assert "is no 4-bit artifact" in refused(2, "bench", model, "--baseline", model, *words, tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"kind": "plan"}')
    told = refused(2, "bench", artifact, "--baseline", model, *words, tmp_path / "a.json")
    assert "is there, and is no evidence: name another file" in told
    (tmp_path / "a.json").unlink()
    (tmp_path / "file").touch()
    told = refused(1, "bench", artifact, "--baseline", model, *words, tmp_path / "file" / "a.json")
    assert "cannot be written" in told and not (tmp_path / "out").exists() and not (tmp_path / "a.json").exists()


def test_what_is_refused(artifact: Path, fake: Path, tmp_path: Path, refused: Any) -> None:
    words = ("bench", artifact, "--on", "cpu", "--vllm", fake, "-o", tmp_path / "out")
    for config in ("marlin", "model: --x y", "BF16: --x y", "4-bit: --x y", "a b: --x y", "marlin: "):
        assert "write a name of letters and digits" in refused(2, *words, "--config", config)
    assert "write whole numbers above 0" in refused(2, *words, "--concurrency", "0")
    assert "repeats" in refused(2, *words, "--repeats", 1)
    assert "the model takes 256" in refused(2, *words, "--alone", "--output", 4000)
    assert "is not a model directory" in refused(2, "tune", tmp_path, "--on", "cpu", "--concurrency", 1)
    assert "unknown platform" in refused(2, "bench", artifact, "--on", "moon")
    told = refused(2, "bench", tmp_path / "none", "--on", "cpu", "--vllm", tmp_path / "no vllm either")
    assert "is not a model directory" in told, "what is wrong with what one named first comes first"
    assert not (tmp_path / "out").exists()


def test_a_bf16_model_is_measured_alone_and_called_so(model: Path, fake: Path, tmp_path: Path, capsys: Any) -> None:
    words = ("--on", "cpu", *FEW, "--prefill", 0, "--vllm", fake, "-o", tmp_path / "out")
    assert halfbyte("bench", model, *words) == 0
    said = capsys.readouterr()
    assert "at once, BF16" in said.out and "4-bit" not in said.out
    assert f"{model} is not in 4 bits: it is measured alone" in said.err


def test_results_go_beside_the_artifact(tmp_path: Path) -> None:
    assert beside(tmp_path / "made") == tmp_path.resolve() / "made-bench"
    (tmp_path / "run.json").touch()
    assert beside(tmp_path / "model") == tmp_path.resolve()
