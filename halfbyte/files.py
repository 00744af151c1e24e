"""Writing that never leaves half a file: aside, fsync, rename; a full disk is one clear line."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError

from halfbyte.errors import HalfbyteError, UsageError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
TEMPORARY = ".tmp"
LOCK_ATTEMPTS = 5
MANY = 64
"""Threads at most."""
DTYPES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.uint32: "U32",
    torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16", torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
"""What safetensors calls them, in the order in which its library lays them out: the widest first, so that each tensor
begins at a multiple of its width."""


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
        raise refused(path, error) from error
    except BaseException:
        _discard(temporary)
        raise


def make_directory(path: Path) -> Path:
    """Make a directory and those above it, where they are missing; returns it. Raises HalfbyteError like a write."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refused(path, error) from error
    return path


def stamps(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Path, size and time of each that is there: another for other contents, without reading them."""
    return [(str(path), found.st_size, found.st_mtime_ns) for path in paths if path.exists() and (found := path.stat())]


def refused(path: Path, error: Exception) -> HalfbyteError:
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
    layout = {name: (dtype_name(t.dtype), tuple(t.shape), t.nbytes) for name, t in tensors.items()}
    write_pieces(path, layout, tensors.__getitem__, metadata)


def dtype_name(dtype: torch.dtype) -> str:
    """What safetensors calls it. Raises HalfbyteError for one that it does not hold."""
    if dtype not in DTYPES:
        raise HalfbyteError(f"tensors of {dtype} cannot be stored")
    return DTYPES[dtype]


def write_pieces(
    path: Path,
    layout: Mapping[str, tuple[str, tuple[int, ...], int]],
    load: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """A safetensors file, atomically, byte for byte as safetensors' own library writes it, of which one tensor at a
    time is in memory.

    layout   by name: the dtype as safetensors calls it, shape, bytes
    load     gives the tensor of a name, when its turn comes
    """
    rank = {dtype: at for at, dtype in enumerate(DTYPES.values())}
    order = sorted(layout, key=lambda name: (rank[layout[name][0]], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in order:
        dtype, shape, size = layout[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as handle:
            handle.write(len(head).to_bytes(8, "little") + head)
            for name in order:
                flat = load(name).detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                if flat.numel() != layout[name][2]:
                    raise HalfbyteError(f"{name} has {flat.numel():,} bytes, not {layout[name][2]:,}: is it damaged?")
                handle.write(flat.numpy().data)

    write_atomically(path, write)


def in_threads(work: Callable[[_Item], _Result], items: Iterable[_Item], most: int | None = None) -> list[_Result]:
    """`work` of each item, in their order, by as many threads as there are cores, or `most`: for hashing, reading and
    writing, which let go of the interpreter."""
    with ThreadPoolExecutor(min(os.cpu_count() or 1, most or MANY)) as pool:
        return list(pool.map(work, items))


def portable(place: str | Path) -> str:
    """A place as results may name it: an absolute path by its last name, anything else (also a hub id) as it is.

    Results travel with an artifact, and say nothing of where things lie on the machine that made them.
    """
    path = Path(place)
    return path.name or str(path) if path.is_absolute() else str(place)


_SECRET = r"[\w.-]*(?:token|secret|passw(?:or)?d|passphrase|api[-_]?key|access[-_]?key|credentials?|authorization)"
_ASSIGNED = re.compile(rf"(?i)^(-*{_SECRET}\s*[=:]\s*)(.+)$", re.S)
_NAMED = re.compile(rf"(?i)^--?{_SECRET}$")
_USERINFO = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^/\s@]+@")
_BEARER = re.compile(r"\b(?:hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[abp]-|AKIA|AIza)[\w-]{12,}|(?i:\bbearer\s+)\S{8,}")
REDACTED = "***"


def redacted(words: Sequence[str]) -> list[str]:
    """A command line as results and logs may show it: values of options called token, password, api-key and the like,
    users and passwords in URLs, and what looks like a key of a known service, are three stars."""
    shown: list[str] = []
    for word in words:
        if shown and _NAMED.match(shown[-1]) and not word.startswith("-"):
            shown.append(REDACTED)
        else:
            word = _ASSIGNED.sub(rf"\g<1>{REDACTED}", word)
            shown.append(_BEARER.sub(REDACTED, _USERINFO.sub(rf"\g<1>{REDACTED}@", word)))
    return shown


def seen_from(directory: Path, place: Path) -> str | None:
    """`place` relative to `directory`, or None where the two share no more than the root of the file system."""
    start, end = directory.resolve(), place.resolve()
    shared = Path(os.path.commonpath([start, end]))
    return None if shared == shared.parent else os.path.relpath(end, start)


def link_or_copy(source: Path, target: Path) -> None:
    """`target` becomes the same file as `source`, or a copy where the disk knows no hard links; atomically."""

    def write(temporary: Path) -> None:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)

    write_atomically(target, write)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold `directory` (made if need be) against a second halfbyte. Raises HalfbyteError when it cannot be held.

    The lock is on the directory itself: it leaves no file, and it goes with the process however that ends. What was
    made here and is still empty when the work is refused goes again.
    """
    missing = [path for path in (directory, *directory.parents) if not os.path.exists(path)]
    handle = -1
    try:
        handle = _hold(directory)
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
        raise
    finally:
        if handle >= 0:
            os.close(handle)


def _hold(directory: Path) -> int:
    """A file descriptor that holds the lock. A directory that went away before the lock was had is made again."""
    for _ in range(LOCK_ATTEMPTS):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            if isinstance(error, (FileExistsError, NotADirectoryError)):
                raise UsageError(f"{directory} is a file, or lies below one: name a directory") from error
            raise HalfbyteError(f"{directory} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            raise _not_held(directory, error) from error
        if os.path.exists(directory) and os.path.samestat(os.fstat(handle), os.stat(directory)):
            return handle
        os.close(handle)
    raise HalfbyteError(f"{directory} comes and goes: is another halfbyte at work there? choose another -o")


def _not_held(directory: Path, error: OSError) -> HalfbyteError:
    if isinstance(error, BlockingIOError):
        return HalfbyteError(f"{directory} is in use by another halfbyte: wait for it, or choose another -o")
    return HalfbyteError(
        f"{directory} cannot be locked ({error.strerror or error}): its file system takes no locks, as some network "
        "ones do not; choose an -o on a local disk and copy the result"
    )
