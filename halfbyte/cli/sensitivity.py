"""sensitivity."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli.console import MIB, Format, emit, progress
from halfbyte.cli.make import Calibration, Device, Model, Set, Style, Text

SHOWN = 20
"""Rows of the table for people; JSON has them all."""


class Arithmetic(StrEnum):
    """What the measurement computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def sensitivity(
    model: Model,
    recipe: Annotated[str, typer.Option("--recipe", "-r", metavar="RECIPE", help="A preset's name or a YAML file.")],
    override: Set = None,
    budget: Annotated[
        float | None,
        typer.Option("--budget", metavar="BITS", help="Bits a quantized weight to spend on exemptions: a new recipe."),
    ] = None,
    text: Text = None,
    tokens: Annotated[int, typer.Option(metavar="N", min=64, help="Held tokens to measure on, about.")] = 2048,
    calibration: Calibration = None,
    dtype: Annotated[
        Arithmetic, typer.Option(metavar="DTYPE", help="float32, or bfloat16: half the memory, and a noise floor.")
    ] = Arithmetic.float32,
    device: Device = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Write sensitivity.json and recipe.yaml here.")
    ] = None,
    style: Style = Format.human,
) -> None:
    """Rank the fused groups by the damage each does alone; --budget makes a recipe that exempts the worst."""
    from halfbyte.experiments.sensitivity import sensitivity as measure
    from halfbyte.recipe import load_recipe

    chosen = load_recipe(recipe, override or [])
    with progress() as shown:
        result = measure(
            model,
            chosen,
            text=list(text or []),
            calibration=list(calibration or []) or None,
            tokens=tokens,
            budget=budget,
            output=output,
            device=device,
            dtype=dtype.value,
            progress=shown,
        )
    emit(result, style, _words(result, model, _spelled(recipe, override, calibration), output))


def _spelled(recipe: str, override: list[str] | None, calibration: list[Path] | None) -> tuple[str, str]:
    """The words of the next command: those that name the recipe, and those that name the calibration text."""
    changed = [word for value in override or [] for word in ("--set", value)]
    text = [word for path in calibration or [] for word in ("--calibration", str(path))]
    return shlex.join(["-r", recipe, *changed]), shlex.join(text)


def _words(result: dict[str, Any], model: str, given: tuple[str, str], output: Path | None) -> str:
    recipe, text = given[0], f" {given[1]}" if given[1] else ""
    lines = [_text_line(result), "", *_table(result["groups"])]
    if output:
        lines.append(f"all of them: {output / 'sensitivity.json'}")
    if "budget" in result:
        lines += ["", *_budget_lines(result["budget"], model, text, output)]
    else:
        lines.append(f"next: halfbyte sensitivity {model} {recipe}{text} --budget BITS -o DIR")
    return "\n".join(lines)


def _text_line(result: dict[str, Any]) -> str:
    text, floor = result["text"], result["noise_floor"]["kl_mean"]
    where = f"{text['source']}: {text['windows']} windows, {text['tokens']:,} scored tokens"
    return f"{where}; noise of the arithmetic ({result['dtype']}): KL {floor:.1e}"


def _table(groups: list[dict[str, Any]]) -> list[str]:
    width = max(len(g["group"]) for g in groups[:SHOWN])
    head = f"{'':4} {'quantized alone':{width}} {'KL':>9}  {'95 % interval':^20} {'rel. error':>10} {'tr(EHE)':>9}"
    lines = [f"{head} {'MiB if exempt':>13} {'KL/MiB':>9}"]
    for g in groups[:SHOWN]:
        added = g["bytes_added"] / MIB
        row = f"{g['rank']:4} {g['group']:{width}} {g['kl']:9.5f}  {g['low']:9.5f}..{g['high']:<9.5f} "
        row += f"{g['relative_error']:10.2%} {g['output_error']:9.3g} {added:13.3f} {g['kl_per_byte'] * MIB:9.4f}"
        lines.append(row)
    rest = groups[SHOWN:]
    if rest:
        lines.append(f"and {len(rest)} more, KL {rest[-1]['kl']:.5f} to {rest[0]['kl']:.5f} each")
    return lines


def _budget_lines(chosen: dict[str, Any], model: str, text: str, output: Path | None) -> list[str]:
    from halfbyte.experiments.exemptions import RECIPE, recipe_text

    added = chosen["bytes_added"] / MIB
    cost = f"{chosen['bits_before']:.3f} -> {chosen['bits_after']:.3f} bits a weight, {added:,.2f} MiB more"
    share = chosen["kl_saved"] / chosen["kl_sum"] if chosen["kl_sum"] else 0.0
    lines = [f"budget {chosen['bits']:g}: {len(chosen['groups'])} groups exempt, {cost}"]
    lines += [f"  {group}" for group in chosen["groups"]]
    saved = f"{chosen['kl_saved']:.4f} of {chosen['kl_sum']:.4f} ({share:.0%})"
    lines.append(f"predicted: KL {saved} saved; lone KLs summed, so a prediction: measure with `halfbyte eval`")
    if output is None:
        return [*lines, "", recipe_text(chosen)]
    return [*lines, f"next: halfbyte quantize {model} -r {output / RECIPE}{text} -o MODEL_DIR"]
