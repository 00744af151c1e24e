"""calibrate."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli.console import Format, emit, progress
from halfbyte.cli.make import Device, Force, Output, RecipeOption, Style
from halfbyte.errors import UsageError

SOURCE = (
    "FILE or hub:DATASET, with :WEIGHT, :in-domain, :field=NAME after it; or one YAML file. None: the model writes."
)
_BAR = 30


class Strategy(StrEnum):
    """How a set is made."""

    curated = "curated"
    mixed = "mixed"
    stream = "stream"


def calibrate(
    model: Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help="Whose tokenizer, and who writes.")],
    output: Output,
    sources: Annotated[list[str] | None, typer.Argument(metavar="[SOURCE]...", help=SOURCE)] = None,
    recipe: RecipeOption = None,
    sequences: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Sequences; 128, or the recipe's (the strategy: 128 to 512).")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens", "--context", metavar="N", min=16, help="Tokens of the longest; 512, or the recipe's."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of sampling; 0, or the recipe's.")] = None,
    strategy: Annotated[
        Strategy,
        typer.Option(
            metavar="HOW",
            help="curated (filtered, weighted), or the text as it is: mixed (lengths), stream (one length).",
        ),
    ] = Strategy.curated,
    language: Annotated[
        list[str] | None, typer.Option(metavar="CODE", help="Keep documents in this language: en, de. Repeatable.")
    ] = None,
    near_duplicates: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Jaccard similarity of near duplicates, 0.8; or off.")
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Evaluation text that must not occur in the set. Repeatable."),
    ] = None,
    drop_contaminated: Annotated[
        bool, typer.Option("--drop-contaminated", help="Leave out documents that share 13 words in a row with it.")
    ] = False,
    allow_contamination: Annotated[
        bool, typer.Option("--allow-contamination", help="Take them all the same; the manifest says so.")
    ] = False,
    device: Device = None,
    force: Force = False,
    style: Style = Format.human,
) -> None:
    """Build a calibration set: from your text, filtered, weighted and checked, or written by the model."""
    from halfbyte.calibration import make_set, spec_from_words
    from halfbyte.experiments.quantize import device_of
    from halfbyte.files import locked
    from halfbyte.models import resolve_model
    from halfbyte.models.library import load_model, load_tokenizer
    from halfbyte.recipe import load_recipe

    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file: choose another -o")
    if output.exists() and any(output.iterdir()) and not force:
        raise UsageError(f"{output} is not empty: choose another -o, or --force")
    if drop_contaminated and allow_contamination:
        raise UsageError("--drop-contaminated and --allow-contamination are two different wishes: give one")
    where = device_of(device)
    known = load_recipe(recipe) if recipe else None
    options: dict[str, Any] = {"sequences": sequences, "max_tokens": max_tokens, "seed": seed}
    options |= {"languages": language or None, "held_out": held_out or None}
    spec = spec_from_words(
        sources or [], known.calibration.model_dump() if known else None, **options, **_similarity(near_duplicates)
    )
    with progress() as shown:
        path = resolve_model(model, shown)
        tokenizer = load_tokenizer(path)
        with locked(output):
            data = make_set(
                tokenizer,
                spec,
                strategy=strategy.value,
                writer=lambda: load_model(path, where),
                on_held_out="drop" if drop_contaminated else "allow" if allow_contamination else "refuse",
                methods=[known.method] if known else [],
                progress=shown,
            )
            data.save(output)
    emit(data.manifest, style, set_words(data.manifest, output, model, recipe))


def _similarity(word: str | None) -> dict[str, Any]:
    if word is None:
        return {}
    if word == "off":
        return {"near_duplicates": False}
    try:
        return {"near_duplicates": float(word)}
    except ValueError:
        raise UsageError(f"--near-duplicates {word}: give a similarity such as 0.8, or off") from None


def set_words(manifest: Mapping[str, Any], output: Path, model: str, recipe: str | None) -> str:
    """A calibration set in a few lines: sources, lengths, coverage, warnings, the next command."""
    from halfbyte.experiments.quantize import LEAST_TOKENS

    lines = [
        f"{output}: {manifest['sequences']:,} sequences, {manifest['tokens']:,} tokens, "
        f"SHA-256 {manifest['sha256'][:16]}"
    ]
    lines += _sources(manifest.get("sources") or [])
    lines += ["", *_histogram(manifest["histogram"]), "", *_measures(manifest)]
    if manifest["warnings"]:
        lines += ["", *(f"warning: {warning['message']}" for warning in manifest["warnings"])]
    follow = f"next: halfbyte quantize {model} -r {recipe or 'RECIPE'} --calibration {output} -o DIR"
    if manifest["tokens"] < LEAST_TOKENS:
        follow = f"too few for quantize, which takes {LEAST_TOKENS:,} tokens or more: raise --sequences or --max-tokens"
    return "\n".join([*lines, "", follow])


def _sources(rows: list[Mapping[str, Any]]) -> list[str]:
    """A table: what each source had, what each step left out, what it gives."""
    if not rows:
        return []
    names = [row["name"] + (" (in-domain)" if row["in_domain"] else "") for row in rows]
    steps = [step["step"] for step in rows[0]["steps"]]
    table = [["source", *steps, "sequences", "tokens", "share", "asked"]]
    for name, row in zip(names, rows):
        counts = [f"{step['documents']:,}" for step in row["steps"]]
        shares = [f"{row['share']:.1%}", f"{row['weight']:.1%}"]
        table.append([name, *counts, f"{row['sequences']:,}", f"{row['tokens']:,}", *shares])
    keep = [0] + [i for i in range(1, len(table[0])) if i > len(steps) or i == 1 or _tells(table, i)]
    widths = {i: max(len(line[i]) for line in table) for i in keep}
    shown = [
        "  ".join(line[i].ljust(widths[i]) if i == 0 else line[i].rjust(widths[i]) for i in keep) for line in table
    ]
    return ["", "documents after each step:", *shown]


def _tells(table: list[list[str]], column: int) -> bool:
    """Whether a step changed any source's count."""
    return any(line[column] != line[column - 1] for line in table[1:])


