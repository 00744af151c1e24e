"""Writing that never leaves half a file: aside, fsync, rename; a full disk is one clear line."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from halfbyte.errors import HalfbyteError

TEMPORARY = ".tmp"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)` for a file beside `path`, fsync it and rename it into place.

    Raises HalfbyteError when the disk is full or the place is not writable; the old file stays as it was.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        write(temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except (OSError, SafetensorError) as error:
        _discard(temporary)
        raise _refused(path, error) from error
    except BaseException:
        _discard(temporary)
        raise


def make_directory(path: Path) -> Path:
    """Make a directory and those above it, where they are missing; returns it. Raises HalfbyteError like a write."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refused(path, error) from error
    return path


def _refused(path: Path, error: Exception) -> HalfbyteError:
    """What to tell of a write that the system refused."""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return HalfbyteError(f"the disk of {path.parent} is full: make room and run the same command again")
    reason = getattr(error, "strerror", None) or str(error)
    return HalfbyteError(f"{path} cannot be written: {reason}")


def _discard(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Text, UTF-8, atomically; what UTF-8 cannot hold (half a surrogate pair) is written as its escape."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """JSON with two spaces and a last newline, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, atomically. Tensors are made contiguous and taken to the CPU."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    meta = {"format": "pt", **(metadata or {})}

    def write(temporary: Path) -> None:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(ready, temporary, metadata=meta)
        temporary.chmod(mode)  # save_file leaves 0600, whatever the umask

    write_atomically(path, write)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold `directory` (made if need be) against a second halfbyte. Raises HalfbyteError when it is held.

    The lock is on the directory itself: it leaves no file, and it goes with the process however that ends.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise HalfbyteError(f"{directory} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise HalfbyteError(f"{directory} is in use by another halfbyte: wait for it, or choose another -o") from error
    try:
        yield
    finally:
        os.close(handle)
