"""What a manifest says of how an artifact was made: versions, commit, machine."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

from halfbyte.artifact.check_files import MANIFEST
from halfbyte.errors import UsageError
from halfbyte.models.checkpoint import meant_inside, read_json

PACKAGES = ("halfbyte", "torch", "transformers", "safetensors", "accelerate", "compressed-tensors")


@cache
def versions() -> dict[str, str | None]:
    """Versions of what takes part: packages, Python, the GPU and its driver where there is one."""
    found: dict[str, str | None] = {"python": platform.python_version(), "machine": platform.machine()}
    found["cpu"] = torch.backends.cpu.get_cpu_capability()
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found["cuda"] = torch.version.cuda
    found["driver"] = _driver()
    return found


def _driver() -> str | None:
    if not torch.cuda.is_available():
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception as error:  # the driver's version is a courtesy: without the library it is unknown, and said so
        return f"unknown ({type(error).__name__})"


@cache
def git_commit() -> str | None:
    """The commit of halfbyte's own checkout, with `-dirty` where files differ; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def read_manifest(directory: Path | str) -> dict[str, Any]:
    """halfbyte.json of an artifact. Raises UsageError where there is none (no artifact, or not finished)."""
    path = Path(directory) / MANIFEST
    if not path.is_file():
        meant = meant_inside(path.parent, MANIFEST)
        raise UsageError(f"{directory} holds no {MANIFEST}: it is no halfbyte artifact, or it was not finished{meant}")
    return read_json(path)
