"""Files are whole or not there; a full disk is one line; a directory has one holder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import halfbyte.files as files
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.files import locked, write_atomically, write_json, write_tensors, write_text


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write_text(tmp_path / "t", "grüße\n")
    write_json(tmp_path / "j", {"a": [1, 2], "ü": None})
    tensor = torch.arange(12).view(3, 4).T
    write_tensors(tmp_path / "s", {"x": tensor}, {"by": "test"})
    assert (tmp_path / "t").read_text(encoding="utf-8") == "grüße\n"
    text = (tmp_path / "j").read_text(encoding="utf-8")
    assert json.loads(text) == {"a": [1, 2], "ü": None} and text.endswith("}\n") and "ü" in text
    assert torch.equal(load_file(tmp_path / "s")["x"], tensor)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["j", "s", "t"]


def test_the_new_file_is_synced_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("sync"), sync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b))[1])
    write_text(tmp_path / "f", "x")
    assert events == ["sync", "replace", "sync"]


FAILURES = {
    "write": ("write_text", full()),
    "replace": ("replace", full()),
    "sync": ("fsync", full()),
}


@pytest.mark.parametrize("where", FAILURES)
def test_a_full_disk_is_one_line_and_the_old_file_stays(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.write_text("old")
    name, error = FAILURES[where]
    owner = {"write_text": Path}.get(name, os)
    with monkeypatch.context() as patch, pytest.raises(HalfbyteError, match=r"disk .* full") as caught:
        patch.setattr(owner, name, raising(error))
        write_json(path, {"new": 1})
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_file_half_written_when_the_disk_fills_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "f"

    def half(temporary: Path) -> None:
        temporary.write_text("ha")
        raise full()

    with pytest.raises(HalfbyteError, match=r"disk .* full"):
        write_atomically(path, half)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    with pytest.raises(HalfbyteError, match=r"disk .* full"):
        write_atomically(tmp_path / "f", lambda _: Path("/dev/full").write_text("x"))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no"), MemoryError()])
def test_other_failures_pass_through_and_leave_the_old_file(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, write)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_place_that_is_not_there_or_not_writable_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(HalfbyteError, match="cannot be written") as caught:
        write_json(tmp_path / "missing" / "f", {})
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="lies below one: name a directory"):
        with locked(tmp_path / "file" / "d"):
            pass


def test_a_place_that_cannot_even_be_cleaned_up_is_one_line(tmp_path: Path) -> None:
    """Below a file, or on a read-only file system, removing the temporary file fails as well."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(HalfbyteError, match="cannot be written"):
        write_json(tmp_path / "file" / "f", {})


def test_a_second_holder_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    with locked(place):
        with pytest.raises(HalfbyteError, match="in use by another halfbyte") as caught, locked(place):
            raise AssertionError("two holders")
        assert str(place) in str(caught.value)
        with locked(tmp_path / "other"):
            pass
    with locked(place):
        pass
    assert list(place.iterdir()) == []


def test_a_lock_is_let_go_of_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path):
        raise RuntimeError
    with locked(tmp_path):
        pass


def test_a_failure_leaves_no_directory_that_was_not_there(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for place in (tmp_path / "a" / "b", tmp_path / "old", tmp_path / "old" / "new"):
        with pytest.raises(RuntimeError), locked(place):
            raise RuntimeError
    assert [p.name for p in tmp_path.rglob("*")] == ["old"]
    with pytest.raises(RuntimeError), locked(tmp_path / "c" / "d"):
        (tmp_path / "c" / "d" / "work").write_text("kept")
        raise RuntimeError
    assert (tmp_path / "c" / "d" / "work").read_text() == "kept"


def test_a_directory_that_went_away_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, flock, taken = tmp_path / "d", fcntl.flock, [0]

    def late(handle: int, how: int) -> None:
        if not taken[0]:
            place.rmdir()
        taken[0] += 1
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(place):
        assert place.is_dir() and taken == [2]
        with pytest.raises(HalfbyteError, match="in use"), locked(place):
            raise AssertionError("two holders")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
def test_a_file_system_without_locks_is_one_line(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", raising(OSError(code, os.strerror(code))))
    with pytest.raises(HalfbyteError, match="choose an -o on a local disk") as caught, locked(tmp_path / "d"):
        raise AssertionError("not held")
    assert "\n" not in str(caught.value) and str(tmp_path / "d") in str(caught.value)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("/data/models/mine", "mine"),
        ("models/mine", "models/mine"),
        ("../mine", "../mine"),
        ("org/model", "org/model"),
        ("/", "/"),
    ],
)
def test_results_name_no_absolute_place(place: str, name: str) -> None:
    assert files.portable(place) == files.portable(Path(place)) == name


def test_a_place_seen_from_another(tmp_path: Path) -> None:
    assert files.seen_from(tmp_path / "runs" / "a", tmp_path / "models" / "m") == "../../models/m"
    assert files.seen_from(tmp_path, tmp_path) == "."
    assert files.seen_from(Path("/out/a"), Path("/models/m")) is None


def test_another_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    script = (
        "import fcntl, os, sys, time\n"
        "handle = os.open(sys.argv[1], os.O_RDONLY)\n"
        "fcntl.flock(handle, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        with pytest.raises(HalfbyteError, match="in use"), locked(tmp_path):
            raise AssertionError("two holders")
    finally:
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path):
        pass
