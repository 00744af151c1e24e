"""One 4-bit checkpoint: recipe, plan, calibration, the pass over the blocks, the artifact."""

from __future__ import annotations

import hashlib
import json
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from halfbyte.artifact import MANIFEST, ArtifactWriter, read_manifest
from halfbyte.calibration import CalibrationSet, build
from halfbyte.engine import BlockResult, Job, Skeleton, Workers, quantize_blocks, work_id
from halfbyte.engine.loop import HEAD
from halfbyte.engine.processes import known_device
from halfbyte.engine.tune import SCHEDULES, train
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.experiments.blocks import BlockStore
from halfbyte.experiments.described import Described
from halfbyte.experiments.tokens import keep_tokens
from halfbyte.files import locked, portable, seen_from
from halfbyte.hashing import beside
from halfbyte.models import Checkpoint, cache_dir, hub_id, resolve_model
from halfbyte.models.library import load_model, load_tokenizer
from halfbyte.models.licence import licence_of
from halfbyte.models.source import DEMO_LICENCE, DEMO_MODEL
from halfbyte.plan.layers import LinearPlan, assign, group_notices, quantized
from halfbyte.recipe import CalibrationSpec, Recipe, load_recipe
from halfbyte.types import Progress, Quiet

AUTO_WEIGHTS, AUTO_TOKENS = 10**9, 32_768
"""`tune: auto` trains models of at most so many quantized weights (training holds them all) on at least so many tokens
(fewer would be learned by heart)."""
LEAST_TOKENS = 2048
"""Calibration tokens below which a Hessian says little: refused."""


def quantize(
    model: str,
    recipe: str | Path | Recipe,
    output_dir: str | Path,
    calibration: Sequence[str | Path] | CalibrationSet | None = None,
    *,
    device: str | None = None,
    force: bool = False,
    command: str | None = None,
    blocks: BlockStore | None = None,
    progress: Progress | None = None,
    workers: Workers | None = None,
    memory: int | None = None,
) -> dict[str, Any]:
    """Make a 4-bit checkpoint of `model` in `output_dir`; returns its manifest (halfbyte.json).

    model         a directory, a hub id or "smollm2-135m"
    recipe        a preset's name, a YAML file or a Recipe
    calibration   a set made by `halfbyte calibrate`, or text files; None: the model writes its own text where
                  the recipe needs any
    force         give up what `output_dir` holds
    blocks        solved blocks of other recipes: what is the same is taken from there, and what is new kept there
    workers       who solves while this process takes the statistics; None: this process. The bytes are the same
    memory        bytes of host memory that the pass over the blocks may take; None: a share of what is free
    An interrupted run goes on where it was; a finished one is recognised and returned.
    Raises UsageError for a wrong recipe or an output directory in use, HalfbyteError when something fails.
    """
    progress = progress or Quiet()
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe))
    path = resolve_model(model, progress)
    checkpoint = Checkpoint(path)
    plans = assign(recipe, checkpoint)
    if not quantized(plans):
        raise UsageError("the recipe leaves every linear in BF16: nothing to quantize")
    device = device_of(device)
    output = Path(output_dir)
    if output.resolve() in (path.resolve(), *path.resolve().parents):
        raise UsageError(f"{output} holds the model {path} itself: choose another -o")
    place = _set_directory(calibration)
    with locked(output), Described(path) as described:
        data = calibration_for(recipe, path, calibration, device, progress)
        with beside(checkpoint.fingerprint) as hashing:
            if force or not (output / MANIFEST).is_file():  # what takes seconds and is needed next, meanwhile
                on_gpu = device.startswith("cuda")
                described.begin(apart=on_gpu and not data)
                if on_gpu:
                    torch.zeros(1, device=device)
            fingerprint = hashing.result()
            if force and any(output.iterdir()):
                described.take()  # before anything is given up for it
        work = work_id(recipe, fingerprint, data.sha256 if data else None)
        writer = ArtifactWriter(output, checkpoint, recipe, plans, work)
        started, passing, resumed = time.monotonic(), False, False
        try:
            writer.open(force)
            if writer.finished:
                progress.say(f"{output} is finished: nothing to do")
                return read_manifest(output)
            if workers:
                workers.open()
            described.take_if_ready()
            told = [*cast_notices(checkpoint, plans), *group_notices(recipe, plans)]
            for notice in told:
                progress.say(notice)
            resumed = any(writer.done(i) for i in range(checkpoint.config["num_hidden_layers"]))
            if blocks and data:
                blocks.lend(writer, data.sha256)
            sequences, passing = data.sequences if data else None, True
            told += quantize_blocks(
                checkpoint,
                [_job(writer, recipe)],
                sequences,
                device,
                progress=progress,
                workers=workers,
                memory=memory,
                scratch=writer.partial,
            )
            if blocks and data:
                blocks.keep(writer, data.sha256)
            tune(writer, data, device, progress)
            seconds = round(time.monotonic() - started, 3)

            def facts() -> dict[str, Any]:
                mark = described.take()
                return {
                    **manifest_facts(model, path, output, fingerprint, recipe, data, device, command, mark),
                    "calibration_path": seen_from(output, place) if place else None,
                    "notices": told,
                    "resumed": resumed,
                    "seconds": seconds,
                }

            progress.start("writing the checkpoint", 1)
            manifest = writer.finish(facts)
        except Exception as error:  # a misfit may make the pass raise anything: then it is the reason
            misfit = described.misfit(wait=passing)
            if misfit or isinstance(error, HalfbyteError):
                writer.abandon(worthless=bool(misfit) and not resumed)
            if misfit:
                raise misfit from error
            raise
        if place is None:
            keep_tokens(data)
        progress.advance()
        return manifest


