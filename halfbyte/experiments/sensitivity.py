"""Which linears suffer: the damage that each fused group does when it alone is quantized.

A group's lone damage is that of the checkpoint that the recipe makes when it exempts every other linear. So an input
scale is folded where it then can be: into the norm before (qkv, gate_up), which is swapped together with the group;
o and down, whose scales would fold into a linear that here stays in BF16, are rounded without one. What is in front
of the group is BF16 in any case, and so `propagate` has no meaning here.

One pass of the engine serves all groups, one job for each kind. As each group of a block is solved it is measured,
its row is written down, and it is forgotten: nothing but rows is kept, and a killed run goes on behind the last one.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfbyte.algo import dequantize
from halfbyte.artifact import MANIFEST
from halfbyte.calibration import CalibrationSet
from halfbyte.engine import BlockResult, Job, quantize_blocks, work_id
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate import Windows, bootstrap, noise_floor, set_windows
from halfbyte.experiments.exemptions import check_budget, choose_exemptions, group_rows, write_recipe
from halfbyte.experiments.lone import LoneMeter
from halfbyte.experiments.quantize import calibration_for, device_of, self_generated
from halfbyte.experiments.run import HELD_OUT, TEXT_WINDOW, windows_of
from halfbyte.files import locked, make_directory, write_json
from halfbyte.models import Checkpoint, cache_dir, family_of, resolve_model
from halfbyte.models.checkpoint import read_json
from halfbyte.models.library import load_tokenizer
from halfbyte.plan.inventory import footprints
from halfbyte.plan.layers import quantized
from halfbyte.recipe import Recipe, load_recipe
from halfbyte.types import Progress, Quiet, Scheme

RESULT = "sensitivity.json"
VERSION = 1
"""Raised whenever the same inputs give other figures."""
HELD_TOKENS = 2048
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NOISE_TOKENS = 512
HEAD = -1


def sensitivity(
    model: str,
    recipe: str | Path | Recipe,
    *,
    text: Sequence[Path] | Windows = (),
    calibration: Sequence[str | Path] | CalibrationSet | None = None,
    tokens: int = HELD_TOKENS,
    budget: float | None = None,
    output: Path | None = None,
    device: str | None = None,
    dtype: str = "float32",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure every group that the recipe quantizes, alone; returns sensitivity.json, ranked by KL.

    text         files to measure on, or windows; none: what the model writes (the set `run` and `eval` judge on)
    calibration  as for `quantize`
    tokens       about how many held tokens are scored
    budget       average bits over the weights that the recipe quantizes: adds "budget" to the result
    output       directory for sensitivity.json (and recipe.yaml); the result is kept in the cache in any case
    dtype        arithmetic of the measurement: float32, or bfloat16 (half the memory, and a noise floor)

    Each group's row: "group" (full fused name), "names", "block", "kind", "scheme", "kl" with "low" and "high" (mean
    nats a token and its 95 % interval), "relative_error" (sqrt(tr(E H E^T) / tr(W H W^T)), H from the calibration
    tokens), "output_error" (tr(E H E^T): that share of the group's mean squared output on the held tokens), "weights",
    "bytes", "bytes_added" (were it exempt), "kl_per_byte", "order" (in the model), "rank".
    Raises UsageError for a wrong recipe, budget or output, HalfbyteError when something fails.
    """
    progress = progress or Quiet()
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe))
    if recipe.propagate:
        recipe = recipe.model_copy(update={"propagate": False})
        progress.say("propagate: set aside, for a group that is quantized alone has BF16 before it")
    if output is not None and (output.is_file() or (output / MANIFEST).exists()):
        raise UsageError(f"{output} is a file or holds an artifact: choose another -o")
    path = resolve_model(model, progress)
    checkpoint = Checkpoint(path)
    prints = footprints(recipe, checkpoint)
    groups = group_rows(prints)
    if not groups:
        raise UsageError("the recipe leaves every linear in BF16: nothing to measure")
    if budget is not None:
        check_budget(budget, groups)
    device = device_of(device)
    windows = text if isinstance(text, Windows) else _windows(path, text, tokens, device, progress)
    data = calibration_for(recipe, path, calibration, device, progress)
    work = work_id(recipe, checkpoint.fingerprint(), data.sha256 if data else None)
    facts = {"schema": 1, "kind": "sensitivity", "work": work, "model": model, "recipe": recipe.identity()}
    facts |= {"text": windows.describe(), "self_generated": windows.self_generated, "dtype": dtype, "device": device}
    place = cache_dir() / "sensitivity" / _key(work, windows, device, dtype)
    with locked(place):
        schemes = quantized([p.plan for p in prints])
        measured = _Measure(checkpoint, recipe, groups, schemes, place / RESULT, facts, progress)
        result = measured.finish(windows, data, device, DTYPES[dtype])
    result["exempt"] = [{"name": p.plan.name, "reason": p.plan.reason} for p in prints if p.plan.scheme is None]
    if budget is not None:
        result["budget"] = choose_exemptions(result, budget)
    if output is not None:
        write_json(make_directory(output) / RESULT, result)
        if budget is not None:
            write_recipe(output, result["budget"])
    return result


