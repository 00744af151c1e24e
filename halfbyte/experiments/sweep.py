"""The experiment matrix on one model: every cell made, judged and ranked; what cells share is done once.

In the output directory: cells/NAME (an artifact each), results/NAME.json (what its evaluation gave), calibration/,
sweep.json, report.html and report.md. A killed sweep goes on where it was: blocks, artifacts and evaluations that are
there are not done again; cells that failed are tried again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import halfbyte
from halfbyte.engine import ALGORITHM_VERSION, Here, Workers
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate import Windows
from halfbyte.experiments.cards import write_cards
from halfbyte.experiments.cells import Cell, resolve_cells
from halfbyte.experiments.gates import Gate, resolve_gates
from halfbyte.experiments.judging import Judge, kept
from halfbyte.experiments.matrix import Matrix, load_matrix
from halfbyte.experiments.production import Production
from halfbyte.experiments.quantize import device_of
from halfbyte.experiments.ranking import BY
from halfbyte.experiments.standings import cost, standings
from halfbyte.experiments.sweep_text import Given, SweepText
from halfbyte.files import TEMPORARY, locked, portable, write_json
from halfbyte.models import Checkpoint, hub_id, resolve_model
from halfbyte.platforms import load_platform
from halfbyte.report.sources import tells_of
from halfbyte.report.sweep import build_sweep_report
from halfbyte.types import Progress, Quiet

RESULT = "sweep.json"
OWN = ("cells", "results", "calibration", "reference")
MEASURED = ("eval.json", "check.json")
"""What gates are judged on without more being asked for."""
STAGES = ("calibration", "statistics", "solving", "writing", "reference", "evaluating")


def sweep(
    model: str,
    matrix: str | Path | Mapping[str, Any] | Matrix,
    output_dir: str | Path,
    *,
    platforms: Sequence[str] = (),
    text: Sequence[Path] | Windows = (),
    calibration: Given = None,
    gates: Sequence[str] = (),
    by: str = "kl",
    only: Sequence[str] = (),
    device: str | None = None,
    force: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
    workers: Workers | None = None,
    judged_on: Sequence[str] = (),
    memory: int | None = None,
    bench: int | None = None,
) -> dict[str, Any]:
    """Make, judge and rank the cells of `matrix` in `output_dir`; returns sweep.json.

    model         a directory, a hub id or "smollm2-135m"
    matrix        a ready matrix's name, a YAML file, a mapping, or a Matrix
    platforms     where the best is to be served: cells that one of them should not be given are marked
    text          files to calibrate on (80 %) and to judge on (the rest), or windows to judge on; none: the model
                  writes both
    calibration   as for `quantize`; all of `text` is then held out
    gates         "ppl=+5%", "top1=90%", "kl=0.1", "check" and what else eval.json tells; and "speed@C=+20%", judged on
                  results/NAME.bench.json
    by            "kl" or "ppl": what quality is
    only          names (or shell patterns) of the cells to take
    force         begin anew: what an earlier sweep left in `output_dir` goes
    workers       who solves, writes and judges (halfbyte.experiments.fanout); None: this process
    memory        bytes of host memory that the pass over the blocks may take; None: a share of what is free
    judged_on     those of `platforms` whose hardware each cell is judged on, by workers that have it; the first counts
                  for the ranking, and gates must hold on all
    bench         the concurrency at which cells will be benchmarked afterwards (bench_cells), which a gate may name

    sweep.json: schema 1, kind "sweep", key (model, text and version), complete, halfbyte, command;
    model {name, hub_id, sha256}; matrix {name, description, cells}; request {platforms, gates, by, only, device};
    calibration [manifest of each set]; text (as in eval.json); verdict "accepted" (a cell passes its gates),
    "rejected" (none does), "failed" (no cell was made and judged) or "incomplete";
    best {cell, path, accepted, portable} or null; ranking {by, method, confidence, noise_floor, order};
    cells, in order, failed ones last: name, status ("judged", "failed", "made", "waiting"), stage and reason of a
    failure, rank, order, equal_to, difference (nats, with its interval) and why (halfbyte.experiments.ranking), pareto,
    path, work, same_as (the cell whose bytes it has), recipe, title, groups (sizes in use), exemptions, bytes,
    bytes_bf16, bits_per_weight (quantized linears), bits_per_linear_weight (all of them), platforms {name: why not},
    portable, notices, tokens_per_second (null: not measured), eval (eval.json), gates (gates.json), check,
    judged_on {platform: eval, gates, check, hardware} (null: not judged by platform), seconds
    {solving, shared (solving that it was spared), writing, evaluating};
    sharing {cells, distinct, parts, distinct_parts, solved}: artifacts, and parts of blocks
    (halfbyte.experiments.cells), asked for and different, and how many parts this start solved;
    seconds {calibration, statistics, solving, writing, reference, evaluating, total}, over all starts;
    cost {one_run, one_run_seconds, matrix_seconds, ratio} or null where an interruption lost the times.

    Raises UsageError for a wrong matrix or output, a wrong gate or one that a sweep does not measure, HalfbyteError
    where no cell can be made at all.
    """
    progress = progress or Quiet()
    if by not in BY:
        raise UsageError(f"ranking by {by!r} is not known: use {' or '.join(BY)}")
    output = Path(output_dir)
    chosen = load_matrix(matrix).only(list(only))
    request = {"platforms": list(platforms), "gates": list(gates), "by": by, "only": list(only)}
    request["judged_on"] = [name for name in platforms if name in judged_on]
    if set(judged_on) - set(platforms):
        raise UsageError(f"--ray-resources: {min(set(judged_on) - set(platforms))} is not among the --on platforms")
    _refuse_unmeasured(resolve_gates(gates), output, bench)
    path = resolve_model(model, progress)
    if output.resolve() in (path.resolve(), *path.resolve().parents):
        raise UsageError(f"{output} holds the model {path} itself: choose another -o")
    device = device_of(device)
    with locked(output):
        _refuse_foreign(output, force)
        run = _Sweep(model, path, chosen, output, {**request, "device": device}, force, command, progress, workers)
        run.memory = memory
        return run.go(SweepText(path, output / "calibration", text, calibration, device, progress))


def _refuse_unmeasured(gates: Sequence[Gate], output: Path, bench: int | None) -> None:
    """Raises UsageError for a gate that is stated and that nothing here will measure."""
    files = [kept(path) or {} for path in output.glob("results/*.bench.json")]
    levels = {str(point["concurrency"]) for file in files for point in file.get("points", [])} | {str(bench)}
    for gate in gates:
        if not gate.stated or gate.kind.file in MEASURED or (gate.family == "speed" and gate.argument in levels):
            continue
        how = f"halfbyte run -r RECIPE --gate {gate.spelled}" if gate.family != "speed" else f"--bench {gate.argument}"
        raise UsageError(f"--gate {gate.spelled}: this sweep does not measure that; {how} does")


def _refuse_foreign(output: Path, force: bool) -> None:
    there = {p.name for p in output.iterdir() if p.suffix != TEMPORARY}
    if there and not there & {RESULT, "calibration"} and not force:
        raise UsageError(f"{output} is not empty and holds no sweep: choose another -o, or --force")


class _Sweep:
    def __init__(
        self,
        model: str,
        path: Path,
        matrix: Matrix,
        output: Path,
        request: dict[str, Any],
        force: bool,
        command: str | None,
        progress: Progress,
        workers: Workers | None,
    ):
        self.model, self.path, self.matrix, self.out, self.request = model, path, matrix, output, request
        self.force, self.command, self.progress, self.device = force, command, progress, request["device"]
        self.workers = workers or Here(self.device, progress)
        self.gates = resolve_gates(request["gates"])
        self.platforms = [load_platform(name) for name in request["platforms"]]
        self.checkpoint = Checkpoint(path)
        self.fingerprint = self.checkpoint.fingerprint()
        self.cells = resolve_cells(matrix, self.checkpoint, self.platforms)
        self.memory: int | None = None
        self.began = time.monotonic()
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.cost: dict[str, Any] | None = None
        self.sharing: dict[str, int] = {}
        self.before: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}

    def go(self, text: SweepText) -> dict[str, Any]:
        if self.force:
            for name in OWN:
                shutil.rmtree(self.out / name, ignore_errors=True)
        self._tell()
        self.workers.open()
        self.data = text.sets(self._alive())
        self._alive()
        windows = text.windows()
        self.seconds["calibration"] = time.monotonic() - self.began
        self._remember(windows)
        self._write_state({}, {}, complete=False)
        manifests = self._produce()
        self._write_state(manifests, {}, complete=False)
        results = self._judge(manifests, windows)
        result = self._write_state(manifests, results, complete=True)
        benches = self._benches(manifests)
        write_cards(self.out, result["cells"], self.cells, manifests, self.platforms, benches)
        build_sweep_report(self.out)
        return result

    def _alive(self) -> list[Cell]:
        """The cells that have not failed. Raises HalfbyteError where none is left."""
        alive = [cell for cell in self.cells if not cell.reason]
        if not alive:
            first = self.cells[0]
            more = f" (and {len(self.cells) - 1} more)" if len(self.cells) > 1 else ""
            raise HalfbyteError(f"no cell can be made: {first.name}{more}: {first.reason}")
        return alive

    def _tell(self) -> None:
        """Each notice once, with the cells that it is about."""
        told: dict[str, list[str]] = {}
        for cell in self.cells:
            for notice in [f"cannot be made: {cell.reason}"] if cell.reason else cell.notices:
                told.setdefault(notice, []).append(cell.name)
        for notice, names in told.items():
            self.progress.say(f"{', '.join(names)}: {notice}")

    def _remember(self, windows: Windows) -> None:
        """The sweep's key, and what an earlier start of the same one has left: times."""
        sets = {data.sha256: data for data in self.data.values()}
        parts = [self.fingerprint, sorted(sets), windows.sha256, halfbyte.__version__, ALGORITHM_VERSION]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        self.facts = {"key": key, "calibration": [data.manifest for data in sets.values()], "text": windows.describe()}
        earlier = kept(self.out / RESULT) or {}
        self.before = earlier if earlier.get("key") == key and not self.force else {}
        was = {row["name"]: row["seconds"] for row in self.before.get("cells", [])}
        for cell in self.cells:
            cell.seconds = {name: value for name, value in was.get(cell.name, {}).items() if name != "evaluating"}

    def _produce(self) -> dict[str, dict[str, Any]]:
        """The artifacts' manifests by cell."""
        made = Production(
            self._alive(),
            self.data,
            self.checkpoint,
            self.fingerprint,
            self.out / "cells",
            self.model,
            self.path,
            self.matrix.name,
            self.device,
            self.command,
            self.progress,
            self.workers,
            self.memory,
        )
        manifests = made.make()
        self.seconds |= made.seconds
        self.sharing = made.sharing
        if made.measured and not self.workers.apart:
            self.cost = cost(self.cells, made.seconds["statistics"])
        return manifests

    def _judge(self, manifests: Mapping[str, dict[str, Any]], windows: Windows) -> dict[str, dict[str, Any]]:
        """The evaluations of the cells that are made, by cell; a cell that is the same as another has none."""
        where = self.request["judged_on"]
        judge = Judge(
            self.out, self.model, self.path, self.fingerprint, windows, self.device, self.progress, self.workers, where
        )
        check = any(gate.name == "check" for gate in self.gates)
        results = judge.all([c for c in self.cells if c.name in manifests and not c.same_as], manifests, check)
        self.seconds |= judge.seconds
        return results

    def _benches(self, manifests: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """results/NAME.bench.json of cells that were benchmarked; one that tells of another artifact is left out."""
        found = {cell.name: kept(self.out / "results" / f"{cell.name}.bench.json") for cell in self.cells}
        works = {name: manifest["work"] for name, manifest in manifests.items()}
        return {name: v for name, v in found.items() if v and tells_of(v, works.get(name, ""))}

    def _write_state(
        self,
        manifests: Mapping[str, dict[str, Any]],
        results: Mapping[str, dict[str, Any]],
        *,
        complete: bool,
    ) -> dict[str, Any]:
        """sweep.json, whole at any time; returns it."""
        stood = standings(self.cells, results, manifests, self._benches(manifests), self.gates, self.request["by"])
        self.seconds["total"] = time.monotonic() - self.began
        earlier = self.before.get("seconds", {})
        names = [cell.name for cell in self.matrix.cells]
        same = self.before.get("matrix", {}).get("cells") == names
        spent = {name: round(value + earlier.get(name, 0.0), 3) for name, value in self.seconds.items()}
        result = {
            "schema": 1,
            "kind": "sweep",
            "complete": complete,
            "halfbyte": halfbyte.__version__,
            "command": self.command,
            "model": {"name": portable(self.model), "hub_id": hub_id(self.model), "sha256": self.fingerprint},
            "matrix": {"name": self.matrix.name, "description": self.matrix.description, "cells": names},
            "request": self.request,
            **self.facts,
            **stood,
            "sharing": self.sharing,
            "seconds": spent,
            "cost": self.cost or (self.before.get("cost") if same else None),
        }
        write_json(self.out / RESULT, result)
        return result