def device_of(asked: str | None) -> str:
    """Where to compute: what was asked for, else the GPU where there is one. Raises UsageError for what is missing."""
    return known_device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))


def tune(writer: ArtifactWriter, data: CalibrationSet | None, device: str, progress: Progress) -> None:
    """Train scales and norms of the blocks that `writer` keeps, where the recipe asks for it, once. What does not come
    out better is left as it was."""
    recipe = writer.recipe
    schedule = _schedule(recipe, writer.plans, data)
    if schedule is None or data is None or writer.tuned:
        return
    skeleton, scaled, seed = Skeleton(writer.checkpoint, device), recipe.scaling == "awq", recipe.calibration.seed
    linears, tensors, note = train(skeleton, writer.block, SCHEDULES[schedule], data.sequences, scaled, seed, progress)
    writer.tune(linears, tensors, {"schedule": schedule, **note})


def _schedule(recipe: Recipe, plans: Sequence[LinearPlan], data: CalibrationSet | None) -> str | None:
    """The name of the schedule that scales and norms are trained on; None: they are not."""
    if recipe.tune != "auto":
        return None if recipe.tune == "none" else recipe.tune
    weights = sum(p.out_features * p.in_features for p in plans if p.scheme)
    fits = weights <= AUTO_WEIGHTS and data is not None and data.tokens >= AUTO_TOKENS
    return "light" if fits else None


def manifest_facts(
    model: str,
    path: Path,
    output: Path,
    fingerprint: str,
    recipe: Recipe,
    data: CalibrationSet | None,
    device: str,
    command: str | None,
    tokenizer: str | None,
) -> dict[str, Any]:
    """What a manifest says of how the artifact in `output` was made, times and notices aside. tokenizer: its hash."""
    return {
        "model": _model_facts(model, path, output, fingerprint),
        "versions": {"vllm": _vllm_version()},
        "tokenizer_sha256": tokenizer,
        "calibration": data.manifest if data else None,
        "seeds": {"calibration": recipe.calibration.seed},
        "command": command,
        "device": device,
        "threads": torch.get_num_threads(),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "peak_device_mib": torch.cuda.max_memory_allocated() >> 20 if device.startswith("cuda") else None,
    }


def _model_facts(model: str, path: Path, output: Path, fingerprint: str) -> dict[str, Any]:
    """What the manifest says of the model; a directory's `path` is seen from the artifact, where that tells."""
    public = hub_id(model)
    place = None if public else seen_from(output, path)
    licence = licence_of(path) or (DEMO_LICENCE if model == DEMO_MODEL else None)
    named = {"name": portable(model), "hub_id": public, "path": place}
    return {**named, "sha256": fingerprint} | ({"license": licence} if licence else {})


def cast_notices(checkpoint: Checkpoint, plans: list[LinearPlan]) -> list[str]:
    """A notice where linears to be quantized are not stored in BF16."""
    names = [f"{name}.weight" for name in quantized(plans)]
    others = sorted({checkpoint.tensors[name].dtype for name in names} - {"BF16"})
    if not others:
        return []
    return [f"the model is stored in {' and '.join(others)}: its linears are rounded to BF16 first, then quantized"]


def _job(writer: ArtifactWriter, recipe: Recipe) -> Job:
    def emit(block: int, result: BlockResult) -> None:
        writer.emit(block, result.linears, result.tensors, result.seconds, result.notices, result.experts)

    schemes = quantized(writer.plans)
    solved = {HEAD if plan.block is None else plan.block for plan in writer.plans if plan.name in schemes}
    return Job(recipe, schemes, lambda block: block not in solved or writer.done(block), emit)


def calibration_for(
    recipe: Recipe,
    model: Path,
    given: Sequence[str | Path] | CalibrationSet | None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> CalibrationSet | None:
    """The calibration set a recipe is carried out with: the one given, one built from text files, or (where the
    recipe needs one) one that the model writes itself, kept in the cache. Raises HalfbyteError for too few tokens."""
    if isinstance(given, CalibrationSet):
        data = given
    elif (place := _set_directory(given)) is not None:
        data = CalibrationSet.load(place)
    elif given:
        data = build(load_tokenizer(model), recipe.calibration, sources=given, progress=progress)
    elif recipe.needs_calibration:
        data = self_generated(model, recipe.calibration, device, progress)
    else:
        return None
    if data.tokens < LEAST_TOKENS:
        raise HalfbyteError(
            f"the calibration set has {data.tokens:,} tokens: {LEAST_TOKENS:,} are the least, 65,536 a good number"
        )
    return data


def _set_directory(given: Sequence[str | Path] | CalibrationSet | None) -> Path | None:
    """The directory of a set that was given as one."""
    if isinstance(given, CalibrationSet) or not given or len(given) != 1 or not Path(given[0]).is_dir():
        return None
    return Path(given[0])


def self_generated(
    model: Path, spec: CalibrationSpec, device: str = "cpu", progress: Progress | None = None
) -> CalibrationSet:
    """Text that the model writes itself, cached by model and spec."""
    name = json.dumps(
        {"model": Checkpoint(model).fingerprint(), "spec": spec.model_dump(), "version": 1}, sort_keys=True
    )
    place = cache_dir() / "calibration" / hashlib.sha256(name.encode()).hexdigest()[:32]
    if (place / "manifest.json").is_file():
        return CalibrationSet.load(place)
    data = build(load_tokenizer(model), spec, model=load_model(model, device), progress=progress)
    data.save(place)
    return data


def _vllm_version() -> str | None:
    """The version of the vLLM that is found on this machine, if there is one."""
    from halfbyte.serving import find_vllm

    try:
        return find_vllm().version
    except HalfbyteError:
        return None
