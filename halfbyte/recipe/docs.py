"""The recipe reference in Markdown, generated from the schema and the presets so that it cannot go stale."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from halfbyte.recipe.loader import list_presets, spell_type
from halfbyte.recipe.schema import Recipe


def recipe_schema_markdown() -> str:
    """A Markdown table of every recipe key: type, default, meaning. Nested keys are written with a dot."""
    lines = ["| key | values | default | meaning |", "|---|---|---|---|"]
    lines += [_row(name, field) for name, field in _flat(Recipe)]
    return "\n".join(lines) + "\n"


def preset_markdown() -> str:
    """A Markdown table of every preset with its one-line description."""
    lines = ["| preset | method | group | format | what it is |", "|---|---|---|---|---|"]
    for name, description, recipe in list_presets():
        cells = (f"`{name}`", recipe.method, recipe.group_size, recipe.format, _escape(description))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _flat(model: type[BaseModel], prefix: str = "") -> list[tuple[str, FieldInfo]]:
    rows: list[tuple[str, FieldInfo]] = []
    for name, field in model.model_fields.items():
        inner: Any = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            rows += _flat(inner, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, field))
    return rows


def _row(name: str, field: FieldInfo) -> str:
    cells = (f"`{name}`", _escape(spell_type(field.annotation)), _default(field), _escape(field.description or ""))
    return "| " + " | ".join(cells) + " |"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None or value == "":
        return "–" if value == "" else "follows"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(value)}]`"
    return f"`{value}`"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
