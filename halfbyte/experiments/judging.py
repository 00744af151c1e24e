"""The cells' fidelity, against one BF16 reference that is computed once.

Evaluating one cell is a function of places alone, so that it can run here or anywhere that sees the directory.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import halfbyte
from halfbyte.artifact import check_artifact, load_fake_quantized
from halfbyte.engine import ALGORITHM_VERSION
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate import Windows
from halfbyte.evaluate.reference import Reference, compare_with_reference, make_reference, reference_key, window_sums
from halfbyte.experiments.cells import Cell
from halfbyte.experiments.quantize import load_model, load_tokenizer
from halfbyte.files import make_directory, portable, write_json
from halfbyte.models.checkpoint import read_json
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
    """Evaluates the artifacts in `place`/cells into `place`/results; the reference goes when all are done.

    model, path, fingerprint   the BF16 model's name, directory and hash
    """

    place: Path
    model: str
    path: Path
    fingerprint: str
    windows: Windows
    device: str
    progress: Progress
    seconds: dict[str, float] = field(default_factory=lambda: {"reference": 0.0, "evaluating": 0.0})

    def all(
        self, cells: Sequence[Cell], manifests: Mapping[str, Mapping[str, Any]], check: bool
    ) -> dict[str, dict[str, Any]]:
        """Every cell's evaluation: the one that is there under the same key, or a new one. What fails is noted with
        its cell."""
        label, reference = f"{self.fingerprint}:{self.device}", self.place / "reference"
        base = [reference_key(self.windows, label), ALGORITHM_VERSION, halfbyte.__version__, check]
        results, todo = {}, []
        for cell in cells:
            files = {n: f["sha256"] for n, f in manifests[cell.name]["files"].items() if n.endswith(".safetensors")}
            key = hashlib.sha256(json.dumps([*base, files], sort_keys=True).encode()).hexdigest()
            there = kept(self._result(cell))
            if there is not None and there.get("key") == key:
                results[cell.name] = there
                continue
            place, name = self.place / "cells" / cell.name, portable(self.model)
            todo.append((cell, CellTask(cell.name, place, reference, name, self.device, key, check)))
        if todo:
            started = time.monotonic()
            make_reference(reference, self._baseline, self.windows, label, progress=self.progress)
            self.seconds["reference"] = time.monotonic() - started
        for cell, task in todo:
            started = time.monotonic()
            try:
                results[cell.name] = evaluate_cell(task, self.progress)
                make_directory(self._result(cell).parent)
                write_json(self._result(cell), results[cell.name])
            except Exception as error:
                cell.fail("evaluating", error)
            self.seconds["evaluating"] += time.monotonic() - started
        shutil.rmtree(reference, ignore_errors=True)
        return results

    def _baseline(self) -> Any:
        return load_model(self.path, self.device)

    def _result(self, cell: Cell) -> Path:
        return self.place / "results" / f"{cell.name}.json"


def kept(path: Path) -> dict[str, Any] | None:
    """What an earlier start left, if it can be read."""
    try:
        return read_json(path)
    except HalfbyteError:
        return None
