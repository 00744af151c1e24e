"""The judgement: gates with their margins, which of them bound, and what was done to pass them."""

from __future__ import annotations

from typing import Any

from halfbyte.report import plots
from halfbyte.report.blocks import Block, Cell, Missing, Section, Words, left, picture, right, table
from halfbyte.report.sources import Sources
from halfbyte.report.words import (
    MISSING,
    dig,
    listing,
    mapping,
    number,
    percent,
    plural,
    seconds,
    significant,
    size,
    text,
)

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


def mitigation(sources: Sources) -> Section | None:
    """The ladder: what was changed rung by rung, what it cost and what it did."""
    rungs = [mapping(rung) for rung in listing(sources.mitigation.get("ladder"))]
    if not rungs:
        return None
    gates_named = list(
        dict.fromkeys(name for r in rungs for side in ("before", "after") for name in mapping(r.get(side)))
    )
    columns = [
        left("Rung"),
        left("Change", wide=True),
        right("Took"),
        right("Bytes"),
        *(right(name) for name in gates_named),
        left("Outcome", wide=True),
    ]
    rows = [_rung(rung, gates_named, _limits(sources.gates)) for rung in rungs]
    blocks: list[Block] = [
        table(columns, rows, stack=True),
        Words("One rung after the other until the gates hold; a gate's value before → after it.", soft=True),
    ]
    final = _final(sources.mitigation)
    blocks += [Words(f"In the end: {final}")] if final else []
    return Section("mitigation", "What was done to pass", blocks, "Mitigation")


def _final(mitigation: dict[str, Any]) -> str:
    final = mitigation.get("final")
    return text(final.get("text") or final.get("verdict"), "") if isinstance(final, dict) else text(final, "")


def _rung(rung: dict[str, Any], names: list[str], spelled: dict[str, Any]) -> list[Cell | str]:
    words = "; ".join(f"{key}: {_from_to(value)}" for key, value in mapping(rung.get("changes")).items()) or "–"
    added, spent = number(dig(rung, "cost", "bytes_added")), number(dig(rung, "cost", "seconds"))
    kept = rung.get("kept")
    return [
        Cell(text(rung.get("title") or rung.get("rung")), note=text(rung.get("why"), "")),
        Cell(words, code=True),
        "–" if spent is None else seconds(spent),
        "–" if added is None else f"{'−' if added < 0 else '+'}{size(abs(added))}",
        *(_effect(rung, name, spelled.get(name, significant)) for name in names),
        Cell("kept" if kept else "not kept", status="passed" if kept else "open", note=text(rung.get("verdict"), "")),
    ]


def _from_to(value: Any) -> str:
    pair = listing(value)
    if len(pair) != 2:
        return text(value)
    if all(isinstance(side, list) for side in pair):
        return ", ".join(f"+{text(one)}" for one in pair[1] if one not in pair[0]) or "fewer"
    return f"{text(pair[0])} → {text(pair[1])}"


def _effect(rung: dict[str, Any], name: str, show: Any) -> str:
    before, after = (number(dig(rung, side, name)) for side in ("before", "after"))
    return "–" if after is None else " → ".join(show(x) for x in (before, after) if x is not None)


def _limits(judgement: dict[str, Any]) -> dict[str, Any]:
    return {text(row.get("name")): spelling(row) for row in map(mapping, listing(judgement.get("gates")))}


def mitigation_words(sources: Sources) -> str:
    """What was done, in a sentence; empty without a ladder."""
    rungs = [mapping(rung) for rung in listing(sources.mitigation.get("ladder"))]
    if not rungs:
        return ""
    kept = [rung for rung in rungs if rung.get("kept")]
    added = sum(number(dig(rung, "cost", "bytes_added")) or 0.0 for rung in kept)
    spent = sum(number(dig(rung, "cost", "seconds")) or 0.0 for rung in rungs)
    what = ", ".join(text(rung.get("title") or rung.get("rung")) for rung in kept) or "none"
    more = f"; +{size(added)}" if added > 0 else ""
    return f"{plural(len(rungs), 'rung')} tried in {seconds(spent)}, kept: {what}{more}."
