"""A small version of benchmarks/reliability/crashes.py, in a program of its own since it forks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.reliability import crashes

ROOT = Path(__file__).resolve().parents[2]


def test_quantize_survives_kills_and_full_disks() -> None:
    script = ROOT / "benchmarks" / "reliability" / "crashes.py"
    words = [sys.executable, str(script), "--commands", "quantize", "--kills", "2", "--full", "1", "--seed", "5"]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| quantize")]
    assert len(rows) == 3
    assert "| quantize: killed | 2 |  | 2 | 2 | 2 |" in rows
    assert "| quantize: two at once | 1 | 1 | 1 | 1 | 1 |" in rows


def test_what_differs_or_is_left_is_told(tmp_path: Path) -> None:
    """The benchmark can fail."""
    out, temporary = tmp_path / "out", tmp_path / "tmp"
    for place in (out, temporary):
        place.mkdir()
    (out / "a.json").write_text('{"value": 1, "seconds": 2}')
    bench = crashes.Bench("quantize", lambda place: [], tmp_path, {"TMPDIR": str(temporary)}, crashes._state(out))
    (out / "a.json").write_text('{"value": 1, "seconds": 3}')
    assert crashes._differences(bench, out) == [] and crashes._left_behind(bench, out) == []
    (out / "a.json").write_text('{"value": 2, "seconds": 2}')
    (out / "b.tmp").write_text("")
    (temporary / "scratch").mkdir()
    assert crashes._differences(bench, out) == ["a.json", "b.tmp"]
    assert crashes._left_behind(bench, out) == ["temporary scratch"]


def test_a_process_that_is_left_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crashes, "WAIT_S", 0.1)
    bench = crashes.Bench("run", lambda place: [], tmp_path, {"TMPDIR": str(tmp_path / "none")})
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", str(tmp_path / "out")])
    try:
        assert crashes._left_behind(bench, tmp_path / "out") == [f"process {child.pid}"]
    finally:
        child.kill()
        child.wait()


def test_a_process_that_renamed_itself_is_told_by_its_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM's engine does: the run's directory is nowhere in its command line."""
    monkeypatch.setattr(crashes, "WAIT_S", 0.1)
    bench = crashes.Bench("run", lambda place: [], tmp_path, {"TMPDIR": str(tmp_path / "own")})
    words = [sys.executable, "-c", "import time; time.sleep(60)"]
    child = subprocess.Popen(words, env={**os.environ, **bench.env})
    other = subprocess.Popen(words)
    try:
        assert crashes._left_behind(bench, tmp_path / "out") == [f"process {child.pid}"]
    finally:
        for one in (child, other):
            one.kill()
            one.wait()
