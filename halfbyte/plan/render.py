"""A plan as text for a terminal: what is made of the model, what that costs and saves, and what to watch for."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

WIDTH = 100


def render_plan(plan: dict[str, Any]) -> str:
    """The plan in plain text, at most 100 columns wide but for commands."""
    sections = [
        _head(plan),
        _linears(plan),
        _groups(plan),
        _exemptions(plan),
        _memory(plan),
        _speed(plan),
        _others(plan),
        _commands(plan),
        _notices(plan),
    ]
    return "\n\n".join(section for section in sections if section)


def human_size(count: float) -> str:
    """Bytes in the largest binary unit that leaves a whole part."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    unit, value = 0, float(count)
    while abs(value) >= 1024 and unit < len(units) - 1:
        value, unit = value / 1024, unit + 1
    digits = 0 if unit == 0 or abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f} {units[unit]}"


def _head(plan: dict[str, Any]) -> str:
    model, sizes = plan["model"], plan["bytes"]
    lines = [
        f"{model['path']}: {model['family']}, {model['blocks']} blocks, {model['parameters'] / 1e6:,.0f} M parameters",
        f"Recipe: {plan['title']}",
        *(_wrap(f"because {reason}", "  ") for reason in plan["reasons"]),
        f"Size: {human_size(sizes['before'])} in BF16 -> {human_size(sizes['after'])} "
        f"({sizes['after'] / max(1, sizes['before']):.0%})",
        f"Bits: {_bits(sizes['bits_per_quantized_weight'])} per quantized weight, scales counted; "
        f"{_bits(sizes['bits_per_parameter'])} per parameter of the whole model",
    ]
    return "\n".join(lines)


def _linears(plan: dict[str, Any]) -> str:
    rows = [("linear", "count", "out x in", "stored as", "BF16", "4-bit", "bits/weight")]
    for row in plan["linears"]:
        stored = "BF16" if row["grid"] == "bf16" else f"{row['grid']} g{row['group_size']}"
        before, after = human_size(row["bytes_before"]), human_size(row["bytes_after"])
        shape = f"{row['out_features']} x {row['in_features']}"
        if not row["bytes_before"]:
            stored, before, after = "tied to embeddings", "-", "-"
        rows.append((row["linear"], str(row["count"]), shape, stored, before, after, _bits(row["bits_per_weight"])))
    other = human_size(plan["bytes"]["other_tensors"])
    rows.append(("other tensors", "", "", "as they are", other, other, ""))
    return _table(rows)


def _groups(plan: dict[str, Any]) -> str:
    rows = [f"  {row['in_features']} inputs ({row['linears']} linears): {row['text']}" for row in plan["group_sizes"]]
    return "Group size\n" + "\n".join(rows) if rows else ""


def _exemptions(plan: dict[str, Any]) -> str:
    rows = []
    for row in plan["exemptions"]:
        count = f"{row['linears']} linear{'s' * (row['linears'] != 1)}"
        rows.append(f"  {row['reason']}: {count}, +{human_size(row['bytes_added'])} over quantizing")
    return "Kept in BF16\n" + "\n".join(rows) if rows else ""


def _memory(plan: dict[str, Any]) -> str:
    lines = []
    for row in plan["memory"]:
        load = f"{row['concurrency']} sequences of {row['context']:,} tokens"
        parts = (
            f"weights {human_size(row['weights_bytes'])}, KV cache {human_size(row['kv_bytes'])} "
            f"({human_size(row['kv_bytes_per_token'])} a token, {row['kv_cache_dtype']}), "
            f"activations about {human_size(row['activation_bytes'])}"
        )
        if row["usable_bytes"] is None:
            verdict = "this platform's memory is not known here"
        else:
            verdict = (
                f"{'fits' if row['fits'] else 'DOES NOT FIT'} in {human_size(row['usable_bytes'])} usable; "
                f"room for {row['max_concurrency']:,} such sequences (BF16: {row['bf16_max_concurrency']:,})"
            )
        lines.append(_wrap(f"{row['platform']}, {load}: {human_size(row['total_bytes'])} = {parts}; {verdict}", "  "))
    return "Memory (estimate)\n" + "\n".join(lines) if lines else ""


def _speed(plan: dict[str, Any]) -> str:
    blocks = []
    for table in plan["speed"]:
        levels = list(table["rows"][0]["gain"])
        rows = [("recipe", "kernel", *(f"conc. {level}" for level in levels), "prefill", "needs")]
        for row in table["rows"]:
            gains = [f"{row['gain'][level]:.2f}x" for level in levels]
            prefill = "-" if row["prefill"] is None else f"{row['prefill']:.2f}x"
            rows.append((row["title"].split(",")[0], row["kernel"], *gains, prefill, row["flags"]))
        source = _wrap(f"Speed against BF16 on {table['platform']} ({table['evidence']})", "")
        blocks.append(f"{source}\n{_table(rows)}")
    return "\n\n".join(blocks)


def _others(plan: dict[str, Any]) -> str:
    lines = [_wrap(f"or {entry['title']}: {entry['reason']}", "  ") for entry in plan["alternatives"]]
    lines += [_wrap(f"not {entry['title']}: {entry['reason']}", "  ") for entry in plan["avoided"]]
    return "Alternatives\n" + "\n".join(lines) if lines else ""


def _commands(plan: dict[str, Any]) -> str:
    return "\n\n".join(f"Serve on {name}\n{textwrap.indent(line, '  ')}" for name, line in plan["commands"].items())


def _notices(plan: dict[str, Any]) -> str:
    return "Notices\n" + "\n".join(_wrap(f"- {notice}", "  ") for notice in plan["notices"]) if plan["notices"] else ""


def _bits(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _wrap(text: str, indent: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_long_words=False)


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    numeric = [all(_is_number(row[column]) for row in rows[1:]) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(row, widths, numeric)]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    return not cell or cell == "-" or cell[0].isdigit()
