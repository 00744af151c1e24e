"""The pure parts of benchmarks/gpu: emulated inputs, packed random models, rounds of engines, evidence by KV cache."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from benchmarks.gpu import bench, engines, everything, matrix, quantize, served, serving, shapes
from benchmarks.gpu.activations import distance, emulated, fp4_inputs, fp8_inputs, verdict
from benchmarks.gpu.common import cards, on_card
from benchmarks.gpu.engines import Engine, Work, read_lines, rounds, run_engines, run_place
from benchmarks.gpu.shapes import packed_model, random_model
from halfbyte.artifact import load_fake_quantized
from halfbyte.cli.serve import _parameters
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.formats import detect_format
from halfbyte.models import Checkpoint
from halfbyte.plan import choose
from halfbyte.platforms import load_platform
from halfbyte.platforms.evidence import read_table
from halfbyte.recipe.loader import recipe_from_mapping
from halfbyte.serving import VllmInstall, bench_memory, find_vllm, serve_command
from halfbyte.types import Scheme
from tests.unit.fake_vllm import make_fake


def fp4_slowly(x: list[float], input_scale: float) -> list[float]:
    """One block of NVFP4 inputs, a number at a time."""
    grid = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    step = float(torch.tensor(max(map(abs, x)) / (6 * input_scale)).to(torch.float8_e4m3fn)) * input_scale
    return [step * min(grid, key=lambda v: abs(abs(a) / step - v)) * (1 if a > 0 else -1) for a in x]


def test_inputs_are_rounded_as_the_formats_say() -> None:
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    got = fp4_inputs(0.001)(x)
    for row, mine in zip(x, got):
        want = fp4_slowly(row[:16].tolist(), 0.001) + fp4_slowly(row[16:].tolist(), 0.001)
        assert mine.tolist() == pytest.approx(want, rel=1e-6)
    assert torch.equal(fp4_inputs(1.0)(torch.zeros(1, 16)), torch.zeros(1, 16))
    eight = fp8_inputs(x)
    assert (eight - x).abs().max() <= x.abs().max() / 16 and not torch.equal(eight, x)
    assert eight.abs().amax(-1).tolist() == pytest.approx(x.abs().amax(-1).tolist(), rel=1e-6)


def test_emulation_holds_only_while_it_is_asked_for() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 4, bias=False))
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
    plain = model(x)
    with emulated(model, {"0": fp8_inputs}):
        assert torch.equal(model(x), torch.nn.functional.linear(fp8_inputs(x), model[0].weight))
    assert torch.equal(model(x), plain)


def test_the_verdict_wants_a_clear_difference() -> None:
    assert distance([[None, -1.0, -2.0]], [[None, -1.5, -2.0]]) == 0.25
    assert verdict({"16-bit": 0.01, "FP8": 0.03, "NVFP4": 0.2}) == "16-bit"
    assert verdict({"16-bit": 0.02, "FP8": 0.03, "NVFP4": 0.2}) == "not told (16-bit is nearest)"


@pytest.mark.parametrize("name", list(serving.PACKINGS))
def test_a_packed_random_model_is_whole_and_as_large_as_a_trained_one(tmp_path: Path, name: str) -> None:
    packing = serving.PACKINGS[name]
    directory = packed_model(tmp_path / name, "random:tiny", packing)
    declared = json.loads((directory / "config.json").read_text())["quantization_config"]
    linears = ["model.layers.0.mlp.down_proj", "lm_head"]
    assert detect_format(declared).parse(declared, linears) == {
        linears[0]: Scheme(packing.grid, packing.group_size),
        "lm_head": None,
    }
    weights = load_fake_quantized(directory).state_dict()
    for linear in (name for name in weights if "_proj" in name):
        width = weights[linear].shape[1]
        assert float(weights[linear].float().std()) == pytest.approx(width**-0.5, rel=0.2)
        assert not (weights[linear] == 0).all(dim=1).any()
    bf16 = random_model(tmp_path / "bf16", "random:tiny")
    assert (
        _parameters(Checkpoint(directory)) == _parameters(Checkpoint(bf16)) == sum(map(torch.numel, weights.values()))
    )


def test_a_random_model_is_kept_only_where_it_is_the_one_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(place: Path) -> dict[str, int]:
        return {file.name: file.stat().st_mtime_ns for file in place.iterdir()}

    base = written(random_model(tmp_path / "base", "random:tiny"))
    place = shapes.place_of(tmp_path, "m", tmp_path / "base")
    assert written(random_model(tmp_path / "base", "random:tiny")) == base
    (tmp_path / "base" / "model-00007.safetensors").touch()
    cut = written(random_model(tmp_path / "base", "random:tiny", 1))
    assert all(cut[name] != base[name] for name in cut) and "model-00007.safetensors" not in cut
    assert shapes.place_of(tmp_path, "m", tmp_path / "base") != place, "other weights under the same name"
    assert shapes.place_of(tmp_path, "random:8b") != shapes.place_of(tmp_path, "random:32b")
    packed = written(packed_model(tmp_path / "packed", "random:tiny", serving.PACKINGS["gptq"]))
    assert written(packed_model(tmp_path / "packed", "random:tiny", serving.PACKINGS["gptq"])) == packed
    assert written(packed_model(tmp_path / "packed", "random:tiny", serving.PACKINGS["awq"])) != packed
    monkeypatch.setitem(shapes.SHAPES, "random:tiny", (128, 512, 2, 4, 2, 512))
    directory = packed_model(tmp_path / "packed", "random:tiny", serving.PACKINGS["awq"])
    assert json.loads((directory / "config.json").read_text())["intermediate_size"] == 512


@pytest.mark.parametrize(
    ("named", "count", "asked", "found"),
    [
        (None, 2, None, ["0", "1"]),
        (None, 0, None, [""]),
        ("2,3", 2, None, ["2", "3"]),
        ("2, 3", 2, "1", ["3"]),
        ("GPU-b,GPU-a", 2, "0", ["5"]),
        ("GPU-a", 1, None, ["4"]),
    ],
)
def test_gpus_are_those_that_the_user_lets_be_seen(
    named: str | None, count: int, asked: str | None, found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their places among them; NVML knows GPU 4 as GPU-a and GPU 5 as GPU-b."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlDeviceGetCount=lambda: 6,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda handle: {4: "GPU-a", 5: "GPU-b"}.get(handle, "GPU-other"),
        nvmlDeviceGetIndex=lambda handle: handle,
    )
    monkeypatch.setattr(bench_memory, "load_nvml", lambda: nvml)
    assert cards(asked) == found
    assert on_card(found[0]).get("CUDA_VISIBLE_DEVICES", "") == found[0]
    assert ("CUDA_DEVICE_ORDER" in on_card(found[0])) == ("GPU" in (named or ""))
    with pytest.raises(UsageError, match="there is no GPU '7'"):
        cards("7")
    monkeypatch.setattr(bench_memory, "load_nvml", lambda: None)
    assert cards() == ([word.strip() for word in named.split(",")] if named else found)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--levels", "a"), "whole numbers above zero"),
        (("--levels", "4,0"), "whole numbers above zero"),
        (("--tokens", "128"), "tokens of a prompt, then of an answer"),
        (("--repeats", "0"), "whole numbers above zero"),
        (("--repeats", "1,2"), "is not one whole number"),
    ],
)
@pytest.mark.parametrize("script", [serving, matrix])
def test_a_load_that_cannot_be_is_one_line(
    script: Any, words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        script.parse(["m", "-o", "out", *words])
    assert ended.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]


def engine(name: str, gib: float) -> Engine:
    return Engine(name, Path(name), (), gib)


def test_rounds_fill_cards_in_order() -> None:
    engines = [engine("a", 6), engine("b", 3), engine("c", 3), engine("d", 20), engine("e", 1)]
    named = [[[e.name for e in lane] for lane in lanes] for lanes in rounds(engines, 2, 10, 4)]
    assert named == [[["a", "b"], ["c"]], [["d"], ["e"]]]
    assert [[e.name for e in lanes[0]] for lanes in rounds(engines[:3], 1, 100, 2)] == [["a", "b"], ["c"]]


def test_a_line_that_is_being_written_does_not_count(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    assert read_lines(file) == []
    file.write_text('{"ready": 1}\n{"point": "c1", "sec')
    assert read_lines(file) == [{"ready": 1}]


SECONDS = {"bf16": 1.0, "gptq": 0.7, "nvfp4-humming": 0.5, "nvfp4-marlin": 0.8}


def timed(tmp_path: Path) -> Path:
    """An evidence file as serving.py writes it: NVFP4 is fastest in Humming with 16 bits, in Marlin with FP8."""
    args = serving.parse(["-o", str(tmp_path), "--levels", "1,64", "--configs", *SECONDS])
    platform, config = load_platform("h100"), serving.shape_config("random:8b", None)
    points = serving.points_of(args)
    configs = serving.chosen(serving.configs_of(platform, "0.26.0"), args.configs)
    engines = [
        serving.engine_of(name, *choice, kv, tmp_path, config, points)
        for kv in ("auto", "fp8")
        for name, choice in configs.items()
    ]
    install = VllmInstall(Path("vllm"), "0.26.0", Path("python"))
    for one in engines:
        fast = 0.4 if one.name == "nvfp4-marlin-fp8" else SECONDS[one.facts["config"]]
        one.status, one.seconds = "ok", {p["name"]: [fast, fast, 9.0] for p in points}
        one.log = tmp_path / f"{one.name}.log"
        kernel = "HummingNvFp4LinearKernel" if "humming" in one.name else "MarlinNvFp4LinearKernel"
        kernel = "MacheteLinearKernel" if one.facts["model"] == "gptq" else kernel
        one.log.write_text(f"Using {kernel} for X GEMM\nModel loading took 5.5 GiB and 2.0 seconds\n")
    result = serving.gathered(args, engines, platform, install, config)
    assert [row["kernel"] for row in result["rows"][:4]] == ["BF16", "Machete", "Humming", "Marlin"]
    file = tmp_path / "evidence.json"
    file.write_text(json.dumps(result["evidence"]))
    return file


def test_every_kernel_that_the_platform_names_is_timed() -> None:
    h100 = load_platform("h100")
    new, old = (serving.configs_of(h100, version) for version in ("0.32.0", "0.26.0"))
    assert new["gptq-marlin"] == ("gptq", ("--linear-backend", "marlin"))
    assert new["nvfp4-marlin"] == ("nvfp4", ("--linear-backend", "marlin")) and old["nvfp4-marlin"] == ("nvfp4", ())
    assert list(old)[:5] == ["bf16", "gptq", "nvfp4-humming", "awq", "nvfp4-marlin"] == list(new)[:5]
    assert list(old)[5:] == ["gptq-marlin", "awq-marlin"], "vLLM takes Machete by itself there"
    assert list(serving.configs_of(load_platform("cpu"), "0.32.0")) == ["bf16", "gptq", "awq"]
    with pytest.raises(UsageError, match="no configuration gptq-machete"):
        serving.chosen(old, ["gptq-machete"])


def test_a_bench_measures_the_first_artifacts_kernels_before_other_caches(tmp_path: Path) -> None:
    """Each server once, whatever it is called: what no word changes is not measured again."""
    h200, install = load_platform("h200"), replace(find_vllm(str(make_fake(tmp_path / "env"))), version="0.26.0")
    models = {name: serving.made(name, "random:tiny", None, tmp_path) for name in ("bf16", "nvfp4", "gptq")}
    args = bench.parse(["-o", str(tmp_path), "--levels", "1,4"])
    for platform, first in ((h200.model_copy(update={"speed": ()}), "humming"), (load_platform("h100"), "marlin")):
        found = bench.configs_by_step(models, args, platform, install)
        names = {step: [text.partition(":")[0] for text in texts] for step, texts in found.items()}
        own = [f"nvfp4-{first}-auto", f"nvfp4-{first}-fp8"]
        own = [*own, "nvfp4-marlin-auto"] if first == "humming" else ["nvfp4-humming-auto", *own]
        assert list(names) == ["served", "kernels-nvfp4", "caches", "kernels-gptq"]
        assert names["served"] == ["gptq"] and names["kernels-nvfp4"] == own
        assert names["caches"] == ["bf16-auto", "gptq-auto"]
        assert names["kernels-gptq"] == ["gptq-marlin-auto", "gptq-marlin-fp8"]


def test_a_row_that_was_cut_short_is_no_evidence() -> None:
    base = {"model": "bf16", "kv": "auto", "kernel": "BF16", "backend": {}, "weights_gib": 2.0}
    rows = [{**base, "seconds": {"c1": [1.0], "c4": [2.0]}}]
    rows += [{**base, "model": "gptq", "kernel": "a", "seconds": {"c1": [0.5, 0.7, 0.5], "c4": [1.0]}}]
    rows += [{**base, "model": "awq", "kernel": "b", "seconds": {"c4": [1.5]}}]
    result = {"rows": rows, "levels": [1, 4, 16], "model": "random:8b", "platform": "h100", "hardware": "", "holds": {}}
    result["date"] = "2026-01-02"
    result |= {"vllm": "0.26.0", "prompt_tokens": 8, "output_tokens": 8, "prefill": None, "repeats": 3}
    table = serving.evidence(result, serving.shape_config("random:8b", None))
    assert table and [(r["kernel"], r["seconds"]) for r in table["rows"]] == [
        ("BF16", {"1": 1.0, "4": 2.0}),
        ("a", {"1": 0.5, "4": 1.0}),
    ]
    assert table["model"]["name"].startswith("Llama-3.1-8B shape")
    other = serving.evidence({**result, "model": "random:32b"}, serving.shape_config("random:32b", None))
    assert other and other["model"]["name"].startswith("Qwen2.5-32B shape")


def artifact(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    quantization = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    (directory / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return directory


def test_serve_takes_the_kernel_that_was_fastest_with_its_kv_cache(tmp_path: Path) -> None:
    platform = load_platform("h100", [timed(tmp_path)])
    model = artifact(tmp_path)
    eight = serve_command(model, "modelopt", platform, concurrency=64)
    assert eight.value("--kv-cache-dtype") == "fp8" and eight.value("--linear-backend") is None
    assert "Marlin, FP8 KV cache: 2.50x the speed of BF16 at concurrency 64" in " ".join(eight.notes)
    sixteen = serve_command(model, "modelopt", platform, concurrency=64, extra=("--kv-cache-dtype", "auto"))
    assert sixteen.value("--kv-cache-dtype") == "auto" and sixteen.value("--linear-backend") == "humming"
    assert "kernel Humming: 2.00x the speed of BF16" in " ".join(sixteen.notes)


def test_the_table_of_a_timing_is_evidence_for_the_versions_that_choose_alike(tmp_path: Path) -> None:
    table = read_table(timed(tmp_path))
    assert (table.since, table.before) == ("0.26.0", "0.32.0")
    assert table.baseline.kernel == "BF16" and not table.baseline.flags
    assert table.model.parameters == 8_030_261_248
    assert [row.kernel for row in table.rows_for("modelopt", "W4A16_NVFP4", "auto")] == ["Marlin"]


def test_every_case_names_an_artifact_that_can_be_made() -> None:
    plan = yaml.safe_load(served.PLAN.read_text())
    made = {**plan["artifacts"], **plan["heads"]}
    for name, recipe in made.items():
        recipe_from_mapping({**plan["defaults"], **recipe}, name)
    cases = served.cases_of(plan, None)
    named = [case.name for case in cases]
    for case in cases:
        assert case.artifact is None or case.artifact in made
        assert case.against is None or named.index(case.against) < named.index(case.name)
    assert set(made) == {case.artifact for case in cases if case.artifact}


def test_cells_with_the_same_tensors_share_a_measurement(tmp_path: Path) -> None:
    packing = serving.PACKINGS["gptq"]
    one, other = (packed_model(tmp_path / n, "random:tiny", packing) for n in ("one", "other"))
    third = packed_model(tmp_path / "third", "random:tiny", serving.PACKINGS["awq"])
    assert matrix.served_as(one) == matrix.served_as(other) != matrix.served_as(third)


FIGURES = {"gptq": (1.8, 18.0), "awq": (0.7, 12.1), "nine": (3.7, 20.0), "nvfp4": (0.2, 5.0), "command": (0.5, 4.0)}


def quantized(out: Path, monkeypatch: pytest.MonkeyPatch, *words: str, **figures: Any) -> tuple[int, list[list[str]]]:
    """quantize.py's exit status and table, where a GPU takes (seconds a block, GiB), fails (None) or is stopped."""
    script = quantize
    taken = {**FIGURES, **figures}

    def found(run: str) -> Any:
        if taken[run] is KeyboardInterrupt:
            raise KeyboardInterrupt
        facts = dict(zip(("block", "peak_gib"), taken[run] or ()))
        return {**facts, "hidden_gib": 1.0, "seconds": 19.0} if facts else None

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in {
        "card_name": lambda: "a GPU",
        "rate": lambda shape: 1e15,
        "random_model": lambda place, *_: place,
        "apart": lambda run: run,
        "told": found,
        "command": lambda args: found("command") or {"reason": "it failed"},
    }.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(sys, "argv", ["quantize.py", "-o", str(out), *words])
    with pytest.raises(SystemExit) as ended:
        script.main()
    rows = json.loads((out / "quantize.json").read_text())
    table = script.table(rows)
    return int(ended.value.code or 0), [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[3:8]]