def _histogram(rows: list[Mapping[str, int]]) -> list[str]:
    most = max((row["tokens"] for row in rows), default=1)
    return [
        f"{row['from']:>6}-{row['to']:<6} tokens  {row['sequences']:>5} sequences  {row['tokens']:>9,} tokens  "
        + "#" * max(1, round(_BAR * row["tokens"] / most))
        for row in rows
    ]


def _measures(manifest: Mapping[str, Any]) -> list[str]:
    covered, varied, checked = manifest["coverage"], manifest["diversity"], manifest["contamination"]
    parts = [f"{covered['vocabulary']:.1%} of the vocabulary"]
    names = {"candidates": "the candidates'", "in_domain": "the in-domain", "held_out": "the held-out"}
    parts += [f"{covered[key]:.2%} of {name} tokens" for key, name in names.items() if covered.get(key) is not None]
    distinct, times = f"{varied['distinct_4grams']:.1%}", f"{varied['compression']:.1f}"
    lines = [
        f"coverage: {', '.join(parts)}",
        f"diversity: {distinct} of the 4-grams are distinct, bzip2 shrinks the text {times} times",
    ]
    if checked is None:
        return [*lines, "held-out text: not looked for (--held-out FILE)"]
    names_of = ", ".join(row["file"] for row in checked["held_out"])
    dropped = (
        f"; {checked['documents_dropped']:,} documents left out" if checked["documents_dropped"] is not None else ""
    )
    found = f"{checked['sequences']:,} of {manifest['sequences']:,} sequences share {checked['ngram']} words in a row"
    return [*lines, f"held-out text: {found} with {names_of}{dropped}"]
