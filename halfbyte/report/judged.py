"""The judgement: gates with their margins, and which of them bound."""

from __future__ import annotations

from typing import Any

from halfbyte.report import plots
from halfbyte.report.blocks import Cell, Missing, Section, Words, left, picture, right, table
from halfbyte.report.sources import Sources
from halfbyte.report.words import MISSING, listing, mapping, number, percent, significant, text

STATUSES = {"passed": "passed", "failed": "failed"}
VERDICTS = {
    "accepted": ("Accepted", "passed"),
    "rejected": ("Rejected", "failed"),
    "failed": ("Failed", "failed"),
    "incomplete": ("Incomplete", "open"),
}
RULE = (
    "A gate passes when the unfavourable end of its interval keeps the limit (the line; the tinted side is allowed). "
    "What was not measured does not pass."
)


def verdict(judgement: dict[str, Any]) -> dict[str, str]:
    """Word, status and text of gates.json."""
    word, status = VERDICTS.get(str(judgement.get("verdict")), ("Not judged", "open"))
    rows = (mapping(gate) for gate in listing(judgement.get("gates")))
    told = " ".join(f"{text(row.get('text'))}." for row in rows if row.get("text"))
    default = told or "No gate was applied: run `halfbyte run`, which judges against a budget."
    return {"word": word, "status": status, "text": text(judgement.get("text"), default)}


def gates(sources: Sources) -> Section | Missing:
    """Each gate with its limit, what was measured, and what is to spare."""
    rows = [mapping(gate) for gate in listing(sources.gates.get("gates"))]
    if not rows:
        return Missing("Gates", "No gates were applied", sources.command("gates"))
    bound = binding(rows)
    columns = [
        left("Gate"),
        left(""),
        right("Limit"),
        right("Measured"),
        right("Interval", wide=True),
        right("To spare"),
        picture("Interval against the limit"),
    ]
    drawn = table(columns, [_gate(row, row is bound) for row in rows], stack=True)
    return Section("gates", "Gates", [drawn, Words(RULE, soft=True)])


def _gate(row: dict[str, Any], binds: bool) -> list[Cell | str]:
    show = spelling(row)
    bounds = [number(row.get(key)) for key in ("low", "high")]
    bullet = plots.gate_bullet(row, plots.limit_number(row.get("limit")))
    where = f"in {text(row['measured_in'])}" if row.get("measured_in") else ""
    notes = ["the one that binds"] * binds + ["not required"] * (row.get("required") is False) + [where] * bool(where)
    return [
        Cell(text(row.get("name")), note=", ".join(notes), code=True),
        Cell(text(row.get("status"), MISSING), status=STATUSES.get(str(row.get("status")), "open")),
        text(row.get("limit")),
        show(row.get("value")) if number(row.get("value")) is not None else "–",
        "–" if None in bounds else f"{show(bounds[0])} to {show(bounds[1])}",
        margin_words(row),
        Cell("" if bullet else text(row.get("text"), ""), bullet=bullet),
    ]


def spelling(row: dict[str, Any]) -> Any:
    """How a gate's numbers are written: as its limit is."""
    spelled = text(row.get("limit"))
    if "%" in spelled:
        return lambda value: percent(value, signed=spelled.startswith(("+", "-")))
    return (lambda value: f"{significant(value)} GiB") if spelled.endswith("GiB") else significant


def margin(row: dict[str, Any]) -> float | None:
    """From the interval's unfavourable end to the limit, in the gate's unit; negative where it is over the limit."""
    limit = plots.limit_number(row.get("limit"))
    low, high = number(row.get("low")), number(row.get("high"))
    if limit is None or low is None or high is None:
        return None
    return low - limit if plots.is_least(row, limit) else limit - high


def margin_words(row: dict[str, Any]) -> str:
    """The margin as `6.79 points` (of percent) or `0.0112`; a dash where a gate has no number."""
    left_over = margin(row)
    if left_over is None:
        return "–"
    spelled = text(row.get("limit"))
    if "%" in spelled:
        return f"{100 * left_over:.3g} points"
    return significant(left_over, 3) + " GiB" * spelled.endswith("GiB")


def budget_left(row: dict[str, Any]) -> float | None:
    """The margin as a share of what the limit allows: 0.3 says that 30 % of the budget is left."""
    limit, left_over = plots.limit_number(row.get("limit")), margin(row)
    if limit is None or left_over is None:
        return None
    is_share = plots.is_least(row, limit) and 0 < limit < 1 and not text(row.get("limit")).startswith("+")
    budget = 1 - limit if is_share else abs(limit)
    return left_over / budget if budget else None


def binding(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The gate that decided: a failed one before all others, then that with the least of its budget left."""
    known = [
        (row.get("status") != "failed", share, i)
        for i, row in enumerate(rows)
        if (share := budget_left(row)) is not None
    ]
    failed = [row for row in rows if row.get("status") == "failed"]
    if failed and not any(not passed for passed, _, _ in known):
        return failed[0]
    return rows[min(known)[2]] if known else None


def binding_words(judgement: dict[str, Any]) -> str:
    """Which gate bound and by how much, in a sentence; empty where no gate has numbers."""
    row = binding([mapping(gate) for gate in listing(judgement.get("gates"))])
    if row is None:
        return ""
    name, limit, share = text(row.get("name")), plots.limit_number(row.get("limit")), budget_left(row)
    if limit is None or share is None:
        return f"{name} ({text(row.get('text'), 'failed')})."
    least = plots.is_least(row, limit)
    worst = spelling(row)(row.get("low" if least else "high"))
    held = f"{name}: {worst} at worst, the limit is {'at least' if least else 'at most'} {text(row.get('limit'))}"
    if share < 0:
        return f"{held}; over the limit by {margin_words(row).removeprefix('-')}."
    return f"{held}; {margin_words(row)} to spare, {share:.0%} of the budget."
