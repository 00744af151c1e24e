"""Workers on this machine: a process for each device ("cpu", "cuda:1"; the same one twice is two workers).

Each process has a thread here that hands it the next piece of work and waits. When the process dies, the thread starts
another and tries again. Processes are started afresh (spawn), not forked: a program that uses them from Python needs
the usual `if __name__ == "__main__":`.
"""

from __future__ import annotations

import multiprocessing
import queue
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from halfbyte.engine.wire import packed, perform, settle
from halfbyte.engine.workers import ATTEMPTS, Errand
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.types import Progress, Quiet

SPAWN = multiprocessing.get_context("spawn")
Task = tuple[Errand, bytes, "Future[Any]"]


class Processes:
    """A context in which there is a worker process for each of `devices`; at its end all are gone.

    Raises UsageError for a device that is not there.
    """

    apart = True

    def __init__(self, devices: Sequence[str], progress: Progress | None = None):
        self.devices, self.progress = [known_device(device) for device in devices], progress or Quiet()
        self.count = len(self.devices)
        self.tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self.closing, self.cores = False, 0
        self.threads: list[threading.Thread] = []
        self.workers: dict[int, _Worker] = {}

    def open(self) -> None:
        if not self.threads:
            self.cores = torch.get_num_threads()
            self.threads = [threading.Thread(target=self._serve, args=(i,), daemon=True) for i in range(self.count)]
            for thread in self.threads:
                thread.start()

    def submit(self, errand: Errand) -> Future[Any]:
        self.open()
        future: Future[Any] = Future()
        self.tasks.put((errand, packed(errand), future))
        return future

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.closing = True
        for _thread in self.threads:
            self.tasks.put(None)
        for thread in self.threads:
            while thread.is_alive():
                for worker in list(self.workers.values()):
                    worker.process.kill()
                thread.join(0.1)

    def _serve(self, seat: int) -> None:
        """The thread of one worker: piece after piece until the end."""
        while (task := self.tasks.get()) is not None and not self.closing:
            errand, work, future = task
            try:
                settle(self._answer(seat, errand.label, work), self.progress, future)
            except Exception as error:
                future.set_exception(error)
        if seat in self.workers:
            self.workers.pop(seat).stop()

    def _answer(self, seat: int, label: str, work: bytes) -> bytes:
        for attempt in range(1, ATTEMPTS + 1):
            worker = self.workers.get(seat) or _Worker(self.devices[seat], self.cores)
            self.workers[seat] = worker
            try:
                return worker.ask(work)
            except (EOFError, OSError):
                ended = self.workers.pop(seat).stop()
                if self.closing:
                    break
                if attempt < ATTEMPTS:
                    self.progress.say(f"{label}: its worker on {self.devices[seat]} died ({ended}): tried again")
        raise HalfbyteError(f"{label}: its worker on {self.devices[seat]} died {ATTEMPTS} times: is memory short?")


def known_device(device: str) -> str:
    """The name of a device ("cpu", "cuda", "cuda:1") that is there. Raises UsageError for another."""
    kind, colon, number = device.partition(":")
    if device != "cpu" and (kind != "cuda" or (colon and not number.isdecimal())):
        raise UsageError(f"device {device!r} is unknown: write cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(number or 0) >= count:
        there = f"its GPUs are cuda:0 to cuda:{count - 1}" if count else "torch sees no GPU, use cpu"
        raise UsageError(f"device {device!r} is not there: {there}")
    return device


class _Worker:
    """A worker process and the pipe to it."""

    def __init__(self, device: str, threads: int):
        self.pipe, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=_work, args=(theirs, device, threads), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, work: bytes) -> bytes:
        """Raises EOFError or OSError when the process is gone."""
        self.pipe.send_bytes(work)
        return self.pipe.recv_bytes()

    def stop(self) -> str:
        """End the process; returns how it ended."""
        self.process.kill()
        self.process.join()
        self.pipe.close()
        code = self.process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _work(pipe: Connection, device: str, threads: int) -> None:
    """A worker process: it lives as long as the other end of its pipe. Ctrl-C is for the one who started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(EOFError, OSError):
        while True:
            pipe.send_bytes(perform(pipe.recv_bytes(), device, threads))
