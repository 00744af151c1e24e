"""sweep."""

from __future__ import annotations

import shutil
import sys
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli.console import MIB, Format, emit, own_command, progress
from halfbyte.cli.make import (
    Calibration,
    Device,
    Force,
    Memory,
    Model,
    On,
    Output,
    Resume,
    Style,
    Text,
    Together,
    memory_limit,
)
from halfbyte.cli.workers import Ray, RayResources, RayWorkers
from halfbyte.cli.workers import ray_workers as workers_of

EXIT_CODES = {"accepted": 0, "rejected": 3, "failed": 1, "incomplete": 1}


class By(StrEnum):
    """What cells are ranked by."""

    kl = "kl"
    ppl = "ppl"


def sweep(
    model: Model,
    matrix: Annotated[
        str, typer.Option("--matrix", metavar="MATRIX", help="A matrix's name (halfbyte ls matrices) or a YAML file.")
    ],
    on: On,
    output: Output,
    cell: Annotated[
        list[str] | None,
        typer.Option("--cell", metavar="NAME", help="Only this cell, or those that match 'A*'. Repeatable."),
    ] = None,
    text: Text = None,
    calibration: Calibration = None,
    gate: Annotated[
        list[str] | None,
        typer.Option("--gate", metavar="GATE", help="A budget: ppl=+5%, top1=90%, kl=0.1, speed@N=+60%. Repeatable."),
    ] = None,
    by: Annotated[By, typer.Option("--by", metavar="WHAT", help="What quality is: kl or ppl.")] = By.kl,
    bench: Annotated[
        int | None,
        typer.Option("--bench", metavar="N", min=1, help="Measure tokens/s in real vLLM here, N sequences at once."),
    ] = None,
    together: Together = 1,
    vllm: Annotated[str | None, typer.Option(metavar="PATH", help="vLLM's executable or environment.")] = None,
    device: Device = None,
    ray: Ray = None,
    ray_workers: RayWorkers = None,
    ray_resources: RayResources = None,
    memory: Memory = None,
    resume: Resume = False,
    force: Force = False,
    style: Style = Format.human,
) -> None:
    """The experiment matrix: every cell made and judged, what they share done once, ranked by quality."""
    from halfbyte.evaluate.speed_machine import measured_here
    from halfbyte.experiments.sweep import sweep as do
    from halfbyte.platforms import load_platform
    from halfbyte.serving import find_vllm

    install = find_vllm(vllm) if bench else None
    with progress() as shown, workers_of(ray, ray_workers, ray_resources, device, shown) as them:
        if bench:
            measured_here([load_platform(on[0])], shown)
        run = partial(
            do,
            model,
            matrix,
            output,
            platforms=on,
            text=list(text or []),
            calibration=list(calibration or []) or None,
            gates=list(gate or []),
            by=by.value,
            only=list(cell or []),
            device=device,
            force=force,
            command=own_command(),
            progress=shown,
            workers=them,
            memory=memory_limit(memory),
            judged_on=list(them.resources) if them else [],
            bench=bench,
        )
        result = run()
        if bench and install:
            _bench(output, model, result, on[0], bench, install, together, shown)
            result = run(force=False)
    emit(result, style, sweep_words(result, output))
    code = EXIT_CODES[result["verdict"]]
    if code:
        raise typer.Exit(code)


def _bench(
    output: Path, model: str, result: dict[str, Any], on: str, level: int, install: Any, together: int, shown: Any
) -> None:
    from halfbyte.experiments.bench_cells import bench_cells
    from halfbyte.models import resolve_model

    base = resolve_model(model, shown)
    found = bench_cells(output, result["cells"], base, on, level, install, progress=shown, together=together)
    for name, row in found.items():
        if row["status"] != "ok":
            shown.say(f"{name}: tokens/s not measured: {row['status']}: {row['reason']}")


