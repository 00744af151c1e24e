"""Killed, interrupted, out of disk: the same command goes on, and the artifact is bit for bit the uninterrupted one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from halfbyte.artifact import check_artifact
from halfbyte.artifact.writer import PARTIAL
from halfbyte.files import locked
from tests.tiny import make_tiny
from tests.unit.artifacts import CHANGING, digests, halfbyte, random_set
from tests.unit.forked import run_forked

BLOCKS = 3
SETTINGS = ["-r", "B3", "--set", "group_size=32"]


@dataclass
class Place:
    """A model, its calibration set, and the reference: the same work done without interruption."""

    root: Path
    model: Path
    data: Path
    reference: Path
    writes: int

    def words(self, output: Path, *more: str) -> list[str]:
        return quantize_words(self.model, self.data, output, *more)


def quantize_words(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    words = ["quantize", str(model), *SETTINGS, "--calibration", str(data), "-o", str(output)]
    return [*words, "--device", "cpu", *more]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("resume")
    model = make_tiny("llama", root / "m", num_hidden_layers=BLOCKS, tie_word_embeddings=False)
    data = random_set(tokens=2100, longest=128).save(root / "set")
    words = quantize_words(model, data, root / "reference", "--set", "ignore=[]")
    (done,) = run_forked(root, [{"words": words}])
    assert done["status"] == 0, done["stderr"]
    assert check_artifact(root / "reference")["ok"]
    assert len(list((root / "reference").glob("model-*.safetensors"))) > 2, "the killing should meet several shards"
    return Place(root, model, data, root / "reference", done["writes"])


def assert_same(place: Place, output: Path) -> None:
    """Every file but the manifest and the card, and nothing left over."""
    assert digests(output) == digests(place.reference)
    assert {p.name for p in output.iterdir()} - CHANGING == {p.name for p in place.reference.iterdir()} - CHANGING
    ours, theirs = (json.loads((p / "halfbyte.json").read_text()) for p in (output, place.reference))
    for key in ("work", "recipe", "linears", "files", "bytes", "bits_per_weight", "notices"):
        assert ours[key] == theirs[key], key


def one_line(told: str) -> str:
    """The error of a command: its last line on stderr, the only one from halfbyte itself, with no traceback."""
    assert "Traceback" not in told
    lines = [line for line in told.splitlines() if line.startswith("halfbyte: ")]
    assert len(lines) == 1 and told.splitlines()[-1] == lines[0], told
    return lines[0]


@pytest.fixture(scope="module")
def again(place: Place, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, Path, Any, Any]]]:
    """For each act, at every write that a run makes: (n, output, the run that was hit, the same command again)."""
    root = tmp_path_factory.mktemp("again")
    cases = [("kill", at) for at in range(place.writes)]
    cases += [(act, at) for act in ("interrupt", "full") for at in range(0, place.writes, 5)]
    jobs: list[dict[str, Any]] = []
    for act, at in cases:
        words = place.words(root / f"{act}-{at}", "--set", "ignore=[]")
        jobs += [{"words": words, "act": act, "at": at}, {"words": [*words, "--format", "json"]}]
    done = run_forked(root, jobs)
    found: dict[str, list[tuple[int, Path, Any, Any]]] = {}
    for i, (act, at) in enumerate(cases):
        found.setdefault(act, []).append((at, root / f"{act}-{at}", done[2 * i], done[2 * i + 1]))
    return found


def assert_all_go_on(place: Place, cases: list[tuple[int, Path, Any, Any]]) -> None:
    assert len(cases) > 3
    for at, output, _, second in cases:
        assert second["status"] == 0, (at, second["stderr"])
        assert json.loads(second["stdout"])["resumed"] is (at >= 2), at
        assert_same(place, output)


def test_killed_at_any_write_it_goes_on(place: Place, again: Any) -> None:
    """SIGKILL, each time with a finished temporary file that has not got its name yet."""
    assert place.writes >= BLOCKS + 10
    assert all(first["status"] == -signal.SIGKILL for _, _, first, _ in again["kill"])
    assert_all_go_on(place, again["kill"])


def test_ctrl_c_is_one_line_and_goes_on(place: Place, again: Any) -> None:
    for _, _, first, _ in again["interrupt"]:
        assert first["status"] == 1, first
        assert "interrupted" in one_line(first["stderr"]) and first["stdout"] == ""
    assert_all_go_on(place, again["interrupt"])


def test_a_full_disk_is_one_line_and_goes_on(place: Place, again: Any) -> None:
    for _, output, first, _ in again["full"]:
        assert first["status"] == 1, first
        assert "is full: make room" in one_line(first["stderr"]) and str(output) in one_line(first["stderr"])
    assert_all_go_on(place, again["full"])


def test_blocks_that_are_there_are_not_done_again(place: Place, tmp_path: Path) -> None:
    """The second run writes what is missing and no more."""
    words = place.words(tmp_path / "out", "--set", "ignore=[]")
    runs = run_forked(tmp_path, [{"words": words, "act": "kill", "at": 3}, {"words": words}])
    assert runs[1]["writes"] == place.writes - 3


def test_between_manifest_and_cleaning_up(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed when all is written but the kept blocks still lie there: it is finished, and they go."""
    import shutil

    import halfbyte.artifact.writer as writer

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(writer, "shutil", Stuck(shutil))
        assert halfbyte(*place.words(out)) == 0
    assert (out / PARTIAL).is_dir()
    assert halfbyte(*place.words(out)) == 0
    assert not (out / PARTIAL).exists() and check_artifact(out)["ok"]


