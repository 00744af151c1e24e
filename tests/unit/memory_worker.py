"""Quantizes once in little, to have everything imported, then under each limit in a fork, and tells what that took.

    python -m tests.unit.memory_worker MODEL SET SMALL_SET OUT LIMIT|none ...
Prints for each limit the bytes that were resident at most beyond those before.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from halfbyte.experiments.quantize import quantize
from halfbyte.recipe.schema import Recipe

RECIPE = Recipe.model_validate({"method": "rtn", "group_size": 32, "tune": "none"})


def status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) << 10


def populate() -> None:
    """Map what is in the libraries' files.

    A fork starts without, and the kernel maps it by and by in pieces of its own choice, 64 KiB or 2 MiB, which is code
    and no memory that a run takes. Linux 5.14 and newer; does nothing before.
    """
    libc, populate_read = ctypes.CDLL(None), 22
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, *_, name = line.split(maxsplit=5)
        if rights.startswith("r") and name.startswith("/"):
            start, end = (int(word, 16) for word in span.split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), populate_read)


def main(model: str, given: str, small: str, out: str, *limits: str) -> None:
    quantize(model, RECIPE, Path(out) / "warm", [small], device="cpu")
    for limit in limits:
        if not (pid := os.fork()):
            populate()
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
