"""Quantizes once in little, to have everything imported, then under each limit in a fork, and tells what that took.

    python -m tests.unit.memory_worker MODEL SET SMALL_SET OUT LIMIT|none ...
Prints for each limit the bytes that were resident at most beyond those before.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from halfbyte.experiments.quantize import quantize
from halfbyte.recipe.schema import Recipe

RECIPE = Recipe.model_validate({"method": "rtn", "group_size": 32, "tune": "none"})


def status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) << 10


def main(model: str, given: str, small: str, out: str, *limits: str) -> None:
    quantize(model, RECIPE, Path(out) / "warm", [small], device="cpu")
    for limit in limits:
        if not (pid := os.fork()):
            Path("/proc/self/clear_refs").write_text("5")
            before = status("VmRSS")
            memory = None if limit == "none" else int(limit)
            quantize(model, RECIPE, Path(out) / limit, [given], device="cpu", memory=memory)
            print(status("VmHWM") - before, flush=True)
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            raise SystemExit(f"{limit}: the child failed")


if __name__ == "__main__":
    main(*sys.argv[1:])