class Stuck:
    """shutil without rmtree."""

    def __init__(self, real: Any):
        self.copyfile = real.copyfile

    def rmtree(self, *_: Any, **__: Any) -> None:
        pass


@pytest.fixture()
def real(place: Place, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A real `python -m halfbyte.cli.app quantize` with enough to do, handed over when its second block is kept."""
    data = random_set(tokens=30_000, longest=128, seed=3).save(tmp_path / "big")
    started: list[subprocess.Popen[str]] = []

    def start(output: Path) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "halfbyte.cli.app", *quantize_words(place.model, data, output)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        started.append(child)
        deadline = time.monotonic() + 120
        while not (output / PARTIAL / "block-00001.safetensors").exists():
            assert child.poll() is None and time.monotonic() < deadline, child.communicate()[1]
            time.sleep(0.002)
        return child

    yield start
    for child in started:
        child.kill()
        child.communicate()


def test_a_real_process_killed_and_a_second_one_refused(place: Place, tmp_path: Path, real: Any, capsys: Any) -> None:
    out = tmp_path / "out"
    child = real(out)
    child.send_signal(signal.SIGSTOP)
    words = quantize_words(place.model, tmp_path / "big", out)
    assert halfbyte(*words) == 1
    assert "is in use by another halfbyte" in one_line(capsys.readouterr().err)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert (out / PARTIAL).is_dir() and not (out / "halfbyte.json").exists()
    assert halfbyte(*words) == 0
    assert json.loads((out / "halfbyte.json").read_text())["resumed"] is True
    assert halfbyte(*quantize_words(place.model, tmp_path / "big", tmp_path / "whole")) == 0
    assert digests(out) == digests(tmp_path / "whole")


def test_ctrl_c_at_a_real_process(tmp_path: Path, real: Any) -> None:
    child = real(tmp_path / "out")
    child.send_signal(signal.SIGINT)
    said, told = child.communicate(timeout=60)
    assert child.returncode == 1 and said == "" and "interrupted" in one_line(told)
    assert not (tmp_path / "out" / ".lock").exists()


def test_a_directory_in_use_is_refused(place: Place, tmp_path: Path, capsys: Any) -> None:
    with locked(tmp_path / "out"):
        assert halfbyte(*place.words(tmp_path / "out")) == 1
    assert "in use" in one_line(capsys.readouterr().err)


def test_a_finished_directory_is_recognised(place: Place, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert halfbyte(*place.words(out)) == 0
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    capsys.readouterr()
    assert halfbyte(*place.words(out)) == 0
    shown = capsys.readouterr()
    assert "is finished: nothing to do" in shown.err and "next: halfbyte check" in shown.out
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before


def test_other_work_is_refused_without_force(place: Place, tmp_path: Path, capsys: Any) -> None:
    out, other = tmp_path / "out", ["--set", "group_size=64"]
    assert halfbyte(*place.words(out)) == 0
    before = digests(out)
    assert halfbyte(*place.words(out, *other)) == 2
    assert "is not empty" in one_line(capsys.readouterr().err) and digests(out) == before
    assert halfbyte(*place.words(out, *other, "--force")) == 0
    assert "group_size: 64" in (out / "recipe.yaml").read_text()
    assert halfbyte(*place.words(tmp_path / "clean", *other)) == 0
    assert digests(out) == digests(tmp_path / "clean")


def test_half_done_other_work_is_refused_without_force(place: Place, tmp_path: Path) -> None:
    out, other = tmp_path / "out", ["--set", "damp=0.1"]
    jobs: list[dict[str, Any]] = [
        {"words": place.words(out), "act": "kill", "at": 3},
        {"words": place.words(out, *other)},
        {"words": place.words(out, *other, "--force"), "act": "kill", "at": 3},
        {"words": place.words(out, *other, "--force", "--format", "json")},
    ]
    _, refused, _, forced = run_forked(tmp_path, jobs)
    assert refused["status"] == 2 and "another recipe, model or calibration" in one_line(refused["stderr"])
    assert forced["status"] == 0 and json.loads(forced["stdout"])["resumed"] is True, "--force gave up its own blocks"
    assert json.loads(forced["stdout"])["recipe"]["damp"] == 0.1 and check_artifact(out)["ok"]


def test_force_makes_a_damaged_artifact_again(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert halfbyte(*place.words(out)) == 0
    whole = digests(out)
    raw = bytearray((out / "model.safetensors").read_bytes())
    raw[-100] ^= 1
    (out / "model.safetensors").write_bytes(raw)
    assert not check_artifact(out)["ok"]
    assert halfbyte(*place.words(out, "--force")) == 0
    assert digests(out) == whole and check_artifact(out)["ok"]


def test_foreign_files_are_never_touched(place: Place, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert halfbyte(*place.words(out)) == 2
    assert "'thesis.tex'" in one_line(capsys.readouterr().err)
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]


def test_a_damaged_block_is_named(place: Place, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    run_forked(tmp_path, [{"words": place.words(out), "act": "kill", "at": 4}])
    block = out / PARTIAL / "block-00001.safetensors"
    block.write_bytes(block.read_bytes()[:100])
    assert halfbyte(*place.words(out)) == 1
    assert "block-00001.safetensors is damaged: delete it" in one_line(capsys.readouterr().err)
    block.unlink()
    assert halfbyte(*place.words(out)) == 0 and check_artifact(out)["ok"]
