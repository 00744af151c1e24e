"""SHA-256 of files: remembered within a process, and begun ahead of need. Imports nothing that takes time, so that a
command can have a model hashed while Python still imports the rest."""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
import time
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

SLICE = 16 << 20
"""Bytes that are mapped and hashed at a time: the interpreter is let go for so long, and so much is in memory."""
_State = tuple[Path, int, int, int, int]
_KNOWN: dict[_State, Future[str]] = {}
_LOCK = threading.Lock()
_SETTLED_S = 2.0
"""A file that was touched less than so long ago may change again under the same time stamp."""


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        try:
            for at in range(0, size, SLICE):
                with mmap.mmap(handle.fileno(), min(SLICE, size - at), access=mmap.ACCESS_READ, offset=at) as pages:
                    digest.update(pages)
        except (OSError, ValueError):  # a file system that maps nothing
            return hashlib.file_digest(handle, "sha256").hexdigest()
    return digest.hexdigest()


def remembered_hash(path: Path) -> str:
    """`hash_file`, computed once in a process for a file that stays as it is (by inode, size and times)."""
    state = path.stat()
    key = (path.resolve(), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    settled = time.time() - state.st_ctime > _SETTLED_S
    if not settled:
        return hash_file(path)
    with _LOCK:
        known = _KNOWN.get(key)
        mine = known is None
        if known is None:
            known = _KNOWN[key] = Future()
    if mine:
        try:
            known.set_result(hash_file(path))
        except BaseException as error:
            _KNOWN.pop(key, None)
            known.set_exception(error)
            raise
    return known.result()


def hash_ahead(model: str | Path) -> None:
    """Begin to hash the files of a model directory (anything else: nothing happens) in threads that end with the
    process; `remembered_hash` waits for what is under way."""
    path = Path(model)
    with suppress(OSError):
        if (path / "config.json").is_file():
            files = deque(sorted(path.glob("model*.safetensors")))
            for _ in range(min(os.cpu_count() or 1, len(files))):
                threading.Thread(target=_hash_each, args=(files,), daemon=True).start()


def _hash_each(files: deque[Path]) -> None:
    with suppress(IndexError):
        while True:
            file = files.popleft()
            with suppress(OSError):  # who needs it, meets it again
                remembered_hash(file)
