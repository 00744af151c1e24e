"""The licence of a model, as the front matter of its own card states it."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

FIELDS = ("license", "license_name", "license_link")
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)


def licence_of(directory: Path) -> dict[str, str] | None:
    """Those of FIELDS that README.md states, where it states a license; None for a model without such a card."""
    try:
        found = _FRONT.match((directory / "README.md").read_text(encoding="utf-8"))
        fields = yaml.safe_load(found.group(1)) if found else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(fields, dict) or not isinstance(fields.get("license"), str):
        return None
    return {name: fields[name] for name in FIELDS if isinstance(fields.get(name), str)}
