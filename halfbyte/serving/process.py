"""A vLLM server as a child: started on a free local port, awaited, and always stopped with all that it started."""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import httpx
import torch

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.files import redacted
from halfbyte.serving.child import Child
from halfbyte.serving.command import ServeCommand
from halfbyte.serving.install import VllmInstall
from halfbyte.serving.log import STAGES, LogFacts, parse_log, read_log, root_error, stages_reached
from halfbyte.types import Progress, Quiet

START_TIMEOUT_S = 900.0
GRACE_S = 10.0
"""How long vLLM has to end by itself when asked to."""
HEADER = "# "
"""Before the command's lines at the head of a log."""
_POLL_S = (0.05, 0.5)
API_KEY = "VLLM_API_KEY"
"""Would make a server that only this process talks to, over the loopback, ask for a password."""


class Server:
    """`with Server(command, install, log_path=…) as server:` a ready server at `server.url`; none is left afterwards.

    A command without --port gets a free one. The log goes to log_path (overwritten).
    The processes end with the block, and also when this process is interrupted or killed, however (see supervisor.py).
    Raises UsageError when the port asked for is in use; HalfbyteError with vLLM's own reason when it does not start,
    or does not answer within `timeout` seconds.
    """

    def __init__(
        self,
        command: ServeCommand,
        install: VllmInstall,
        *,
        log_path: Path,
        timeout: float = START_TIMEOUT_S,
        env: dict[str, str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.host = command.value("--host") or "127.0.0.1"
        asked = command.value("--port")
        if asked is not None:
            require_free_port(self.host, int(asked))
        self.port = int(asked) if asked else free_port()
        self.command = command.run_by(install.executable, *(() if asked else ("--port", str(self.port))))
        self.log_path = Path(log_path)
        self.timeout = timeout
        self.env = {**command.env, **(env or {})}
        self.progress: Progress = progress or Quiet()
        self.load_seconds = 0.0
        self._began = 0.0
        self._child: Child | None = None

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def facts(self) -> LogFacts:
        """What the log says so far."""
        return parse_log(read_log(self.log_path))

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.poll() is None

    @property
    def pid(self) -> int:
        """The process that all of the server's processes are below; 0 before the start."""
        return self._child.pid if self._child else 0

    def failure(self) -> HalfbyteError:
        """The error that says why vLLM ended, from its log."""
        return HalfbyteError(f"vLLM failed: {self.reason()} (log: {self.log_path})")

    def reason(self) -> str:
        """The line of the log that tells why vLLM ended."""
        said = root_error(self._said())
        killed = self._child is not None and self._child.poll() == 128 + signal.SIGKILL
        return f"killed by the system, as it does when memory runs out; last word: {said}" if killed else said

    def __enter__(self) -> Server:
        try:
            self.begin()
            self.await_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End every process of the server; harmless when there is none."""
        child, self._child = self._child, None
        if child is not None:
            child.stop()

    def begin(self) -> None:
        """Start the processes; `await_ready` is to follow, and `stop` in any case."""
        make_room()
        self._began = time.monotonic()
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("wb") as log:
            told = replace(self.command, argv=redacted(self.command.argv))
            log.write(textwrap.indent(told.shell(), HEADER).encode() + b"\n")
            log.flush()
            self._child = Child(self.command.argv, self.env, log, GRACE_S, without=(API_KEY,))

    def await_ready(self) -> None:
        """Wait for a server that was begun."""
        self.progress.start("starting vLLM", len(STAGES) + 1)
        reached, pause = 0, _POLL_S[0]
        while not self.is_ready():
            now = stages_reached(self._said())
            if now > reached:
                self.progress.advance(now - reached, STAGES[now - 1][1])
                reached = now
            time.sleep(pause)
            pause = min(pause * 1.5, _POLL_S[1])
        self.progress.advance(len(STAGES) + 1 - reached, "ready")

    def is_ready(self) -> bool:
        """Whether a server that was begun answers; `load_seconds` is then how long it took. Raises HalfbyteError where
        it ended, or `timeout` is over."""
        if not self.running:
            raise self.failure()
        waited = time.monotonic() - self._began
        if _answers(f"{self.url}/health"):
            self.load_seconds = self.load_seconds or waited
            return True
        if waited > self.timeout:
            last = root_error(self._said())
            raise HalfbyteError(
                f"vLLM did not answer within {self.timeout:.0f} s; its last word: {last} (log: {self.log_path})"
            )
        return False

    def _said(self) -> str:
        """The log without the command that heads it."""
        return "\n".join(line for line in read_log(self.log_path).splitlines() if not line.startswith(HEADER))


def run_in_place(command: ServeCommand, install: VllmInstall) -> NoReturn:
    """Become the server (`halfbyte serve`): this process is replaced by vLLM, in the foreground.

    Raises UsageError when the port it asks for is in use.
    """
    port = command.value("--port")
    if port is not None:
        require_free_port(command.value("--host") or "127.0.0.1", int(port))
    sys.stdout.flush()
    sys.stderr.flush()
    argv = command.run_by(install.executable).argv
    os.execve(argv[0], argv, {**os.environ, **command.env})


def free_port() -> int:
    """A local TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def require_free_port(host: str, port: int) -> None:
    """Raises UsageError when nobody could listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            problem = error.strerror or error
            raise UsageError(f"port {port} on {host} cannot be used ({problem}): choose another with --port") from None
        except OverflowError:
            raise UsageError(f"{port} is no port: choose one from 1 to 65535 with --port") from None


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False, timeout=5.0).status_code == 200
    except httpx.HTTPError:
        return False


def make_room() -> None:
    """Give back what torch keeps of the GPU's memory for later: a server wants most of it at once."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
