"""The weights: bytes by component, what stays in BF16, memory to serve, and the error of every linear."""

from __future__ import annotations

from typing import Any

from halfbyte.report import plots
from halfbyte.report.blocks import Bars, Block, Cell, Facts, Heading, Heat, Missing, Section, Words, left, right, table
from halfbyte.report.sources import Sources
from halfbyte.report.words import MISSING, count, listing, mapping, number, significant, size, text

PLAN = "Not known: there is no plan here"


def byte_section(sources: Sources) -> Section | Missing:
    """Two bars on one scale and the table of their parts, exemptions and group sizes."""
    drawn = plots.byte_bars(sources.plan)
    if drawn is None:
        return Missing("Bytes by component", PLAN, sources.command("plan"))
    rows: list[list[Cell | str]] = [
        [Cell(row["label"], swatch=row["class"]), row["before"], row["after"], row["ratio"]] for row in drawn["rows"]
    ]
    rows.append([Cell("All tensors", bold=True), drawn["before"], drawn["after"], drawn["ratio"]])
    blocks: list[Block] = [
        Bars(drawn["bars"]),
        table([left("Component"), right("BF16"), right("4-bit"), right("Share kept")], rows),
        *_exemptions(sources.plan),
        *_groups(sources.plan),
    ]
    return Section("bytes", "Bytes by component", blocks, "Bytes")


def _exemptions(plan: dict[str, Any]) -> list[Block]:
    rows = [mapping(row) for row in listing(plan.get("exemptions"))]
    if not rows:
        return []
    drawn = [[text(r.get("reason")), text(r.get("linears")), "+" + size(r.get("bytes_added"))] for r in rows]
    return [Heading("Kept in BF16"), table([left("Why"), right("Linears"), right("Bytes added")], drawn)]


def _groups(plan: dict[str, Any]) -> list[Block]:
    rows = [mapping(row) for row in listing(plan.get("group_sizes"))]
    pairs = [(text(row.get("in_features")), text(row.get("text"))) for row in rows]
    return [Heading("Group size by input width"), Facts(pairs)] if pairs else []


def memory(sources: Sources) -> Section | None:
    """What serving takes at a context and a concurrency, as the plan estimates it; BF16 beside it."""
    rows = [row for entry in listing(sources.plan.get("memory")) for row in _memory_rows(mapping(entry))]
    if not rows:
        return None
    columns = [
        left("Platform"),
        right("Tokens × sequences"),
        right("Weights"),
        right("KV cache"),
        right("In all"),
        right("Usable"),
        right("BF16, in all"),
        left("Fits"),
        right("Most sequences"),
    ]
    note = "An estimate from the plan: weights, KV cache, activations and the runtime. BF16: the unquantized model."
    return Section("memory", "Memory to serve", [table(columns, rows, stack=True), Words(note, soft=True)], "Memory")


def _memory_rows(entry: dict[str, Any]) -> list[list[Cell | str]]:
    levels = [mapping(level) for level in listing(entry.get("levels"))] or [entry]
    return [_memory_row(entry, {**entry, **level}) for level in levels]


def _memory_row(entry: dict[str, Any], need: dict[str, Any]) -> list[Cell | str]:
    fits, before = need.get("fits"), "–"
    if need.get("concurrency") == entry.get("concurrency") and number(entry.get("bf16_total_bytes")) is not None:
        before = size(entry.get("bf16_total_bytes"))
    return [
        text(need.get("platform")),
        f"{count(need.get('context'))} × {count(need.get('concurrency'))}",
        size(need.get("weights_bytes")),
        Cell(size(need.get("kv_bytes")), note=text(need.get("kv_cache_dtype"), "")),
        Cell(size(need.get("total_bytes")), bold=True),
        size(need.get("usable_bytes")) if need.get("usable_bytes") else "not known",
        before,
        "–" if fits is None else Cell("yes", status="passed") if fits else Cell("no", status="failed"),
        count(need.get("max_concurrency")),
    ]


def errors(sources: Sources) -> Section | Missing:
    """Depth × linear, shaded by output error, and by sensitivity where it was measured."""
    found = plots.errors_by_linear(sources.manifest, sources.plan)
    heat = plots.heat_map(found)
    lone = plots.sensitivity_by_linear(sources.sensitivity)
    alone = plots.heat_map(lone, "KL alone", _nats)
    if heat is None and alone is None:
        words = "Not measured: the artifact's manifest is not here, or holds no error of any linear"
        return Missing("Error by depth and linear", words, sources.command("manifest"))
    blocks: list[Block] = []
    if heat:
        worst = [[Cell(row["name"], code=True), row["error"]] for row in plots.worst_linears(found)]
        blocks += [Heat(heat, "of the output's size, on calibration tokens"), Heading("Largest errors")]
        blocks.append(table([left("Linear"), right("Output error")], worst))
    if alone:
        blocks += [Heading("Sensitivity: KL when this linear's group alone is in 4 bits"), Heat(alone, "nats a token")]
        blocks += _most_sensitive(sources.sensitivity)
    return Section("errors", "Error by depth and linear", blocks, "Errors by linear")


def _nats(value: float) -> str:
    return significant(value, 2)


def _most_sensitive(sensitivity: dict[str, Any], most: int = 8) -> list[Block]:
    rows = [mapping(row) for row in listing(sensitivity.get("groups"))]
    rows = sorted((r for r in rows if number(r.get("kl")) is not None), key=lambda r: -(number(r.get("kl")) or 0))[
        :most
    ]
    columns = [left("Group", wide=True), right("KL alone, nats"), right("Interval"), right("Bytes, were it exempt")]
    drawn = []
    for row in rows:
        ends = [number(row.get(key)) for key in ("low", "high")]
        interval = "–" if None in ends else f"{significant(ends[0], 3)} to {significant(ends[1], 3)}"
        added = "–" if number(row.get("bytes_added")) is None else "+" + size(row.get("bytes_added"))
        drawn.append([Cell(text(row.get("group")), code=True), significant(row.get("kl"), 3), interval, added])
    return [table(columns, drawn, stack=True)] if drawn else []


def byte_words(sources: Sources) -> tuple[str, str, str]:
    """Size, how much smaller than BF16, bits a weight."""
    plan = mapping(sources.plan.get("bytes"))
    after = number(sources.manifest.get("bytes")) or number(plan.get("after"))
    before = number(plan.get("before")) or number(sources.manifest.get("bytes_bf16"))
    smaller = f"{before / after:.1f}× smaller than BF16 ({size(before)})" if before and after else ""
    bits = number(sources.manifest.get("bits_per_weight")) or number(plan.get("bits_per_quantized_weight"))
    return size(after), smaller, MISSING if bits is None else significant(bits, 3)
