"""The cells' fidelity, against one BF16 reference that is computed once.

Evaluating one cell is a function of places alone, so that it can run here or anywhere that sees the directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from platform import machine
from typing import Any

import torch

import halfbyte
from halfbyte.artifact import check_artifact, load_fake_quantized
from halfbyte.engine import ALGORITHM_VERSION, Errand, Seat, Workers, as_done
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate import Windows
from halfbyte.evaluate.reference import Reference, compare_with_reference, make_reference, reference_key, window_sums
from halfbyte.experiments.cells import Cell
from halfbyte.files import make_directory, portable, write_json
from halfbyte.models.checkpoint import read_json
from halfbyte.models.library import load_model, load_tokenizer
from halfbyte.types import Progress


@dataclass(frozen=True)
class CellTask:
    """What evaluating a cell takes; picklable. `key` names the result: what was judged, on what, against what."""

    cell: str
    artifact: Path
    reference: Path
    baseline: str
    device: str
    key: str
    check: bool = False


def evaluate_cell(task: CellTask, progress: Progress | None = None) -> dict[str, Any]:
    """The artifact in `task.artifact` against the reference on disk.

    Returns plain data: schema, kind "cell", cell, key, eval (eval.json), windows (sums per window, for paired
    comparisons with other cells), check (check.json, or None where it was not asked for), seconds.
    Raises HalfbyteError when the artifact cannot be read or gives NaN.
    """
    started = time.monotonic()
    reference = Reference.load(task.reference)
    check = check_artifact(task.artifact, progress) if task.check else None
    model = load_fake_quantized(task.artifact, device=task.device)
    fidelity = compare_with_reference(reference, model, progress=progress, label=f"judging {task.cell}")
    return {
        "schema": 1,
        "kind": "cell",
        "cell": task.cell,
        "key": task.key,
        "eval": fidelity.result(task.artifact.name, task.baseline, load_tokenizer(task.artifact)),
        "windows": window_sums(fidelity.scores),
        "check": check,
        "seconds": round(time.monotonic() - started, 3),
    }


@dataclass
class Judge:
    """Evaluates the artifacts in `place`/cells into `place`/results; the references go when all are done.

    model, path, fingerprint   the BF16 model's name, directory and hash
    workers                    who evaluates
    platforms                  whose hardware cells are judged on, each against its own reference; none: any worker's
    """

    place: Path
    model: str
    path: Path
    fingerprint: str
    windows: Windows
    device: str
    progress: Progress
    workers: Workers
    platforms: Sequence[str] = ()
    seconds: dict[str, float] = field(default_factory=lambda: {"reference": 0.0, "evaluating": 0.0})

    def all(
        self, cells: Sequence[Cell], manifests: Mapping[str, Mapping[str, Any]], check: bool
    ) -> dict[str, dict[str, Any]]:
        """Every cell's evaluation: the one that is there under the same key, or a new one. What fails is noted with
        its cell. With platforms: the first one's evaluation, and under "judged_on" each one's (see `_joined`)."""
        todo: list[Errand] = []
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for cell in cells:
            files = {n: f["sha256"] for n, f in manifests[cell.name]["files"].items() if n.endswith(".safetensors")}
            for platform in self._platforms(cell):
                key = self._key(platform, check, files)
                there = kept(self._result(cell.name, platform))
                if there is not None and there.get("key") == key:
                    found[cell.name, platform] = there
                    continue
                place, base = self.place / "cells" / cell.name, portable(self.model)
                task = CellTask(cell.name, place, self._reference(platform), base, self.device, key, check)
                todo.append(Errand(f"judging {cell.name}", judge_cell, (task, platform), platform))
        self._make_references(sorted({errand.on for errand in todo}))
        self._evaluate(todo, {cell.name: cell for cell in cells}, found)
        shutil.rmtree(self.place / "reference", ignore_errors=True)
        return {c.name: self._joined(c, found) for c in cells if all((c.name, p) in found for p in self._platforms(c))}

    def _platforms(self, cell: Cell) -> Sequence[str]:
        """Where a cell is judged: on the platforms that can run it; on the first where none can. "": anywhere."""
        able = [name for name in self.platforms if not cell.facts["platforms"][name]]
        return able or self.platforms[:1] or [""]

    def _key(self, platform: str, check: bool, files: Mapping[str, str]) -> str:
        base = [reference_key(self.windows, self._label(platform)), ALGORITHM_VERSION, halfbyte.__version__, check]
        return hashlib.sha256(json.dumps([*base, files], sort_keys=True).encode()).hexdigest()

    def _label(self, platform: str) -> str:
        return ":".join([self.fingerprint, self.device, *([platform] if platform else [])])

    def _make_references(self, platforms: Sequence[str]) -> None:
        started = time.monotonic()
        errands = [
            Errand("the BF16 reference", run_baseline, (self.path, self._reference(p), self.windows, self._label(p)), p)
            for p in platforms
        ]
        for _, done in as_done(self.workers, errands):
            done.result()
        if errands:
            self.seconds["reference"] = time.monotonic() - started

    def _evaluate(
        self, todo: Sequence[Errand], cells: Mapping[str, Cell], found: dict[tuple[str, str], dict[str, Any]]
    ) -> None:
        started = time.monotonic()
        if self.workers.apart and todo:
            self.progress.start("judging the cells", len(todo))
        for errand, done in as_done(self.workers, todo):
            name = errand.arguments[0].cell
            try:
                result = done.result()
                make_directory(self.place / "results")
                write_json(self._result(name, errand.on), result)
                found[name, errand.on] = result
            except Exception as error:
                cells[name].fail("evaluating", error)
            if self.workers.apart:
                self.progress.advance(note=name)
        self.seconds["evaluating"] += time.monotonic() - started

    def _joined(self, cell: Cell, found: Mapping[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
        """A cell's evaluation; with platforms, that of the first, and "judged_on": {platform: evaluation}."""
        each = {platform: found[cell.name, platform] for platform in self._platforms(cell)}
        first = next(iter(each.values()))
        return {**first, "judged_on": each} if self.platforms else first

    def _reference(self, platform: str) -> Path:
        return self.place / "reference" / platform

    def _result(self, cell: str, platform: str) -> Path:
        return self.place / "results" / (f"{cell}.{platform}.json" if platform else f"{cell}.json")


def judge_cell(seat: Seat, task: CellTask, platform: str) -> dict[str, Any]:
    """An errand: `evaluate_cell`; with a platform, "platform" and "hardware" tell where it was."""
    result = evaluate_cell(replace(task, device=seat.device), seat.progress)
    return {**result, "platform": platform, "hardware": hardware(seat.device)} if platform else result


def run_baseline(seat: Seat, path: Path, reference: Path, windows: Windows, label: str) -> None:
    """An errand: the BF16 model's side on `windows`, for every cell to be compared with."""
    make_reference(reference, lambda: load_model(path, seat.device), windows, label, progress=seat.progress)


def hardware(device: str) -> str:
    """What `device` is, in words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{machine()} CPU, {os.cpu_count()} cores"


def kept(path: Path) -> dict[str, Any] | None:
    """What an earlier start left, if it can be read."""
    try:
        return read_json(path)
    except HalfbyteError:
        return None
