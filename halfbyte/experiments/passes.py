"""One pass over the blocks for many cells: what cells share is solved once, and every cell's artifact is written.

The engine takes any number of jobs. A job here is not a cell but a slot: at each block it solves one part (cells.py)
that some cells need, and hands the result to all of them. A cell's block is written when its parts are together; a
cell whose whole block is the same as another's links that block's file. So a cell that differs from another in two
blocks costs two blocks, and one that differs in `down_proj` alone costs the MLP half.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from halfbyte.artifact import ArtifactWriter
from halfbyte.calibration import CalibrationSet
from halfbyte.engine import BlockResult, Here, Job, Workers, quantize_blocks
from halfbyte.engine.parts import together
from halfbyte.errors import HalfbyteError
from halfbyte.experiments.cells import Cell, PartKey, block_content, part_keys, part_names
from halfbyte.models import Checkpoint, family_of
from halfbyte.recipe import Recipe
from halfbyte.types import Progress, Quiet, Scheme


@dataclass
class Taker:
    """A cell and its writer. `parts`: what each block of it is made of; `ready`: parts that wait for the others."""

    cell: Cell
    writer: ArtifactWriter
    parts: dict[int, list[PartKey]] = field(default_factory=dict)
    ready: dict[int, dict[PartKey, BlockResult]] = field(default_factory=dict)
    whole: bool = False

    def has(self, block: int) -> bool:
        """Whether nothing is left to do there: it is kept, finished, or the cell has failed."""
        return self.whole or bool(self.cell.reason) or self.writer.done(block)

    def content(self, block: int) -> tuple[Any, ...]:
        """What decides the bytes of a block's file."""
        return block_content(self.cell, self.parts[block])


@dataclass
class _Slot:
    """At most one part a block, all with the same options."""

    recipe: Recipe
    at: dict[int, PartKey] = field(default_factory=dict)
    schemes: dict[str, Scheme] = field(default_factory=dict)


class SharedPass:
    """Solves what `takers` lack, on one calibration set. After `run`, each has all its blocks, or a reason.

    Seconds: `solving` and `writing` in all; in each cell's `seconds`, "solving" (parts that it was the first to need),
    "shared" (solving that it was spared), "writing".
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        takers: Sequence[Taker],
        data: CalibrationSet,
        device: str,
        progress: Progress | None = None,
        workers: Workers | None = None,
        memory: int | None = None,
    ):
        self.checkpoint, self.takers, self.data, self.device, self.memory = checkpoint, takers, data, device, memory
        self.progress = progress or Quiet()
        self.workers = workers or Here(device, self.progress)
        self.family = family_of(checkpoint.config)
        self.needed: dict[PartKey, list[Taker]] = {}
        self.kept: dict[tuple[Any, ...], ArtifactWriter] = {}
        self.solving = self.writing = self.total = 0.0
        self.solved = 0
        for taker in takers:
            taker.whole = taker.writer.finished
            taker.parts = part_keys(taker.cell, self.family, data.sha256)
            for keys in taker.parts.values():
                for key in keys:
                    self.needed.setdefault(key, []).append(taker)

    @property
    def statistics(self) -> float:
        """Seconds of the pass beside solving and writing. Workers apart solve meanwhile; where a GPU solves, a thread
        writes meanwhile (engine.solving.Keeping)."""
        writing = 0.0 if self.device.startswith("cuda") else self.writing
        return max(0.0, self.total - writing - (0.0 if self.workers.apart else self.solving))

    @property
    def resumed(self) -> bool:
        """Whether an earlier start has left work: the seconds of this one are then not those of the whole."""
        return any(taker.has(block) for taker in self.takers for block in taker.parts)

    def run(self) -> None:
        """Solve and write all that is missing; what fails is noted with its cells, never raised."""
        started = time.monotonic()
        self._adopt_what_is_there()
        if all(taker.has(block) for taker in self.takers for block in taker.parts):
            return
        jobs = [self._job(slot) for slot in self._slots()]
        try:
            quantize_blocks(
                self.checkpoint,
                jobs,
                self.data.sequences,
                self.device,
                progress=self.progress,
                workers=self.workers,
                memory=self.memory,
                scratch=self.takers[0].writer.partial,
            )
        except (HalfbyteError, ValueError, RuntimeError) as error:
            for taker in self.takers:
                if not all(taker.has(block) for block in taker.parts):
                    taker.cell.fail("solving", error)
        self.total = time.monotonic() - started

    def _adopt_what_is_there(self) -> None:
        """Blocks that an earlier start kept for one cell serve every cell that has the same ones."""
        missing = []
        for taker in self.takers:
            for block in () if taker.whole else taker.parts:
                if taker.writer.done(block):
                    self.kept[taker.content(block)] = taker.writer
                else:
                    missing.append((taker, block))
        for taker, block in missing:
            if taker.content(block) in self.kept:
                self._write(taker, block, {})

    def _slots(self) -> list[_Slot]:
        """Jobs' worth of parts, in the cells' order; a recipe that propagates keeps to one slot (and one pass)."""
        slots: dict[tuple[Any, ...], _Slot] = {}
        taken: dict[tuple[Any, ...], int] = {}
        for key, takers in self.needed.items():
            _, options, block, kinds, _ = key
            recipe = takers[0].cell.recipe
            assert recipe is not None
            line = (options,) if recipe.propagate else (options, kinds)
            number = taken.get((*line, block), 0)
            taken[(*line, block)] = number + 1
            slot = slots.setdefault((*line, number), _Slot(recipe))
            slot.at[block] = key
            names = part_names(self.family, block, kinds)
            slot.schemes |= {name: takers[0].cell.schemes[name] for name in names if name in takers[0].cell.schemes}
        return list(slots.values())

    def _job(self, slot: _Slot) -> Job:
        def done(block: int) -> bool:
            key = slot.at.get(block)
            return key is None or all(taker.has(block) for taker in self.needed[key])

        def emit(block: int, result: BlockResult) -> None:
            self._hand_out(slot.at[block], block, result)

        def failed(block: int, error: Exception) -> None:
            for taker in self.needed[slot.at[block]]:
                taker.cell.fail("solving", error)

        return Job(slot.recipe, slot.schemes, done, emit, None if slot.recipe.propagate else failed)

    def _hand_out(self, key: PartKey, block: int, result: BlockResult) -> None:
        self.solving += result.seconds
        self.solved += 1
        waiting = [taker for taker in self.needed[key] if not taker.has(block)]
        for taker in waiting:
            _add(taker.cell, "solving" if taker is waiting[0] else "shared", result.seconds)
            ready = taker.ready.setdefault(block, {})
            ready[key] = result
            if len(ready) == len(taker.parts[block]):
                self._write(taker, block, taker.ready.pop(block))

    def _write(self, taker: Taker, block: int, parts: dict[PartKey, BlockResult]) -> None:
        started = time.monotonic()
        content = taker.content(block)
        try:
            if content in self.kept:
                taker.writer.adopt(block, self.kept[content])
            else:
                whole = together(parts[key] for key in taker.parts[block])
                taker.writer.emit(block, whole.linears, whole.tensors, whole.seconds, whole.notices, whole.experts)
                self.kept[content] = taker.writer
        except Exception as error:
            taker.cell.fail("writing", error)
        spent = time.monotonic() - started
        self.writing += spent
        _add(taker.cell, "writing", spent)


def _add(cell: Cell, name: str, seconds: float) -> None:
    cell.seconds[name] = cell.seconds.get(name, 0.0) + seconds
