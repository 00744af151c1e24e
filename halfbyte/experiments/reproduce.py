"""An artifact made again from its manifest, and compared with it file by file.

On the same machine with the same versions the files are the same, bit for bit. What differs from when it was made is
named first: versions, the device, the algorithms. Sums over another number of threads round differently on a CPU, so
torch gets the manifest's number of threads. Where files differ, the dequantized weights say how much it matters.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from halfbyte.algo import dequantize
from halfbyte.artifact import MANIFEST
from halfbyte.artifact.manifest import git_commit, versions
from halfbyte.calibration import CalibrationSet
from halfbyte.engine import work_id
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.experiments.quantize import device_of, quantize, self_generated
from halfbyte.experiments.run import artifact_baseline
from halfbyte.experiments.tokens import find_tokens
from halfbyte.files import make_directory, portable
from halfbyte.formats import get_format
from halfbyte.models import Checkpoint, cache_dir, resolve_model
from halfbyte.models.checkpoint import read_json
from halfbyte.models.library import load_tokenizer
from halfbyte.recipe import Recipe
from halfbyte.recipe.loader import recipe_from_mapping
from halfbyte.types import Progress, Quiet, Scheme

TOLERANCE = 0.05
"""Relative difference (Frobenius norm) of a linear's dequantized weights up to which they count as equal. Rounding to
4 bits itself moves a weight by about 0.1 of its size."""
IRRELEVANT = ("vllm",)
"""Versions in a manifest that say nothing of its bytes."""


def reproduce(
    manifest: Path,
    *,
    model: str | None = None,
    calibration: Sequence[Path] = (),
    output: Path | None = None,
    tolerance: float = TOLERANCE,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make the artifact of `manifest` (halfbyte.json, or the directory that holds it) again and compare.

    model         the BF16 model, where the manifest does not lead to it; its contents must be the same
    calibration   the calibration set, or the text that it was cut from; none: it is looked for (`find_tokens`)
    output        where the new artifact goes; none: it is removed after the comparison
    Returns {"result": "identical" | "equal within tolerance" | "different", "differences", "files", "weights", ...}.
    Raises UsageError for no manifest or an output in use, HalfbyteError where model or tokens are others.
    """
    progress, started = progress or Quiet(), time.monotonic()
    place, told = _open(manifest)
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} is not empty: choose another -o")
    recipe = recipe_from_mapping(told.get("recipe") or {}, f"the recipe in {MANIFEST}")
    path = _model(place, told, model, progress)
    device = _device(told)
    with _threads(told.get("threads")):
        data = _tokens(told, place, path, calibration, device, progress)
        differences = _differences(told, recipe, data, device)
        for row in differences:
            progress.say(f"{row['what']}: {row['then']} then, {row['now']} now")
        with _target(output) as target:
            made = quantize(str(path), recipe, target, data, device=device, progress=progress)
            files = _files(told, made)
            same = all(row["same"] for row in files)
            weights = None if same else compare_weights(place, told, target, made, tolerance)
    return {
        "schema": 1,
        "kind": "reproduction",
        "artifact": portable(place),
        "result": _verdict(same, weights),
        "differences": differences,
        "threads": told.get("threads"),
        "device": device,
        "files": files,
        "weights": weights,
        "seconds": round(time.monotonic() - started, 3),
    }


def _verdict(same: bool, weights: Mapping[str, Any] | None) -> str:
    if same:
        return "identical"
    return "equal within tolerance" if weights and weights["equal"] else "different"


def compare_weights(
    place: Path, then: Mapping[str, Any], target: Path, now: Mapping[str, Any], tolerance: float
) -> dict[str, Any] | None:
    """How far the dequantized weights of two artifacts, and their other tensors, are apart; None where the first one's
    files are not there. {"equal", "tolerance", "compared", "different", "largest", "where", "mean"}: relative
    differences in the Frobenius norm, the mean over what differs.
    """
    try:
        first, second = Checkpoint(place), Checkpoint(target)
        names = sorted(first.tensors)
    except HalfbyteError:
        return None
    quantized = {name: row for name, row in then["linears"].items() if row["scheme"] is not None}
    others = [n for n in names if n.rpartition(".")[0] not in quantized or n.endswith(".bias")]
    apart = dict.fromkeys([*quantized, *others], 0.0)
    for name, row in quantized.items():
        new = now["linears"].get(name) or {}
        if row["scheme"] != new.get("scheme"):
            apart[name] = float("inf")
        elif row["fingerprint"] != new["fingerprint"]:
            apart[name] = _relative(_dequantized(first, then, name), _dequantized(second, now, name))
    for name in others:
        apart[name] = _relative(first.load(name), second.load(name)) if second.has(name) else float("inf")
    moved = {name: x for name, x in apart.items() if x > 0}
    worst = max(apart, key=lambda name: apart[name])
    return {
        "equal": apart[worst] <= tolerance,
        "tolerance": tolerance,
        "compared": len(apart),
        "different": len(moved),
        "largest": apart[worst] if apart[worst] < float("inf") else None,
        "where": worst if moved else None,
        "mean": sum(moved.values()) / len(moved) if moved and apart[worst] < float("inf") else None,
    }


