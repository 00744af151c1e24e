"""Runs one command and outlives nobody: a program of its own (standard library alone), started by process.Server.

    python supervisor.py PIPE PARENT GRACE COMMAND...

It stops COMMAND and everything that it started when the read end PIPE reports end of file (the parent closed it, or
died in whatever way), when PARENT is no longer its parent, when it is told to end, or when COMMAND ends by itself.
On Linux it adopts orphans below it (PR_SET_CHILD_SUBREAPER), so a grandchild whose own parent is gone is found too,
and COMMAND is killed should the supervisor itself be (PR_SET_PDEATHSIG). COMMAND has GRACE seconds to end when asked
to. What it leaves of sockets and temporary files goes with it: its TMPDIR is a directory of its own (vLLM leaves both
there, even when it ends in peace). Exit status: COMMAND's.
"""

from __future__ import annotations

import contextlib
import ctypes
import getpass
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LEFTOVERS_S = 2.0
"""How long what is left behind has between SIGTERM and SIGKILL."""
GIVE_UP_S = 10.0
SOCKET_NAME = 37
"""Characters that vLLM's sockets add to the directory's name; of both the system takes SOCKET_PATH."""
SOCKET_PATH = 107
LINUX = sys.platform == "linux"


def main() -> int:
    pipe, parent, grace, command = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]
    libc = ctypes.CDLL(None, use_errno=True) if LINUX else None
    if libc is not None:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    ending = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}

    def in_child() -> None:
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    scratch = own_scratch()
    try:
        env = {**os.environ, "TMPDIR": scratch} if scratch else None
        child = subprocess.Popen(command, preexec_fn=in_child, stdin=subprocess.DEVNULL, env=env)
    except OSError as error:
        print(f"error: {command[0]} cannot be run: {error.strerror}", file=sys.stderr)
        forget(scratch)
        return 127
    while child.poll() is None and os.getppid() == parent:
        ready, _, _ = select.select([pipe, wake_read], [], [], 1.0)
        if pipe in ready or (wake_read in ready and ending & set(os.read(wake_read, 64))):
            break
    stop(child, grace)
    forget(scratch)
    status = child.returncode
    return status if status is not None and status >= 0 else 128 - (status or 0)


def own_scratch() -> str | None:
    """A temporary directory for the command, in which what torch keeps from one run to the next lies where it always
    does; None where none can be made, or none whose name is short enough for a socket in it."""
    usual = tempfile.gettempdir()
    short = len(usual) + len("/hb-12345678") + SOCKET_NAME <= SOCKET_PATH
    try:
        scratch = tempfile.mkdtemp(prefix="hb-", dir=usual if short else "/tmp")
        name = "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
        os.makedirs(os.path.join(usual, name), exist_ok=True)
        os.symlink(os.path.join(usual, name), os.path.join(scratch, name))
        return scratch
    except (OSError, KeyError, ImportError):
        return None


def forget(scratch: str | None) -> None:
    if scratch:
        shutil.rmtree(scratch, ignore_errors=True)


def stop(child: subprocess.Popen, grace: float) -> None:
    """Ask the command to end, wait for a while, then kill whatever is left below this process."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(grace)
        except subprocess.TimeoutExpired:
            child.kill()
    began = time.monotonic()
    for pid in descendants(os.getpid()):
        send(pid, signal.SIGTERM)
    while time.monotonic() < began + GIVE_UP_S:
        reap(child)
        left = descendants(os.getpid())
        if not left and child.poll() is not None:
            return
        waited = time.monotonic() - began
        for pid in left if waited > LEFTOVERS_S else []:
            if waited > 2 * LEFTOVERS_S or not cleans_up(pid):
                send(pid, signal.SIGKILL)
        time.sleep(0.02)


def descendants(root: int) -> list[int]:
    """Every living process below `root` (Linux; elsewhere the process group stands for it)."""
    if not LINUX:
        return []
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as handle:
                    state, parent = handle.read().rpartition(")")[2].split()[:2]
            except (OSError, ValueError):
                continue
            if state != "Z":
                parents.setdefault(int(parent), []).append(int(name))
    found, frontier = [], [root]
    while frontier:
        frontier = [pid for parent in frontier for pid in parents.get(parent, [])]
        found += frontier
    return found


def cleans_up(pid: int) -> bool:
    """Whether it is multiprocessing's resource tracker, which frees shared memory once the others are gone."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as handle:
            return b"resource_tracker" in handle.read()
    except OSError:
        return False


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def reap(child: subprocess.Popen) -> None:
    """Collect orphans that were adopted; the command's own status is left to `child`."""
    child.poll()
    while child.returncode is not None:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                return
        except ChildProcessError:
            return


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        if not LINUX:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.killpg(0, signal.SIGTERM)
