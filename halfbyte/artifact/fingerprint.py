"""Fingerprints: what ties an artifact's bytes to the values that the quantizer chose, and a manifest to itself."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Any

import torch

from halfbyte.algo import dequantize
from halfbyte.formats.bits import pack_bytes
from halfbyte.types import NVFP4_BLOCK, QuantizedLinear

SEAL = "seal"


def weight_fingerprint(q: QuantizedLinear) -> str:
    """SHA-256, in hex, of what a linear's values follow from: grid, shape, codes, scales, zeros, global scale.

    The same for every format that holds it and for any device; blocks of NVFP4 that share a scale count one by one,
    as files hold them.
    """
    return digest_of(*values_of(q))


def values_of(q: QuantizedLinear) -> tuple[str, list[torch.Tensor]]:
    """What `digest_of` makes a linear's fingerprint of, on the CPU."""
    group = min(q.group_size, NVFP4_BLOCK) if q.grid == "nvfp4" else q.group_size
    scales = q.scales.repeat_interleave(q.group_size // group, 1)
    outer = struct.pack("<f", 0.0 if q.global_scale is None else q.global_scale).hex()
    codes = pack_bytes(q.codes) if q.in_features % 2 == 0 else q.codes
    parts = [part.detach().cpu().contiguous() for part in (codes, scales.float(), q.zeros) if part is not None]
    return f"{q.grid} {list(q.codes.shape)} {group} {outer} ", parts


def digest_of(head: str, parts: list[torch.Tensor]) -> str:
    """SHA-256, in hex, of words and tensors' bytes."""
    digest = hashlib.sha256(head.encode())
    for part in parts:
        digest.update(part.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint_holds(q: QuantizedLinear, stated: str) -> bool:
    """Whether a linear has the fingerprint that a manifest states; older manifests state one of its float32 values."""
    if weight_fingerprint(q) == stated:
        return True
    return hashlib.sha256(dequantize(q).cpu().contiguous().numpy().data).hexdigest() == stated


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256, in hex, of a stored tensor: its dtype, its shape and its bytes."""
    return digest_of(f"{tensor.dtype} {list(tensor.shape)} ", [tensor.detach().cpu().contiguous()])


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with its own SHA-256, over all else in it, as `seal`: a checksum against accidents, no signature."""
    return {**manifest, SEAL: _digest(manifest)}


def seal_holds(manifest: Mapping[str, Any]) -> bool:
    """Whether the manifest says what it said when it was sealed."""
    return manifest.get(SEAL) == _digest(manifest)


def _digest(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
