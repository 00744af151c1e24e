"""Where calibration comes from, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import HalfbyteError, UsageError
from tests.tiny import make_tiny
from tests.unit.artifacts import random_set
from tests.unit.quantizing.conftest import GPTQ, RTN, make, make_with


def test_calibration_comes_from_a_directory_or_from_text(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    place = random_set().save(tmp_path / "set")
    first = make_with(model, tmp_path / "a", GPTQ, [place])
    assert first["work"] == make_with(model, tmp_path / "b", GPTQ, random_set())["work"]
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {i}: " + "words and words, " * 12 for i in range(30)))
    recipe = {**GPTQ, "calibration": {"sequences": 32, "max_tokens": 128}}
    from_text = make_with(model, tmp_path / "c", recipe, [text])
    assert from_text["calibration"]["source"]["kind"] == "text" and from_text["work"] != first["work"]


def test_the_model_writes_its_own_text_once(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    recipe = {**GPTQ, "calibration": {"sequences": 40, "max_tokens": 96}}
    first = make_with(tiny("llama"), tmp_path / "a", recipe, None)
    assert first["calibration"]["source"]["kind"] == "self-generated" and first["calibration"]["tokens"] >= 2048
    kept_sets = list((tmp_path / "cache" / "calibration").iterdir())
    assert len(kept_sets) == 1
    monkeypatch.setattr("halfbyte.experiments.quantize.load_model", None)
    assert make_with(tiny("llama"), tmp_path / "b", recipe, None)["work"] == first["work"]


def test_refusals(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    with pytest.raises(HalfbyteError, match=r"2,047 tokens: 2,048 are the least"):
        make_with(model, tmp_path / "a", GPTQ, random_set(tokens=2047))
    with pytest.raises(UsageError, match="nothing to quantize"):
        make(model, tmp_path / "b", {**RTN, "boundary": {"blocks": 1, "keep": "blocks"}})
    with pytest.raises(UsageError, match=r"group_size 128 does not divide the 96 inputs"):
        make(tiny("llama", intermediate_size=96), tmp_path / "c", {**RTN, "group_size": 128})
    assert not (tmp_path / "b").exists() and not (tmp_path / "c").exists()


@pytest.mark.parametrize("up", [".", ".."])
def test_the_model_itself_is_never_written_over(up: str, tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "models" / "m")
    before = sorted(p.name for p in model.iterdir())
    with pytest.raises(UsageError, match="holds the model"):
        make(model, model / up, RTN, force=True)
    assert sorted(p.name for p in model.iterdir()) == before
