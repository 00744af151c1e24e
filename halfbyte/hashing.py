"""SHA-256 of files: remembered within a process, and begun ahead of need. Imports nothing that takes time, so that a
command has its model hashed, by a process of its own, while Python still imports the rest.

    python hashing.py FILE ...

prints the place of each file in the row and its hash, as they come; it ends when its standard input does.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path

SLICE = 64 << 20
"""Bytes that are mapped at a time."""
PIECE = 1 << 20
"""Bytes that are read at a time: they stay in a core's cache."""
LEAST_BYTES = 64 << 20
"""What is smaller is hashed before another process has begun."""
_State = tuple[Path, int, int, int, int]
_KNOWN: dict[_State, Future[str]] = {}
_CHILDREN: list[subprocess.Popen[bytes]] = []
_STOPPED = threading.Event()
_SETTLED_S = 2.0
"""A file that was touched less than so long ago may change again under the same time stamp."""


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex. Raises OSError, also where `beside` was left with an error meanwhile."""
    digest, buffer = hashlib.sha256(), bytearray(PIECE)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as handle:
        while size := handle.readinto(buffer):
            digest.update(view[:size])
            if _STOPPED.is_set():
                raise InterruptedError(f"hashing {path} was given up")
    return digest.hexdigest()


@contextmanager
def beside(hashing: Callable[[], str]) -> Iterator[Future[str]]:
    """`hashing` in a thread of its own, while what stands in the `with` goes on. An error or Ctrl-C there ends what is
    hashed, here and in other processes, so that nobody waits for it."""
    with ThreadPoolExecutor(1) as apart:
        future = apart.submit(hashing)
        try:
            yield future
        except BaseException:
            _STOPPED.set()
            for child in _CHILDREN:
                child.kill()
            wait([future])
            _STOPPED.clear()
            raise


def remembered_hash(path: Path) -> str:
    """`hash_file`, computed once in a process for a file that stays as it is (by inode, size and times)."""
    key = _settled(path)
    if key is None:
        return hash_file(path)
    known = _KNOWN.get(key)
    if known is not None and (digest := known.result()):
        return digest
    done = Future[str]()
    done.set_result(hash_file(path))
    _KNOWN[key] = done
    return done.result()


def hash_ahead(model: str | Path) -> None:
    """Begin to hash the weights of a model directory (anything else: nothing happens) in a process that ends with this
    one at the latest; `remembered_hash` waits for what is under way."""
    with suppress(OSError):
        path = Path(model)
        if not (path / "config.json").is_file():
            return
        files = sorted(path.glob("model*.safetensors"))
        if sum(file.stat().st_size for file in files) < LEAST_BYTES:
            return
        waiting = {key: file for file in files if (key := _settled(file)) and key not in _KNOWN}
        told = [_KNOWN.setdefault(key, Future()) for key in waiting]
        threading.Thread(target=_ask, args=(list(waiting.values()), told), daemon=True).start()


def _settled(path: Path) -> _State | None:
    """What a file's hash is remembered by; None where it changed a moment ago."""
    state = path.stat()
    if time.time() - state.st_ctime <= _SETTLED_S:
        return None
    return path.resolve(), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def _ask(files: Sequence[Path], told: Sequence[Future[str]]) -> None:
    """Have them hashed apart. What is not told in the end is an empty word: who needs it computes it."""
    try:
        words = [sys.executable, "-I", "-S", __file__, *map(str, files)]
        pipe = subprocess.PIPE
        with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as child:
            _CHILDREN.append(child)
            for line in child.stdout or ():
                number, digest = line.decode().split()
                told[int(number)].set_result(digest)
    except (OSError, ValueError):
        pass  # no process to be had: as above
    finally:
        for future in told:
            if not future.done():
                future.set_result("")


def _mapped_hash(path: str) -> str:
    """`hash_file` by mapping: a third faster, but a file that shrinks or cannot be read ends the process."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        for at in range(0, size, SLICE):
            with mmap.mmap(handle.fileno(), min(SLICE, size - at), access=mmap.ACCESS_READ, offset=at) as pages:
                digest.update(pages)
    return digest.hexdigest()


def _main(files: Sequence[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asked hears it, too

    def leave() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    def tell(number: int) -> None:
        with suppress(OSError, ValueError):  # not told
            print(f"{number} {_mapped_hash(files[number])}\n", end="", flush=True)

    threading.Thread(target=leave, daemon=True).start()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(tell, range(len(files))))
    os._exit(0)  # not to wait for the reader of standard input


if __name__ == "__main__":
    _main(sys.argv[1:])
