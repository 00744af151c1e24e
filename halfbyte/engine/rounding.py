"""Learned rounding: with the scales fixed, codes are moved until each block's outputs are as near as they get to the
BF16 model's.

GPTQ rounds a linear for its own output's sake. What its errors do behind the nonlinearity, the attention and the other
linears of the block is not in its Hessian, nor is what the blocks before it have done already. Cheng et al.,
"Optimize Weight Rounding via Signed Gradient Descent" (2023, arXiv 2309.05516) learn the rounding by descending

    || block_4bit(x_4bit) - block_bf16(x_bf16) ||^2        over tokens, x_4bit from the 4-bit blocks before

where a rounded weight passes its gradient on as if it were not rounded, and only the gradient's sign counts. Here that
starts from GPTQ's codes instead of from the nearest: a weight u in steps of the grid, beside its code c,

    u_0 = clamp(w / s, c - 1/2, c + 1/2),     u  -=  rate * sign(dL/dw),     c - 1 < u < c + 1,     code = round(u)

so that a code that GPTQ chose against the weight lies at the edge, and flips when the block wants it to. The rate falls
linearly; all steps together move a weight by half a step of the grid.

Measured on SmolLM2-135M, int4 symmetric g64, effort max (docs/log.md): KL 0.109 -> 0.081 on 40 windows of wikitext-2,
with 8 to 10 % of the codes changed. With the BF16 model's inputs instead of the 4-bit one's: 0.092. Without the
fractions (u_0 = c): 0.117, worse than nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from halfbyte.algo import dequantize, get_grid
from halfbyte.engine.backprop import call, equal_lengths
from halfbyte.engine.block import norm_scale
from halfbyte.engine.heap import trim
from halfbyte.engine.skeleton import Skeleton
from halfbyte.models import Family, set_parameter
from halfbyte.types import Progress, QuantizedLinear, Quiet

Block = tuple[dict[str, QuantizedLinear], dict[str, torch.Tensor]]
"""Quantized linears and changed tensors of a block, by full name."""
EDGE, FAR = 0.49, 0.99
"""How far from its code a weight may begin, and may go, in steps of the grid there."""


@dataclass(frozen=True)
class Learning:
    """steps: of each block; sequences: of one step."""

    steps: int = 170
    sequences: int = 4


@dataclass
class Learned:
    """What became of the model: every block's linears and tensors, and for each block the mean square error before and
    after and the share of its codes that changed. A block that did not come out better is as it was."""

    blocks: dict[int, Block]
    errors: list[tuple[float, float]]
    changed: list[float]

    @property
    def linears(self) -> dict[str, QuantizedLinear]:
        return {name: q for linears, _ in self.blocks.values() for name, q in linears.items()}

    @property
    def note(self) -> dict[str, Any]:
        """For the manifest."""
        ratios = [after / before for before, after in self.errors if before > 0]
        kept = [share for share in self.changed if share]
        return {
            "blocks": len(kept),
            "codes_changed": sum(self.changed) / max(1, len(self.changed)),
            "error_ratio": sum(ratios) / len(ratios) if ratios else None,
        }


class _Weight:
    """One linear's weight while its rounding is learned. Shapes [O, G, g]."""

    def __init__(self, q: QuantizedLinear, target_OI: torch.Tensor):
        self.q, self.grid = q, get_grid(q.grid)
        self.zeros = None if q.zeros is None else q.zeros.float()[:, :, None]
        self.scale = (q.scales * (1.0 if q.global_scale is None else q.global_scale))[:, :, None]
        self.code = self.grid.decode(q.codes.float().unflatten(1, (-1, q.group_size)), self.zeros)
        self.step = spacing(q.grid, self.code)
        away = (target_OI.unflatten(1, (-1, q.group_size)) / self.scale - self.code) / self.step
        self.away = away.clamp_(-EDGE, EDGE)

    def value(self) -> torch.Tensor:
        """The weight as it is rounded now: float32 [O, I]."""
        return (self._snapped() * self.scale).flatten(1)

    def descend(self, gradient_OI: torch.Tensor, rate: float) -> None:
        sign = gradient_OI.float().sign_().unflatten(1, (-1, self.q.group_size))
        self.away.sub_(sign, alpha=rate).clamp_(-FAR, FAR)

    def result(self) -> QuantizedLinear:
        codes = self.grid.encode(self._moved(), self.zeros).flatten(1).to(torch.uint8)
        return replace(self.q, codes=codes)

    def _moved(self) -> torch.Tensor:
        return torch.addcmul(self.code, self.away, self.step)

    def _snapped(self) -> torch.Tensor:
        return self.grid.snap(self._moved(), self.zeros)


