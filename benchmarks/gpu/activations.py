"""What a linear's inputs become in a kernel that does not keep them in 16 bits, emulated in a transformers model.

Three candidates for what an NVFP4 kernel does: BF16 inputs; NVFP4 inputs, in blocks of 16 under the stored input_scale;
FP8 inputs, with a scale a token. A served model's log-probabilities lie nearest to those of the candidate that it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from halfbyte.algo.nvfp4 import E4M3_MAX, snap_e2m1
from halfbyte.types import NVFP4_BLOCK

Emulation = Callable[[torch.Tensor], torch.Tensor]
CLEAR = 2.0
"""How many times nearer one candidate must be than the next, before it is said to be what runs."""


def fp4_inputs(input_scale: float) -> Emulation:
    """x -> e2m1(x / (s t)) s t, t = input_scale, s the E4M3 number nearest to amax / (6 t) of each block of 16."""

    def emulate(x: torch.Tensor) -> torch.Tensor:
        blocks = x.float().unflatten(-1, (-1, NVFP4_BLOCK))
        wanted = blocks.abs().amax(-1, keepdim=True) / (6 * input_scale)
        step = wanted.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float() * input_scale
        safe = torch.where(step > 0, step, torch.ones_like(step))
        return (snap_e2m1(blocks / safe) * step).flatten(-2).to(x.dtype)

    return emulate


def fp8_inputs(x: torch.Tensor) -> torch.Tensor:
    """x as E4M3, with a scale a token that puts its largest at 448."""
    scale = (x.float().abs().amax(-1, keepdim=True) / E4M3_MAX).clamp_min(1e-12)
    return ((x.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


@contextmanager
def emulated(model: Any, linears: Mapping[str, Emulation]) -> Iterator[None]:
    """While it holds, each of those linears of `model` gets its inputs through its emulation."""

    def hook(emulate: Emulation) -> Callable[[Any, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
        return lambda module, inputs: (emulate(inputs[0]), *inputs[1:])

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(e)) for n, e in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def distance(served: Sequence[Sequence[float | None]], reference: Sequence[Sequence[float | None]]) -> float:
    """Mean absolute difference of the tokens' log-probabilities, nats."""
    pairs = [
        (a, b) for mine, other in zip(served, reference, strict=True) for a, b in zip(mine, other) if a is not None
    ]
    return sum(abs(a - b) for a, b in pairs if b is not None) / len(pairs)


def verdict(distances: Mapping[str, float]) -> str:
    """The candidate that is CLEAR times nearer than the next one, else that the numbers do not tell."""
    (best, near), (_, far) = sorted(distances.items(), key=lambda pair: pair[1])[:2]
    return best if far > CLEAR * near else f"not told ({best} is nearest)"
