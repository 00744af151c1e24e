"""Safetensors files as halfbyte writes them, against the safetensors library."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from halfbyte.errors import HalfbyteError
from halfbyte.files import DTYPES, write_pieces, write_tensors


def every_dtype() -> dict[str, torch.Tensor]:
    """Odd sizes of every dtype, under names whose order is not that of their widths."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for at, dtype in enumerate(DTYPES):
        raw = torch.randint(0, 2 if dtype == torch.bool else 100, (3, 5), generator=generator)
        found[f"{at * 7 % 13:02}.{dtype}"] = raw.to(dtype)
    more = {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3), 'a "name" – ü': torch.ones(1)}
    return found | more | {"turned": torch.arange(6.0).reshape(2, 3).T}


def test_bytes_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    tensors = every_dtype()
    write_tensors(tmp_path / "ours", tensors, {"note": 'ä "x"'})
    theirs = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert _bodies((tmp_path / "ours").read_bytes()) == _bodies(save(theirs, {"format": "pt", "note": 'ä "x"'}))
    write_tensors(tmp_path / "plain", tensors)
    assert (tmp_path / "plain").read_bytes() == save(theirs, {"format": "pt"})


def test_read_back_as_they_were(tmp_path: Path) -> None:
    tensors = every_dtype()
    write_tensors(tmp_path / "a.safetensors", tensors)
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].tolist() == tensor.tolist()


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    finally:
        os.umask(old)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_tensor_of_another_size_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(HalfbyteError, match="has 4 bytes, not 8"):
        write_pieces(tmp_path / "a.safetensors", {"a": ("F32", (2,), 8)}, lambda _: torch.ones(1))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_between_two_tensors_leaves_the_old_file(tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.safetensors", {"a": torch.ones(2), "b": torch.ones(2)}
    write_tensors(path, {"old": torch.zeros(1)})

    def load(name: str) -> torch.Tensor:
        if name == "b":
            raise OSError(errno.ENOSPC, "No space left on device")
        return tensors[name]

    with pytest.raises(HalfbyteError, match=r"disk .* full"):
        write_pieces(path, dict.fromkeys(tensors, ("F32", (2,), 8)), load)
    assert list(load_file(path)) == ["old"] and list(tmp_path.iterdir()) == [path]


def test_a_dtype_that_safetensors_has_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HalfbyteError, match="complex64 cannot be stored"):
        write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1, dtype=torch.complex64)})


def _bodies(data: bytes) -> tuple[object, bytes]:
    """A file's header and what follows; the library writes the metadata's keys in any order."""
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    return json.loads(data[8 : 8 + length]), data[8 + length :]