def test_a_quantize_that_is_stopped_prints_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantized(tmp_path, monkeypatch, command=KeyboardInterrupt)[0] == 130
    said = capsys.readouterr()
    assert said.out.count("| halfbyte |") == 4 and said.err.endswith("quantize.py: stopped\n")


def test_quantizing_is_held_against_its_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, rows = quantized(tmp_path, monkeypatch, awq=(0.7, 11.5), nine=(3.6, 20.0))
    assert status == 0 and [row[0] for row in rows] == ["gptq", "awq", "nine", "nvfp4", "command"]
    limits = ["3.5 s a block", "4 s a block, 12 GiB", "2 times gptq", "", "20 s in all"]
    assert [row[-2] for row in rows] == limits and [row[-1] for row in rows] == ["yes", "yes", "yes", "", "yes"]
    assert [row[3] == "–" for row in rows] == [False, False, False, True, True], "no data, no floor"
    assert rows[0][6:9] == ["18.00", "1.00", "17.00"]
    status, rows = quantized(tmp_path, monkeypatch)
    assert status == 1 and [row[-1] for row in rows] == ["yes", "NO", "NO", "", "yes"]
    status, rows = quantized(tmp_path, monkeypatch, "--runs", "nine,nvfp4", nvfp4=None)
    assert status == 1 and rows[0][-2:] == ["2 times gptq", "–"] and rows[2] == [], rows
    status, rows = quantized(tmp_path, monkeypatch, "--runs", "nine,gptq", nine=(3.6, 20.0))
    assert status == 0 and rows[0][-1] == "yes"
    status, rows = quantized(tmp_path, monkeypatch, "--shape", "random:32b")
    assert status == 0 and [row[-2:] for row in rows] == [["", ""]] * 5


