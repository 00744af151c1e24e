"""A sweep's results as one page, in HTML and in Markdown, from sweep.json and the benchmarks beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halfbyte.errors import UsageError
from halfbyte.report.blocks import (
    Block,
    Code,
    Facts,
    Heading,
    Items,
    Missing,
    Page,
    Pairs,
    Section,
    Words,
    left,
    right,
    table,
)
from halfbyte.report.build import SWEEP, write_page
from halfbyte.report.front import Candidate, cell_rates, front_section
from halfbyte.report.judged import VERDICTS, binding_words
from halfbyte.report.sources import read_result, tells_of
from halfbyte.report.sweep_cells import by_platform, differences, kl_of, matrix
from halfbyte.report.words import (
    command,
    dig,
    listing,
    mapping,
    measure,
    number,
    percent,
    seconds,
    significant,
    size,
    text,
)

STAGES = {
    "calibration": "Text: calibration and held out",
    "statistics": "Statistics, once for all cells",
    "solving": "Solving, what differs",
    "writing": "Writing",
    "reference": "BF16 reference, once for all cells",
    "evaluating": "Evaluating, every cell that differs",
    "total": "In all",
}


def build_sweep_report(directory: Path) -> tuple[Path, Path]:
    """Write report.html and report.md into a sweep's directory; returns both paths.

    Raises UsageError where sweep.json is not there or is none.
    """
    directory = Path(directory)
    result = read_result(directory / SWEEP)
    if result is None:
        raise UsageError(f"{directory / SWEEP} cannot be read: run `halfbyte sweep` again")
    return write_page(sweep_page(with_benches(result, directory)), directory / "report.html", directory / "report.md")


def with_benches(result: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The sweep with results/NAME.bench*.json and results/NAME/bench*.json of each cell as its `bench`, unless it has
    one. A result that tells of another work is left out."""
    cells = []
    for cell in map(mapping, listing(result.get("cells"))):
        name = str(cell.get("name"))
        if cell.get("bench") or not name.strip(".") or set(name) & set("/\\*?["):
            cells.append(cell)
            continue
        files = [
            path for way in (f"{name}.bench*.json", f"{name}/bench*.json") for path in (directory / "results").glob(way)
        ]
        read = [bench for bench in map(read_result, sorted(files)) if bench]
        found = [bench for bench in read if tells_of(bench, cell.get("work") or "")]
        cells.append({**cell, "bench": found} if found else cell)
    return {**result, "cells": cells}


def sweep_page(result: dict[str, Any]) -> Page:
    """Everything that the templates print."""
    cells = [mapping(cell) for cell in listing(result.get("cells"))]
    judged = [cell for cell in cells if cell.get("status") == "judged"]
    word, status = VERDICTS.get(str(result.get("verdict")), ("Not judged", "open"))
    sections = (
        _front(result, judged),
        matrix(result, judged, [cell for cell in cells if cell.get("status") != "judged"]),
        by_platform(judged),
        differences(judged),
        _notices(cells),
        _cost(result, cells),
        Section("provenance", "Provenance", _provenance(result)),
    )
    return Page(
        eyebrow="halfbyte sweep",
        title=f"{text(dig(result, 'model', 'name'))}: matrix {text(dig(result, 'matrix', 'name'))}",
        subtitle=text(dig(result, "matrix", "description"), ""),
        verdict={"word": word, "status": status, "text": _summary(result, cells, judged)},
        facts=_facts(result, judged),
        tiles=_tiles(result, judged),
        sections=[section for section in sections if section],
        missing=_missing(result, judged),
        footer="Made by halfbyte from sweep.json and the results beside it alone.",
    )


def _front(result: dict[str, Any], judged: list[dict[str, Any]]) -> Section | None:
    grouped: dict[str, list[dict[str, Any]]] = {}
    for cell in judged:
        key = [cell.get("bytes"), kl_of(cell, "value"), cell.get("same_as") or cell.get("name")]
        grouped.setdefault(str(key), []).append(cell)
    made = []
    for group in grouped.values():
        first = group[0]
        names = ", ".join(text(cell.get("name")) for cell in group)
        kl, method = measure(dig(first, "eval", "metrics", "kl_mean")), str(dig(first, "recipe", "method"))
        made.append(Candidate(names, method, kl, number(first.get("bytes")), cell_rates(first)))
    return front_section(made, _base(judged), number(dig(result, "ranking", "noise_floor")), with_bytes=True)


def _base(judged: list[dict[str, Any]]) -> Candidate | None:
    """BF16, where a cell was benchmarked beside it; its bytes would squeeze the others into a corner."""
    rates = next((found for cell in judged if (found := cell_rates(cell, "baseline"))), None)
    return Candidate("BF16", "", (0.0, None, None), None, rates) if rates else None


def _facts(result: dict[str, Any], judged: list[dict[str, Any]]) -> Pairs:
    best = next((c for c in judged if c.get("name") == dig(result, "best", "cell")), {})
    bound = binding_words(mapping(best.get("gates")))
    return [("What bound the best", bound)] if bound else []


