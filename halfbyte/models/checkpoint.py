"""A model directory as headers: every tensor's name, dtype, shape and place, with no weight read until asked.

The safetensors header (8 bytes little-endian length, then JSON) is parsed here, so that a truncated or
hostile file gets one clear line; tensors themselves come through the safetensors library, memory-mapped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.files import DTYPES, in_threads
from halfbyte.hashing import remembered_hash

MAX_HEADER = 32 << 20
"""Bytes of the largest header that is read: some 300,000 tensors. (The format allows 100 MB.)"""
MAX_JSON = 128 << 20
"""Bytes of the largest JSON file that is read; the largest tokenizers have 34 MB."""
LIMITS = {
    "num_hidden_layers": 2000,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 30,
}
"""What no model has in these keys of config.json; beyond it a config is a mistake or a trap."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_BYTES = {name: dtype.itemsize for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its header states it. `dtype` in safetensors' names (BF16, F16, I32, U8, F8_E4M3 ...)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path


def read_header(file: Path) -> dict[str, TensorInfo]:
    """All tensors of one safetensors file. Raises HalfbyteError when the file is truncated or malformed."""
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if MAX_HEADER < length <= size - 8:
                raise HalfbyteError(f"{file} has a header of {length >> 20} MiB, more than any model needs: refused")
            if size < 8 or length > size - 8:
                raise HalfbyteError(f"{file} is truncated or no safetensors file: fetch or make it again")
            header = json.loads(handle.read(length), object_pairs_hook=_unique)
    except OSError as error:
        raise HalfbyteError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise HalfbyteError(f"{file} has a broken safetensors header: fetch or make it again") from error
    if not isinstance(header, dict):
        raise HalfbyteError(f"{file} has a broken safetensors header: fetch or make it again")
    tensors, spans = {}, []
    for name, entry in header.items():
        if name != "__metadata__":
            tensors[name], span = _entry(file, name, entry)
            spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise HalfbyteError(
                f"{file}: tensors overlap or leave a hole at byte {min(start, end):,}: fetch or make it again"
            )
        end = stop
    if size != 8 + length + end:
        state = "truncated" if size < 8 + length + end else "longer than its header says"
        raise HalfbyteError(
            f"{file} is {state} ({size:,} bytes, header says {8 + length + end:,}): fetch or make it again"
        )
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ: of two of one name, readers would take one or the other."""
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("a name stands there twice")
    return tree


def _entry(file: Path, name: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        start, stop = entry["data_offsets"]
        count = 1
        for number in (*shape, start, stop):
            if type(number) is not int or number < 0:
                raise ValueError(number)
        for extent in shape:
            count *= extent
        if dtype not in _BYTES or stop - start != count * _BYTES[dtype]:
            raise ValueError(dtype)
    except (KeyError, TypeError, ValueError) as error:
        raise HalfbyteError(
            f"{file}: the header entry of {name[:80]!r} is malformed: fetch or make it again"
        ) from error
    return TensorInfo(name, dtype, shape, stop - start, file), (start, stop)


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file to take tensors from. Raises HalfbyteError, in one line, where it cannot be read."""
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        size = file.stat().st_size >> 30
        raise HalfbyteError(
            f"{file} has {size} GiB, more than can be mapped here: cut it into smaller shards"
        ) from error
    except (OSError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise HalfbyteError(f"{file} cannot be read ({reason}): fetch or make it again") from error


def refuse_large(path: Path, limit: int = MAX_JSON) -> None:
    """Raise HalfbyteError for a file of more than `limit` bytes, before it is read."""
    size = path.stat().st_size
    if size > limit:
        raise HalfbyteError(f"{path} has {size >> 20:,} MiB, and more than {limit >> 20} are not read: refused")


def read_json(path: Path) -> dict:
    """A JSON object from a file of at most MAX_JSON bytes. Raises HalfbyteError with the file's name."""
    try:
        refuse_large(path)
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HalfbyteError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise HalfbyteError(f"{path} is not valid JSON") from error
    if not isinstance(value, dict):
        raise HalfbyteError(f"{path} does not hold a JSON object")
    return value


def meant_inside(directory: Path, file: str) -> str:
    """What to add to a refusal where a run's directory was named instead of the artifact in it, which has that file."""
    inner = directory / "model"
    return f"; did you mean {inner}?" if (inner / file).is_file() else ""


class Checkpoint:
    """A local model directory: config, tensors by name, files. Headers are read once; weights when asked.

    Raises UsageError when the directory is no model directory, HalfbyteError when a shard is missing or broken.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / "config.json").is_file():
            meant = meant_inside(self.path, "config.json")
            raise UsageError(f"{path} is not a model directory: it has no config.json{meant}")
        self.own(self.path / "config.json")
        self.config = read_json(self.path / "config.json")
        self._refuse_traps()

    def own(self, file: Path) -> Path:
        """`file`, which is copied or read as it is. Raises HalfbyteError for a link that leads out of the directory:
        what it leads to may be private, and would end in an artifact. (The hub's cache links into itself.)"""
        root = self.path.resolve()
        homes = [root, root.parents[1]] if root.parent.name == "snapshots" else [root]
        if file.is_symlink() and not any(file.resolve().is_relative_to(home) for home in homes):
            raise HalfbyteError(f"{file} is a link that leads out of the model's directory: put the file itself there")
        return file

    def _refuse_traps(self) -> None:
        """Raise HalfbyteError for a directory that would have code fetched or run, or whose sizes are absurd."""
        for key, limit in LIMITS.items():
            value = self.config.get(key)
            if isinstance(value, (int, float)) and not -limit <= value <= limit:
                raise HalfbyteError(f"{self.path}/config.json: {key} is {value:.3g}, and no model has that: refused")
        for key in ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"):
            if "/" in str(self.config.get(key, "")):
                raise HalfbyteError(f"{self.path}/config.json: {key} names code on the hub: refused; remove the key")
        if (self.path / "adapter_config.json").exists():
            raise HalfbyteError(f"{self.path} holds an adapter beside the model: merge it first, or remove it")

    @cached_property
    def files(self) -> list[Path]:
        """The weight files, in name order, as the index (or their presence) states them."""
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            places = read_json(index).get("weight_map")
            if not isinstance(places, dict) or not places or not all(isinstance(n, str) for n in places.values()):
                raise HalfbyteError(f"{index} has no weight_map of tensor names to files: fetch the model again")
            names = sorted(set(places.values()))
            bad = [n for n in names if Path(n).name != n or n == ".."]
            if bad:
                raise HalfbyteError(f"{index} names a shard outside the directory ({bad[0]!r}): refused")
            missing = [n for n in names if not (self.path / n).is_file()]
            if missing:
                raise HalfbyteError(f"{self.path} lacks {missing[0]}, which its index names: fetch the model again")
            return [self.path / n for n in names]
        single = self.path / "model.safetensors"
        if single.is_file():
            return [single]
        pickled = [p.name for p in self.path.glob("*.bin")] + [p.name for p in self.path.glob("*.pt*")]
        why = f"only {pickled[0]}, and pickled weights are not read: convert them to safetensors" if pickled else "none"
        raise UsageError(f"{self.path} has no model.safetensors or model.safetensors.index.json ({why})")

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor of every weight file."""
        found: dict[str, TensorInfo] = {}
        for file in self.files:
            for name, info in read_header(file).items():
                if name in found:
                    raise HalfbyteError(f"{name} stands in {found[name].file.name} and again in {file.name}")
                found[name] = info
        return found

    @property
    def total_bytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def has(self, name: str) -> bool:
        return name in self.tensors

    def load(self, name: str) -> torch.Tensor:
        """One tensor, memory-mapped. Raises HalfbyteError when no file has it."""
        info = self.tensors.get(name)
        if info is None:
            raise HalfbyteError(f"{self.path} lacks the tensor {name}: is the model whole?")
        with opened(info.file) as handle:
            return handle.get_tensor(name)

    def load_all(self, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors whose names start with `prefix`, keyed by the rest of the name; each file is opened once."""
        wanted: dict[Path, list[str]] = {}
        for name, info in self.tensors.items():
            if name.startswith(prefix):
                wanted.setdefault(info.file, []).append(name)
        loaded = {}
        for file, names in wanted.items():
            with opened(file) as handle:
                for name in names:
                    loaded[name[len(prefix) :]] = handle.get_tensor(name)
        return loaded

    def fingerprint(self) -> str:
        """SHA-256 over config.json and every weight file's own SHA-256: names the model's contents."""
        digest = hashlib.sha256()
        files = [self.path / "config.json", *self.files]
        for file, own in zip(files, in_threads(remembered_hash, files)):
            digest.update(f"{file.name} {own}\n".encode())
        return digest.hexdigest()

    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's files that are there."""
        found = [self.own(self.path / name) for name in TOKENIZER_FILES if (self.path / name).is_file()]
        for file in found:
            refuse_large(file)
        return found