def test_quantizing_takes_a_tiny_shape_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [quantize.__file__, "--dry", "-o", str(tmp_path), "--runs", "gptq,nvfp4"])
    args = quantize.parse()
    monkeypatch.setattr(quantize, "apart", lambda run: quantize.one(args, run))
    monkeypatch.setattr(quantize, "told", lambda found: found)
    with pytest.raises(SystemExit) as ended:
        quantize.main()
    assert ended.value.code == 0
    rows = json.loads((tmp_path / "quantize.json").read_text())["rows"]
    assert [(row["run"], len(row["blocks"]), row["met"]) for row in rows] == [("gptq", 1, None), ("nvfp4", 1, None)]
    assert (tmp_path / "random-tiny" / "bf16-2").is_dir()
    assert quantize.parse(["-o", "o", "--peers"]).peers == ["gptq", "awq"]
    with pytest.raises(SystemExit):
        quantize.parse(["-o", "o", "--runs", "gptq,rtn"])


def test_steps_share_what_time_is_left() -> None:
    assert everything.share(450, ["served", "matrix", "serving"]) == 135
    assert everything.share(300, ["serving"]) == 300


def test_every_step_is_called_with_words_that_it_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = {"served": served, "matrix": matrix, "serving": serving, "bench": bench}
    words = ["smollm2-135m", "--calibration", "cal", "--text", "t.txt", "-o", str(tmp_path), "--gpus", "0,1"]
    args = everything.parse([*words, "--work", str(tmp_path / "work"), "--vllm", "env"])
    assert args.steps == ["quantize", "kernels", *scripts]
    for step, script in scripts.items():
        parsed = script.parse(everything.words_of(step, args, 99.5)[1:])
        place = tmp_path / "work" / ("serving" if step == "bench" else step)
        assert (parsed.gpus, parsed.seconds, parsed.output, parsed.vllm) == ("0,1", 100.0, place, "env")
    parsed = quantize.parse(everything.words_of("quantize", args, 99.5)[1:])
    assert (parsed.json, parsed.shape) == (tmp_path / "quantize.json", "random:8b")
    assert everything.words_of("kernels", args, 99.5)[1:] == ["--json", str(tmp_path / "kernels.json")]
    dry = everything.parse(["--dry", "-o", str(tmp_path), "--skip", "matrix"])
    assert dry.steps == ["quantize", "served", "serving", "bench"]
    assert all(scripts[step].parse(everything.words_of(step, dry, 9)[1:]).dry for step in dry.steps[1:])
    with pytest.raises(SystemExit):
        everything.parse(["-o", str(tmp_path)])
    assert everything.parse(["-o", str(tmp_path), "--steps", "quantize", "kernels"]).model is None


