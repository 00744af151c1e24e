"""Sixteen codes in eight bytes: the two packings that every 4-bit format is made of.

Both keep the first of neighbouring codes in the low bits. A little-endian int32 of eight nibbles is four bytes of
two, so one packing serves both.
"""

from __future__ import annotations

import torch

from halfbyte.errors import HalfbyteError


class FormatError(HalfbyteError):
    """A format cannot hold what it is given, or a stored config says what vLLM would not load."""


def pack_bytes(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [..., C] codes 0..15 -> uint8 [..., C/2]: code 2j in the low nibble of byte j, code 2j+1 in the high."""
    if codes.shape[-1] % 2:
        raise FormatError(f"{codes.shape[-1]} codes do not fill whole bytes: an even number is needed")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_bytes(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of pack_bytes: uint8 [..., C/2] -> uint8 [..., C]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def pack_int32(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [..., C] codes 0..15 -> int32 [..., C/8]: code 8j+i in bits 4i..4i+3 of word j."""
    if codes.shape[-1] % 8:
        raise FormatError(f"{codes.shape[-1]} codes do not fill whole 32-bit words: a multiple of 8 is needed")
    return pack_bytes(codes).reshape(-1).view(torch.int32).reshape(*codes.shape[:-1], -1)


def unpack_int32(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of pack_int32: int32 [..., C/8] -> uint8 [..., C]."""
    return unpack_bytes(packed.reshape(-1).view(torch.uint8)).reshape(*packed.shape[:-1], -1)


def exact(values: torch.Tensor, dtype: torch.dtype, what: str) -> torch.Tensor:
    """`values` in `dtype`, unchanged. Raises FormatError where the smaller type cannot hold them exactly."""
    stored = values.to(dtype)
    if not torch.equal(stored.to(values.dtype), values):
        raise FormatError(f"{what} cannot be stored exactly in {str(dtype).removeprefix('torch.')}: round it first")
    return stored
