"""From cells and their results to what a sweep says: rows in order, the best, what it cost, the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from halfbyte.evaluate import bootstrap
from halfbyte.experiments.cells import Cell
from halfbyte.experiments.gate_readers import Results
from halfbyte.experiments.gates import Gate, evaluate_gates
from halfbyte.experiments.ranking import Scored, floor_of, rank

METHOD = (
    "paired bootstrap over windows: equal where the 95 % interval of the difference holds 0, "
    "or where the difference is below the noise floor"
)

FACTS = (
    "title",
    "groups",
    "exemptions",
    "bytes",
    "bytes_bf16",
    "bits_per_weight",
    "bits_per_linear_weight",
    "platforms",
)
"""Of a cell's `facts`, those that stand in its row."""
SEVERITY = ("accepted", "incomplete", "rejected")
"""Verdicts, the worst last: gates must hold on every platform that a cell was judged on."""


def standings(
    cells: Sequence[Cell],
    results: Mapping[str, Mapping[str, Any]],
    manifests: Mapping[str, Mapping[str, Any]],
    benches: Mapping[str, Mapping[str, Any]],
    gates: Sequence[Gate],
    by: str,
) -> dict[str, Any]:
    """The parts of sweep.json that follow from results: "cells", "ranking", "best", "verdict".

    results     Judge's, by the name of a cell or of the one it is the same as
    manifests   of the cells that are made
    benches     results/NAME.bench.json of the cells that were benchmarked: tokens_per_second counts in the ranking, and
                points for gates on speed that are stated
    """
    speeds = {name: float(v["tokens_per_second"]) for name, v in benches.items() if v.get("tokens_per_second")}
    wanted = any(gate.stated and gate.family == "speed" for gate in gates)
    rows = {cell.name: _row(cell, manifests.get(cell.name), speeds.get(cell.name)) for cell in cells}
    scored, floor = [], None
    for cell in cells:
        result = None if cell.reason else results.get(cell.same_as or cell.name)
        if result is None:
            continue
        row = rows[cell.name]
        known = {"bench.json": benches.get(cell.name)} if wanted else {}
        each = {name: _judged(gates, one, known) for name, one in result.get("judged_on", {"": result}).items()}
        judged = max((one["gates"] for one in each.values()), key=lambda g: SEVERITY.index(g["verdict"]))
        row |= {"status": "judged", "eval": result["eval"], "gates": judged, "check": result.get("check")}
        row["judged_on"] = each if "judged_on" in result else None
        row["seconds"]["evaluating"] = 0.0 if cell.same_as else result["seconds"]
        scored.append(Scored(cell.name, result["windows"], row["bytes"], speeds.get(cell.name)))
        floor = result["eval"]["noise_floor"]
    order = rank(scored, floor, by) if floor is not None else []
    for place, entry in enumerate(order, 1):
        rows[entry["name"]] |= {"order": place, **{key: value for key, value in entry.items() if key != "name"}}
    ranked = [rows[entry["name"]] for entry in order]
    ranking = {"by": by, "method": METHOD, "confidence": bootstrap.CONFIDENCE}
    ranking |= {"noise_floor": None if floor is None else floor_of(floor, by), "order": [row["name"] for row in ranked]}
    rest = [row for row in rows.values() if row["order"] is None]
    return {"verdict": _verdict(rest, ranked), "best": _best(ranked), "ranking": ranking, "cells": ranked + rest}


def _judged(gates: Sequence[Gate], result: Mapping[str, Any], known: Results) -> dict[str, Any]:
    """What an evaluation on one platform says, and `known`: the cell's other results."""
    check = result.get("check")
    judged = {
        "eval": result["eval"],
        "gates": evaluate_gates(gates, result["eval"], check, results=known),
        "check": check,
    }
    return {**judged, "hardware": result.get("hardware")}


def _row(cell: Cell, manifest: Mapping[str, Any] | None, speed: float | None) -> dict[str, Any]:
    recipe = cell.recipe
    made = manifest or {}
    facts = dict(cell.facts)
    for key in ("bytes", "bytes_bf16", "bits_per_weight"):
        facts[key] = made.get(key, facts.get(key))
    return {
        "name": cell.name,
        "status": "failed" if cell.reason else "made" if made else "waiting",
        "stage": cell.stage or None,
        "reason": cell.reason or None,
        "rank": None,
        "order": None,
        "equal_to": None,
        "difference": None,
        "why": None,
        "pareto": False,
        "path": f"cells/{cell.name}" if made else None,
        "work": made.get("work"),
        "same_as": cell.same_as,
        "recipe": recipe.identity() if recipe else None,
        **{key: facts.get(key) for key in FACTS},
        "portable": not any((facts.get("platforms") or {}).values()),
        "notices": made.get("notices", cell.notices),
        "tokens_per_second": speed,
        "eval": None,
        "gates": None,
        "check": None,
        "judged_on": None,
        "seconds": {key: round(value, 3) for key, value in cell.seconds.items()},
    }


def _verdict(rest: Sequence[Mapping[str, Any]], ranked: Sequence[Mapping[str, Any]]) -> str:
    if any(row["gates"]["verdict"] == "accepted" for row in ranked):
        return "accepted"
    if ranked:
        return "rejected"
    return "failed" if rest and all(row["status"] == "failed" for row in rest) else "incomplete"


def _best(ranked: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The first that every platform serves and the gates accept; failing that, the first that is accepted, the first
    that is portable, the first."""
    if not ranked:
        return None

    def merit(row: Mapping[str, Any]) -> tuple[bool, bool]:
        return (row["gates"]["verdict"] != "accepted", not row["portable"])

    row = min(ranked, key=merit)
    accepted = row["gates"]["verdict"] == "accepted"
    return {"cell": row["name"], "path": row["path"], "accepted": accepted, "portable": row["portable"]}


def cost(cells: Sequence[Cell], statistics: float) -> dict[str, Any] | None:
    """What quantizing the matrix took beside one GPTQ run of it: statistics, that cell's solving and its writing.

    The run is the matrix's first symmetric GPTQ cell (failing that, its first cell) as if it had been made alone.
    """
    made = [cell for cell in cells if not cell.reason and not cell.same_as and "solving" in cell.seconds]
    if not made:
        return None
    one = next((c for c in made if c.recipe and c.recipe.rounding == "gptq" and c.recipe.grid == "int4_sym"), made[0])
    alone = statistics + sum(one.seconds.get(key, 0.0) for key in ("solving", "shared", "writing"))
    whole = statistics + sum(c.seconds.get(key, 0.0) for c in cells for key in ("solving", "writing"))
    return {
        "one_run": one.name,
        "one_run_seconds": round(alone, 3),
        "matrix_seconds": round(whole, 3),
        "ratio": round(whole / max(alone, 1e-9), 3),
    }
