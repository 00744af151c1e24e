"""Solving a block for every recipe, by whoever does the work; results come back in the blocks' order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.algo import Stats
from halfbyte.engine.block import BlockResult
from halfbyte.engine.parts import Part, divide, together
from halfbyte.engine.workers import Errand, Seat, Workers
from halfbyte.models import Family
from halfbyte.recipe.schema import Recipe
from halfbyte.types import Progress, Scheme


@dataclass(frozen=True)
class Job:
    """One recipe in a pass.

    schemes   every quantized linear's full name and scheme
    done      whether a block's result is already kept (resume)
    emit      takes a block's result
    failed    takes what solving a block raised, and the other jobs go on; None: it ends the pass
    """

    recipe: Recipe
    schemes: dict[str, Scheme]
    done: Callable[[int], bool]
    emit: Callable[[int, BlockResult], None]
    failed: Callable[[int, Exception], None] | None = None


class Solving:
    """Blocks under way at `workers`. solve_part: the errand; a BlockResult or an error for each recipe of a Part."""

    def __init__(
        self,
        family: Family,
        workers: Workers,
        solve_part: Callable[[Seat, Part], list[BlockResult | Exception]],
        progress: Progress,
    ):
        self.family, self.workers, self.solve_part, self.progress = family, workers, solve_part, progress
        self.under_way: deque[tuple[int, Sequence[Job], list[Future[Any]]]] = deque()

    def solve(
        self, index: int, jobs: Sequence[Job], tensors: dict[str, torch.Tensor], stats: dict[str, Stats]
    ) -> list[BlockResult]:
        """Have the block solved, and take in what is done by now: all of it here, blocks before it from workers apart.

        Here, jobs are solved one by one; workers apart get the parts of the block, each for all jobs.
        """
        apart, factors = self.workers.apart, dict[tuple, Any]()
        kinds = tuple(group.kind for group in self.family.groups)
        results = []
        for some in [jobs] if apart else [[job] for job in jobs]:
            wanted = [(job.recipe, job.schemes) for job in some]
            whole = Part(self.family, index, kinds, wanted, tensors, stats, factors)
            parts = divide(whole) if apart else [whole]
            solved = [self.workers.submit(Errand(part.label, self.solve_part, (part,))) for part in parts]
            self.under_way.append((index, some, solved))
            waits = not apart or jobs[0].recipe.propagate
            results += self.finish(0 if waits else 1 + self.workers.count // max(1, len(parts)))
        return results

    def finish(self, ahead: int = 0) -> list[BlockResult]:
        """Hand out results, oldest first: those that are there, and more until only `ahead` blocks are under way."""
        results = []
        while self.under_way:
            index, jobs, solved = self.under_way[0]
            if len(self.under_way) <= ahead and not all(one.done() for one in solved):
                break
            self.under_way.popleft()
            for number, job in enumerate(jobs):
                try:
                    result = _block(one.result()[number] for one in solved)
                except Exception as error:
                    if job.failed is None:
                        raise
                    job.failed(index, error)
                    continue
                for notice in result.notices:
                    self.progress.say(notice)
                results.append(result)
                if not job.done(index):
                    job.emit(index, result)
        return results


def _block(pieces: Iterable[BlockResult | Exception]) -> BlockResult:
    """A block from its parts; raises what one of them raised."""
    results = []
    for piece in pieces:
        if isinstance(piece, Exception):
            raise piece
        results.append(piece)
    return together(results)
