"""A supervised child: a command whose every process ends with this one, however that ends (see supervisor.py)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

SUPERVISOR = Path(__file__).with_name("supervisor.py")


class Child:
    """Starts `argv` with `env` over this process's own, its output into `log`; `stop()` ends all that it started.

    grace     seconds that the command has to end by itself when asked to
    without   variables of this process that it does not get
    """

    def __init__(
        self, argv: Sequence[str], env: Mapping[str, str], log: BinaryIO, grace: float, without: Sequence[str] = ()
    ) -> None:
        self._grace = grace
        inherited = {name: value for name, value in os.environ.items() if name not in without}
        read_end, self._pipe = os.pipe()
        watch = [str(SUPERVISOR), str(read_end), str(os.getpid()), str(grace)]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", *watch, *argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**inherited, **env},
                pass_fds=(read_end,),
                start_new_session=True,
            )
        except BaseException:
            os.close(self._pipe)
            raise
        finally:
            os.close(read_end)

    @property
    def pid(self) -> int:
        """The supervisor's process id: the command and what it starts are below it."""
        return self._process.pid

    def poll(self) -> int | None:
        """The command's exit status; None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """End every process of the command; harmless when there is none."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
        if self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(self._grace + 20.0)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
