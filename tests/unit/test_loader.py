"""`vllm bench serve` run many times over, its imports done once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from halfbyte.serving.bench import Loader
from halfbyte.serving.install import VllmInstall

SCRIPT = """
import os, sys, time
words = sys.argv[1:]
print(*words, os.getppid(), flush=True)
if words[0] == "exit":
    sys.exit(int(words[1]))
if words[0] == "say":
    sys.exit("ValueError: " + words[1])
if words[0] == "raise":
    raise RuntimeError(words[1])
if words[0] == "kill":
    os.kill(os.getpid(), 9)
if words[0] == "twice":
    again = os.path.exists(words[1])
    open(words[1], "w").write(str(os.getpid()))
    if again:
        sys.exit(7)
    time.sleep(60)
if words[0] == "sleep":
    open(words[1], "w").write(str(os.getpid()))
    time.sleep(60)
"""


@pytest.fixture
def install(tmp_path: Path) -> VllmInstall:
    executable = tmp_path / "vllm"
    executable.write_text(f"#!{sys.executable}\n{SCRIPT}")
    executable.chmod(0o755)
    return VllmInstall(executable, "0.32.0", Path(sys.executable))


def never() -> bool:
    return False


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["fine"], 0, "fine"),
        (["exit", "3"], 3, "exit 3"),
        (["say", "no such dataset"], 1, "ValueError: no such dataset"),
        (["raise", "a fault"], 1, "RuntimeError: a fault"),
        (["kill"], -9, "kill"),
    ],
)
def test_a_run_ends_as_the_script_does(
    words: list[str], code: int, said: str, install: VllmInstall, tmp_path: Path
) -> None:
    with Loader(install) as loader:
        for number in range(2):
            log = tmp_path / f"{number}.log"
            assert loader.run(words, log, never) == code and said in log.read_text()


def test_all_runs_are_forks_of_one_process(install: VllmInstall, tmp_path: Path) -> None:
    with Loader(install) as loader:
        for number in range(3):
            assert loader.run(["fine"], tmp_path / f"{number}.log", never) == 0
    parents = {(tmp_path / f"{number}.log").read_text().split()[-1] for number in range(3)}
    assert len(parents) == 1 and not psutil.pid_exists(int(parents.pop()))


def test_what_is_given_up_ends_and_the_next_run_goes(install: VllmInstall, tmp_path: Path) -> None:
    asleep = tmp_path / "pid"
    with Loader(install) as loader:
        assert loader.run(["sleep", str(asleep)], tmp_path / "a.log", asleep.exists) is None
        deadline = time.monotonic() + 10
        while psutil.pid_exists(int(asleep.read_text())) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not psutil.pid_exists(int(asleep.read_text()))
        assert loader.run(["exit", "4"], tmp_path / "b.log", never) == 4


def test_a_forker_that_is_gone_is_done_without(install: VllmInstall, tmp_path: Path) -> None:
    with Loader(install) as loader:
        assert loader._forker is not None
        loader._forker.stop()
        assert loader.run(["exit", "5"], tmp_path / "a.log", never) == 5


def test_a_run_under_which_the_forker_dies_is_done_again(install: VllmInstall, tmp_path: Path) -> None:
    asleep = tmp_path / "pid"

    killed = list[int]()

    def kill() -> bool:
        if not killed and asleep.exists() and asleep.read_text():
            killed.append(psutil.Process(int(asleep.read_text())).ppid())
            os.kill(killed[0], 9)
        return False

    with Loader(install) as loader:
        assert loader.run(["twice", str(asleep)], tmp_path / "a.log", kill) == 7 and killed
        assert loader.run(["fine"], tmp_path / "b.log", never) == 0


def test_a_place_that_goes_away_costs_nothing(install: VllmInstall, tmp_path: Path) -> None:
    with Loader(install) as loader:
        assert loader.run(["fine"], tmp_path / "a.log", never) == 0 and loader._place is not None
        shutil.rmtree(loader._place.name)
        assert loader.run(["exit", "8"], tmp_path / "b.log", never) == 8


@pytest.mark.parametrize("first", ["#!/bin/sh", "#!/usr/bin/env python3"])
def test_what_is_no_script_of_its_python_is_run_as_it_is(first: str, install: VllmInstall, tmp_path: Path) -> None:
    """`env python3` is whichever comes first on the PATH."""
    other = tmp_path / "other"
    rest = "import sys\nsys.exit(6)" if "python" in first else f'exec {sys.executable} {install.executable} "$@"'
    other.write_text(f"{first}\n{rest}\n")
    other.chmod(0o755)
    with Loader(VllmInstall(other, "0.32.0", Path(sys.executable))) as loader:
        assert loader._forker is None
        assert loader.run(["exit", "6"], tmp_path / "a.log", never) == 6


def test_nothing_is_left_where_halfbyte_is_killed(install: VllmInstall, tmp_path: Path) -> None:
    asleep, temporary = tmp_path / "pid", tmp_path / "tmp"
    temporary.mkdir()
    program = (
        "from pathlib import Path; from halfbyte.serving.bench import Loader; "
        "from halfbyte.serving.install import VllmInstall; import sys; "
        f"install = VllmInstall(Path({str(install.executable)!r}), '0', Path(sys.executable)); "
        f"Loader(install).__enter__().run(['sleep', {str(asleep)!r}], Path({str(tmp_path / 'a.log')!r}), lambda: False)"
    )
    with subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "TMPDIR": str(temporary)}) as child:
        while not (asleep.exists() and asleep.read_text()):
            time.sleep(0.05)
        assert any(path.name.startswith("halfbyte-") for path in temporary.iterdir())
        child.kill()
    pid, deadline = int(asleep.read_text()), time.monotonic() + 20
    while (psutil.pid_exists(pid) or any(_own(temporary))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid) and not list(_own(temporary))


def _own(temporary: Path) -> list[Path]:
    """What lies there, but for what torch keeps for its next start."""
    return [path for path in temporary.iterdir() if not path.name.startswith("torchinductor_")]
