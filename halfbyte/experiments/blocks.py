"""Solved blocks of one run, by content: a recipe that differs from an earlier one in two blocks solves two blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from halfbyte.artifact import ArtifactWriter
from halfbyte.engine import ALGORITHM_VERSION
from halfbyte.experiments.cells import Cell, block_content, part_keys
from halfbyte.files import make_directory
from halfbyte.models import Checkpoint, family_of
from halfbyte.plan.layers import LinearPlan, quantized
from halfbyte.recipe import Recipe


class BlockStore:
    """Block files in `directory`, named by all that decides their bytes (`block_content`) for one model on one sort
    of device."""

    def __init__(self, directory: Path, checkpoint: Checkpoint, device: str):
        self.directory, self.family = directory, family_of(checkpoint.config)
        self.label = (checkpoint.fingerprint(), device.partition(":")[0], ALGORITHM_VERSION)

    def names(self, recipe: Recipe, plans: Sequence[LinearPlan], data: str) -> dict[int, str]:
        """The file of each block that the recipe quantizes. `data`: the calibration set's SHA-256."""
        cell = Cell("", recipe, list(plans), quantized(list(plans)))
        parts = part_keys(cell, self.family, data)
        return {block: self._name(block_content(cell, keys)) for block, keys in parts.items()}

    def _name(self, content: tuple[object, ...]) -> str:
        digest = hashlib.sha256(repr((*self.label, content)).encode()).hexdigest()
        return f"{digest[:32]}.safetensors"

    def lend(self, writer: ArtifactWriter, data: str) -> None:
        """Give the writer every block that is here and that it lacks."""
        for block, file in self._files(writer, data).items():
            if file.is_file() and not writer.done(block):
                writer.take(block, file)

    def keep(self, writer: ArtifactWriter, data: str) -> None:
        """Keep every block of the writer's, as it is before training."""
        make_directory(self.directory)
        for block, file in self._files(writer, data).items():
            if not file.is_file() and writer.done(block):
                writer.lend(block, file)

    def _files(self, writer: ArtifactWriter, data: str) -> dict[int, Path]:
        """Each block's place; none where blocks depend on those before them."""
        if writer.recipe.propagate:
            return {}
        return {block: self.directory / name for block, name in self.names(writer.recipe, writer.plans, data).items()}