def sweep_words(result: dict[str, Any], output: Path) -> str:
    """The table, what failed, what it cost, and the best cell with the next command."""
    from halfbyte.report.sweep import cost_words

    judged = [row for row in result["cells"] if row["status"] == "judged"]
    rest = [row for row in result["cells"] if row["status"] != "judged"]
    lines = [_table(judged), ""] if judged else []
    lines += [f"{row['name']}: {row['status']} ({row['stage']}): {row['reason']}" for row in rest]
    lines += [_on_each(row) for row in judged if row["judged_on"]]
    sharing, spent = result["sharing"], result["seconds"]
    lines.append(
        f"{sharing['cells']} cells, {sharing['distinct']} artifacts that differ; "
        f"{sharing['parts']} parts of blocks, {sharing['distinct_parts']} that differ"
    )
    lines.append("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in spent.items()))
    lines += [line for line in [cost_words(result)] if line]
    if judged:
        how, floor = result["ranking"]["method"], result["ranking"]["noise_floor"]
        lines.append(f"ranked by {result['ranking']['by']}; {how} ({floor:.2g} nats)")
        if all(row["tokens_per_second"] is None for row in judged):
            lines.append("tokens/s: not measured")
    lines += [f"report: {output / 'report.html'} (and report.md)", _last(result, output)]
    return "\n".join(lines)


def _on_each(row: dict[str, Any]) -> str:
    """A cell's KL on each platform that it was judged on."""
    each = row["judged_on"].items()
    figures = [f"{r['eval']['metrics']['kl_mean']['value']:.4f} on {name} ({r['hardware']})" for name, r in each]
    return f"{row['name']}: KL {', '.join(figures)}"


def _last(result: dict[str, Any], output: Path) -> str:
    best = result["best"]
    if best is None:
        return "best: none; next: put right what failed, and run the same command again"
    path = output / best["path"]
    platform = result["request"]["platforms"][0]
    doubts = [] if best["accepted"] else ["no cell passes the gates"]
    doubts += [] if best["portable"] else ["not every platform named serves it"]
    said = f" ({'; '.join(doubts)})" if doubts else ""
    return f"best: {best['cell']}{said} in {path}; next: halfbyte check {path} --serve --on {platform}"


def _table(rows: list[dict[str, Any]]) -> str:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    words = [_words(row) for row in rows]
    shown = [name for name in words[0] if any(row[name] for row in words)]
    for name in shown:
        table.add_column(name, justify="left" if name in LEFT else "right", overflow="fold")
    for row in words:
        table.add_row(*(row[name] for name in shown))
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
    console = Console(width=width, color_system=None, highlight=False)
    with console.capture() as captured:
        console.print(table, markup=False)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()).strip("\n")


WIDTH = 240
"""Of a table that no terminal bounds."""
LEFT = ("cell", "method", "in BF16", "95 % interval", "gates", "front", "note")


def _words(row: dict[str, Any]) -> dict[str, str]:
    from halfbyte.report.sweep_cells import exemption_words

    metrics = row["eval"]["metrics"]
    kl, speed = metrics["kl_mean"], row["tokens_per_second"]
    notes = [f"same bytes as {row['same_as']}"] if row["same_as"] else []
    notes += [] if row["portable"] else ["not portable"]
    return {
        "rank": str(row["rank"]),
        "cell": row["name"],
        "method": row["recipe"]["method"],
        "group": "/".join(map(str, row["groups"])),
        "in BF16": exemption_words(row),
        "bits": f"{row['bits_per_linear_weight']:.2f}",
        "MiB": f"{row['bytes'] / MIB:,.0f}" if row["bytes"] >= 10 * MIB else f"{row['bytes'] / MIB:.2f}",
        "KL": f"{kl['value']:.4f}",
        "95 % interval": f"{kl['low']:.4f}..{kl['high']:.4f}",
        "ppl": f"{metrics['ppl_ratio']['value'] - 1:+.1%}",
        "top-1": f"{metrics['top1']['value']:.1%}",
        "tokens/s": "" if speed is None else f"{speed:,.0f}",
        "gates": row["gates"]["verdict"],
        "front": "front" if row["pareto"] else "",
        "note": ", ".join(notes),
    }
