"""The text of a sweep: calibration sets by what cells ask for, and the held-out windows that all are judged on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.calibration import CalibrationSet, build
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate import Windows, set_windows, text_windows
from halfbyte.experiments.cells import Cell
from halfbyte.experiments.quantize import calibration_for, self_generated
from halfbyte.experiments.run import CALIBRATION_SHARE, HELD_OUT, OWN_TEXT, TEXT_WINDOW, TEXT_WINDOWS
from halfbyte.files import stamps
from halfbyte.models.library import load_tokenizer
from halfbyte.recipe import CalibrationSpec, Recipe
from halfbyte.types import Progress

Given = Sequence[str | Path] | CalibrationSet | None


@dataclass(frozen=True)
class SweepText:
    """Where text comes from. `text`: files (80 % to calibrate on, the rest to judge on; all of it to judge on where
    `calibration` is given), or windows; none: the model writes its own, as in `run`."""

    model: Path
    place: Path
    text: Sequence[Path] | Windows
    calibration: Given
    device: str
    progress: Progress

    def sets(self, cells: Sequence[Cell]) -> dict[str, CalibrationSet]:
        """Each cell's calibration set by the cell's name; cells that ask for the same share one.

        A set that cannot be made fails its cells alone.
        """
        made: dict[str, CalibrationSet | HalfbyteError] = {}
        found = {}
        for cell in cells:
            assert cell.recipe is not None
            spec = self._spec(cell.recipe)
            name = self._name(spec)
            if name not in made:
                try:
                    made[name] = self._make(cell.recipe.model_copy(update={"calibration": spec}), self.place / name)
                except HalfbyteError as error:
                    made[name] = error
            data = made[name]
            if isinstance(data, HalfbyteError):
                cell.fail("calibration", data)
            else:
                found[cell.name] = data
        return found

    def windows(self) -> Windows:
        """What every cell is judged on."""
        if isinstance(self.text, Windows):
            return self.text
        if not self.text:
            return set_windows(self_generated(self.model, HELD_OUT, self.device, self.progress))
        share = (0.0 if self.calibration else CALIBRATION_SHARE, 1.0)
        tokenizer = load_tokenizer(self.model)
        return text_windows(list(self.text), tokenizer, window=TEXT_WINDOW, portion=share).first(TEXT_WINDOWS)

    def _files(self) -> list[Path]:
        return [] if isinstance(self.text, Windows) else list(self.text)

    def _spec(self, recipe: Recipe) -> CalibrationSpec:
        """What the recipe asks for; where the model writes and the recipe says nothing, as much as in `run`."""
        own = not (self._files() or self.calibration) and recipe.calibration == CalibrationSpec()
        return OWN_TEXT if own else recipe.calibration

    def _name(self, spec: CalibrationSpec) -> str:
        """A set's directory: what it is made of. A given set is the same whatever the recipe asks for."""
        if isinstance(self.calibration, CalibrationSet):
            parts: list[Any] = [self.calibration.sha256]
        else:
            files = [Path(p) for p in (self.calibration or self._files())]
            whole = len(files) == 1 and files[0].is_dir()
            parts = [stamps(files), None if whole else spec.model_dump(), bool(self.calibration)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]

    def _make(self, recipe: Recipe, place: Path) -> CalibrationSet:
        if (place / "manifest.json").is_file():
            data = CalibrationSet.load(place)
        else:
            data = self._new(recipe)
            data.save(place)
        checked = calibration_for(recipe, self.model, data)
        assert checked is not None
        return checked

    def _new(self, recipe: Recipe) -> CalibrationSet:
        if self.calibration:
            given = calibration_for(recipe, self.model, self.calibration, self.device, self.progress)
            assert given is not None
            return given
        if self._files():
            share = (0.0, CALIBRATION_SHARE)
            tokenizer = load_tokenizer(self.model)
            return build(tokenizer, recipe.calibration, sources=self._files(), portion=share, progress=self.progress)
        return self_generated(self.model, recipe.calibration, self.device, self.progress)
