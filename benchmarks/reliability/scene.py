"""An artifact that is about to be damaged, and what its faults are made with."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from halfbyte.artifact.fingerprint import sealed
from halfbyte.hashing import hash_file
from halfbyte.models import TensorInfo
from halfbyte.models.checkpoint import read_header

MANIFEST, INDEX = "halfbyte.json", "model.safetensors.index.json"
ROLES = {
    "codes": (".qweight", ".weight_packed"),
    "scales": (".scales", ".weight_scale", ".weight_scale_2", ".weight_global_scale", ".input_scale"),
    "zeros": (".qzeros", ".weight_zero_point"),
}
Tensors = dict[str, torch.Tensor]


class NotHere(Exception):
    """This artifact has nothing that the fault could damage."""


@dataclass(frozen=True)
class Scene:
    """A copy to damage, the artifact of another model of the same shapes, and a source of chance."""

    place: Path
    other: Path | None
    chance: random.Random

    def shards(self) -> list[Path]:
        return sorted(self.place.glob("*.safetensors"))

    def headers(self) -> dict[str, TensorInfo]:
        return {name: info for shard in self.shards() for name, info in read_header(shard).items()}

    def pick(self, role: str) -> TensorInfo:
        """A tensor of that role, large ones as likely as small ones."""
        found = [info for name, info in self.headers().items() if role_of(name, info) == role and info.nbytes]
        if not found:
            raise NotHere(role)
        return self.chance.choice(found)

    def rewrite(self, shard: Path, change: Callable[[Tensors], Any]) -> None:
        """The shard with its tensors changed, as a writer that went wrong would have written it."""
        with safe_open(shard, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        change(tensors)
        save_file({n: t.clone() for n, t in tensors.items()}, shard, metadata={"format": "pt"})

    def edit(self, file: str, change: Callable[[dict], Any]) -> None:
        tree = json.loads((self.place / file).read_text())
        change(tree)
        (self.place / file).write_text(json.dumps(tree, indent=2))


def role_of(name: str, info: TensorInfo) -> str:
    """codes, scales, zeros, indices, embeddings, or rest (norms, biases, linears left in BF16)."""
    for role, ends in ROLES.items():
        if name.endswith(ends):
            return role
    if info.dtype == "U8":
        return "codes"
    if info.dtype.startswith("I"):
        return "indices"
    return "embeddings" if "embed_tokens" in name or "lm_head" in name else "rest"


def reseal(place: Path) -> None:
    """Bring the manifest's file hashes and its seal up to date, as someone who edits a file on purpose would."""
    manifest = json.loads((place / MANIFEST).read_text())
    files = {n: p for n in manifest.get("files", {}) if (p := place / n).is_file()}
    files |= {p.name: p for p in place.iterdir() if p.name not in (MANIFEST, "README.md") and p.is_file()}
    manifest["files"] = {n: {"sha256": hash_file(p), "bytes": p.stat().st_size} for n, p in files.items()}
    (place / MANIFEST).write_text(json.dumps(sealed(manifest), indent=2))