def _windows(path: Path, text: Sequence[Path], tokens: int, device: str, progress: Progress) -> Windows:
    if text:
        windows = windows_of(text, load_tokenizer(path), TEXT_WINDOW, None, None)
    else:
        windows = set_windows(self_generated(path, HELD_OUT, device, progress))
    scored = np.cumsum([int(mask.sum()) for mask in windows.scored])
    return windows.first(int(np.searchsorted(scored, tokens)) + 1)


def _key(work: str, windows: Windows, device: str, dtype: str) -> str:
    masks = hashlib.sha256(torch.cat(windows.scored).numpy().tobytes()).hexdigest()
    parts = [VERSION, work, windows.sha256, masks, device.partition(":")[0], dtype]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class _Notices(Quiet):
    """The engine's notices alone: its steps are not the ones that take the time here."""

    def __init__(self, progress: Progress):
        self.progress = progress

    def say(self, message: str) -> None:
        self.progress.say(message)


class _Measure:
    """One piece of work: the rows that are there, and how the others are made."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        groups: list[dict[str, Any]],
        schemes: Mapping[str, Scheme],
        file: Path,
        facts: Mapping[str, Any],
        progress: Progress,
    ):
        self.checkpoint, self.recipe, self.groups, self.file, self.progress = checkpoint, recipe, groups, file, progress
        self.schemes = schemes
        self.family = family_of(checkpoint.config)
        self.state: dict[str, Any] = {**facts, "complete": False, "seconds": 0.0, "noise_floor": None, "groups": []}
        kept = _kept(file)
        if kept is not None:
            self.state |= {key: kept[key] for key in ("complete", "seconds", "noise_floor", "groups")}
        self.done = {row["group"] for row in self.state["groups"]}
        self.at = {(HEAD if g["block"] is None else g["block"], self._module(g)): g for g in groups}

    def finish(self, windows: Windows, data: CalibrationSet | None, device: str, dtype: torch.dtype) -> dict[str, Any]:
        """Measure what is missing; returns the ranked result."""
        if not self.state["complete"]:
            self.began = time.monotonic() - self.state["seconds"]
            self._start(windows, device, dtype)
            sequences = data.sequences if data else None
            quantize_blocks(self.checkpoint, self._jobs(), sequences, device, progress=_Notices(self.progress))
            rows = sorted(self.state["groups"], key=lambda row: -row["kl"])
            self.state |= {"groups": [{**row, "rank": i} for i, row in enumerate(rows, 1)], "complete": True}
            self._keep()
        return dict(self.state)

    def _start(self, windows: Windows, device: str, dtype: torch.dtype) -> None:
        self.progress.start("running the BF16 model", 1)
        self.meter = LoneMeter(self.checkpoint, windows, device, dtype)
        if self.state["noise_floor"] is None:
            quiet = _Notices(self.progress)
            first = int(np.searchsorted(np.cumsum([len(i) for i in windows.ids]), NOISE_TOKENS)) + 1
            self.state["noise_floor"] = noise_floor(self.meter.model, windows.first(first), progress=quiet)
        self.progress.advance()
        self.counts = np.unique(self.meter.window.numpy(), return_inverse=True)[1]
        self.draws = bootstrap.draw_counts(int(self.counts.max()) + 1, 0)
        steps = sum(self._steps(g) for g in self.groups if g["group"] not in self.done)
        self.progress.start(f"measuring {len(self.groups) - len(self.done)} groups (block runs)", steps)

    def _steps(self, group: Mapping[str, Any]) -> int:
        """What measuring a group costs, in runs of a block; lm_head counts by its size."""
        info = self.checkpoint.tensors
        block = sum(t.nbytes for n, t in info.items() if n.startswith(self.family.block(0) + "."))
        head = info[f"{self.family.embedding}.weight"].nbytes
        behind = 0 if group["block"] is None else self.family.num_blocks - group["block"]
        return behind + max(1, round(head / block))

    def _jobs(self) -> list[Job]:
        """One job for each fused module of a block, quantizing nothing else: what is scaled then is what the lone group
        can have."""
        return [self._job(module) for module in dict.fromkeys(map(self._module, self.groups))]

    def _module(self, group: Mapping[str, Any]) -> str:
        """A group's name within its block."""
        name: str = group["group"]
        return name if group["block"] is None else name.removeprefix(self.family.block(group["block"]) + ".")

    def _job(self, module: str) -> Job:
        schemes = {n: self.schemes[n] for g in self.groups if self._module(g) == module for n in g["names"]}

        def done(block: int) -> bool:
            group = self.at.get((block, module))
            return group is None or group["group"] in self.done

        def emit(block: int, result: BlockResult) -> None:
            self._measure(self.at[block, module], result)

        return Job(self.recipe, schemes, done, emit)

    def _measure(self, group: dict[str, Any], result: BlockResult) -> None:
        values = {f"{name}.weight": dequantize(solved.q) for name, solved in result.linears.items()}
        start = self.family.num_blocks if group["block"] is None else group["block"]
        kl = self.meter.kl(start, values | result.tensors).numpy()
        if not np.isfinite(kl).all():
            raise HalfbyteError(f"{group['group']} quantized alone gives NaN or infinite logits: is the model broken?")
        found = bootstrap.interval(bootstrap.mean_replicates(kl, self.counts, self.draws), float(kl.mean()))
        power = sum(self.meter.power.get(name, 0.0) for name in group["names"])  # an expert may get no held token
        error = sum(s.relative_error**2 * self.meter.power.get(name, 0.0) for name, s in result.linears.items())
        row = {**group, "kl": found["value"], "low": found["low"], "high": found["high"]}
        row |= {"relative_error": (error / max(power, 1e-30)) ** 0.5, "output_error": error}
        row["kl_per_byte"] = row["kl"] / max(1, group["bytes_added"])
        self.state["groups"].append(row)
        self.done.add(group["group"])
        self._keep()
        where = f"{len(self.done)}/{len(self.groups)} {group['group'].removeprefix('model.')}"
        self.progress.advance(self._steps(group), f"{where}: KL {row['kl']:.2g}")

    def _keep(self) -> None:
        self.state["seconds"] = round(time.monotonic() - self.began, 3)
        write_json(self.file, self.state)


def _kept(file: Path) -> dict[str, Any] | None:
    """What an earlier run left, if it can be read."""
    try:
        return read_json(file)
    except HalfbyteError:
        return None
