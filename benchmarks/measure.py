"""Seconds and peak memory of a whole command, from outside it.

A process inherits its parent's peak memory when it is forked, so the command is started by a small Python of its own
(this file, run as a script), never by the benchmark, which holds gigabytes of logits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Measured:
    """Exit status, wall and processor seconds, peak resident MiB of the largest process, the output's last lines."""

    status: int
    seconds: float
    cpu_seconds: float
    peak_rss_mib: int
    tail: str

    @property
    def reason(self) -> str:
        """One line on a failure: the last line of the output that says anything."""
        lines = [line.strip() for line in self.tail.splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line or line.startswith("error")]
        return (errors or lines or [f"exit status {self.status}"])[-1][:300]


def measure(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> Measured:
    """Run `command` to its end, its output into `log`."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "usage.json"
        with log.open("wb") as sink:
            subprocess.run(
                [sys.executable, "-S", "-E", __file__, str(result), *command],
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                check=False,
            )
        usage = json.loads(result.read_text())
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    return Measured(tail="\n".join(lines[-60:]), **usage)


def _child(result: str, command: list[str]) -> None:
    started = time.monotonic()
    child = os.posix_spawnp(command[0], command, os.environ)
    _, status, usage = os.wait4(child, 0)
    facts = {
        "status": os.waitstatus_to_exitcode(status),
        "seconds": round(time.monotonic() - started, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_rss_mib": usage.ru_maxrss // 1024,
    }
    Path(result).write_text(json.dumps(facts))


if __name__ == "__main__":
    _child(sys.argv[1], sys.argv[2:])
