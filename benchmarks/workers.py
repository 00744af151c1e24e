"""Does solving go faster in two processes of one thread than in one of two? Solving alone, and the whole pass.

    python -m benchmarks.workers --blocks 6 --recipe B1 --repeats 3

Statistics are those of a few calibration sequences; the workers are started before the clock. Prints a table.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from benchmarks.common import MODEL, calibration_tokens, data_directory, machine, read_recipe, say
from halfbyte.engine import Errand, Here, Job, Processes, quantize_blocks
from halfbyte.engine.loop import solve_part
from halfbyte.engine.parts import Part, divide
from halfbyte.models import Checkpoint, resolve_model
from halfbyte.plan.layers import assign, quantized
from halfbyte.types import Quiet


class Noting(Here):
    """Does the work here, and keeps what it was."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[Part] = []

    def submit(self, errand: Errand) -> Future[Any]:
        done = super().submit(errand)
        part = errand.arguments[0]
        self.parts.append(Part(part.family, part.block, part.groups, part.wanted, part.tensors, part.stats))
        return done


def clock(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def solve_here(parts: list[Part]) -> None:
    here = Here()
    for part in parts:
        whole = Part(part.family, part.block, part.groups, part.wanted, part.tensors, part.stats)
        here.submit(Errand(part.label, solve_part, (whole,))).result()


def solve_apart(workers: Processes, parts: list[Part]) -> None:
    pieces = [piece for part in parts for piece in divide(part)]
    for done in [workers.submit(Errand(piece.label, solve_part, (piece,))) for piece in pieces]:
        done.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--recipe", default="B1")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data")
    given = parser.parse_args()
    path = resolve_model(MODEL, Quiet())
    checkpoint = Checkpoint(path)
    data = calibration_tokens(path, data_directory(given.data), given.sequences)
    recipe = read_recipe(given.recipe)[1]
    schemes = quantized(assign(recipe, checkpoint))
    job = Job(recipe, schemes, lambda block: not 0 <= block < given.blocks, lambda *_: None)

    def whole(workers: Any = None) -> None:
        quantize_blocks(checkpoint, [job], data.sequences, workers=workers)

    noting = Noting()
    whole(noting)
    found: dict[str, list[float]] = {}

    def measure(name: str, threads: int, work: Callable[[], Any]) -> None:
        torch.set_num_threads(threads)
        found.setdefault(name, []).append(clock(work))
        say(f"{name}: {found[name][-1]:.2f} s")

    torch.set_num_threads(1)
    with Processes(["cpu", "cpu"]) as two:
        solve_apart(two, noting.parts[:2])  # started and warm
        for _ in range(given.repeats):
            for threads in (1, 2):
                measure(f"solving, here, threads: {threads}", threads, lambda: solve_here(noting.parts))
            measure("solving, two processes of one thread", 1, lambda: solve_apart(two, noting.parts))
        for _ in range(given.repeats):
            for threads in (1, 2):
                measure(f"whole pass, here, threads: {threads}", threads, whole)
            measure("whole pass, two processes of one thread", 1, lambda: whole(two))
    print(machine())
    print(f"{given.recipe}, {given.blocks} blocks, {given.sequences} sequences\n")
    print("| | seconds, median | all |\n|---|---|---|")
    for name, seconds in sorted(found.items()):
        print(f"| {name} | {statistics.median(seconds):.2f} | {', '.join(f'{s:.2f}' for s in seconds)} |")


if __name__ == "__main__":
    main()
