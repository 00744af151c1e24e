"""A sweep on a real Ray cluster of two workers, started once: the bytes and figures of a sweep without Ray, a killed
worker's work done again, errors kept to their cell, each platform judged by itself; and nothing is left behind."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import halfbyte.engine.loop as loop
import halfbyte.experiments.fanout as fanout
import halfbyte.experiments.judging as judging
import halfbyte.serving.install as install
from halfbyte.cli.sweep import sweep_words
from halfbyte.engine import Errand, Seat
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate import Windows
from halfbyte.experiments.fanout import RayWorkers
from halfbyte.experiments.judging import CellTask
from halfbyte.experiments.sweep import sweep
from halfbyte.types import Quiet
from tests.tiny import VOCAB, make_tiny
from tests.unit.artifacts import digests, halfbyte, random_set
from tests.unit.test_imports import ROOT, modules
from tests.unit.test_workers import MARK, die, die_once, dying_part

MATRIX = {
    "cells": {
        "B1": None,
        "twin": {"extends": "B1", "ignore": ["lm_head", "model.embed_tokens"]},
        "A1": None,
        "lost": {"extends": "B3", "group_size": 32},
    }
}
GATES = ("ppl=+100000%", "top1=0%")


def dying_judge(seat: Seat, task: CellTask, platform: str) -> dict[str, Any]:
    """Dies once in the middle of B1; fails for a reason of its own in `lost`."""
    if task.cell == "B1":
        die_once("judge")
    if task.cell == "lost":
        raise HalfbyteError("a fault of its own")
    return judging.judge_cell(seat, task, platform)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("fanout")
    make_tiny("llama", root / "m", num_hidden_layers=2, intermediate_size=192)
    (root / "marks").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HALFBYTE_CACHE", str(root / "cache"))
        patch.setenv(MARK, str(root / "marks"))
        patch.setattr(install, "ENVIRONMENT", "no-such-environment")
        yield root


@pytest.fixture(scope="module")
def ray(place: Path) -> Iterator[tuple[RayWorkers, Quiet]]:
    """The cluster. Its one machine stands in for two platforms."""
    said = Quiet()
    with RayWorkers("local", 2, "cpu", {"h100": "h100", "mi325x": "amd"}, said) as workers:
        yield workers, said
    assert workers.place is not None and not workers.place.exists()
    assert "RAY_AUTH_TOKEN" not in os.environ


def go(place: Path, output: str, **more: Any) -> dict[str, Any]:
    ids = [torch.randint(5, VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in (40, 36, 30, 24)]
    windows = Windows(ids, [torch.arange(len(i)) > 0 for i in ids], "random", 40, 40)
    given: dict[str, Any] = {"platforms": ["h100", "mi325x"], "text": windows, "gates": GATES, "device": "cpu"}
    data = random_set(tokens=2100, longest=64)
    return sweep(str(place / "m"), MATRIX, place / output, calibration=data, **given, **more)


@pytest.fixture(scope="module")
def both(place: Path, ray: tuple[RayWorkers, Quiet]) -> dict[str, dict[str, Any]]:
    """The same sweep without Ray, and on Ray with a worker killed while it solves and one while it judges."""
    done = {"without": go(place, "without")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "solve_part", dying_part)
        patch.setattr(judging, "judge_cell", dying_judge)
        done["with"] = go(place, "with", workers=ray[0], judged_on=["h100", "mi325x"])
    return done


def rows(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in result["cells"]}


def test_the_bytes_are_those_without_ray(place: Path, both: dict[str, dict[str, Any]]) -> None:
    ours, theirs = (digests(place / name / "cells") for name in ("with", "without"))
    assert ours == theirs and len(ours) > 20
    assert os.path.samefile(*(place / "with" / "cells" / name / "model.safetensors" for name in ("B1", "twin")))


def test_the_figures_are_those_without_ray(both: dict[str, dict[str, Any]]) -> None:
    ours, theirs = rows(both["with"]), rows(both["without"])
    for name in ("B1", "twin", "A1"):
        for key in ("metrics", "noise_floor", "text"):
            assert ours[name]["eval"][key] == theirs[name]["eval"][key], name
        for key in ("work", "bytes", "notices", "gates", "recipe"):
            assert ours[name][key] == theirs[name][key], name
        assert theirs[name]["judged_on"] is None
    assert both["with"]["sharing"] == both["without"]["sharing"] and both["with"]["cost"] is None


def test_a_killed_worker_costs_a_retry(ray: tuple[RayWorkers, Quiet], both: dict[str, dict[str, Any]]) -> None:
    told = [notice for notice in ray[1].notices if "tried again" in notice]
    assert sorted(n.partition(":")[0] for n in told) == ["block 1 (gate_up, down)", "judging B1"]
    assert all("its worker on Ray died (WorkerCrashedError)" in notice for notice in told)
    assert rows(both["with"])["B1"]["status"] == "judged"


def test_a_fault_of_its_own_fails_its_cell_alone(both: dict[str, dict[str, Any]]) -> None:
    row = rows(both["with"])["lost"]
    assert (row["status"], row["stage"], row["reason"]) == ("failed", "evaluating", "a fault of its own")
    assert [r["status"] for r in both["with"]["cells"]] == ["judged"] * 3 + ["failed"]


def test_each_platform_judges_what_it_can_run(place: Path, both: dict[str, dict[str, Any]]) -> None:
    ours = rows(both["with"])
    assert list(ours["B1"]["judged_on"]) == ["h100", "mi325x"] and list(ours["A1"]["judged_on"]) == ["h100"]
    for name, row in ours.items():
        for platform, one in (row["judged_on"] or {}).items():
            assert one["hardware"].endswith("cores") and one["eval"]["metrics"] == row["eval"]["metrics"], name
            assert one["gates"]["verdict"] == "accepted", platform
    kl = f"{ours['B1']['eval']['metrics']['kl_mean']['value']:.4f}"
    told = [line for line in sweep_words(both["with"], place).splitlines() if line.startswith("B1: KL ")]
    assert len(told) == 1 and told[0].startswith(f"B1: KL {kl} on h100 (") and f", {kl} on mi325x (" in told[0]
    left = sorted(path.name for path in (place / "with" / "results").iterdir())
    assert left == ["A1.h100.json", "B1.h100.json", "B1.mi325x.json"]
    assert not (place / "with" / "reference").exists()


def test_gates_must_hold_on_every_platform(both: dict[str, dict[str, Any]]) -> None:
    from halfbyte.experiments.cells import Cell
    from halfbyte.experiments.gates import resolve_gates
    from halfbyte.experiments.standings import standings

    row = rows(both["with"])["B1"]
    good = {"eval": row["eval"], "check": None, "seconds": 1.0, "windows": {"tokens": [9], "kl": [1.0], "gap": [1.0]}}
    worse = {**row["eval"]["metrics"], "kl_mean": {"value": 9.0, "low": 9.0, "high": 9.0}}
    bad = {**good, "eval": {**row["eval"], "metrics": worse}}
    cell, manifest = Cell("B1", facts={"bytes": 1}), {"bytes": 1, "bytes_bf16": 2, "bits_per_weight": 4.0}
    for second, verdict in ((good, "accepted"), (bad, "rejected")):
        joined = {**good, "judged_on": {"h100": good, "mi325x": second}}
        gates = resolve_gates([*GATES, "kl=5"])
        assert standings([cell], {"B1": joined}, {"B1": manifest}, {}, gates, "kl")["verdict"] == verdict


def test_what_kills_every_worker_is_told(ray: tuple[RayWorkers, Quiet], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout, "ATTEMPTS", 1)
    with pytest.raises(HalfbyteError, match="bad: its worker on Ray died 1 times: is memory short"):
        ray[0].submit(Errand("bad", die)).result()


def test_a_cluster_without_room_is_refused(ray: tuple[RayWorkers, Quiet], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself would wait for ever."""
    monkeypatch.setitem(ray[0].resources, "h200", "nowhere")
    needed = f"{torch.get_num_threads()} CPU and 1 nowhere, which a task needs"
    with pytest.raises(UsageError, match=f"no node of the Ray cluster at local has {needed}"):
        ray[0]._find_room()


