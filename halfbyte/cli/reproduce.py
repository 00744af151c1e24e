"""reproduce."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli.console import Format, emit, progress
from halfbyte.cli.make import Style


def reproduce(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="halfbyte.json, or an artifact's directory.")],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The BF16 model, where the manifest does not lead to it.")
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            exists=True,
            help="The calibration set, or the text that it was cut from.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Keep the new artifact here.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(metavar="X", min=0.0, help="Relative difference of a weight that is still equal.")
    ] = None,
    style: Style = Format.human,
) -> None:
    """Make an artifact again from its manifest, and compare the hashes of its files."""
    from halfbyte.experiments.reproduce import TOLERANCE
    from halfbyte.experiments.reproduce import reproduce as make

    with progress() as shown:
        result = make(
            manifest,
            model=model,
            calibration=calibration or (),
            output=output,
            tolerance=TOLERANCE if tolerance is None else tolerance,
            progress=shown,
        )
    emit(result, style, reproduction_words(result))
    if result["result"] == "different":
        raise typer.Exit(1)


def reproduction_words(result: dict[str, Any]) -> str:
    """What differed beforehand, which files differ, the verdict."""
    lines = [f"not as it was: {row['what']}: {row['then']} then, {row['now']} now" for row in result["differences"]]
    changed = [row["file"] for row in result["files"] if not row["same"]]
    lines += [f"differs: {name}" for name in changed]
    files, weights = len(result["files"]), result["weights"]
    if weights and weights["where"]:
        largest = "another shape or scheme" if weights["largest"] is None else f"{weights['largest']:.2%}"
        lines.append(
            f"weights: {weights['different']} of {weights['compared']} tensors differ, at most by {largest} "
            f"({weights['where']}); {weights['tolerance']:.2%} counts as equal"
        )
    elif weights:
        lines.append(f"weights: all {weights['compared']} tensors have the same values")
    elif changed:
        lines.append("weights: not compared, because the artifact's own files are not there")
    same = f"{files - len(changed)} of {files} files have the same SHA-256"
    lines.append(f"{result['artifact']}: {result['result']}; {same}; {result['seconds']:.0f} s")
    return "\n".join(lines)
