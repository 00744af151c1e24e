"""The ladder of mitigations: what was changed rung by rung, what each cost, and how close it came to the limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from halfbyte.report.blocks import Block, Cell, Charts, Section, Words, left, right, table
from halfbyte.report.chart import Rule, Series, Value, trend
from halfbyte.report.judged import spelling
from halfbyte.report.plots import limit_number
from halfbyte.report.sources import Sources
from halfbyte.report.words import dig, listing, mapping, measure, number, plural, seconds, significant, size, text

Show = Callable[[Any], str]
KEPT, GIVEN_UP = ("kept", "attention", "dot"), ("given up", "other", "triangle")
"""Name, colour and shape of a step's mark."""
MANY = 4
"""Names in a list beyond which they are counted: the section on bytes has them all."""
NOTHING: Value = (None, None, None)


def mitigation(sources: Sources) -> Section | None:
    """The ladder as curves towards each gate's limit, and as a table of changes and costs."""
    rungs = _rungs(sources)
    if not rungs:
        return None
    names = list(dict.fromkeys(name for r in rungs for side in ("before", "after") for name in mapping(r.get(side))))
    gates = _gates(sources)
    columns = [
        left("Rung", wide=True),
        left("Change", wide=True),
        right("Took"),
        right("Bytes"),
        *(right(f"{name}, {text(gates[name].get('limit'))}" if name in gates else name) for name in names),
        left("Outcome", wide=True),
    ]
    shown = {name: spelling(gates[name]) if name in gates else significant for name in names}
    rows = [_rung(i, rung, shown) for i, rung in enumerate(rungs, 1)]
    charts = [chart for name in names if (chart := _chart(name, rungs, gates.get(name, {}), sources.mitigation))]
    note = "One rung after the other until the gates hold; a gate's value before → after it."
    blocks: list[Block] = [Charts(charts)] if charts else []
    blocks += [table(columns, rows, stack=True), Words(note, soft=True)]
    final = _final(sources.mitigation)
    blocks += [Words(f"In the end: {final}")] if final else []
    return Section("mitigation", "What was done to pass", blocks, "Mitigation")


def _rungs(sources: Sources) -> list[dict[str, Any]]:
    return [mapping(rung) for rung in listing(sources.mitigation.get("ladder"))]


def _gates(sources: Sources) -> dict[str, dict[str, Any]]:
    """A row of each gate by its name, for its limit: of gates.json, else (while a climb goes on) of its start."""
    rows = [*listing(dig(sources.mitigation, "start", "gates")), *listing(sources.gates.get("gates"))]
    return {text(row.get("name")): row for row in map(mapping, rows)}


def _chart(
    name: str, rungs: list[dict[str, Any]], gate: dict[str, Any], mitigation: dict[str, Any]
) -> dict[str, Any] | None:
    """One gate's value over the steps, with its limit; a step that was given up lies beside the curve."""
    kept, given_up = [_value(mapping(mitigation.get("start")), name, dig(rungs[0], "before", name))], [NOTHING]
    for rung in rungs:
        value = _value(rung, name, dig(rung, "after", name))
        kept.append(value if rung.get("kept") else NOTHING)
        given_up.append(NOTHING if rung.get("kept") else value)
    series = [
        Series(words, look, values, shape) for (words, look, shape), values in ((KEPT, kept), (GIVEN_UP, given_up))
    ]
    limit, steps = limit_number(gate.get("limit")), ["start", *(str(i) for i in range(1, len(rungs) + 1))]
    show = spelling(gate) if gate else significant
    rules = [] if limit is None else [Rule(limit, f"the limit: {text(gate.get('limit'))}")]
    drawn = [one for one in series if any(value[0] is not None for value in one.values)]
    return trend(
        f"{name} by rung", steps, drawn, show, names=("", "rung"), rules=rules, zero=limit is None or limit < 0.5
    )


def _value(step: dict[str, Any], name: str, plain: Any) -> Value:
    """A gate's value at a step with its interval, where the step's own rows tell it."""
    row = next((r for r in map(mapping, listing(step.get("gates"))) if r.get("name") == name), None)
    return (number(plain), None, None) if row is None else measure(row)


def _final(mitigation: dict[str, Any]) -> str:
    final = mitigation.get("final")
    return text(final.get("text") or final.get("verdict"), "") if isinstance(final, dict) else text(final, "")


def _rung(place: int, rung: dict[str, Any], shown: dict[str, Show]) -> list[Cell | str]:
    words = "; ".join(f"{key}: {_from_to(value)}" for key, value in mapping(rung.get("changes")).items()) or "–"
    added, spent = number(dig(rung, "cost", "bytes_added")), number(dig(rung, "cost", "seconds"))
    kept = rung.get("kept")
    return [
        Cell(f"{place}. {text(rung.get('title') or rung.get('rung'))}", note=text(rung.get("why"), "")),
        Cell(words, code=True),
        "–" if spent is None else seconds(spent),
        "–" if added is None else f"{'−' if added < 0 else '+'}{size(abs(added))}",
        *(_effect(rung, name, show) for name, show in shown.items()),
        Cell("kept" if kept else "not kept", status="passed" if kept else "open", note=text(rung.get("verdict"), "")),
    ]


def _from_to(value: Any) -> str:
    pair = listing(value)
    if len(pair) != 2:
        return text(value)
    if all(isinstance(side, list) for side in pair):
        more = [text(one) for one in pair[1] if one not in pair[0]]
        return f"+{len(more)} linears" if len(more) > MANY else ", ".join(f"+{one}" for one in more) or "fewer"
    return f"{text(pair[0])} → {text(pair[1])}"


def _effect(rung: dict[str, Any], name: str, show: Show) -> str:
    before, after = (number(dig(rung, side, name)) for side in ("before", "after"))
    return "–" if after is None else " → ".join(show(x) for x in (before, after) if x is not None)


def mitigation_words(sources: Sources) -> str:
    """What was done, in a sentence; empty without a ladder."""
    rungs = _rungs(sources)
    if not rungs:
        return ""
    kept = [rung for rung in rungs if rung.get("kept")]
    added = sum(number(dig(rung, "cost", "bytes_added")) or 0.0 for rung in kept)
    spent = sum(number(dig(rung, "cost", "seconds")) or 0.0 for rung in rungs)
    what = ", ".join(text(rung.get("title") or rung.get("rung")) for rung in kept) or "none"
    more = f"; +{size(added)}" if added > 0 else ""
    return f"{plural(len(rungs), 'rung')} tried in {seconds(spent)}, kept: {what}{more}."
