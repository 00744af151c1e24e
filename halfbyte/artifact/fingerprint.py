"""Fingerprints: what ties an artifact's bytes to the values that the quantizer chose, and a manifest to itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

SEAL = "seal"


def weight_fingerprint(weight: torch.Tensor) -> str:
    """SHA-256, in hex, of a weight's float32 values in row-major order (any device, any floating dtype)."""
    values = weight.detach().to("cpu", torch.float32).contiguous()
    return hashlib.sha256(values.numpy().data).hexdigest()


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256, in hex, of a stored tensor: its dtype, its shape and its bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with its own SHA-256, over all else in it, as `seal`: a checksum against accidents, no signature."""
    return {**manifest, SEAL: _digest(manifest)}


def seal_holds(manifest: Mapping[str, Any]) -> bool:
    """Whether the manifest says what it said when it was sealed."""
    return manifest.get(SEAL) == _digest(manifest)


def _digest(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
