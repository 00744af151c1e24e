"""SHA-256 of files: what it is, what is remembered, and what is begun ahead."""

from __future__ import annotations

import hashlib
import mmap
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import halfbyte.hashing as hashing
from halfbyte.hashing import hash_ahead, hash_file, remembered_hash


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "_SETTLED_S", -1.0)


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 3 * 4096])
def test_a_file_is_hashed_in_slices(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "SLICE", mmap.ALLOCATIONGRANULARITY)
    (tmp_path / "a").write_bytes(data := bytes(i % 251 for i in range(size)))
    assert hash_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_what_cannot_be_mapped_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(19, "No such device")

    (tmp_path / "a").write_bytes(b"abc")
    monkeypatch.setattr(mmap, "mmap", refuse)
    assert hash_file(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_what_is_under_way_is_waited_for_and_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, hashed = threading.Event(), list[str]()

    def slowly(path: Path) -> str:
        hashed.append(path.name)
        assert go.wait(30)
        return hash_file(path)

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    (tmp_path / "consolidated.safetensors").write_bytes(b"not asked for")
    monkeypatch.setattr(hashing, "hash_file", slowly)
    hash_ahead(tmp_path)
    while not hashed:
        time.sleep(0.01)
    threading.Timer(0.1, go.set).start()
    assert remembered_hash(tmp_path / "model.safetensors") == hashlib.sha256(b"abc").hexdigest()
    assert hashed == ["model.safetensors"]


def test_a_hash_that_failed_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    with monkeypatch.context() as broken:
        broken.setattr(hashing, "hash_file", lambda _path: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            remembered_hash(tmp_path / "a")
    assert remembered_hash(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_anything_but_a_model_directory_is_left(tmp_path: Path) -> None:
    before = threading.active_count()
    for model in (tmp_path, tmp_path / "missing", "owner/name", "x" * 5000):
        hash_ahead(model)
    assert threading.active_count() == before


def test_it_is_there_before_torch_is() -> None:
    """The command line begins to hash before what takes seconds is imported."""
    script = "import sys, halfbyte.cli.app, halfbyte.hashing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
