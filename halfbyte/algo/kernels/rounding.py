"""Rounding as the torch oracles do it, from operations that the hardware, LLVM and the interpreter all do exactly."""

# mypy: allow-untyped-defs, allow-untyped-calls
# Annotations other than tl.constexpr mean something to Triton: kernels have none, and no postponed evaluation.

import torch
import triton
import triton.language as tl


@triton.jit
def nearest(x):
    """The nearest integer, ties to even; |x| < 2^22. Above 1.5 * 2^23 float32 holds integers alone."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def clip(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def rounded_bits(x, DROP: tl.constexpr):
    """The bits of float32 x without the lowest DROP, rounded to nearest, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits + ((1 << (DROP - 1)) - 1) + ((bits >> DROP) & 1)) >> DROP


@triton.jit
def storable(x):
    """halfbyte.algo.int4.storable: the nearest bfloat16 within the normal range of float16."""
    x = (rounded_bits(x, 16) << 16).to(tl.float32, bitcast=True)
    return clip(x, 0.00006103515625, 65024.0)


@triton.jit
def e4m3_code(x):
    """The nearest positive float8_e4m3 as its byte (int32, 1..126)."""
    x = clip(x, 0.001953125, 448.0)
    return tl.where(x < 0.015625, nearest(x * 512.0).to(tl.int32), rounded_bits(x, 20) - 960)


@triton.jit
def e4m3_value(code):
    """float32 value of a byte 0..126."""
    normal = ((code + 960) << 20).to(tl.float32, bitcast=True)
    return tl.where(code < 8, code.to(tl.float32) * 0.001953125, normal)


@triton.jit
def e2m1(x):
    """halfbyte.algo.nvfp4.snap_e2m1, but for the sign of zero."""
    a = tl.minimum(tl.abs(x), 6.0)
    per_step = tl.where(a < 2.0, 2.0, tl.where(a < 4.0, 1.0, 0.5))
    a = nearest(a * per_step) * tl.where(a < 2.0, 0.5, tl.where(a < 4.0, 1.0, 2.0))
    return tl.where(x < 0.0, -a, a)


@triton.jit
def snap(x, z, GRID: tl.constexpr):
    """Grid.snap; z is read on int4_asym alone."""
    if GRID == "int4_sym":
        value = nearest(clip(x, -8.0, 7.0))
    elif GRID == "int4_asym":
        value = nearest(clip(x + z, 0.0, 15.0)) - z
    else:
        value = e2m1(x)
    return value


@triton.jit
def code_of(value, z, GRID: tl.constexpr):
    """The code of a snapped value, as float32 0..15."""
    if GRID == "int4_sym":
        code = value + 8.0
    elif GRID == "int4_asym":
        code = value + z
    else:
        a = tl.abs(value)
        index = tl.where(a < 2.0, a * 2.0, tl.where(a < 4.0, a + 2.0, a * 0.5 + 4.0))
        code = tl.where(value < 0.0, index + 8.0, index)
    return code


@triton.jit
def _probe(out):
    tl.store(out, nearest(tl.load(out)))  # loaded: a constant would be folded in float64


def probe(device: torch.device) -> bool:
    """Whether a kernel runs on `device` and rounds as it should."""
    out = torch.full((1,), 2.5, device=device)
    with torch.cuda.device(device):
        _probe[(1,)](out, enable_fp_fusion=True)
    return out.item() == 2.0
