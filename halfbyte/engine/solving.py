"""Solving a block for every recipe, by whoever does the work; results come back in the blocks' order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

import torch

from halfbyte.algo import Stats
from halfbyte.engine.block import BlockResult
from halfbyte.engine.experts import ExpertInputs
from halfbyte.engine.parts import Part, divide, together
from halfbyte.engine.workers import Errand, Seat, Workers
from halfbyte.models import Family
from halfbyte.recipe.schema import Recipe
from halfbyte.types import LinearGroup, Progress, Scheme


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


EXPERTS_AHEAD = 2
"""Parts of a block with experts that are made for each worker: the one that it solves, and the next."""

UnderWay = tuple[int, Sequence[Job], "list[Future[Any]]", "ExpertInputs | None"]
"""A block, those who wait for it, its parts, and what its experts were given."""


class Keeping:
    """Hands results to those who keep them. On a GPU a thread does: it packs and writes a block while the next one is
    run and solved, one at a time and in order; at most `AHEAD` wait, and hold their memory."""

    AHEAD = 2

    def __init__(self, device: torch.device):
        self.device = device
        self.thread = ThreadPoolExecutor(1) if device.type == "cuda" else None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.waiting: deque[Future[None]] = deque()

    def hand_on(self, job: Job, index: int, result: BlockResult) -> None:
        """Let `job` have the block. Raises what keeping it, or one before it, raised."""
        if self.thread is None:
            job.emit(index, result)
            return
        self.settle(self.AHEAD)
        made = torch.cuda.current_stream(self.device).record_event()
        self.waiting.append(self.thread.submit(self._emit, job, index, result, made))

    def settle(self, left: int = 0) -> None:
        """Wait until no more than `left` blocks are on their way. Raises what keeping one raised."""
        while len(self.waiting) > left:
            self.waiting.popleft().result()

    def close(self) -> None:
        """Let what is on its way end, however it ends."""
        if self.thread:
            self.thread.shutdown()

    def _emit(self, job: Job, index: int, result: BlockResult, made: torch.cuda.Event) -> None:
        assert self.stream is not None
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(made)
            job.emit(index, result)
        self.stream.synchronize()


class Solving:
    """Blocks under way at `workers`. solve_part: the errand, whose result is a BlockResult or an error for each recipe
    of a Part; device: where the pass itself runs."""

    def __init__(
        self,
        family: Family,
        workers: Workers,
        solve_part: Callable[[Seat, Part], list[BlockResult | Exception]],
        progress: Progress,
        device: str = "cpu",
    ):
        self.family, self.workers, self.solve_part, self.progress = family, workers, solve_part, progress
        self.under_way: deque[UnderWay] = deque()
        self.keeping = Keeping(torch.device(device))

    def solve(
        self,
        index: int,
        jobs: Sequence[Job],
        tensors: dict[str, torch.Tensor],
        stats: Mapping[str, Stats],
        experts: ExpertInputs | None = None,
    ) -> list[BlockResult]:
        """Have the block solved, and take in what is done by now: all of it here, blocks before it from workers apart.

        What precedes the experts comes first, then each of them with its own statistics. Here, jobs are solved one by
        one; workers apart get the parts of the block, each for all jobs. Experts have statistics of their own: there
        no more parts are made than the workers soon take.
        """
        wholes = (self._part(index, groups, jobs, tensors, stats, experts) for groups in self._groups(index, jobs))
        if not self.workers.apart:
            return self._solve_here(index, jobs, wholes, experts)
        parts: list[Future[Any]] = []
        for part in (part for whole in wholes for part in divide(whole)):
            parts.append(self._submit(part))
            if experts:
                self._wait_for_room(parts)
        if experts:
            experts.forget()
        self.under_way.append((index, jobs, parts, experts))
        ahead = 1 + self.workers.count // max(1, len(parts))
        return self.finish(0 if jobs[0].recipe.propagate else ahead)

    def _solve_here(
        self, index: int, jobs: Sequence[Job], wholes: Iterable[Part], experts: ExpertInputs | None
    ) -> list[BlockResult]:
        solved: list[list[Future[Any]]] = [[] for _ in jobs]
        results = []
        count = len(self._groups(index, jobs))
        for whole in wholes:
            for job, wanted, mine in zip(jobs, whole.wanted, solved):
                mine.append(self._submit(replace(whole, wanted=[wanted])))
                if len(mine) == count:
                    self.under_way.append((index, [job], mine, experts))
                    results += self.finish()
        return results

    def _wait_for_room(self, parts: Sequence[Future[Any]]) -> None:
        """Until fewer than `EXPERTS_AHEAD` parts for each worker are waiting or being solved."""
        waiting = {one for one in (*parts, *(f for _, _, them, _ in self.under_way for f in them)) if not one.done()}
        while len(waiting) >= EXPERTS_AHEAD * self.workers.count:
            waiting = wait(waiting, return_when=FIRST_COMPLETED).not_done

    def _submit(self, part: Part) -> Future[Any]:
        return self.workers.submit(Errand(part.label, self.solve_part, (part,)))

    def _part(
        self,
        index: int,
        groups: Sequence[LinearGroup],
        jobs: Sequence[Job],
        tensors: dict[str, torch.Tensor],
        stats: Mapping[str, Stats],
        experts: ExpertInputs | None,
    ) -> Part:
        number = groups[0].expert if groups else None
        here = dict(stats)
        if experts and number is not None:
            found = experts.stats(number)
            here = {group.key: found[group.kind] for group in groups}
        return Part(self.family, index, tuple(groups), [(job.recipe, job.schemes) for job in jobs], tensors, here)

    def _groups(self, index: int, jobs: Sequence[Job]) -> list[list[LinearGroup]]:
        """The block's groups that some job quantizes: all that are not experts', then each expert's."""
        prefix = self.family.block(index) + "."
        parts: dict[int | None, list[LinearGroup]] = {}
        for group in self.family.groups_of(index):
            if any(prefix + group.names[0] in job.schemes for job in jobs):
                parts.setdefault(group.expert, []).append(group)
        return list(parts.values()) or [[]]

    def finish(self, ahead: int = 0) -> list[BlockResult]:
        """Hand out results, oldest first: those that are there, and more until only `ahead` blocks are under way."""
        results = []
        while self.under_way:
            index, jobs, solved, experts = self.under_way[0]
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
                self._tell(index, result, experts)
                results.append(result)
                if not job.done(index):
                    self.keeping.hand_on(job, index, result)
        return results

    def _tell(self, index: int, result: BlockResult, experts: ExpertInputs | None) -> None:
        mixture = self.family.mixture(index)
        if mixture and experts and any(f".{mixture.experts}." in name for name in result.linears):
            name = f"{self.family.block(index)}.{mixture.experts}"
            result.experts[name] = {"tokens": experts.tokens, "starved": experts.starved}
            result.notices += [notice] if (notice := experts.notice(name)) else []
        for notice in result.notices:
            self.progress.say(notice)


def _block(pieces: Iterable[BlockResult | Exception]) -> BlockResult:
    """A block from its parts; raises what one of them raised."""
    results = []
    for piece in pieces:
        if isinstance(piece, Exception):
            raise piece
        results.append(piece)
    return together(results)
