"""A calibration set: token sequences with a manifest that says where they come from and proves that they are intact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.files import make_directory, write_json, write_tensors

MANIFEST = "manifest.json"
TOKENS = "tokens.safetensors"


@dataclass(frozen=True)
class CalibrationSet:
    """`sequences`: int64 [T] each. `sampled`: bool [T] each, True where a model sampled it (self-generated).

    Make one with `CalibrationSet.of`; on disk it is a directory with tokens.safetensors (ids int32 [total],
    offsets int64 [n + 1], sampled uint8 [total] where known) and manifest.json, written last.
    """

    sequences: list[torch.Tensor]
    manifest: dict[str, Any]
    sampled: list[torch.Tensor] | None = None

    @classmethod
    def of(
        cls, sequences: Sequence[torch.Tensor], facts: dict[str, Any], sampled: Sequence[torch.Tensor] | None = None
    ) -> CalibrationSet:
        """A set whose manifest holds `facts` and what the tokens themselves tell: counts, histogram, SHA-256."""
        kept = [sequence.to(torch.int64) for sequence in sequences]
        lengths = [len(sequence) for sequence in kept]
        manifest = {
            "schema": 1,
            "kind": "calibration",
            **facts,
            "sequences": len(kept),
            "tokens": sum(lengths),
            "longest": max(lengths, default=0),
            "histogram": histogram(lengths),
            "sha256": tokens_sha256(kept),
        }
        return cls(kept, manifest, list(sampled) if sampled is not None else None)

    @property
    def sha256(self) -> str:
        """SHA-256 of the tokens (ids and where each sequence ends)."""
        return self.manifest["sha256"]

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return sum(len(sequence) for sequence in self.sequences)

    def save(self, directory: Path | str) -> Path:
        """Write the set to `directory` (made if missing; files of the same names are replaced). Returns it."""
        directory = Path(directory)
        ids, offsets = _flat(self.sequences)
        tensors = {"ids": ids, "offsets": offsets}
        if self.sampled is not None:
            tensors["sampled"] = torch.cat(self.sampled).to(torch.uint8)
        make_directory(directory)
        (directory / MANIFEST).unlink(missing_ok=True)
        write_tensors(directory / TOKENS, tensors)
        write_json(directory / MANIFEST, self.manifest)
        return directory

    @classmethod
    def load(cls, directory: Path | str) -> CalibrationSet:
        """Read a set back and verify its tokens against the manifest. Raises one line when they do not agree."""
        directory = Path(directory)
        if not (directory / MANIFEST).is_file():
            raise UsageError(f"{directory} is no calibration set (no {MANIFEST}): make one with `halfbyte calibrate`")
        try:
            manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
            tensors = load_file(directory / TOKENS)
            lengths = (tensors["offsets"][1:] - tensors["offsets"][:-1]).tolist()
            sequences = list(tensors["ids"].to(torch.int64).split(lengths))
            sampled = list(tensors["sampled"].bool().split(lengths)) if "sampled" in tensors else None
            expected = manifest["sha256"]
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise HalfbyteError(f"{directory} is a broken calibration set ({reason}): make it again") from error
        found = tokens_sha256(sequences)
        if found != expected:
            raise HalfbyteError(
                f"{directory}: the tokens hash to {found[:12]}, the manifest says {str(expected)[:12]}: make it again"
            )
        return cls(sequences, manifest, sampled)


def tokens_sha256(sequences: Sequence[torch.Tensor]) -> str:
    """SHA-256 over ids (int32) and offsets (int64), little-endian, in that order."""
    digest = hashlib.sha256()
    ids, offsets = _flat(sequences)
    digest.update(ids.numpy().astype("<i4").tobytes())
    digest.update(offsets.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def histogram(lengths: Sequence[int]) -> list[dict[str, int]]:
    """Sequences and tokens by length, in classes that double: {"from", "to" (inclusive), "sequences", "tokens"}."""
    rows: dict[int, dict[str, int]] = {}
    for length in sorted(lengths):
        low = 1 << max(0, length - 1).bit_length() - 1 if length > 1 else 0
        row = rows.setdefault(low, {"from": low + 1, "to": max(1, 2 * low), "sequences": 0, "tokens": 0})
        row["sequences"] += 1
        row["tokens"] += length
    return list(rows.values())


def _flat(sequences: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.cat([s.to(torch.int32) for s in sequences]) if sequences else torch.empty(0, dtype=torch.int32)
    lengths = torch.tensor([0, *(len(s) for s in sequences)], dtype=torch.int64)
    return ids, lengths.cumsum(0)
