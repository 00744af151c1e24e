"""Text from outside in Markdown, so that it can add no markup."""

from __future__ import annotations

import math
import re
from typing import Any

_SPECIAL = re.compile(r"([\\`*\[\]<>|])")


def finite(value: Any) -> float | None:
    """A number, or None for anything else: text, booleans, NaN, infinities."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def md(value: Any) -> str:
    """Text in one line with nothing that Markdown or HTML would read."""
    flat = " ".join(str(value).split()).replace("&", "&amp;")
    return _SPECIAL.sub(r"\\\1", flat).replace("\\<", "&lt;").replace("\\>", "&gt;")


def code(value: str) -> str:
    """Text as inline code, whatever ticks it holds."""
    flat = " ".join(value.split())
    ticks = "`" * (1 + max((len(run) for run in re.findall(r"`+", flat)), default=0))
    pad = " " if flat.startswith("`") or flat.endswith("`") else ""
    return f"{ticks}{pad}{flat}{pad}{ticks}"


def fence(body: str, language: str = "") -> str:
    """Text as a code block, whatever ticks it holds."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", body)), default=0))
    return f"{ticks}{language}\n{body}\n{ticks}"
