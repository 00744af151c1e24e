"""Servers that are loaded at once and measured alone: what each is given of the device, what comes of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import halfbyte.evaluate.speed_room as room
from halfbyte.cli.bench import _config
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate.speed import BASELINE, MODEL, BenchRequest, Variant, command_for
from halfbyte.evaluate.speed_evidence import write_evidence
from halfbyte.evaluate.speed_result import bench_result
from halfbyte.evaluate.speed_runs import INTERRUPTED, measure
from halfbyte.evaluate.stability import Watch
from halfbyte.platforms import load_platform
from halfbyte.platforms.evidence import read_table
from halfbyte.serving import ServeCommand, find_vllm
from halfbyte.serving.bench import Load
from tests.tiny import make_tiny
from tests.unit.artifacts import edit_json
from tests.unit.fake_vllm import make_fake
from tests.unit.test_serving_process import gone, pids
from tests.unit.test_speed_stopped import Stopper

H100 = load_platform("h100")


@pytest.fixture
def install(tmp_path: Path) -> Any:
    return find_vllm(str(make_fake(tmp_path / "env")))


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """A BF16 model, and two whose configs say gptq and awq."""
    made = {BASELINE: make_tiny("llama", tmp_path / "base")}
    for method in ("gptq", "awq"):
        made[method] = Path(shutil.copytree(made[BASELINE], tmp_path / method))
        stated = {"quant_method": method, "bits": 4, "group_size": 32}
        edit_json(made[method] / "config.json", lambda tree, stated=stated: tree.update(quantization_config=stated))
    return made


def asked(models: dict[str, Path], **changes: Any) -> BenchRequest:
    slow = ("--linear-backend", "slow")
    variants = (
        Variant(BASELINE, models[BASELINE]),
        Variant(MODEL, models["gptq"]),
        Variant("slow", models["gptq"], slow),
        Variant("awq", models["awq"]),
        Variant("bf16-auto", models[BASELINE], ("--kv-cache-dtype", "auto")),
    )
    given = {"requests": 4, "repeats": 2, "input_tokens": 8, "output_tokens": 4, "together": 3, **changes}
    return BenchRequest(variants, H100, (1, 4), **given)


class Told:
    """A Progress that keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def start(self, label: str, total: int) -> None:
        pass

    def advance(self, steps: int = 1, note: str = "") -> None:
        pass

    def say(self, message: str) -> None:
        self.said.append(message)


