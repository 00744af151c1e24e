"""What 4 bits cost SmolLM2-135M, recipe by recipe: seconds, memory, bits, perplexity and KL, in one table.

    python benchmarks/quality.py [--recipes R …] [--timed R …] [--peers NAME …] [--artifact NAME=DIR …] [--dithered]
                                 [--second-text FILE] [--data DIR] [--device cuda] [--json FILE] [--also FILE …]

Recipes of one effort are solved in memory in ONE pass over the blocks, from the same statistics; `--timed` ones run the
real `halfbyte quantize` in a fresh process, and their artifact is scored. BF16 and plain round-to-nearest of the same
grids stand beside them, and the noise floor below. Scales and norms are trained afterwards where the recipe says so, as
`halfbyte quantize` does. `--peers` runs those of peers.py on the same tokens and scores their files. With --json FILE,
rows that FILE has already are not made again, nor those of other runs' files after --also: the table can be made in
pieces, and a run that was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from candidates import Candidate, Solved
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
from kept import Kept, find, row_key, row_of
from measure import Measured, measure
from peer_runs import PEERS, Peer, add_options, known_peers, model_in, run_peer
from rtn import nearest
from scoring import FEW, HEADER, Reference, bits_of_artifact, bits_of_recipe, cells, load_scored, score_row

from halfbyte.artifact import ArtifactWriter
from halfbyte.calibration import CalibrationSet
from halfbyte.engine import Job, quantize_blocks
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.experiments.quantize import tune as train
from halfbyte.models import Checkpoint, resolve_model
from halfbyte.models.library import load_model
from halfbyte.plan.layers import assign, quantized
from halfbyte.recipe import Recipe

DEFAULT = (
    "method=rtn,group_size=64",
    "method=gptq,group_size=64",
    "method=awq,group_size=64",
    "method=nvfp4,group_size=16",
    "method=nvfp4,group_size=64",
)


def main(arguments: argparse.Namespace) -> None:
    """Make the candidates, score them on every text, print the tables and write the JSON."""
    data = data_directory(arguments.data)
    recipes = [read_recipe(words) for words in arguments.recipes]
    timed = [read_recipe(words) for words in arguments.timed]
    outside = [_named(words) for words in arguments.artifact]
    texts = [data / TEXT] + [_text(words, data) for words in arguments.second_text]
    model = resolve_model(MODEL, Report())
    command = shlex.join(["python", *sys.argv])
    facts = {"schema": 1, "kind": "quality", "command": command, "machine": machine(), "device": arguments.device}
    kept = Kept(arguments.json, facts, arguments.also)
    rivals = known_peers(arguments)
    shown = []
    for source in [model] + ([dithered_copy(model)] if arguments.dithered else []):
        title, fingerprint = MODEL if source == model else f"{MODEL}, dithered", Checkpoint(source).fingerprint()
        tables = [kept.table(title, fingerprint, text, arguments.windows) for text in texts]
        calibration = calibration_tokens(source, data, arguments.sequences)
        with tempfile.TemporaryDirectory(prefix="quality-") as scratch:
            candidates = yardsticks(recipes + timed, source)
            candidates += time_recipes(timed, source, calibration, tables, Path(scratch), arguments.device)
            candidates += outside if source == model else []
            candidates += peer_files(rivals.values(), source, calibration, tables, Path(scratch), arguments.peer_python)
            candidates += solve(recipes, source, calibration, tables, kept, arguments.device)
            for text, table in zip(texts, tables):
                for row in score_rows(table, source, text, candidates, arguments.windows, arguments.device):
                    kept.add(table, row)
                shown.append({**table, "rows": [found for c in candidates if (found := row_of(table, c.name))]})
    for table in shown:
        print(render(table, arguments.windows))


def _wanted(candidate: Candidate, tables: list[dict[str, Any]]) -> bool:
    """Whether one of the tables has no row of it."""
    return any(find(table, candidate.key) is None for table in tables)


def _key(label: str, recipe: Recipe, calibration: CalibrationSet, **more: Any) -> str:
    return row_key(label, calibration.sha256, recipe=recipe.identity(), **more)


def solve(
    recipes: list[tuple[str, Recipe]],
    model: Path,
    calibration: CalibrationSet,
    tables: list[dict[str, Any]],
    kept: Kept,
    device: str = "cpu",
) -> list[Candidate]:
    """Every recipe that has a row to make in one pass over the blocks, in memory (one for each kind of statistics);
    then their training."""
    checkpoint = Checkpoint(model)
    found = [Candidate(label, _key(label, recipe, calibration)) for label, recipe in recipes]
    todo = [(c, Solved(checkpoint, recipe)) for c, (_, recipe) in zip(found, recipes) if _wanted(c, tables)]
    if not todo:
        return found
    for alike in sorted({solved.recipe.statistics for _, solved in todo}):
        jobs = [
            Job(s.recipe, quantized(s.plans), lambda _: False, s.emit) for _, s in todo if s.recipe.statistics == alike
        ]
        say(f"one pass over the blocks for {len(jobs)} recipes")
        started = time.monotonic()
        quantize_blocks(checkpoint, jobs, calibration.sequences, device, progress=Report())
        took = {"recipes": len(jobs), "seconds": round(time.monotonic() - started, 1)}
        kept.facts.setdefault("passes", []).append(took)
    for candidate, solved in todo:
        started = time.monotonic()
        train(cast(ArtifactWriter, solved), calibration, device, Report())
        candidate.make = solved.tensors
        candidate.facts = {
            "recipe": solved.recipe.identity(),
            "bits_per_weight": bits_of_recipe(solved.recipe, model),
            "solve_seconds": solved.seconds,
            "train_seconds": round(time.monotonic() - started, 1) if solved.tuned else 0.0,
            "tuning": solved.note or None,
            "mean_relative_error": sum(solved.errors) / len(solved.errors),
        }
    return found


def time_recipes(
    recipes: list[tuple[str, Recipe]],
    model: Path,
    calibration: CalibrationSet,
    tables: list[dict[str, Any]],
    scratch: Path,
    device: str = "cpu",
) -> list[Candidate]:
    """The real `halfbyte quantize` in a fresh process each: wall seconds and peak memory of the whole of it."""
    found = []
    for label, recipe in recipes:
        candidate = Candidate(f"{label} (timed)", _key(label, recipe, calibration, timed=True))
        found.append(candidate)
        if not _wanted(candidate, tables):
            continue
        place = scratch / f"timed-{len(found)}"
        measured = quantize_process(recipe, model, calibration, place, device)
        if measured.status:
            candidate.facts = {"error": measured.reason}
            continue
        say(f"halfbyte quantize {label}: {measured.seconds:.1f} s, {measured.peak_rss_mib} MiB")
        candidate.directory = place / "artifact"
        candidate.facts = {
            "recipe": recipe.identity(),
            "seconds": measured.seconds,
            "cpu_seconds": measured.cpu_seconds,
            "peak_rss_mib": measured.peak_rss_mib,
            "bits_per_weight": bits_of_artifact(candidate.directory),
        }
    return found


def peer_files(
    rivals: Iterable[Peer],
    model: Path,
    calibration: CalibrationSet,
    tables: list[dict[str, Any]],
    scratch: Path,
    python: Path | None = None,
) -> list[Candidate]:
    """What the peers make of the model, each in a process of its own; only those that have a row to make."""
    found = []
    for index, peer in enumerate(rivals):
        key = row_key(peer.label, calibration.sha256, packages=peer.packages, options=peer.options)
        candidate = Candidate(peer.label, key)
        found.append(candidate)
        if not _wanted(candidate, tables):
            continue
        place = scratch / f"peer-{index}"
        try:
            measured, versions = run_peer(peer, model, calibration.save(place / "tokens"), place, python)
        except HalfbyteError as error:  # it does not install: told in its row, and the others go on
            candidate.facts = {"error": str(error)}
            continue
        if measured.status:
            candidate.facts = {"error": measured.reason}
            continue
        candidate.directory = model_in(place / "artifact")
        candidate.facts = {"seconds": measured.seconds, "peak_rss_mib": measured.peak_rss_mib, "versions": versions}
        candidate.facts["bits_per_weight"] = bits_of_artifact(candidate.directory)
    return found


def quantize_process(
    recipe: Recipe, model: Path, calibration: CalibrationSet, place: Path, device: str = "cpu"
) -> Measured:
    """`halfbyte quantize` as a user runs it, into place/artifact."""
    place.mkdir(parents=True)
    calibration.save(place / "calibration")
    written = recipe.model_dump(mode="json", exclude_none=True)
    (place / "recipe.yaml").write_text(json.dumps(written), encoding="utf-8")
    command = [sys.executable, "-m", "halfbyte", "quantize", str(model), "-r", str(place / "recipe.yaml")]
    command += ["--calibration", str(place / "calibration"), "-o", str(place / "artifact"), "--device", device]
    beside = Path(sys.executable).with_name("halfbyte")
    if beside.is_file():
        command[:3] = [str(beside)]
    return measure(command, place / "log.txt")


def yardsticks(recipes: list[tuple[str, Recipe]], model: Path) -> list[Candidate]:
    """BF16 itself, and plain round-to-nearest on every grid and group size that the recipes use."""
    found = [Candidate("BF16", row_key("BF16", ""), {"bits_per_weight": 16.0})]
    checkpoint = Checkpoint(model)
    seen = []
    for _, recipe in recipes:
        grid = (str(recipe.grid), recipe.group_size)
        if grid in seen:
            continue
        seen.append(grid)
        name = f"RTN, extremes, {grid[0]} g{grid[1]}"

        def make(recipe: Recipe = recipe) -> dict[str, torch.Tensor]:
            schemes = quantized(assign(recipe, checkpoint)).items()
            return {f"{n}.weight": nearest(checkpoint.load(f"{n}.weight"), s.grid, s.group_size) for n, s in schemes}

        found.append(Candidate(name, row_key(name, ""), {"bits_per_weight": bits_of_recipe(recipe, model)}, make))
    return found


def score_rows(
    table: dict[str, Any], model: Path, text: Path, candidates: list[Candidate], windows: int, device: str = "cpu"
) -> Iterator[dict[str, Any]]:
    """Every candidate that `table` has no row of, on one text: its row as it is done."""
    todo = [candidate for candidate in candidates if find(table, candidate.key) is None]
    if not todo:
        return
    reference = Reference(model, text, windows, device)
    table.update(reference.describe())
    host = load_model(model, device)
    original = {name: value.clone() for name, value in host.state_dict().items()}
    for candidate in todo:
        row = {**_score(candidate, reference, host, original), "key": candidate.key}
        say("  ".join(cells(row, windows)))
        yield row


def _score(candidate: Candidate, reference: Reference, host: Any, original: dict[str, Any]) -> dict[str, Any]:
    if candidate.facts.get("error"):
        return {"name": candidate.name, **candidate.facts}
    try:
        if candidate.directory is None:
            if candidate.make:
                host.load_state_dict({**original, **candidate.make()})
            scores = reference.score(host if candidate.make else None)
            return score_row(candidate.name, scores, **candidate.facts)
        bits = candidate.facts.get("bits_per_weight") or bits_of_artifact(candidate.directory)
        scores = reference.score(load_scored(candidate.directory, reference.device))
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
    return Candidate(name, row_key(name, "", tensors=Checkpoint(directory).fingerprint()), directory=Path(directory))


def _text(words: str, data: Path) -> Path:
    for path in (Path(words), data / words):
        if path.is_file():
            return path
    raise UsageError(f"--second-text {words}: no such file, here or in {data}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several: dict[str, Any] = {"nargs": "*", "default": [], "metavar": "RECIPE"}
    parser.add_argument(
        "--recipes", **{**several, "default": list(DEFAULT)}, help="presets, YAML files, or key=value,key=value"
    )
    parser.add_argument("--timed", **several, help="run these as whole `halfbyte quantize` processes")
    parser.add_argument("--artifact", nargs="*", default=[], metavar="NAME=DIR", help="score these directories too")
    parser.add_argument("--peers", nargs="*", default=[], metavar="PEER", help=f"score these too: {', '.join(PEERS)}")
    add_options(parser)
    parser.add_argument("--dithered", action="store_true", help="everything again on the dithered copy of the model")
    parser.add_argument("--second-text", nargs="*", default=[], metavar="FILE", help="score on these texts too")
    parser.add_argument("--windows", type=int, default=40, help="windows of the larger figure (default 40)")
    parser.add_argument("--sequences", type=int, default=SEQUENCES, help="calibration sequences (default 128)")
    parser.add_argument("--data", metavar="DIR", help="where calibration/ and text/ are (else HALFBYTE_DATA)")
    parser.add_argument("--device", default="cpu", help="where to solve, train and score (default cpu)")
    parser.add_argument("--also", nargs="*", type=Path, default=[], metavar="FILE", help="rows of other runs' --json")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all figures here, and take finished rows from there"
    )
    return parser


if __name__ == "__main__":
    run_main(main, build_parser())