def test_a_step_that_fails_or_is_not_begun_is_the_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are programs that find what is named from here, and that end with all they started."""
    script = """import pathlib, subprocess, sys, time
print(pathlib.Path("text").read_text(), sys.argv[1])
if sys.argv[1] == "slow":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(2); open('late', 'w')"])
    time.sleep(60)
sys.exit(int(sys.argv[1]))"""
    (tmp_path / "text").write_text("found")
    (tmp_path / "step.py").write_text(script)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tables.txt").write_text("of another run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(everything, "END_S", 1.0)
    does = {"served": "0", "matrix": "slow", "serving": "3"}
    monkeypatch.setattr(everything, "words_of", lambda step, args, seconds: ["step.py", does[step]])
    monkeypatch.setattr(everything, "UNTIMED", ("matrix",))
    monkeypatch.setattr(everything, "share", lambda left, steps: 1.5)

    def ended(*steps: str, seconds: str = "300") -> int:
        words = ["m", "--calibration", "c", "--text", "text", "-o", "out", "--work", "work", "--seconds", seconds]
        monkeypatch.setattr(sys, "argv", ["everything.py", *words, "--steps", *steps])
        with pytest.raises(SystemExit) as end:
            everything.main()
        return int(end.value.code or 0)

    assert ended("served") == 0 and (tmp_path / "out" / "tables.txt").read_text() == "found 0\n"
    assert ended("serving", "served") == 3
    assert (tmp_path / "out" / "tables.txt").read_text() == "found 3\n\nfound 0\n"
    assert ended("served", seconds="0") == 1
    assert ended("matrix") > 0
    time.sleep(1.5)
    assert not (tmp_path / "late").exists()
    assert everything.worst([0, -9, 3]) == 137


STAND_IN = """
import sys, time

