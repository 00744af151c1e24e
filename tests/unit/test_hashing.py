"""SHA-256 of files: what it is, what is remembered, and what is begun ahead."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import halfbyte.hashing as hashing
from halfbyte.hashing import beside, hash_ahead, hash_file, remembered_hash


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "_SETTLED_S", -1.0)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three weight files of which one may change, and one that is not asked for."""
    monkeypatch.setattr(hashing, "LEAST_BYTES", 0)
    (tmp_path / "config.json").write_text("{}")
    for number, size in enumerate((0, 5, 100_000)):
        (tmp_path / f"model-{number}.safetensors").write_bytes(bytes(i % 251 for i in range(size)))
    (tmp_path / "consolidated.safetensors").write_bytes(b"not asked for")
    return tmp_path


def digests(model: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(model.glob("model*"))}


def told(model: Path) -> dict[str, str]:
    """What is known, once all that was begun has ended."""
    return {key[0].name: future.result(30) for key, future in hashing._KNOWN.items() if key[0].parent == model}


def test_what_is_begun_ahead_is_right_and_not_done_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hash_ahead(model)
    assert told(model) == digests(model)
    monkeypatch.setattr(hashing, "hash_file", None)
    assert {p.name: remembered_hash(p) for p in sorted(model.glob("model*"))} == digests(model)


def test_a_child_that_dies_or_does_not_start_is_done_without(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for executable in ("/bin/false", "/no/such/file", "/bin/echo"):
        monkeypatch.setattr(sys, "executable", executable)
        hash_ahead(model)
        assert set(told(model).values()) == {""}
        assert {p.name: remembered_hash(p) for p in sorted(model.glob("model*"))} == digests(model)
        hashing._KNOWN.clear()


def test_a_file_that_cannot_be_read_is_not_told(model: Path) -> None:
    (model / "model-9.safetensors").symlink_to(model / "model-8.safetensors")
    (model / "model-8.safetensors").mkdir()
    hash_ahead(model)
    known = told(model)
    assert known["model-8.safetensors"] == "" and known["model-2.safetensors"]


def test_it_ends_with_who_asked(model: Path) -> None:
    fifo = model / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen(
        [sys.executable, hashing.__file__, str(fifo)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as child:
        time.sleep(0.3)
        assert child.poll() is None, "nobody writes into it"
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(30) == 1


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


def test_an_error_ends_what_is_hashed_beside_it(tmp_path: Path) -> None:
    """Of a file without end."""
    ended = list[BaseException]()

    def endless() -> str:
        try:
            return hash_file(Path("/dev/zero"))
        except OSError as error:
            ended.append(error)
            raise

    with pytest.raises(KeyboardInterrupt), beside(endless) as hashing:
        assert not hashing.done()
        raise KeyboardInterrupt
    assert isinstance(ended[0], InterruptedError)
    (tmp_path / "a").write_bytes(b"abc")
    with beside(lambda: hash_file(tmp_path / "a")) as hashing:
        assert hashing.result() == hashlib.sha256(b"abc").hexdigest()


def test_two_names_of_one_file_are_one(model: Path) -> None:
    (model / "model-9.safetensors").symlink_to(model / "model-2.safetensors")
    hash_ahead(model)
    known = told(model)
    assert known["model-2.safetensors"] == remembered_hash(model / "model-9.safetensors") and all(known.values())
