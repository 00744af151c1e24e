"""What 4 bits cost SmolLM2-135M, recipe by recipe: seconds, memory, bits, perplexity and KL, in one table.

    python benchmarks/quality.py [--recipes R …] [--timed R …] [--artifact NAME=DIR …] [--dithered]
                                 [--second-text FILE] [--data DIR] [--json FILE]

Every recipe is solved in memory in ONE pass over the blocks, from the same statistics; `--timed` ones run the real
`halfbyte quantize` in a fresh process, and their artifact is scored. BF16 and plain round-to-nearest of the same grids
stand beside them, and the noise floor below.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import (
    MODEL,
    SEQUENCES,
    TEXT,
    Report,
    calibration_tokens,
    data_directory,
    machine,
    markdown,
    number,
    read_recipe,
    run_main,
    say,
)
from dither import dithered_copy
from measure import Measured, measure
from rtn import nearest
from scoring import FEW, HEADER, Reference, bits_of_artifact, bits_of_recipe, cells, load_scored, score_row

from halfbyte.algo import dequantize
from halfbyte.calibration import CalibrationSet
from halfbyte.engine import BlockResult, Job, quantize_blocks
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.experiments.quantize import load_model
from halfbyte.files import write_json
from halfbyte.models import Checkpoint, resolve_model
from halfbyte.plan.layers import assign, quantized
from halfbyte.recipe import Recipe

DEFAULT = (
    "method=rtn,group_size=64",
    "method=gptq,group_size=64",
    "method=gptq,group_size=64,scaling=awq",
    "method=awq,group_size=64",
    "method=nvfp4,group_size=16",
    "method=nvfp4,group_size=16,scaling=awq",
    "method=nvfp4,group_size=64",
)


@dataclass
class Candidate:
    """A model to score: tensors that replace the baseline's, or a directory."""

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] | None = None
    directory: Path | None = None


def main(arguments: argparse.Namespace) -> None:
    """Make the candidates, score them on every text, print the tables and write the JSON."""
    data = data_directory(arguments.data)
    recipes = [read_recipe(words) for words in arguments.recipes]
    timed = [read_recipe(words) for words in arguments.timed]
    outside = [_named(words) for words in arguments.artifact]
    texts = [data / TEXT] + [_text(words, data) for words in arguments.second_text]
    model = resolve_model(MODEL, Report())
    result: dict[str, Any] = {
        "schema": 1,
        "kind": "quality",
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        "tables": [],
    }
    with tempfile.TemporaryDirectory(prefix="quality-") as scratch:
        for source in [model] + ([dithered_copy(model)] if arguments.dithered else []):
            title = f"{MODEL}, dithered" if source != model else MODEL
            calibration = calibration_tokens(source, data, arguments.sequences)
            result["calibration_sha256"] = calibration.sha256
            own = [time_recipe(label, recipe, source, calibration, Path(scratch)) for label, recipe in timed]
            own += outside if source == model else []
            own += solve(recipes, source, calibration, result)
            for text in texts:
                table: dict[str, Any] = {"model": title, "rows": []}
                result["tables"].append(table)
                for _ in score_rows(table, source, text, yardsticks(recipes + timed, source) + own, arguments.windows):
                    if arguments.json:
                        write_json(arguments.json, result)
    for table in result["tables"]:
        print(render(table, arguments.windows))
    for seconds in result.get("pass_seconds", []):
        print(f"\none pass over the blocks for {len(recipes)} recipes: {seconds:.0f} s (load {_load(result)})")


def solve(
    recipes: list[tuple[str, Recipe]], model: Path, calibration: CalibrationSet, result: dict[str, Any]
) -> list[Candidate]:
    """Every recipe in one pass over the blocks, in memory."""
    if not recipes:
        return []
    checkpoint = Checkpoint(model)
    found, jobs = [], []
    for label, recipe in recipes:
        facts = {"recipe": recipe.identity(), "bits_per_weight": bits_of_recipe(recipe, model)}
        candidate = Candidate(label, {**facts, "solve_seconds": 0.0, "errors": []}, tensors={})
        found.append(candidate)
        jobs.append(Job(recipe, quantized(assign(recipe, checkpoint)), lambda _: False, _keep(candidate)))
    say(f"one pass over the blocks for {len(jobs)} recipes")
    started = time.monotonic()
    quantize_blocks(checkpoint, jobs, calibration.sequences, progress=Report())
    result.setdefault("pass_seconds", []).append(round(time.monotonic() - started, 1))
    for candidate in found:
        errors = candidate.facts.pop("errors")
        candidate.facts["mean_relative_error"] = sum(errors) / len(errors)
    return found


def _keep(candidate: Candidate) -> Any:
    def emit(block: int, result: BlockResult) -> None:
        assert candidate.tensors is not None
        for name, solved in result.linears.items():
            candidate.tensors[f"{name}.weight"] = dequantize(solved.q).bfloat16()
            candidate.facts["errors"].append(solved.relative_error)
        candidate.tensors.update(result.tensors)
        candidate.facts["solve_seconds"] += result.seconds

    return emit


def time_recipe(label: str, recipe: Recipe, model: Path, calibration: CalibrationSet, scratch: Path) -> Candidate:
    """The real `halfbyte quantize` in a fresh process: wall seconds and peak memory of the whole of it."""
    place = scratch / f"timed-{len(list(scratch.iterdir()))}"
    measured = quantize_process(recipe, model, calibration, place)
    if measured.status:
        return Candidate(f"{label} (timed)", {"error": measured.reason})
    say(f"halfbyte quantize {label}: {measured.seconds:.1f} s, {measured.peak_rss_mib} MiB")
    facts = {"seconds": measured.seconds, "cpu_seconds": measured.cpu_seconds, "peak_rss_mib": measured.peak_rss_mib}
    directory = place / "artifact"
    facts["bits_per_weight"] = bits_of_artifact(directory)
    return Candidate(f"{label} (timed)", {"recipe": recipe.identity(), **facts}, directory=directory)