class Answer:
    def __init__(self, count):
        self.outputs = [self]
        self.token_ids = [7] * count

class LLM:
    @classmethod
    def from_engine_args(cls, words):
        print("Using FakeLinearKernel for Fake", flush=True)
        if "broken" in words[1]:
            raise ValueError("no such kernel")
        return cls()

    def generate(self, prompts, sampling, use_tqdm):
        time.sleep(0.01)
        return [Answer(sampling["max_tokens"]) for _ in prompts]

def SamplingParams(**words):
    return words

class EngineArgs:
    add_cli_args = staticmethod(lambda parser: parser)
    from_cli_args = staticmethod(lambda words: words)

class FlexibleArgumentParser:
    def parse_args(self, words):
        return words
"""


@pytest.fixture
def engine_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VllmInstall:
    """A vLLM package that answers at once, and does not load what is called broken."""
    for name in ("vllm", "vllm/engine", "vllm/utils"):
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text("")
    (tmp_path / "site/vllm/__init__.py").write_text(STAND_IN)
    (tmp_path / "site/vllm/engine/arg_utils.py").write_text("from vllm import EngineArgs\n")
    (tmp_path / "site/vllm/utils/argparse_utils.py").write_text("from vllm import FlexibleArgumentParser\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    return VllmInstall(Path(sys.executable), "0.32.0", Path(sys.executable))


def test_engines_load_together_and_one_that_does_not_is_a_row(tmp_path: Path, engine_program: VllmInstall) -> None:
    engines = [engine("one", 1), engine("broken", 1), engine("two", 1)]
    points = [{"name": "c2", "prompts": 2, "input": 4, "output": 3}]
    written: list[str] = []
    run_engines(
        engines,
        Work(points, 2, 100),
        engine_program,
        tmp_path,
        [""],
        gib=10,
        abreast=3,
        after=lambda: written.append(",".join(e.status for e in engines)),
    )
    assert [e.status for e in engines] == ["ok", "failed", "ok"]
    assert engines[1].reason == "ValueError: no such kernel" and "no such kernel" in engines[1].result()["log"]
    assert all(len(e.seconds["c2"]) == 2 and min(e.seconds["c2"]) >= 0.01 for e in (engines[0], engines[2]))
    assert engines[0].result()["kernels"] == ["FakeLinearKernel"]
    assert written[0] == "ok,failed,not run"


def test_what_was_timed_is_taken_under_the_same_conditions_alone(
    tmp_path: Path, engine_program: VllmInstall, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [{"name": f"c{n}", "prompts": n, "input": 4, "output": 3} for n in (1, 2)]
    work, started = Work(points[:1], 2, 100), []
    begin = engines.start_round
    monkeypatch.setattr(engines, "start_round", lambda *words: started.append(words) or begin(*words))

    def again(work: Work, install: VllmInstall = engine_program, **changes: Any) -> Engine:
        one = replace(engine("one", 1), **{"weights": "w", **changes})
        run_engines([one], work, install, tmp_path, [""], gib=10, abreast=1)
        assert one.status == "ok" and list(one.seconds) == [p["name"] for p in work.points]
        return one

    timed = again(work)
    kept = again(work)
    assert len(started) == 1 and (kept.seconds, kept.load_seconds) == (timed.seconds, timed.load_seconds)
    assert kept.result()["kernels"] == ["FakeLinearKernel"]
    assert again(replace(work, points=points)).seconds["c1"] == timed.seconds["c1"], "c2 alone is new"
    assert len(started) == 2
    again(replace(work, repeats=3))
    again(work, replace(engine_program, version="0.31.0"))
    again(work, weights="other")
    again(work, words=("--kv-cache-dtype", "fp8"))
    again(replace(work, points=[{**points[0], "output": 5}]))
    assert len(started) == 7
    monkeypatch.setattr(engines, "card_name", lambda: "another GPU")
    again(work)
    assert len(started) == 8


def test_a_point_that_was_timed_stays_where_the_rest_is_cut_short(tmp_path: Path, engine_program: VllmInstall) -> None:
    points = [{"name": f"c{n}", "prompts": n, "input": 4, "output": 3} for n in (1, 2)]
    one, work = engine("one", 1), Work(points[:1], 2, 100)
    run_engines([one], work, engine_program, tmp_path, [""], gib=10, abreast=1)
    late = engine("one", 1)
    with (run_place(one, work, engine_program, tmp_path) / "result.jsonl").open("a") as file:
        file.write('{"point": {"name": "c2"')
    run_engines([late], replace(work, points=points), engine_program, tmp_path, [""], gib=10, abreast=1, deadline=0.0)
    assert (late.status, late.seconds) == ("not run", one.seconds) and "time was over" in late.reason
    run_engines([late], replace(work, points=points), engine_program, tmp_path, [""], gib=10, abreast=1)
    assert late.status == "ok" and late.seconds["c1"] == one.seconds["c1"] and len(late.seconds["c2"]) == 2


@pytest.fixture
def time_out(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Once it is called, an engine or a server that is started fails the test."""

    def never(*_: Any) -> None:
        raise AssertionError("nothing is to be started")

    return lambda: [monkeypatch.setattr(*one, never) for one in ((engines, "start_round"), (served, "serve"))] and None


