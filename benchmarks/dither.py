"""The model off its 4-bit grid.

The embedded model was stored as Q4_1: in every group of 32 inputs w = step * c + low, c in 0..15, and groups of 64
of ours meet just two of these. A method might owe its figures to that. The dithered copy adds seeded noise, uniform
within half a step on either side, to every linear of the decoder blocks: as if they had never been 4-bit. It is a
slightly worse model with its own BF16 baseline.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from halfbyte.errors import HalfbyteError
from halfbyte.models import Checkpoint, cache_dir, family_of

GROUP = 32
FITS = 0.2
"""How far from a whole number of steps BF16's rounding may put a weight."""


def dithered_copy(model: Path, seed: int = 0) -> Path:
    """A directory with the dithered model, made once and kept in the cache."""
    checkpoint = Checkpoint(model)
    target = cache_dir() / "models" / f"dithered-{checkpoint.fingerprint()[:12]}-{seed}"
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        whole = Path(scratch) / "model"
        whole.mkdir()
        tensors = dithered_tensors(checkpoint, seed)
        save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
        for file in model.iterdir():
            if file.suffix in (".json", ".jinja", ".model", ".txt") and ".safetensors." not in file.name:
                shutil.copy2(file, whole / file.name)
        try:
            whole.rename(target)
        except OSError:
            if not (target / "config.json").is_file():  # another process made the same meanwhile
                raise
    return target


def dithered_tensors(checkpoint: Checkpoint, seed: int) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint, the blocks' linears with noise. Raises HalfbyteError off a Q4_1 grid."""
    family = family_of(checkpoint.config)
    linears = {f"{n}.weight" for i in range(family.num_blocks) for n in family.linears(i)}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in sorted(checkpoint.tensors):
        value = checkpoint.load(name)
        if name in linears:
            step, share = q4_1_steps(value)
            if share < 0.99:
                raise HalfbyteError(f"{name} is not on a Q4_1 grid ({share:.0%} of it fits): nothing to dither")
            noise = torch.rand(step.shape[:2] + (GROUP,), generator=generator) - 0.5
            value = (value.float().unflatten(1, (-1, GROUP)) + noise * step).flatten(1).bfloat16()
        tensors[name] = value.contiguous()
    return tensors


def q4_1_steps(weight: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The step of each group of 32 (float32 [O, G, 1], its range / 15), and the share of weights on that grid."""
    w = weight.float().unflatten(1, (-1, GROUP))
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    step = (high - low) / 15
    codes = (w - low) / step.clamp_min(1e-30)
    return step, float(((codes - codes.round()).abs() < FITS).float().mean())
