"""From cells to artifacts: equal cells found, one pass for all that is missing, every artifact written or linked."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from halfbyte.artifact import ArtifactWriter, read_manifest, work_of
from halfbyte.artifact.twin import link_twin
from halfbyte.calibration import CalibrationSet
from halfbyte.engine import Errand, Seat, Workers, as_done, work_id
from halfbyte.experiments.cells import Cell, content_key
from halfbyte.experiments.described import tokenizer_hash
from halfbyte.experiments.passes import SharedPass, Taker
from halfbyte.experiments.quantize import cast_notices, manifest_facts, tune
from halfbyte.models import Checkpoint
from halfbyte.types import Progress


@dataclass
class Production:
    """Makes the artifacts of `cells` (those that have not failed) in `place`/NAME.

    model, path, matrix   as manifests name them
    data                  each cell's calibration set, by its name
    workers               who solves, trains and writes; the statistics are taken here
    After `make`: seconds of statistics, solving and writing; how much was shared; whether these are the seconds of the
    whole (`measured`), or an earlier start had done a part.
    """

    cells: Sequence[Cell]
    data: Mapping[str, CalibrationSet]
    checkpoint: Checkpoint
    fingerprint: str
    place: Path
    model: str
    path: Path
    matrix: str
    device: str
    command: str | None
    progress: Progress
    workers: Workers
    memory: int | None = None
    seconds: dict[str, float] = field(default_factory=lambda: {"statistics": 0.0, "solving": 0.0, "writing": 0.0})
    sharing: dict[str, int] = field(default_factory=dict)
    measured: bool = False

    @cached_property
    def _tokenizer(self) -> str | None:
        return tokenizer_hash(self.path)

    def make(self) -> dict[str, dict[str, Any]]:
        """The manifests of the artifacts by the cells' names; a cell that is not among them has its reason."""
        takers = [Taker(cell, self._writer(cell)) for cell in self._leaders()]
        self._quantize(takers)
        manifests = self._finish(takers)
        return manifests | self._twins(manifests)

    def _leaders(self) -> list[Cell]:
        """The cells that are made; the others with the same bytes follow one of them (a finished one, if there is)."""
        groups: dict[tuple[Any, ...], list[Cell]] = {}
        for cell in self.cells:
            groups.setdefault(content_key(cell, self.data[cell.name].sha256), []).append(cell)
        leaders = []
        for group in groups.values():
            leader = next((cell for cell in group if self._writer(cell).finished), group[0])
            leaders.append(leader)
            for cell in group:
                cell.same_as = None if cell is leader else leader.name
        self.sharing = {"cells": sum(map(len, groups.values())), "distinct": len(leaders)}
        return sorted(leaders, key=list(self.cells).index)

    def _work(self, cell: Cell) -> str:
        assert cell.recipe is not None
        return work_id(cell.recipe, self.fingerprint, self.data[cell.name].sha256)

    def _writer(self, cell: Cell) -> ArtifactWriter:
        assert cell.recipe is not None
        return ArtifactWriter(self.place / cell.name, self.checkpoint, cell.recipe, cell.plans, self._work(cell))

    def _quantize(self, takers: list[Taker]) -> None:
        """Solve what is missing, one pass for each calibration set; apart from it, what collects other statistics:
        cells of effort max or fast, and each recipe that propagates. So each cell has the bytes that it has alone."""
        for taker in takers:
            there = taker.writer.directory
            taker.writer.open(there.exists() and work_of(there) != taker.writer.work)
        groups: dict[tuple[Any, ...], list[Taker]] = {}
        for taker in takers:
            recipe = taker.cell.recipe
            assert recipe is not None
            alone = taker.cell.name if recipe.propagate else ""
            groups.setdefault((self.data[taker.cell.name].sha256, recipe.statistics, alone), []).append(taker)
        for notice in cast_notices(self.checkpoint, takers[0].cell.plans):
            self.progress.say(notice)
        parts = distinct = solved = 0
        whole = True
        for group in groups.values():
            data = self.data[group[0].cell.name]
            shared = SharedPass(self.checkpoint, group, data, self.device, self.progress, self.workers, self.memory)
            whole = whole and not shared.resumed
            if not shared.resumed:
                for taker in group:
                    taker.cell.seconds = {}
            shared.run()
            self.seconds["statistics"] += shared.statistics
            self.seconds["solving"] += shared.solving
            self.seconds["writing"] += shared.writing
            parts += sum(len(keys) for taker in group for keys in taker.parts.values())
            distinct += len(shared.needed)
            solved += shared.solved
        self.sharing |= {"parts": parts, "distinct_parts": distinct, "solved": solved}
        self.measured = whole

    def _finish(self, takers: Sequence[Taker]) -> dict[str, dict[str, Any]]:
        """The artifacts of the cells whose blocks are all there; those that fail are left out."""
        alive = [taker for taker in takers if not taker.cell.reason]
        made = {t.cell.name: read_manifest(t.writer.directory) for t in alive if t.writer.finished}
        cells = {taker.cell.name: taker.cell for taker in alive}
        todo = [taker for taker in alive if taker.cell.name not in made]
        if self.workers.apart and todo:
            self.progress.start("writing the cells", len(todo))
        for errand, done in as_done(self.workers, map(self._errand, todo)):
            cell = cells[errand.label]
            try:
                made[cell.name], took = done.result()
                cell.seconds["writing"] = cell.seconds.get("writing", 0.0) + took
                self.seconds["writing"] += took
            except Exception as error:
                cell.fail("writing", error)
            self.progress.advance(note=cell.name)
        return {name: made[name] for name in cells if name in made}

    def _errand(self, taker: Taker) -> Errand:
        cell, writer = taker.cell, taker.writer
        assert cell.recipe is not None
        data = self.data[cell.name]
        facts = manifest_facts(
            self.model,
            self.path,
            writer.directory,
            self.fingerprint,
            cell.recipe,
            data,
            self.device,
            self.command,
            self._tokenizer,
        )
        told = [*cell.notices, *cast_notices(self.checkpoint, cell.plans)]
        alone = self.seconds["statistics"] + sum(cell.seconds.values())
        facts |= {"notices": told, "resumed": not self.measured, "seconds": round(alone, 3)}
        facts |= {"sweep": {"matrix": self.matrix, "cell": cell.name}}
        return Errand(cell.name, write_cell, (writer, data, facts))

    def _twins(self, manifests: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """The artifacts of the cells that have another's bytes; they fail with it."""
        named = {cell.name: cell for cell in self.cells}
        made = {}
        for cell in self.cells:
            if cell.same_as is None or cell.reason:
                continue
            leader = named[cell.same_as]
            if leader.name not in manifests:
                cell.fail(leader.stage, f"the same as {leader.name}: {leader.reason}")
                continue
            assert cell.recipe is not None
            others = [n for n in manifests[leader.name]["notices"] if n not in leader.notices]
            facts = {"notices": [*cell.notices, *others], "sweep": {"matrix": self.matrix, "cell": cell.name}}
            facts["same_bytes_as"] = leader.name
            try:
                place, source = self.place / cell.name, self.place / leader.name
                made[cell.name] = link_twin(source, place, cell.recipe, self._work(cell), facts)
            except Exception as error:
                cell.fail("writing", error)
        return made


def write_cell(
    seat: Seat, writer: ArtifactWriter, data: CalibrationSet, facts: dict[str, Any]
) -> tuple[dict[str, Any], float]:
    """An errand: train scales and norms where the recipe asks for it, write the artifact of the blocks that are there.

    Returns its manifest and the seconds that it took.
    """
    started = time.monotonic()
    if writer.finished:  # by a worker that died behind its last write
        return read_manifest(writer.directory), 0.0
    seat.progress.start(f"writing {writer.directory.name}", 1)
    tune(writer, data, seat.device, seat.progress)
    manifest = writer.finish(lambda: facts)
    return manifest, time.monotonic() - started
