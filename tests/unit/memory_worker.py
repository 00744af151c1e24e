"""A process that quantizes once in little, to have everything imported, then for real, and tells how much it took.

    python -m tests.unit.memory_worker MODEL SET SMALL_SET OUT LIMIT|none
Prints: bytes resident before, most bytes resident since.
"""

from __future__ import annotations

import sys
from pathlib import Path

from halfbyte.experiments.quantize import quantize
from halfbyte.recipe.schema import Recipe

RECIPE = Recipe.model_validate({"method": "rtn", "group_size": 32, "tune": "none"})


def status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) << 10


def main(model: str, given: str, small: str, out: str, limit: str) -> None:
    quantize(model, RECIPE, Path(out) / "warm", [small], device="cpu")
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    quantize(model, RECIPE, Path(out) / "model", [given], device="cpu", memory=None if limit == "none" else int(limit))
    print(before, status("VmHWM"))


if __name__ == "__main__":
    main(*sys.argv[1:])
