"""Finished rows of an earlier run of `quality.py`: taken from its JSON where nothing that they depend on has changed.

A row depends on the model, the text and its windows, the calibration tokens, the recipe and the algorithms; a scored
directory on its tensors. So the table can be made in pieces, and a run that was killed loses only the row it was at.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfbyte.engine import ALGORITHM_VERSION
from halfbyte.errors import HalfbyteError
from halfbyte.files import write_json
from halfbyte.models.checkpoint import read_json


class Kept:
    """The tables of one JSON file, found by what they were scored on.

    file     where they are kept; None: nowhere
    facts    what the file says beside them
    also     files of other runs, whose rows are taken too
    """

    def __init__(self, file: Path | None, facts: dict[str, Any], also: Sequence[Path] = ()):
        self.file, self.facts = file, facts
        self.tables = _tables(file) if file else []
        for other in also:
            for table in _tables(other):
                mine = next((t for t in self.tables if t["key"] == table["key"]), None)
                if mine is None:
                    self.tables.append(table)
                else:
                    mine["rows"] += [r for r in table["rows"] if find(mine, r["key"]) is None]

    def table(self, title: str, model: str, text: Path, windows: int) -> dict[str, Any]:
        """The table of a model (its fingerprint) on a text, with the rows that are there."""
        words = hashlib.sha256(text.read_bytes()).hexdigest()
        key = digest({"model": model, "text": words, "windows": windows})
        for table in self.tables:
            if table.get("key") == key:
                return table
        table = {"model": title, "key": key, "rows": []}
        self.tables.append(table)
        return table

    def add(self, table: dict[str, Any], row: dict[str, Any]) -> None:
        """A row that is done, in the place of an older one of its name; the file is written."""
        table["rows"] = [r for r in table["rows"] if r["name"] != row["name"]] + [row]
        self.write()

    def write(self) -> None:
        """All that is there, whole or not at all."""
        if self.file is not None:
            write_json(self.file, {**self.facts, "tables": self.tables})


def _tables(file: Path) -> list[dict[str, Any]]:
    try:
        return list(read_json(file).get("tables", [])) if file.is_file() else []
    except HalfbyteError:
        return []


def find(table: dict[str, Any], key: str) -> dict[str, Any] | None:
    """The row of a table that was made under that key, if it is there and has no error."""
    return next((row for row in table["rows"] if row.get("key") == key and not row.get("error")), None)


def row_of(table: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The row of that name."""
    return next((row for row in table["rows"] if row["name"] == name), None)


def row_key(name: str, calibration: str, **more: Any) -> str:
    """What a row depends on beside its table."""
    return digest({"name": name, "calibration": calibration, "algorithms": ALGORITHM_VERSION, **more})


def digest(facts: dict[str, Any]) -> str:
    """A key of plain facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