def test_ended_in_the_middle_nothing_is_left(place: Path) -> None:
    """Real commands with a cluster of their own, ended while they solve: one line, no process, no file."""
    random_set(tokens=30_000, longest=128).save(place / "big")
    make_tiny("llama", place / "deep", num_hidden_layers=16)
    runs = {sent: Ended(place, sent) for sent in (signal.SIGTERM, signal.SIGINT)}
    try:
        deadline = time.monotonic() + 120
        while not all([run.ended() for run in runs.values()]):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for sent, run in runs.items():
            told = run.child.communicate(timeout=60)[1]
            assert run.child.returncode == 1 and "Traceback" not in told, (sent, told)
            assert told.splitlines()[-1] == "halfbyte: interrupted; the same command goes on where it was", sent
            assert psutil.wait_procs(run.started, timeout=30)[1] == [] and len(run.started) > 3, sent
            left = {path.name for path in run.home.iterdir()} - {f"torchinductor_{getpass.getuser()}"}
            assert left == set(), "torch alone leaves an empty cache"
    finally:
        for run in runs.values():
            run.child.kill()
            shutil.rmtree(run.home, ignore_errors=True)


class Ended:
    """`halfbyte quantize --ray local` with a home and a temporary directory of its own (a short one: Ray has sockets
    there)."""

    def __init__(self, place: Path, sent: int):
        self.sent, self.output = sent, place / f"ended-{sent}"
        self.home = Path(tempfile.mkdtemp(prefix="hb", dir="/tmp"))
        self.started: list[psutil.Process] = []
        words = ["quantize", place / "deep", "-r", "B1", "--calibration", place / "big", "-o", self.output]
        more = ["--device", "cpu", "--ray", "local", "--ray-workers", "1"]
        self.child = subprocess.Popen(
            [sys.executable, "-m", "halfbyte.cli.app", *map(str, words), *more],
            stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.home), "HOME": str(self.home)},
        )  # fmt: skip

    def ended(self) -> bool:
        """Whether the signal is sent: once Ray has solved the first of many blocks, with all processes noted."""
        if not self.started and list(self.output.glob(".partial/block-*.safetensors")):
            self.started = psutil.Process(self.child.pid).children(recursive=True)
            assert any("raylet" in process.name() for process in self.started)
            self.child.send_signal(self.sent)
        assert self.started or self.child.poll() is None, self.child.communicate()[1]
        return bool(self.started)


