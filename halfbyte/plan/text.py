"""Plain text for a terminal: sizes, wrapped lines, tables."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

WIDTH = 80


def human_size(count: float) -> str:
    """Bytes in the largest binary unit that leaves a whole part."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    unit, value = 0, float(count)
    while abs(value) >= 1024 and unit < len(units) - 1:
        value, unit = value / 1024, unit + 1
    digits = 0 if unit == 0 or abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f} {units[unit]}"


def wrap(text: str, first: str, rest: str | None = None) -> str:
    """A paragraph behind `first`, its further lines behind `rest` (unless said, two blanks more than `first`)."""
    after = first + "  " if rest is None else rest
    return textwrap.fill(
        text, WIDTH, initial_indent=first, subsequent_indent=after, break_long_words=False, break_on_hyphens=False
    )


def item(text: str, source: str = "") -> str:
    """A point of a list, with its source in brackets."""
    return wrap(f"{text} [{source}]" if source else text, "  - ", "    ")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows below their heading; columns of numbers are set to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    numeric = [all(_is_number(row[column]) for row in rows[1:]) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(row, widths, numeric)]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    return not cell or cell == "-" or cell.removeprefix("~")[:1].isdigit()
