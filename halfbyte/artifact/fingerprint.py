"""A fingerprint of a weight: what ties an artifact's packed bytes to the values that the quantizer chose."""

from __future__ import annotations

import hashlib

import torch


def weight_fingerprint(weight: torch.Tensor) -> str:
    """SHA-256, in hex, of a weight's float32 values in row-major order (any device, any floating dtype)."""
    values = weight.detach().to("cpu", torch.float32).contiguous()
    return hashlib.sha256(values.numpy().data).hexdigest()
