"""Finds the vLLM to serve with. It lives in an environment of its own and is asked there, never imported here."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from halfbyte.errors import HalfbyteError, UsageError

VARIABLE = "HALFBYTE_VLLM"
ENVIRONMENT = ".venv-vllm"
HOW_TO_GET = "run scripts/install_vllm_cpu.py, or name one with --vllm or HALFBYTE_VLLM"
_ASK_VERSION = "import importlib.metadata as m; print(m.version('vllm'))"
_QUICK_S = 60.0
_SLOW_S = 300.0


@dataclass(frozen=True)
class VllmInstall:
    """One vLLM: its command, its version ("0.32.0+cpu") and the Python of its environment."""

    executable: Path
    version: str
    python: Path


def find_vllm(explicit: str | None = None) -> VllmInstall:
    """The vLLM named by `explicit` or $HALFBYTE_VLLM, else .venv-vllm beside the project or here, else the one on PATH.

    `explicit` (and the variable) may be the `vllm` executable or the directory of an environment.
    Raises UsageError when a named one is not there, HalfbyteError when none is found or it cannot tell its version.
    """
    for source, named in (("--vllm", explicit), (VARIABLE, os.environ.get(VARIABLE))):
        if named:
            return _install(_named(Path(named).expanduser(), source))
    project = Path(__file__).resolve().parents[2]
    for home in (project, Path.cwd()):
        executable = home / ENVIRONMENT / "bin" / "vllm"
        if _runs(executable):
            return _install(executable)
    on_path = shutil.which("vllm")
    if on_path:
        return _install(Path(on_path))
    raise HalfbyteError(f"no vLLM found: {HOW_TO_GET}")


def _named(path: Path, source: str) -> Path:
    if path.is_dir():
        for candidate in (path / "bin" / "vllm", path / "vllm"):
            if _runs(candidate):
                return candidate
        raise UsageError(f"{source}: there is no bin/vllm in {path}; {HOW_TO_GET}")
    if _runs(path):
        return path
    problem = "is not executable" if path.exists() else "does not exist"
    raise UsageError(f"{source}: {path} {problem}; {HOW_TO_GET}")


def _runs(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def _install(executable: Path) -> VllmInstall:
    executable = executable.absolute()
    python = _python_of(executable)
    version = _output([str(python), "-c", _ASK_VERSION], _QUICK_S) if python else None
    version = version or _output([str(executable), "--version"], _SLOW_S)
    if not version:
        raise HalfbyteError(f"{executable} does not tell its version: its environment is broken; {HOW_TO_GET}")
    return VllmInstall(executable, version, python or executable)


def _python_of(executable: Path) -> Path | None:
    """The interpreter in the script's first line, else the one beside the script (conda and uv write such wrappers)."""
    words = shebang(executable)
    if words and "python" in Path(words[0]).name and _runs(Path(words[0])):
        return Path(words[0])
    for beside in (executable.parent, executable.resolve().parent):
        if _runs(beside / "python"):
            return beside / "python"
    return None


def shebang(executable: Path) -> list[str]:
    """The words of a script's first line behind #!; none where it is no script."""
    with executable.open("rb") as handle:
        first = handle.readline(512).decode(errors="replace")
    return first[2:].split() if first.startswith("#!") else []


def _output(command: list[str], timeout: float) -> str | None:
    """The last line that a command prints, or None when it fails. Run at the root, so that no local module is met."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, cwd="/", stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[-1].strip() if done.returncode == 0 and lines else None
