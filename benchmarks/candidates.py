"""What `quality.py` scores: a directory, or tensors in place of the baseline's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from halfbyte.algo import dequantize
from halfbyte.engine import BlockResult
from halfbyte.models import Checkpoint
from halfbyte.plan.layers import LinearPlan, assign
from halfbyte.recipe import Recipe
from halfbyte.types import QuantizedLinear

TRAINED = -1
"""Where `Solved.changed` holds what training has changed beside the linears."""


@dataclass
class Candidate:
    """A model to score: what replaces the baseline's tensors, or a directory.

    key    what its row depends on beside model and text
    make   gives the tensors when they are wanted; None: the baseline itself, or `directory`
    """

    name: str
    key: str
    facts: dict[str, Any] = field(default_factory=dict)
    make: Callable[[], dict[str, torch.Tensor]] | None = None
    directory: Path | None = None


@dataclass
class Solved:
    """A recipe's blocks in memory: to `tune` of halfbyte.experiments.quantize, what a writer of an artifact is."""

    checkpoint: Checkpoint
    recipe: Recipe
    linears: dict[int, dict[str, QuantizedLinear]] = field(default_factory=dict)
    changed: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    note: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    errors: list[float] = field(default_factory=list)
    tuned: bool = False

    @property
    def plans(self) -> list[LinearPlan]:
        return assign(self.recipe, self.checkpoint)

    def emit(self, block: int, result: BlockResult) -> None:
        self.linears[block] = {name: solved.q for name, solved in result.linears.items()}
        self.changed[block] = dict(result.tensors)
        self.errors += [solved.relative_error for solved in result.linears.values()]
        self.seconds += result.seconds

    def block(self, index: int) -> tuple[dict[str, QuantizedLinear], dict[str, torch.Tensor]]:
        return self.linears.get(index, {}), self.changed.get(index, {})

    def tune(self, linears: dict[str, QuantizedLinear], tensors: dict[str, torch.Tensor], note: dict[str, Any]) -> None:
        self.tuned, self.note = True, note
        for mine in self.linears.values():
            mine.update({name: linears[name] for name in mine if name in linears})
        self.changed[TRAINED] = tensors

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor that differs from the baseline's, by name, BF16."""
        found: dict[str, torch.Tensor] = {}
        for index in sorted(self.changed, key=lambda index: index == TRAINED):
            found |= self.changed[index]
        return found | {f"{n}.weight": dequantize(q).bfloat16() for b in self.linears.values() for n, q in b.items()}