def spacing(grid: str, values: torch.Tensor) -> torch.Tensor:
    """The distance from a grid's values to the nearest others: 1 for int4; for NVFP4 1/2 up to 2, 1 up to 4, then 2."""
    if grid != "nvfp4":
        return torch.ones((), device=values.device)
    size = values.abs()
    return torch.where(size <= 2, 0.5, torch.where(size <= 4, 1.0, 2.0))


class Rounder:
    """Learns the rounding of what `blocks` gives for each block's index; blocks are run through `skeleton`.

    scaled    whether input scales may have been folded into the blocks
    """

    def __init__(
        self,
        skeleton: Skeleton,
        blocks: Callable[[int], Block],
        scaled: bool,
        learning: Learning | None = None,
        progress: Progress | None = None,
    ):
        self.skeleton, self.blocks, self.scaled = skeleton, blocks, scaled
        self.learning, self.progress = learning or Learning(), progress or Quiet()

    @torch.no_grad()
    def run(self, sequences: Sequence[torch.Tensor], seed: int = 0) -> Learned:
        """Learn from `sequences` (int64 [t]): steps take them in a seeded order."""
        generator = torch.Generator().manual_seed(seed)
        batches = list(equal_lengths(sorted(sequences, key=len), self.learning.sequences))
        plain, arguments = self.skeleton.embed(batches)
        rounded = list(plain)
        learned = Learned({}, [], [])
        self.progress.start("learning the rounding", self.skeleton.family.num_blocks)
        for index in range(self.skeleton.family.num_blocks):
            kwargs = [arguments[tuple(ids.shape)][index] for ids in batches]
            block = self.skeleton.load_block(index, then=index + 1)
            originals = {name: p.detach() for name, p in block.named_parameters()}
            plain = [call(block, x, k) for x, k in zip(plain, kwargs)]
            note = self._block(index, block, originals, rounded, plain, kwargs, generator, learned)
            rounded = [call(block, x, k) for x, k in zip(rounded, kwargs)]
            self.skeleton.drop_block(index)
            self.progress.advance(note=note)
            trim()
        return learned

    def _block(
        self,
        index: int,
        block: nn.Module,
        originals: Mapping[str, torch.Tensor],
        inputs: Sequence[torch.Tensor],
        wanted: Sequence[torch.Tensor],
        kwargs: Sequence[dict[str, Any]],
        generator: torch.Generator,
        learned: Learned,
    ) -> str:
        """Learn one block, leave it with its new weights, and note what became of it."""
        linears, tensors = self.blocks(index)
        learned.blocks[index] = linears, tensors
        prefix = self.skeleton.family.block(index) + "."
        _install(
            block, {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        )
        device = self.skeleton.device
        targets = folded(self.skeleton.family, index, originals, linears, tensors) if self.scaled else originals
        weights = {}
        for name, q in linears.items():
            own = f"{name.removeprefix(prefix)}.weight"
            weights[own] = _Weight(on_device(q, device), targets[own].to(device).float())
        if not weights:
            return ""

        def error() -> float:
            found = [_error(call(block, x, k), y) for x, y, k in zip(inputs, wanted, kwargs)]
            return float(torch.stack(found).mean())

        _install(block, {name: weight.value() for name, weight in weights.items()})
        before = error()
        steps = self.learning.steps
        for step in range(steps):
            at = int(torch.randint(len(inputs), (), generator=generator))
            _descend(block, weights, inputs[at], wanted[at], kwargs[at], before, (1 - step / steps) / steps)
        after = error()
        learned.errors.append((before, min(before, after)))
        if not after < before:
            _install(block, {own: dequantize(weight.q) for own, weight in weights.items()})
            learned.changed.append(0.0)
            return "as it was"
        found = {f"{prefix}{own.removesuffix('.weight')}": on_device(w.result(), "cpu") for own, w in weights.items()}
        flips = sum(int((found[n].codes != q.codes.cpu()).sum()) for n, q in linears.items())
        learned.changed.append(flips / sum(q.codes.numel() for q in linears.values()))
        learned.blocks[index] = found, tensors
        return f"error {after / before:.3f} of what it was"


def _descend(
    block: nn.Module,
    weights: Mapping[str, _Weight],
    x: torch.Tensor,
    wanted: torch.Tensor,
    kwargs: dict[str, Any],
    unit: float,
    rate: float,
) -> None:
    """One step on a batch: gradients of the error in units of `unit`, then every weight moves by `rate`."""
    parameters = {name: block.get_parameter(name) for name in weights}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    with torch.enable_grad():
        (_error(call(block, x, kwargs), wanted) / max(unit, 1e-30)).backward()
    for name, parameter in parameters.items():
        parameter.requires_grad_(False)
        if parameter.grad is not None:  # else an expert that no token of this step went to
            weights[name].descend(parameter.grad, rate)
            parameter.grad = None
    _install(block, {name: weight.value() for name, weight in weights.items()})


def _error(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return (found.float() - wanted.float()).square().mean()


def _install(block: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Give parameters (by name within the block) values."""
    for name, value in values.items():
        old = block.get_parameter(name)
        set_parameter(block, name, value.to(old.device, old.dtype))


def on_device(q: QuantizedLinear, device: torch.device | str) -> QuantizedLinear:
    """The same with its tensors there."""
    zeros = None if q.zeros is None else q.zeros.to(device)
    return replace(q, codes=q.codes.to(device), scales=q.scales.to(device), zeros=zeros)


def folded(
    family: Family,
    index: int,
    originals: Mapping[str, torch.Tensor],
    linears: Mapping[str, QuantizedLinear],
    tensors: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The weights of block `index` that were rounded, float32 by name within the block: the model's `originals` with
    the input scales that were folded into it.

    A scale in a norm is read off the norm. One in a linear's rows is what best makes its original rows those that came
    out, which their rounding blurs by about a hundredth: enough to know where between two codes a weight was.
    """
    prefix, offset = family.block(index) + ".", family.architecture.norm_offset
    groups = {group.key: group for group in family.groups_of(index)}
    weights = {name: value.float() for name, value in originals.items() if value.ndim == 2}
    mine = {name.removeprefix(prefix) for name in linears}
    folds = [f for f in family.folds_of(index) if f.kind in groups and groups[f.kind].names[0] in mine]
    for fold in folds:
        new = tensors.get(f"{prefix}{fold.norm}.weight")
        if fold.norm and new is not None:
            old = originals[f"{fold.norm}.weight"]
            scale, _ = norm_scale(old, new.to(old.device), offset)
            for name in groups[fold.kind].names:
                weights[f"{name}.weight"] = weights[f"{name}.weight"] * scale
    for fold in folds:
        if fold.linear and fold.linear in mine:
            own = f"{fold.linear}.weight"
            rows = family.rows_of(fold, len(weights[own]))
            w = weights[own][rows]
            q = dequantize(linears[prefix + fold.linear]).to(w.device)[rows]
            share_O = (q * w).sum(1) / w.square().sum(1).clamp_min(1e-30)
            share_O = torch.where(share_O > 0, share_O, 1.0)
            weights[own] = weights[own].clone()
            weights[own][rows] = w * share_O[:, None]
            scale = 1 / family.inputs_of(fold, share_O)
            for name in groups[fold.kind].names:
                weights[f"{name}.weight"] = weights[f"{name}.weight"] * scale
    return weights