def test_room(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((models[BASELINE] / "config.json").read_text())
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * width
    assert room.token_bytes(config, "fp8") == token and room.token_bytes(config, "auto") == 2 * token
    loads = [Load(256, 512, 128, 128), Load(16, 16, 2048, 1)]
    assert room.cache_tokens(loads, 100) == 76596, "1.1 times 256 sequences of 272 tokens"
    assert room.cache_tokens([Load(1, 8, 8, 8)], 100) == 8192 and room.cache_tokens([], 9000) == 9000
    assert room.spread("abcd", [3, 3, 3, 3], [7], 4) == [["a", "b"]] and room.spread("abcd", [9, 1], [7], 4) == [["a"]]
    assert room.spread("abcd", [1, 1, 1, 1], [7], 3) == [["a", "b", "c"]]
    assert room.spread("abcde", [3, 3, 3, 3, 9], [7, 3], 4) == [["a", "c"], ["b"]], "d would be c's third"
    assert room.spread("ab", [1, 1], [7, 7, 7], 2) == [["a"], ["b"], []]


def test_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices by twos and alone; a lane has what is free on the fullest of its devices."""
    (lane,) = room.lanes(H100, 1)
    assert lane == room.Lane((), int(79.6 * (1 << 30))), "no GPU to ask"
    see(monkeypatch, [5, 3, 4, 6, 9])
    assert [(lane.cards, lane.free) for lane in room.lanes(H100, 1)] == [
        (("0",), 5), (("1",), 3), (("2",), 4), (("3",), 6), (("4",), 9)
    ]  # fmt: skip
    assert room.lanes(H100, 2) == [room.Lane(("0", "1"), 3), room.Lane(("2", "3"), 4)]
    assert room.lanes(H100, 4) == [room.Lane((), 3)] and room.lanes(H100, 3) == [room.Lane((), 3)]


def test_how_many_devices_a_server_takes() -> None:
    words = ["vllm", "serve", "x", "-tp", "2", "--pipeline-parallel-size", "3", "--data-parallel-size=2"]
    command = ServeCommand(words)
    assert (room.ranks(command), room.devices(command)) == (6, 12) and room.devices(ServeCommand(words[:3])) == 1


def see(monkeypatch: pytest.MonkeyPatch, rooms: list[int]) -> None:
    """As many GPUs as there are rooms, with so many free bytes."""
    nvml = SimpleNamespace(
        nvmlDeviceGetCount=lambda: len(rooms),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(free=rooms[handle]),
        NVMLError=RuntimeError,
    )
    monkeypatch.setattr(room, "load_nvml", lambda: nvml)
    monkeypatch.setattr(room, "visible", lambda: [str(i) for i in range(len(rooms))])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_server_that_shares_gets_what_the_load_needs(models: dict[str, Path], install: Any) -> None:
    request = asked(models)
    commands = [command_for(request, variant, install) for variant in request.variants]
    spaces = [int(command.value("--kv-cache-memory-bytes") or 0) for command in commands]
    assert spaces[-1] == 2 * spaces[0] == 2 * spaces[1] > 0, "FP8, but for the last"
    assert all(command.value("--gpu-memory-utilization") == "0.02" for command in commands)
    assert room.taken(commands[0], models[BASELINE]) > spaces[0] + room.BESIDE
    longer = command_for(replace(request, watch=Watch(4, tokens=9000)), request.variants[0], install)
    assert int(longer.value("--kv-cache-memory-bytes") or 0) > 4 * 9000 / 8192 * spaces[0]
    assert (
        command_for(replace(request, together=1), request.variants[0], install).value("--kv-cache-memory-bytes") is None
    )
    with pytest.raises(UsageError, match="leave out --gpu-memory-utilization"):
        measure(replace(request, extra=("--gpu-memory-utilization=0.5",)), models[BASELINE].parent / "out", install)


def test_servers_load_at_once_and_models_stand_side_by_side(
    models: dict[str, Path], install: Any, tmp_path: Path
) -> None:
    told = Told()
    found = measure(asked(models, prefill=16), tmp_path / "out", install, progress=told)
    assert told.said == [
        "loading 3 servers at once: baseline, model, slow",
        "loading 2 servers at once: awq, bf16-auto",
    ]
    result = bench_result(found)
    for point in result["points"]:
        gains = {name: round(entry["speedup"]["value"], 3) for name, entry in point["configs"].items()}
        assert gains == {"slow": 0.85, "awq": 1.7, "bf16-auto": 1.0} and round(point["speedup"]["value"], 3) == 1.7
    assert {entry["peak_device_bytes"] for entry in result["memory"].values()} == {None}
    assert {entry["kv_cache_tokens"] for entry in result["memory"].values()} == {None}
    ports = [(models[name] / "argv").read_text().split()[-1] for name in models]
    assert len(set(ports)) == 3 and all(gone(models[name]) for name in models)
    assert write_evidence(tmp_path / "evidence.json", found, result) == []
    table = read_table(tmp_path / "evidence.json")
    rows = [(row.method, row.format, row.group_size, row.kv_cache, dict(row.flags)) for row in table.rows]
    assert rows == [
        ("bf16", "bf16", None, "fp8", {}),
        ("gptq", "gptq", 32, "fp8", {}),
        ("gptq", "gptq", 32, "fp8", {"--linear-backend": "slow"}),
        ("awq", "awq", 32, "fp8", {}),
        ("bf16", "bf16", None, "auto", {}),
    ]
    kernels = [row.kernel for row in table.rows]
    assert kernels[2].endswith(" (slow)") and not any("(" in kernel for kernel in (kernels[0], *kernels[3:]))
    before = (models["gptq"] / "starts").read_text()
    again = Told()
    measure(asked(models, prefill=16), tmp_path / "out", install, progress=again)
    assert not again.said and (models["gptq"] / "starts").read_text() == before


def test_servers_are_spread_over_the_devices(
    models: dict[str, Path], install: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two to a GPU, each with its GPU alone in sight; a lane does not wait for another."""
    see(monkeypatch, [80 << 30, 80 << 30])
    told = Told()
    found = measure(asked(models, together=2), tmp_path / "out", install, progress=told)
    assert told.said[0] == "loading 4 servers at once on 2 GPUs: baseline, slow, model, awq" and len(told.said) == 1
    gains = {name: round(e["speedup"]["value"], 3) for name, e in bench_result(found)["points"][1]["configs"].items()}
    assert gains == {"slow": 0.85, "awq": 1.7, "bf16-auto": 1.0}
    seen = {name: (tmp_path / "out" / "bench" / name / "vllm-0.log").read_text() for name in ("model", "slow", "awq")}
    cards = {name: re.search(r"CUDA_VISIBLE_DEVICES (\S+)", text) for name, text in seen.items()}
    assert {name: card and card[1] for name, card in cards.items()} == {"model": "1", "slow": "0", "awq": "1"}


def test_an_interrupt_ends_every_lane(
    models: dict[str, Path], install: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ends then is no crash: it is done when the command is given again."""
    see(monkeypatch, [80 << 30, 80 << 30])
    found = measure(asked(models, together=2), tmp_path / "out", install, progress=Stopper(3), partial=True)
    states = [job.result["status"] for job in found.jobs if job.result]
    assert found.stopped == INTERRUPTED and set(states) == {"ok"} and 3 <= len(states) < len(found.jobs)
    assert all(gone(models[name]) for name in models)
    whole = measure(asked(models, together=2), tmp_path / "out", install)
    assert not whole.stopped and {job.result["status"] for job in whole.jobs if job.result} == {"ok"}


def test_a_server_that_found_no_room_beside_others_is_tried_alone(
    models: dict[str, Path], install: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE", "first")
    request = asked(models)
    request = replace(request, variants=request.variants[:2])
    found = measure(request, tmp_path / "out", install)
    assert {job.result["status"] for job in found.jobs if job.result} == {"ok"}
    assert [len((models[name] / "starts").read_text().splitlines()) for name in (BASELINE, "gptq")] == [2, 2]
    monkeypatch.setenv("FAKE", "die")
    found = measure(request, tmp_path / "out", install, force=True)
    starts = [len((models[name] / "starts").read_text().splitlines()) - 2 for name in (BASELINE, "gptq")]
    assert starts == [2, 1], "the same words, beside others and alone: the next one is not tried again"
    assert all("the weights are wrong" in job.result["reason"] for job in found.jobs if job.result) and found.jobs


def test_a_server_that_its_neighbours_ended_is_tried_alone(
    models: dict[str, Path], install: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed while it waited: that is no result of its own."""
    killed = []

    class Killer(Told):
        def advance(self, steps: int = 1, note: str = "") -> None:
            if note.startswith("baseline, c1") and not killed:
                killed.extend(pids(models["gptq"]))
                os.kill(killed[0], signal.SIGKILL)

    request = asked(models)
    request = replace(request, variants=request.variants[:2])
    found = measure(request, tmp_path / "out", install, progress=Killer())
    assert killed and {job.result["status"] for job in found.jobs if job.result} == {"ok"} and not found.stopped
    assert [len((models[name] / "starts").read_text().splitlines()) for name in (BASELINE, "gptq")] == [1, 2]


def test_a_gpu_that_others_use_is_left_alone(
    models: dict[str, Path], install: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch, [80 << 30, 1 << 30])
    told = Told()
    measure(asked(models, together=5), tmp_path / "out", install, progress=told)
    assert told.said == ["loading 5 servers at once: baseline, model, slow, awq, bf16-auto"]


def test_where_there_is_no_gpu_servers_are_loaded_one_by_one(
    models: dict[str, Path], install: Any, tmp_path: Path
) -> None:
    told, cpu = Told(), load_platform("cpu")
    request = BenchRequest(asked(models).variants[:2], cpu, (1,), 8, 4, 4, 2, together=2)
    found = measure(request, tmp_path / "out", install, progress=told)
    assert told.said == ["servers are loaded one by one where there is no GPU"]
    assert all(entry["kv_cache_tokens"] for entry in bench_result(found)["memory"].values())


@pytest.mark.parametrize(
    "words", [("--port", "8000"), ("--gpu_memory_utilization=0.5",), ("--kv_cache_memory_bytes", "5")]
)
def test_words_that_servers_together_cannot_share(
    models: dict[str, Path], install: Any, tmp_path: Path, words: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError, match=f"leave out {words[0].partition('=')[0].replace('_', '-')}"):
        measure(asked(models, extra=words), tmp_path / "out", install)


def test_a_family_whose_cache_is_not_known(models: dict[str, Path], install: Any, tmp_path: Path) -> None:
    edit_json(models[BASELINE] / "config.json", lambda tree: tree.update(model_type="stranger"))
    with pytest.raises(UsageError, match=r"not known \(stranger\): load its servers one by one, without --together"):
        measure(asked(models), tmp_path / "out", install)


def test_evidence_holds_one_model_and_bf16_once_for_a_cache(
    models: dict[str, Path], install: Any, tmp_path: Path
) -> None:
    """Another model, and BF16 twice, are measured, told, and no rows of it."""
    small = make_tiny("llama", tmp_path / "small", num_hidden_layers=1)
    more = (Variant("small", small, ("--kv-cache-dtype", "auto")), Variant("again", models[BASELINE], ("--seed", "0")))
    again = Variant("same", models[BASELINE], ("--kv-cache-dtype", "fp8"))
    few = Variant("few", models["gptq"], ("--max-num-seqs", "2"))
    request = asked(models)
    request = replace(request, variants=(*request.variants[:2], *more, again, few))
    found = measure(request, tmp_path / "out", install)
    result = bench_result(found)
    assert all(point["configs"][name]["status"] == "ok" for point in result["points"] for name in ("small", "same"))
    assert write_evidence(tmp_path / "evidence.json", found, result) == [
        "small: another model than the BF16 one",
        "same: BF16 with the KV cache fp8 is there already",
        "few: --max-num-seqs is said by plan and serve themselves",
    ]
    table = read_table(tmp_path / "evidence.json")
    assert [(row.method, dict(row.flags)) for row in table.rows] == [
        ("bf16", {}),
        ("gptq", {}),
        ("bf16", {"--seed": "0"}),
    ]


def test_a_config_may_be_another_model(models: dict[str, Path]) -> None:
    assert _config("a: --x 1") == ("a", None, ("--x", "1"))
    other = models["awq"]
    assert _config(f"a: {other} --x 1") == ("a", other, ("--x", "1")) and _config(f"a: {other}") == ("a", other, ())
    with pytest.raises(HalfbyteError, match="nowhere"):
        _config(f"a: {other}/nowhere")
    for text in ("a:", "..: --x 1", "model: --x 1", "a: ''"):
        with pytest.raises(UsageError, match="a model's directory"):
            _config(text)
    with pytest.raises(UsageError, match="no closing quotation"):
        _config("a: 'x")