def _missing(result: dict[str, Any], judged: list[dict[str, Any]]) -> list[Missing]:
    if not judged or any(cell_rates(cell) for cell in judged):
        return []
    on = next((str(name) for name in listing(dig(result, "request", "platforms"))), "PLATFORM")
    best = text(dig(result, "best", "cell"), "CELL")
    return [
        Missing(
            "Tokens/s of the cells",
            "Speed was not measured",
            f"halfbyte bench cells/{best} --on {on} -o results/{best}",
        )
    ]


def cost_words(result: dict[str, Any]) -> str:
    """What quantizing the matrix took beside one of its runs, in a sentence; empty where it was not measured."""
    cost = mapping(result.get("cost"))
    ratio = number(cost.get("ratio"))
    if ratio is None:
        return ""
    whole, one = seconds(cost.get("matrix_seconds")), seconds(cost.get("one_run_seconds"))
    name = text(cost.get("one_run"))
    return f"Quantizing the matrix took {whole}, {ratio:.2f} times what {name} alone takes ({one}); evaluations apart."


def _summary(result: dict[str, Any], cells: list[dict[str, Any]], judged: list[dict[str, Any]]) -> str:
    accepted = [text(cell.get("name")) for cell in judged if dig(cell, "gates", "verdict") == "accepted"]
    passed = f"{len(accepted)} of {len(cells)} cells pass the gates{': ' if accepted else ''}{', '.join(accepted)}."
    best = mapping(result.get("best"))
    if not best:
        return passed
    how = "The best" if best.get("accepted") else "None passes; the best of them"
    where = "" if best.get("portable") else " (not every platform that was named serves it)"
    return f"{passed} {how} is {text(best.get('cell'))}{where}."


def _tiles(result: dict[str, Any], judged: list[dict[str, Any]]) -> list[dict[str, str]]:
    best = next((c for c in judged if c.get("name") == dig(result, "best", "cell")), {})
    sharing = mapping(result.get("sharing"))
    ratio = number(dig(best, "eval", "metrics", "ppl_ratio", "value"))
    made = f"{text(sharing.get('distinct'))} of {text(sharing.get('cells'))}"
    parts = f"{text(sharing.get('distinct_parts'))} of {text(sharing.get('parts'))}"
    return [
        {"label": "Best", "value": text(best.get("name")), "note": text(best.get("title"), "")},
        {"label": "Its KL to BF16", "value": significant(kl_of(best, "value"), 3), "note": "nats a token, mean"},
        {"label": "Its perplexity", "value": percent(None if ratio is None else ratio - 1, signed=True), "note": ""},
        {"label": "Its size", "value": size(best.get("bytes")), "note": f"BF16: {size(best.get('bytes_bf16'))}"},
        {"label": "Artifacts that differ", "value": made, "note": "the others have the same bytes"},
        {"label": "Parts solved", "value": parts, "note": "the others are shared"},
    ]


def _notices(cells: list[dict[str, Any]]) -> Section | None:
    told: dict[str, list[str]] = {}
    for cell in cells:
        for notice in listing(cell.get("notices")):
            told.setdefault(text(notice), []).append(text(cell.get("name")))
    lines = [f"{', '.join(names)}: {notice}" for notice, names in told.items()]
    return Section("notices", "Notices", [Items(lines)]) if lines else None


def _cost(result: dict[str, Any], cells: list[dict[str, Any]]) -> Section:
    words = cost_words(result)
    rows = [_spent(cell) for cell in cells if mapping(cell.get("seconds"))]
    blocks: list[Block] = [Words(words)] if words else []
    blocks.append(Facts([(label, seconds(dig(result, "seconds", key))) for key, label in STAGES.items()]))
    if rows:
        columns = [left("Cell"), *(right(label) for label in ("Solving", "Spared by sharing", "Writing", "Evaluating"))]
        blocks += [Heading("By cell"), table(columns, rows, stack=True)]
    return Section("cost", "What it cost", blocks, "Cost")


def _spent(cell: dict[str, Any]) -> list[str]:
    spent = mapping(cell.get("seconds"))
    return [
        text(cell.get("name")),
        *(seconds(spent.get(key, 0.0)) for key in ("solving", "shared", "writing", "evaluating")),
    ]


def _provenance(result: dict[str, Any]) -> list[Block]:
    sets = [mapping(data) for data in listing(result.get("calibration"))]
    rows = [
        ("halfbyte", text(result.get("halfbyte"))),
        ("Model, SHA-256", text(dig(result, "model", "sha256"))),
        *(("Calibration tokens, SHA-256", f"{text(d.get('sha256'))} ({text(d.get('tokens'))} tokens)") for d in sets),
        ("Held-out tokens, SHA-256", text(dig(result, "text", "sha256"))),
    ]
    line = command(result.get("command"))
    return [*([Heading("Made with"), Code(line)] if line else []), Facts(rows)]
