"""tokens/s of a sweep's cells in real vLLM: results/NAME.bench.json, which the ranking reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from halfbyte.errors import UsageError
from halfbyte.evaluate.speed import BASELINE, MODEL, BenchRequest, Measured, Variant, command_for
from halfbyte.evaluate.speed_result import summary
from halfbyte.evaluate.speed_runs import measure
from halfbyte.evaluate.speed_stats import ratio_interval
from halfbyte.files import make_directory, write_json
from halfbyte.platforms import load_platform
from halfbyte.serving import VllmInstall
from halfbyte.serving.bench import OK
from halfbyte.types import Progress

RATE = "output_tokens_per_second"
CELL = "cell-"
"""Before a cell's name in that of its server: a cell may be called `baseline`."""


def bench_cells(
    sweep: Path,
    rows: Sequence[Mapping[str, Any]],
    baseline: Path,
    platform: str,
    concurrency: int,
    install: VllmInstall,
    *,
    progress: Progress | None = None,
    **load: Any,
) -> dict[str, dict[str, Any]]:
    """Measure BF16 and every cell of `rows` (of sweep.json) that the platform serves; by cell, what was written.

    load   input_tokens, output_tokens, requests, repeats, turns, seed, together of a BenchRequest
    A cell with the bytes of another has that one's figures. What was measured before is not measured again.
    """
    known = load_platform(platform)
    made = [row for row in rows if row["path"] and not row["same_as"]]
    first = Variant(BASELINE, baseline)
    cells, refused = [], {}
    for row in made:
        variant = Variant(CELL + row["name"], sweep / row["path"])
        try:
            command_for(BenchRequest((variant,), known, (concurrency,), **load), variant, install)
            cells.append(variant)
        except UsageError as error:
            refused[row["name"]] = str(error)
    if not cells and not refused:
        return {}
    request = BenchRequest((first, *cells), known, (concurrency,), **load)
    found = measure(request, sweep, install, progress=progress)
    names = [cell.name.removeprefix(CELL) for cell in cells]
    results = {name: bench_cell(found, name) for name in names}
    results |= {name: {**_blank(found, name), "status": "failed", "reason": why} for name, why in refused.items()}
    results |= {row["name"]: results[row["same_as"]] for row in rows if row["same_as"] in results}
    works = {row["name"]: row.get("work") for row in rows}
    for name, result in results.items():
        write_json(make_directory(sweep / "results") / f"{name}.bench.json", {**result, "work": works[name]})
    return results


def bench_cell(found: Measured, name: str) -> dict[str, Any]:
    """One cell's file: status, reason, tokens_per_second (its median; null where not measured), interval, gain over
    BF16 {value, low, high} or null, the latencies, and `points` as in bench.json: the same beside BF16."""
    (level,) = found.request.concurrency
    runs, base = found.runs(CELL + name, f"c{level}"), found.runs(BASELINE, f"c{level}")
    mine, other = (summary(side, found.request.repeats) for side in (runs, base))
    both = mine["status"] == other["status"] == OK
    gain = ratio_interval([run[RATE] for run in runs], [run[RATE] for run in base]) if both else None
    return {
        **_blank(found, name),
        **mine,
        "tokens_per_second": mine[RATE] and mine[RATE]["value"],
        "speedup": gain,
        "points": [{"concurrency": level, BASELINE: other, MODEL: mine, "speedup": gain}],
    }


def _blank(found: Measured, name: str) -> dict[str, Any]:
    return {
        "schema": 1,
        "kind": "bench-cell",
        "cell": name,
        "platform": found.request.platform.name,
        "hardware": found.hardware,
        "vllm": found.install.version,
        "concurrency": found.request.concurrency[0],
        "tokens_per_second": None,
        "speedup": None,
    }
