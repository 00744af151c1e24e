"""The result files of a run directory, read as they are; a missing or broken one is noted, never an error."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.errors import UsageError

FILES: dict[str, tuple[str, ...]] = {
    "plan": ("plan.json",),
    "check": ("check.json",),
    "served": ("served.json",),
    "evaluation": ("eval.json",),
    "gates": ("gates.json",),
    "calibration": ("calibration/manifest.json",),
    "manifest": ("model/halfbyte.json", "halfbyte.json"),
}
"""Where each result stands; the manifest also directly, so that a report can be made of an artifact alone."""


@dataclass(frozen=True)
class Sources:
    """What was found. An absent or unreadable result is an empty mapping; `problems` names the unreadable ones."""

    run: Path
    plan: dict[str, Any] = field(default_factory=dict)
    check: dict[str, Any] = field(default_factory=dict)
    served: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    gates: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def read_sources(run_dir: Path) -> Sources:
    """All result files of `run_dir`. Raises UsageError when the directory is missing or holds none of them."""
    if not run_dir.is_dir():
        raise UsageError(f"{run_dir} is no directory: name the output directory of `halfbyte run`")
    found: dict[str, dict[str, Any]] = {}
    problems = []
    for name, places in FILES.items():
        file = next((run_dir / place for place in places if (run_dir / place).is_file()), None)
        if file is None:
            continue
        value = _read(file)
        if value is None:
            problems.append(f"{file.relative_to(run_dir)} is not a JSON object and was left out")
        else:
            found[name] = value
    if not found and not problems:
        names = ", ".join(places[0] for places in FILES.values())
        raise UsageError(f"{run_dir} holds no results ({names}): run `halfbyte run` first")
    return Sources(run=run_dir, problems=tuple(problems), **found)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
