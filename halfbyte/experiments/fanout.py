"""Workers on a Ray cluster: one that is started here for the run and ended with it, or one that is there already.

Ray is imported here alone. Each piece of work is a task without Ray's own retries, so that a worker's death is said and
counted here, like that of a process. A thread waits for what is done; all else happens in the caller's thread.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from halfbyte.engine import Errand
from halfbyte.engine.wire import packed, perform, settle
from halfbyte.engine.workers import ATTEMPTS
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.types import Progress, Quiet

LOCAL = "local"
LOOPBACK = "127.0.0.1"
TOKEN = secrets.token_hex(32)
"""What lets this process and its own clusters alone talk to each other."""
WAIT_S = 0.2
"""How long the waiting thread looks at tasks before it looks whether it is to end."""


@dataclass
class _Sent:
    errand: Errand
    work: Any
    future: Future[Any] = field(default_factory=Future)
    attempt: int = 1


class RayWorkers:
    """A context; in it, work goes to Ray.

    address     "local", or a cluster's address as Ray knows it ("auto", "head:6379")
    count       workers of a local cluster; None: one for each GPU, or as many as the cores have threads for
    device      of every worker: "cpu", or "cuda" for a GPU of its own
    resources   by platform, the name of the Ray resource that marks its nodes. A local cluster is said to have them all
    Each worker has as many threads as this process has.
    """

    apart = True

    def __init__(
        self,
        address: str = LOCAL,
        count: int | None = None,
        device: str = "cpu",
        resources: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ):
        self.address, self.resources = address, dict(resources or {})
        self.device = device.partition(":")[0]  # Ray shows a task no GPU but its own
        self.progress = progress or Quiet()
        self.asked, self.count, self.threads = count, count or 1, torch.get_num_threads()
        self.ray: Any = None
        self.place: Path | None = None
        self.sent: dict[Any, _Sent] = {}
        self.change = threading.Condition()
        self.ending = False
        self.watch = threading.Thread(target=self._watch, daemon=True)
        self.handler: Any = None
        self.environment: dict[str, str | None] = {}

    def open(self) -> None:
        if self.ray is not None:
            return
        if self.address == LOCAL:
            self._alone()
        self.ray = _library()
        before = signal.getsignal(signal.SIGTERM)
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
        try:
            if self.address == LOCAL:
                self.ray.init(**quiet, **self._local())
            else:
                _answers(self.address)
                self.ray.init(address=self.address, **quiet)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise HalfbyteError(
                f"Ray at {self.address} cannot be reached: {' '.join(str(error).split())[:300]}"
            ) from None
        finally:
            self._end_on_sigterm(before)
        self._find_room()
        self.task = self.ray.remote(perform)
        self.watch.start()

    def submit(self, errand: Errand) -> Future[Any]:
        self.open()
        sent = _Sent(errand, self.ray.put(packed(errand)))
        self._send(sent)
        return sent.future

    def __enter__(self) -> RayWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        if self.handler is not None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            self._end()
        finally:
            if self.handler is not None:
                signal.signal(signal.SIGTERM, self.handler)
            if self.place is not None:
                shutil.rmtree(self.place, ignore_errors=True)
            for name, value in self.environment.items():
                os.environ.pop(name, None)
                os.environ |= {} if value is None else {name: value}

    def _end(self) -> None:
        with self.change:
            self.ending = True
            self.change.notify()
        if self.watch.is_alive():
            self.watch.join()
        self.sent.clear()
        if self.ray is not None:
            self.ray.shutdown()

    def _alone(self) -> None:
        """A local cluster keeps to the loopback, with a secret of its own, and tells nobody of its use. Ray reads this
        when it is imported."""
        wanted = {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # what Ray calls it; without it, nodes listen to the network
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.environment = {name: os.environ.get(name) for name in wanted}
        os.environ |= wanted

    def _local(self) -> dict[str, Any]:
        """What a local cluster is started with: room for `count` tasks, and a directory that goes with it."""
        gpus = torch.cuda.device_count() if self.device.startswith("cuda") else 0
        self.count = self.asked or gpus or max(1, (os.cpu_count() or 1) // self.threads)
        self.place = Path(tempfile.mkdtemp(prefix="halfbyte-ray-"))
        if self.resources:
            names = ", ".join(self.resources)
            self.progress.say(f"--ray local: this machine stands in for {names}: what is measured there is its own")
        labels = {resource: self.count for resource in self.resources.values()}
        needed = self._needs("")
        return {
            "num_cpus": self.count * needed["num_cpus"],
            "num_gpus": gpus,
            "resources": labels,
            "include_dashboard": False,
            "_temp_dir": str(self.place),
        }

    def _needs(self, platform: str) -> dict[str, Any]:
        """The resources of one task."""
        gpu = self.device.startswith("cuda")
        needs: dict[str, Any] = {"num_cpus": 1 if gpu else self.threads, "num_gpus": 1 if gpu else 0}
        return needs | ({"resources": {self.resources[platform]: 1}} if platform in self.resources else {})

    def _find_room(self) -> None:
        """How many tasks go at a time; raises UsageError where those of a platform would wait for ever."""
        nodes = [node for node in self.ray.nodes() if node["Alive"]]
        if self.address == LOCAL and any(node["NodeManagerAddress"] != LOOPBACK for node in nodes):
            raise HalfbyteError("Ray does not keep a local cluster to 127.0.0.1: was it imported before?")
        for platform in ["", *self.resources]:
            needs = self._needs(platform)
            wanted = {"CPU": needs["num_cpus"], "GPU": needs["num_gpus"], **needs.get("resources", {})}
            wanted = {name: amount for name, amount in wanted.items() if amount}
            room = sum(min(int(n["Resources"].get(name, 0) // x) for name, x in wanted.items()) for n in nodes)
            if not room:
                what = " and ".join(f"{amount} {name}" for name, amount in wanted.items())
                raise UsageError(f"no node of the Ray cluster at {self.address} has {what}, which a task needs")
            if not platform:
                self.count = room

    def _end_on_sigterm(self, before: Any) -> None:
        """SIGTERM ends the run as Ctrl-C does, and the cluster with it; Ray has put a handler of its own in place."""
        if threading.current_thread() is threading.main_thread():
            self.handler = before or signal.SIG_DFL
            signal.signal(signal.SIGTERM, _interrupt)

    def _send(self, sent: _Sent) -> None:
        task = self.task.options(max_retries=0, name=sent.errand.label, **self._needs(sent.errand.on))
        with self.change:
            self.sent[task.remote(sent.work, self.device, self.threads)] = sent
            self.change.notify()

    def _watch(self) -> None:
        """The waiting thread: futures get their results; what was lost is sent again."""
        while True:
            with self.change:
                while not self.sent and not self.ending:
                    self.change.wait()
                if self.ending:
                    return
                under_way = list(self.sent)
            for task in self.ray.wait(under_way, timeout=WAIT_S)[0]:
                with self.change:
                    sent = self.sent.pop(task)
                try:
                    self._take(task, sent)
                except Exception as error:
                    sent.future.set_exception(error)

    def _take(self, task: Any, sent: _Sent) -> None:
        errors = self.ray.exceptions
        lost = (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError, errors.ObjectLostError)
        label = sent.errand.label
        try:
            settle(self.ray.get(task), self.progress, sent.future)
        except lost as error:
            if sent.attempt == ATTEMPTS:
                raise HalfbyteError(f"{label}: its worker on Ray died {ATTEMPTS} times: is memory short?") from error
            self.progress.say(f"{label}: its worker on Ray died ({type(error).__name__}): tried again")
            sent.attempt += 1
            self._send(sent)
        except errors.RayError as error:
            first = next(iter(str(getattr(error, "cause", None) or error).splitlines()), "")
            raise HalfbyteError(f"{label}: Ray: {first or type(error).__name__}") from error


def _answers(address: str) -> None:
    """Raises OSError where nobody listens at host:port: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _library() -> Any:
    try:
        import ray
    except ImportError:
        raise HalfbyteError("--ray needs Ray: pip install ray") from None
    return ray
