"""Small artifacts to damage: tiny random models of every family in every format, in one shard or several."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from halfbyte import Recipe, quantize  # noqa: E402
from halfbyte.artifact import writer  # noqa: E402
from tests.tiny import FAMILIES, make_tiny  # noqa: E402
from tests.unit.artifacts import random_set  # noqa: E402

SORTS = {
    "gptq": {"method": "rtn", "group_size": 32},
    "awq": {"method": "awq", "group_size": 32, "rounding": "rtn"},
    "modelopt": {"method": "nvfp4", "group_size": 16, "rounding": "rtn"},
    "modelopt, fp4 activations": {"method": "nvfp4", "group_size": 32, "rounding": "rtn", "activations": "fp4"},
    "compressed-tensors, symmetric": {"method": "rtn", "group_size": 64, "format": "compressed-tensors"},
    "compressed-tensors, asymmetric": {
        "method": "awq", "group_size": 32, "rounding": "rtn", "format": "compressed-tensors"
    },
    "compressed-tensors, nvfp4": {
        "method": "nvfp4", "group_size": 16, "rounding": "rtn", "format": "compressed-tensors"
    },
}  # fmt: skip
"""A recipe for each format, and each grid that it holds."""
KEEP = ({}, {"boundary": {"blocks": 1, "keep": "projections"}})


@dataclass(frozen=True)
class Sample:
    """A sound artifact, and (or None) one of the same shapes made of another model."""

    sort: str
    family: str
    place: Path
    other: Path | None


def make_sample(
    root: Path, sort: str, family: str, shard_bytes: int, keep: int = 0, seed: int = 0, twice: bool = True
) -> Sample:
    """An artifact of that sort under `root`; `twice`: and one of another random model."""
    recipe = Recipe.model_validate({**SORTS[sort], **KEEP[keep]})
    made = []
    for number in (seed, seed + 1) if twice else (seed,):
        model = root / f"{family}-{number}"
        if not model.exists():
            make_tiny(family, model, seed=number)
        place = root / f"{sort}-{family}-{shard_bytes}-{keep}-{number}".replace(", ", "-").replace(" ", "-")
        with mock.patch.object(writer, "SHARD_BYTES", shard_bytes):
            quantize(str(model), recipe, place, random_set(seed=number) if recipe.needs_calibration else None)
        made.append(place)
    return Sample(sort, family, made[0], made[1] if twice else None)


def draw(root: Path, count: int, chance: random.Random) -> list[Sample]:
    """`count` samples: every sort in turn, families and shard sizes at random; every third has another's beside it."""
    sorts = list(SORTS)
    return [
        make_sample(
            root / str(i), sorts[i % len(sorts)], chance.choice(FAMILIES), chance.choice((60_000, 150_000, 1 << 30)),
            chance.randrange(len(KEEP)), 2 * i, i % 3 == 0,
        )
        for i in range(count)
    ]  # fmt: skip