def test_the_extra_is_named(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    random_set().save(place / "set")
    words = ["quantize", place / "m", "-r", "B3", "--calibration", place / "set", "-o", place / "none"]
    assert halfbyte(*words, "--device", "cpu", "--ray", "local") == 1
    assert capsys.readouterr().err.splitlines()[-1] == "halfbyte: --ray needs Ray: pip install ray"


def test_an_address_where_nobody_is(place: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(HalfbyteError, match=f"^Ray at {address} cannot be reached: .*refused"):
            with RayWorkers(address) as workers:
                workers.open()


def test_refusals(place: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["sweep", place / "m", "--matrix", "portable", "--on", "cpu", "-o", tmp_path / "out"]
    for more, told in (
        (["--ray-resources", "cpu=x"], "--ray-workers and --ray-resources belong to --ray"),
        (["--ray", "local", "--ray-resources", "cpu"], "write it as h100=RESOURCE"),
        (["--ray", "local", "--ray-resources", "h100=x"], "h100 is not among the --on platforms"),
    ):
        assert halfbyte(*words, *more) == 2
        assert told in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "out").exists()


def test_ray_is_imported_in_one_file() -> None:
    found = [p.name for p in modules() if re.search(r"^\s*(import|from) ray\b", p.read_text(), re.M)]
    assert found == ["fanout.py"] and (ROOT / "experiments" / "fanout.py").exists()