def test_serving_says_why_there_is_no_evidence(
    tmp_path: Path,
    engine_program: VllmInstall,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    time_out: Callable[[], None],
) -> None:
    """A run of the tiny shape; what it found stays as it is where it is asked again, with no time left."""
    monkeypatch.setattr(serving, "find_vllm", lambda named: engine_program)
    words = ["--dry", "-o", str(tmp_path / "out"), "--configs", "gptq", "bf16"]

    def ended(*more: str) -> int:
        monkeypatch.setattr(sys, "argv", ["serving.py", *words, *more])
        with pytest.raises(SystemExit) as end:
            serving.main()
        return int(end.value.code or 0)

    assert ended() == 0 and "no evidence" not in capsys.readouterr().err
    evidence = json.loads((tmp_path / "out" / "evidence.json").read_text())
    told = json.loads((tmp_path / "out" / "serving.json").read_text())
    for level in ("1", "2"):
        apart = [max(seconds) / min(seconds) - 1 for row in told["rows"] for seconds in [row["seconds"][f"c{level}"]]]
        assert evidence["apart"][level] == pytest.approx(max(apart), abs=1e-4)
    logs = list((tmp_path / "out").glob("random-tiny/runs/*/vllm.log"))
    os.utime(logs[0], (0, 0))
    time_out()
    assert len(logs) == 2 and ended("--seconds", "0") == 0
    later = json.loads((tmp_path / "out" / "evidence.json").read_text())
    assert later == {**evidence, "date": later["date"]} and later["date"].startswith("19"), "old seconds stay old"
    capsys.readouterr()
    words[-2:] = ["bf16"]
    assert ended() == 0 and "no evidence.json" in capsys.readouterr().err.splitlines()[-1]
    words[-1:] = ["gpu"]
    assert ended() == 2 and "serving.py: no configuration gpu" in capsys.readouterr().err


