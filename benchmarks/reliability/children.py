"""The command line in forked children: everything is imported once, so that thousands of starts cost little.

A child may be killed after a while, or at its nth finished write; its time, memory and last words come back. All
children compute on one thread, so that their artifacts are the same bit for bit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch


@dataclass(frozen=True)
class Ended:
    """How a child ended. `status`: its exit code, or minus the signal; `mib`: what it took beyond its beginning."""

    status: int
    stdout: str
    stderr: str
    seconds: float
    mib: int

    @property
    def error(self) -> str:
        """The one line of halfbyte's that stderr ends with; "" where there is none, or not exactly one."""
        lines = self.stderr.splitlines()
        ours = [line for line in lines if line.startswith("halfbyte: ")]
        return ours[0] if len(ours) == 1 and lines[-1] == ours[0] and "Traceback" not in self.stderr else ""


@dataclass
class Child:
    """A started command; `finish` waits for it."""

    pid: int
    stdout: Any
    stderr: Any
    began: float = field(default_factory=time.monotonic)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def finish(self, limit: float = 600.0, kill_after: float | None = None) -> Ended:
        """Wait; SIGKILL after `kill_after` seconds, or when `limit` is over (a status of -9 then)."""
        until = self.began + (limit if kill_after is None else kill_after)
        killed = False
        while True:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                break
            if not killed and time.monotonic() >= until:
                self.kill()
                killed = True
            time.sleep(0.002)
        said, told = self._read(self.stdout), self._read(self.stderr)
        base = psutil.Process().memory_info().rss >> 20
        took = time.monotonic() - self.began
        return Ended(os.waitstatus_to_exitcode(status), said, told, took, max(0, usage.ru_maxrss // 1024 - base))

    def _read(self, stream: Any) -> str:
        stream.seek(0)
        with stream:
            return stream.read().decode(errors="replace")


def start(words: list[str], before: Callable[[], None] | None = None, env: dict[str, str] | None = None) -> Child:
    """Begin `halfbyte WORDS` in a fork, in a process group of its own; `before` is called in the child first."""
    stdout, stderr = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  closed by `finish`
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Child(pid, stdout, stderr)
    try:
        os.setpgid(0, 0)
        os.dup2(stdout.fileno(), 1)
        os.dup2(stderr.fileno(), 2)
        os.environ.update(env or {})
        torch.set_num_threads(1)
        if before is not None:
            before()
        os._exit(_main(words))
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    os._exit(70)


def _main(words: list[str]) -> int:
    from halfbyte.cli.app import main

    sys.argv = ["halfbyte", *words]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def run(words: list[str], **options: Any) -> Ended:
    """Run a command to its end."""
    return start(words, **options).finish()


def import_all() -> None:
    """What the commands import late, before the first fork."""
    import accelerate  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import halfbyte.cli.app
    import halfbyte.evaluate
    import halfbyte.experiments.run
    import halfbyte.experiments.sweep
    import halfbyte.report.build  # noqa: F401


def listing(directory: Path) -> set[str]:
    """Names of all files below a directory."""
    return {str(p.relative_to(directory)) for p in directory.rglob("*")} if directory.is_dir() else set()