def quantize_process(recipe: Recipe, model: Path, calibration: CalibrationSet, place: Path) -> Measured:
    """`halfbyte quantize` as a user runs it, into place/artifact."""
    place.mkdir(parents=True)
    calibration.save(place / "calibration")
    written = recipe.model_dump(mode="json", exclude_none=True)
    (place / "recipe.yaml").write_text(json.dumps(written), encoding="utf-8")
    command = [sys.executable, "-m", "halfbyte.cli.app", "quantize", str(model), "-r", str(place / "recipe.yaml")]
    command += ["--calibration", str(place / "calibration"), "-o", str(place / "artifact"), "--device", "cpu"]
    beside = Path(sys.executable).with_name("halfbyte")
    if beside.is_file():
        command[:3] = [str(beside)]
    return measure(command, place / "log.txt")


def yardsticks(recipes: list[tuple[str, Recipe]], model: Path) -> list[Candidate]:
    """BF16 itself, and plain round-to-nearest on every grid and group size that the recipes use."""
    found = [Candidate("BF16", {"bits_per_weight": 16.0}, tensors={})]
    checkpoint = Checkpoint(model)
    seen = []
    for _, recipe in recipes:
        key = (str(recipe.grid), recipe.group_size)
        if key in seen:
            continue
        seen.append(key)
        schemes = quantized(assign(recipe, checkpoint))
        tensors = {
            f"{name}.weight": nearest(checkpoint.load(f"{name}.weight"), scheme.grid, scheme.group_size)
            for name, scheme in schemes.items()
        }
        bits = bits_of_recipe(recipe, model)
        found.append(Candidate(f"RTN, extremes, {key[0]} g{key[1]}", {"bits_per_weight": bits}, tensors=tensors))
    return found


def score_rows(
    table: dict[str, Any], model: Path, text: Path, candidates: list[Candidate], windows: int
) -> Iterator[dict[str, Any]]:
    """Every candidate on one text: fills `table` and gives each row as it is done."""
    reference = Reference(model, text, windows)
    table.update(reference.describe())
    host = load_model(model)
    original = {name: value.clone() for name, value in host.state_dict().items()}
    for candidate in candidates:
        row = _score(candidate, reference, host, original)
        say("  ".join(cells(row, windows)))
        table["rows"].append(row)
        yield row


def _score(candidate: Candidate, reference: Reference, host: Any, original: dict[str, Any]) -> dict[str, Any]:
    if candidate.facts.get("error"):
        return {"name": candidate.name, **candidate.facts}
    try:
        if candidate.directory is None:
            if candidate.tensors:
                host.load_state_dict({**original, **candidate.tensors})
            scores = reference.score(host if candidate.tensors else None)
            return score_row(candidate.name, scores, **candidate.facts)
        bits = candidate.facts.get("bits_per_weight") or bits_of_artifact(candidate.directory)
        scores = reference.score(load_scored(candidate.directory))
        return score_row(candidate.name, scores, **{"bits_per_weight": bits, **candidate.facts})
    except HalfbyteError as error:
        return {"name": candidate.name, "error": str(error)}


def render(table: dict[str, Any], windows: int) -> str:
    """One text's table in Markdown, with its noise floor."""
    noise, text = table["noise_floor"], table["text"]
    head = [h.replace("40", str(windows)) for h in HEADER]
    head[0] = f"{table['model']}, {text['source']}"
    return (
        f"\n{markdown(head, [cells(row, windows) for row in table['rows']])}\n\n"
        f"noise floor (BF16 against itself in other batch shapes, {FEW} windows): KL {noise['kl_mean']:.5f}, "
        f"top-1 {noise['top1']:.2%}, perplexity x {number(noise['ppl_ratio'], 5)}"
    )


def _named(words: str) -> Candidate:
    name, equals, directory = words.partition("=")
    if not equals or not (Path(directory) / "config.json").is_file():
        raise UsageError(f"--artifact {words}: write NAME=DIR, DIR a model directory with config.json")
    return Candidate(name, directory=Path(directory))


def _text(words: str, data: Path) -> Path:
    for path in (Path(words), data / words):
        if path.is_file():
            return path
    raise UsageError(f"--second-text {words}: no such file, here or in {data}")


def _load(result: dict[str, Any]) -> str:
    return f"{result['machine']['load_average'][0]:.1f} before, {os.getloadavg()[0]:.1f} after"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several: dict[str, Any] = {"nargs": "*", "default": [], "metavar": "RECIPE"}
    parser.add_argument(
        "--recipes", **{**several, "default": list(DEFAULT)}, help="presets, YAML files, or key=value,key=value"
    )
    parser.add_argument("--timed", **several, help="run these as whole `halfbyte quantize` processes")
    parser.add_argument("--artifact", nargs="*", default=[], metavar="NAME=DIR", help="score these directories too")
    parser.add_argument("--dithered", action="store_true", help="everything again on the dithered copy of the model")
    parser.add_argument("--second-text", nargs="*", default=[], metavar="FILE", help="score on these texts too")
    parser.add_argument("--windows", type=int, default=40, help="windows of the larger figure (default 40)")
    parser.add_argument("--sequences", type=int, default=SEQUENCES, help="calibration sequences (default 128)")
    parser.add_argument("--data", metavar="DIR", help="where calibration/ and text/ are (else HALFBYTE_DATA)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    return parser


if __name__ == "__main__":
    run_main(main, build_parser())