def test_served_goes_on_where_it_was(
    tmp_path: Path, engine_program: VllmInstall, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A case that failed is served again, one that was served is not, unless vLLM is another."""
    install, asked = engine_program, []
    broken = {"gptq-g32"}

    def serve(scene: Any, case: Any, seats: Any) -> dict[str, Any]:
        asked.append(case.name)
        if case.name in broken:
            raise HalfbyteError("no such kernel")
        return {"ppl_served": 1.0, "tokens": 9, "completion": "", "weight_gib_reported": 1.0, "kernels": []}

    monkeypatch.setattr(served, "serve", serve)
    monkeypatch.setattr(served, "find_vllm", lambda named: install)
    words = ["--dry", "--text", "t.txt", "-o", str(tmp_path / "out"), "--cases", "bf16", "gptq-g32"]

    def again() -> dict[str, str]:
        asked.clear()
        result = served.run(served.parse(words))
        assert json.loads((tmp_path / "out" / "served.json").read_text())["rows"] == result["rows"]
        return {row["name"]: row["status"] for row in result["rows"]}

    assert again() == {"bf16": "served", "gptq-g32": "not served"} and sorted(asked) == ["bf16", "gptq-g32"]
    assert again() == {"bf16": "served", "gptq-g32": "not served"} and asked == ["gptq-g32"]
    broken.clear()
    assert again() == {"bf16": "served", "gptq-g32": "served"} and asked == ["gptq-g32"]
    broken.update(("bf16", "gptq-g32"))
    assert again() == {"bf16": "served", "gptq-g32": "served"} and asked == []
    install = replace(install, version="0.31.0")
    assert again() == {"bf16": "not served", "gptq-g32": "not served"}
    install = engine_program
    assert again() == {"bf16": "served", "gptq-g32": "served"} and asked == []


def test_the_matrix_ranks_by_what_was_timed(
    tmp_path: Path, engine_program: VllmInstall, monkeypatch: pytest.MonkeyPatch, time_out: Callable[[], None]
) -> None:
    monkeypatch.setattr(matrix, "find_vllm", lambda named: engine_program)
    report = tmp_path / "report.md"
    words = ["--dry", "-o", str(tmp_path / "out"), "--report", str(report)]
    args = matrix.parse(words)
    monkeypatch.setattr(sys, "argv", ["matrix.py", *words, "--seconds", "0"])
    with pytest.raises(SystemExit) as ended:
        matrix.main()
    assert ended.value.code == 1, "nothing is timed"
    result, speeds = matrix.run(args)
    assert [cell["status"] for cell in result["cells"]] == ["judged", "judged"]
    for cell in result["cells"]:
        assert cell["tokens_per_second"] == speeds[cell["name"]]["tokens_per_second"] > 0
        assert speeds[cell["name"]]["speedup"]["low"] <= speeds[cell["name"]]["speedup"]["value"]
    assert "| BF16 |" in report.read_text() and "tokens/s at 2" in report.read_text()
    time_out()
    assert matrix.run(args)[1] == speeds
    args.seconds, results = 0.0, tmp_path / "out" / "sweep" / "results"
    monkeypatch.setattr(matrix, "find_vllm", lambda named: replace(engine_program, version="0.31.0"))
    result, later = matrix.run(args)
    assert later == speeds, "what is not measured does not take the place of what was"
    assert {json.loads(file.read_text())["vllm"] for file in results.glob("*.bench.json")} == {"0.32.0"}


def test_artifacts_are_benched_and_tuned_as_the_command_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stand-in for vLLM; what was measured stays where there is no time, and is not taken for another load."""
    vllm = make_fake(tmp_path / "env")
    monkeypatch.setattr(bench, "configs_of", lambda *_: {"gptq-slow": ("gptq", ("--linear-backend", "slow"))})

    def again(*more: str, **changes: Any) -> dict[str, Any]:
        words = ["--dry", "-o", str(tmp_path / "out"), "--vllm", str(vllm), "--models", "gptq", *more]
        args = bench.parse(words)
        vars(args).update(changes)
        result = bench.run(args)
        assert json.loads((tmp_path / "out" / "bench.json").read_text())["rows"] == result["rows"]
        return result

    result = again()
    steps = [(row["name"], step, entry["status"]) for row in result["rows"] for step, entry in row["steps"].items()]
    assert steps == [("bench", "served", "ok"), ("bench", "kernels-gptq", "ok"), ("gptq", "tune", "ok")]
    lines = bench.table(result)
    assert lines[1] == "|  | 1 | 2 | prefill |" and lines[3].startswith("| BF16 | 100 | 200 | ")
    assert lines[4].startswith("| gptq | 170 (1.70x)") and lines[6].startswith("gptq, tune: ")
    assert lines[5].startswith("| gptq-slow-auto | 85 (0.85x)")
    assert bench.result_file(bench.parse(["--dry", "-o", "x", "--json", "x/32b.json"])).name == "32b.json"
    (words,) = {tuple(entry["words"]) for row in result["rows"][:1] for entry in list(row["steps"].values())[:1]}
    assert words[words.index("--evidence") + 1] == str(tmp_path / "out" / "bench-evidence.json")
    table = read_table(tmp_path / "out" / "bench-evidence.json")
    assert [row.method for row in table.rows] == ["bf16", "gptq", "gptq"] and table.rows[1].group_size == 128
    assert again("--seconds", "0")["rows"] == result["rows"]
    rows = again("--seconds", "500")["rows"]
    assert {entry["status"] for row in rows for entry in row["steps"].values()} == {"ok"}
    other = again("--seconds", "0", levels=[1, 4])["rows"]
    assert [entry["status"] for row in other for entry in row["steps"].values()] == ["not run", "not run", "ok"]


def test_a_bench_that_is_cut_tells_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs before the deadline are in the table, and the same command does the rest."""
    vllm = make_fake(tmp_path / "env")
    words = ["--dry", "-o", str(tmp_path / "out"), "--vllm", str(vllm), "--models", "gptq", "--tune", "0"]
    monkeypatch.setenv("FAKE", "hang")
    monkeypatch.setattr(bench, "LAST_S", 25.0)
    args = bench.parse([*words, "--seconds", "28"])
    args.tune = 0
    result = bench.run(args)
    (step,) = result["rows"][0]["steps"].values()
    assert step["status"] == "failed" and "no evidence" in step["reason"], "nothing was measured at all"
    monkeypatch.setenv("FAKE", "ok")
    args.seconds = float("inf")
    result = bench.run(args)
    assert result["rows"][0]["steps"]["served"]["status"] == "ok"
    entry = result["rows"][0]["steps"]["served"]
    cut = {**entry, "result": {**entry["result"], "stopped": "the time was over"}}
    (there,) = (tmp_path / "out" / "random-tiny" / "bench").iterdir()
    (there / "served.whole.json").unlink()
    code = f"import json; json.dump({cut['result']!r}, open({str(there / 'bench.json')!r}, 'w'))"
    fresh = bench.planned([sys.executable, "-c", code], "served", there)
    bench.do(fresh, "served", there, "", float("inf"), threading.Event())
    assert (fresh["status"], fresh["reason"]) == ("cut", "the time was over") and fresh["result"]["points"]
    assert not (there / "served.whole.json").exists(), "it is done again"
    lines = bench.table({**result, "rows": [{"name": "bench", "steps": {"served": fresh}}]})
    assert lines[3].startswith("| BF16 | 100 | 200 |") and lines[-1] == "bench, served: cut: the time was over"


def test_a_plan_compares_what_is_served_with_the_platforms_kv_cache(tmp_path: Path) -> None:
    """FP8, the H100's own: NVFP4 in Marlin (0.4 s) is faster than GPTQ (0.7) and needs no flag."""
    decision = choose([128], [load_platform("h100", [timed(tmp_path)])], [64])
    assert decision.recipe.method == "nvfp4" and decision.recipe.activations == "bf16"
    words = " ".join(reason.text for reason in decision.reasons)
    assert "linear-backend" not in words and "kv-cache-dtype fp8 (" not in words


def test_a_stopped_bench_ends_what_it_runs(tmp_path: Path) -> None:
    """A step that is cut short is a row that says so, and keeps what was found before."""
    words = [sys.executable, "-c", "import time; time.sleep(60)"]
    entry = bench.planned(words, "bench", tmp_path)
    over, began = threading.Event(), time.monotonic()
    threading.Timer(1.0, over.set).start()
    bench.do(entry, "bench", tmp_path, "", float("inf"), over)
    assert time.monotonic() - began < 30 and entry["status"] == "failed" and entry["reason"] == "the time was over"
    entry["reason"] = ""
    bench.do(entry, "bench", tmp_path, "", float("inf"), over)
    assert entry["reason"] == "", "nothing is begun"
