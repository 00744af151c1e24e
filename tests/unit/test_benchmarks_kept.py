"""The table of benchmarks/quality.py goes on where it was: finished rows are kept under all that they depend on."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import kept as module
from benchmarks.kept import Kept, find, row_key


def test_rows_are_found_again_under_all_that_they_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, text = tmp_path / "quality.json", tmp_path / "text.txt"
    text.write_text("one")
    key = row_key("B3", "tokens", recipe={"method": "gptq"})
    first = Kept(file, {"kind": "quality"})
    first.add(first.table("model", "f", text, 40), {"name": "B3", "key": key, "kl": 1})
    first.add(first.table("model", "f", text, 40), {"name": "B4", "key": row_key("B4", "tokens"), "error": "no"})

    again = Kept(file, {"kind": "quality"})
    table = again.table("model", "f", text, 40)
    assert find(table, key) == {"name": "B3", "key": key, "kl": 1}
    assert find(table, row_key("B4", "tokens")) is None, "a row that failed is made again"
    for other in (row_key("B3", "tokens", recipe={"method": "awq"}), row_key("B3", "other", recipe={"method": "gptq"})):
        assert find(table, other) is None
    assert not again.table("model", "f", text, 10)["rows"] and not again.table("model", "g", text, 40)["rows"]
    text.write_text("two")
    assert not again.table("model", "f", text, 40)["rows"]
    monkeypatch.setattr(module, "ALGORITHM_VERSION", module.ALGORITHM_VERSION + 1)
    assert row_key("B3", "tokens", recipe={"method": "gptq"}) != key


def test_a_row_made_anew_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    file, text = tmp_path / "quality.json", tmp_path / "text.txt"
    text.write_text("one")
    kept = Kept(file, {})
    table = kept.table("model", "f", text, 40)
    for key in ("old", "new"):
        kept.add(table, {"name": "B3", "key": key})
    assert [row["key"] for row in Kept(file, {}).table("model", "f", text, 40)["rows"]] == ["new"]
    file.write_text("{ half a fi")
    assert Kept(file, {}).tables == [], "a broken file is made anew"
