"""`eval`: what it reads, and that a second artifact of the same model costs no second BF16 run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import halfbyte.experiments.evaluating as evaluating
from halfbyte import Recipe, quantize
from halfbyte.evaluate.windows import doubling


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "held.txt"
    file.write_text("".join(f"Line {i} of a text that is long enough.\n" for i in range(80)))
    return file


def test_mixed_lengths_up_to_the_context(model: Path, made: Path, text: Path, as_json: Any, tmp_path: Path) -> None:
    found = as_json("eval", made, "--text", text, "--tokens", 1600, "--lengths", "mixed", "-o", tmp_path / "a")
    lengths = doubling(1600, 256)
    assert (found["text"]["windows"], found["text"]["window"]) == (len(lengths), 256)
    assert found["text"]["tokens"] == sum(lengths) - len(lengths)
    rows = found["by_position"]
    assert rows[0]["from"] == 1 and rows[-1]["to"] == 256 and len(rows) == 5
    assert len(found["worst"]) == 20 and all(row["context"] in text.read_text() for row in found["worst"])


def test_the_same_text_runs_bf16_once(
    model: Path, made: Path, text: Path, as_json: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(str(model), Recipe(method="rtn", group_size=64), tmp_path / "second")
    words = ("--text", text, "--tokens", 900, "--lengths", 100)
    first = as_json("eval", made, *words)
    monkeypatch.setattr(evaluating, "load_model", pytest.fail)
    second, again = as_json("eval", tmp_path / "second", *words), as_json("eval", made, *words)
    assert first["text"]["windows"] == 9 and first["metrics"] == again["metrics"]
    assert second["metrics"]["ppl_baseline"] == first["metrics"]["ppl_baseline"]
    assert second["metrics"]["kl_mean"]["value"] != first["metrics"]["kl_mean"]["value"]


def test_contradictions_are_refused(made: Path, text: Path, refused: Any) -> None:
    assert "both say how much" in refused(2, "eval", made, "--text", text, "--tokens", 9, "--windows", 2)
    assert "with --tokens" in refused(2, "eval", made, "--text", text, "--lengths", "mixed", "--windows", 2)
    assert "write mixed" in refused(2, "eval", made, "--text", text, "--lengths", "some")
    assert "too few tokens" in refused(1, "eval", made, "--text", text, "--tokens", 50_000, "--lengths", "mixed")