def _open(manifest: Path) -> tuple[Path, dict[str, Any]]:
    """The artifact's directory and its manifest, whose keys are there."""
    file = manifest / MANIFEST if manifest.is_dir() else manifest
    if not file.is_file():
        raise UsageError(f"{manifest} is no {MANIFEST}, nor a directory with one: name an artifact")
    told = read_json(file)
    lacking = [key for key in ("work", "model", "recipe", "files", "linears") if key not in told]
    if told.get("kind") != "manifest" or lacking:
        raise UsageError(f"{file} is not the manifest of an artifact ({', '.join(lacking) or 'another kind'})")
    return file.parent, told


def _model(place: Path, told: Mapping[str, Any], named: str | None, progress: Progress) -> Path:
    """The BF16 model's directory, its contents those that the manifest names."""
    name = named or artifact_baseline(place)
    path = resolve_model(name, progress)
    fingerprint = Checkpoint(path).fingerprint()
    if fingerprint != told["model"].get("sha256"):
        raise HalfbyteError(
            f"{name} is another model than the artifact's (SHA-256 {fingerprint[:12]}, the manifest says "
            f"{str(told['model'].get('sha256'))[:12]}): name the one it was made of with --model"
        )
    return path


def _tokens(
    told: Mapping[str, Any], place: Path, path: Path, given: Sequence[Path], device: str, progress: Progress
) -> CalibrationSet | None:
    described = told.get("calibration")
    if not described:
        return None
    return find_tokens(
        described,
        place.resolve(),
        told.get("calibration_path"),
        given,
        lambda spec: self_generated(path, spec, device, progress),
        lambda: load_tokenizer(path),
        progress,
    )


def _differences(
    told: Mapping[str, Any], recipe: Recipe, data: CalibrationSet | None, device: str
) -> list[dict[str, Any]]:
    """What is not as it was when the artifact was made: {"what", "then", "now"}."""
    now = {**versions(), "git": git_commit(), "device": device}
    then = {**(told.get("versions") or {}), "git": told.get("git"), "device": told.get("device")}
    rows = [
        {"what": name, "then": then.get(name), "now": now.get(name)}
        for name in sorted({*now, *then} - set(IRRELEVANT))
        if name in then and then[name] != now.get(name)
    ]
    work = work_id(recipe, told["model"]["sha256"], data.sha256 if data else None)
    if work != told["work"]:
        rows.append({"what": "algorithms (the work's id)", "then": told["work"][:12], "now": work[:12]})
    return rows


def _device(told: Mapping[str, Any]) -> str:
    """The manifest's device where there is one such; else what this machine has."""
    wanted = str(told.get("device") or "cpu")
    return wanted if device_of(None) == "cuda" or not wanted.startswith("cuda") else device_of(None)


@contextmanager
def _threads(count: Any) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if isinstance(count, int) and count > 0:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _target(output: Path | None) -> Iterator[Path]:
    """Where the new artifact goes: `output`, or a directory that is removed."""
    if output is not None:
        yield output
        return
    with tempfile.TemporaryDirectory(prefix="reproduce-", dir=make_directory(cache_dir())) as scratch:
        yield Path(scratch) / "model"


def _files(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every file of either artifact with both hashes."""
    old, new = ({name: row["sha256"] for name, row in told["files"].items()} for told in (then, now))
    return [
        {"file": name, "then": old.get(name), "now": new.get(name), "same": old.get(name) == new.get(name)}
        for name in sorted({*old, *new})
    ]


def _dequantized(checkpoint: Checkpoint, told: Mapping[str, Any], name: str) -> torch.Tensor:
    recipe = told["recipe"]
    form = get_format(recipe["format"], recipe.get("activations", "bf16"))
    tensors = {f"{name}.{leaf}": t for leaf, t in checkpoint.load_all(f"{name}.").items() if leaf != "bias"}
    return dequantize(form.unpack(name, tensors, Scheme(**told["linears"][name]["scheme"])))


def _relative(old: torch.Tensor, new: torch.Tensor) -> float:
    if old.shape != new.shape:
        return float("inf")
    a, b = old.double(), new.double()
    size = float(a.norm())
    return float((a - b).norm()) / size if size else float(b.norm() > 0)
