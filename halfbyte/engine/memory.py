"""How much memory a pass over the blocks takes, and what to do where there is less.

Everything is worked out from headers, in bytes, for the block that takes most:

    weights      the block, and its copy where it is not stored in the type it runs in; lm_head while losses are taken
    statistics   4 I^2 for each Gram matrix, which stays until the block is solved; in a mixture, the experts' inputs
    a forward    what the block's own steps hold of one batch, and the inputs in float32 that are squared and summed
    a solve      a Hessian's factor and what making it takes (WIDE: in place), half a Gram matrix in 16 bits, the rows
                 in work in float32, the codes and their packed form; factors stay for the recipes that come after

All of that stays in memory; the hidden states between blocks take what is left, and go to disk beyond it. Where not
even the rest is left, batches are made smaller, down to one sequence: other batches round sums otherwise, so this is
said, and done only where the user states a limit. It is an estimate, on the careful side; the weights are mapped from
their files, and the system may take those pages back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from halfbyte.algo.gptq import WIDE
from halfbyte.algo.solve import LARGE, PIECE
from halfbyte.engine.activations import Room
from halfbyte.engine.backprop import PIECE as HEAD_TOKENS
from halfbyte.engine.heap import return_at_once
from halfbyte.engine.importance import BATCH, TOKENS
from halfbyte.engine.solving import Job
from halfbyte.errors import HalfbyteError
from halfbyte.models import Checkpoint, Family, family_of
from halfbyte.plan.text import human_size

SHARE = 0.8
"""Of the memory that is free, without a limit from the user."""
SLACK = 96 << 20
"""Bytes that a process takes beside what is counted: what libraries of linear algebra pack matrices into, mostly."""


@dataclass(frozen=True)
class Need:
    """Bytes that a pass takes at once beside the hidden states: its largest parts, and how many tokens a batch has."""

    weights: int
    statistics: int
    forward: int
    solve: int
    batch_tokens: int

    @property
    def total(self) -> int:
        """A block is run, then solved."""
        return self.weights + self.statistics + max(self.forward, self.solve) + SLACK

    def __str__(self) -> str:
        parts = (("block", self.weights), ("statistics", self.statistics))
        words = [f"{human_size(size)} {name}" for name, size in parts]
        return ", ".join([*words, f"{human_size(max(self.forward, self.solve))} to run and solve it"])


def need(
    checkpoint: Checkpoint,
    jobs: Sequence[Job],
    tokens: int,
    batch_tokens: int,
    data: bool = True,
    thrifty: bool = True,
) -> Need:
    """What a pass takes: `tokens` of calibration in all, `batch_tokens` at a time; without `data`, data-free.

    thrifty    whether large linears are solved in the ways that save memory, as on a CPU
    """
    family = family_of(checkpoint.config)
    linears = {name for job in jobs for name in job.schemes}
    waiting = [i for i in range(family.num_blocks) if any(not job.done(i) for job in jobs)] or [0]
    shapes = [dict(_block(checkpoint, family, i)) for i in waiting]
    weights = max(sum(size for _, size in tensors.values()) for tensors in shapes)
    gram = data and any(j.recipe.needs_gram for j in jobs)
    careful = any(j.recipe.statistics == "weighted" for j in jobs)
    awq = any(j.recipe.scaling == "awq" for j in jobs)
    statistics = solve = forward = 0
    for index, tensors in zip(waiting, shapes):
        summed, scaled, work, outputs, widest, largest = 0, 0, 0, 0, 0, 0
        for group in family.groups_of(index):
            if f"{family.block(index)}.{group.names[0]}" not in linears:
                continue
            own = [tensors[f"{name}.weight"][0] for name in group.names]
            width, count = own[0][1], sum(o * i for o, i in own)
            square = 4 * width**2 if gram else 0
            summed += square if group.expert is None else 0
            scaled += square if awq and group.expert is None else 0
            outputs += 2 * count
            widest = max(widest, width)
            largest = max(largest, square if group.expert is None else 0)
            work = max(
                work, _solve(width, count, square, awq, thrifty) + (3 * square if group.expert is not None else 0)
            )
        kept = 2 * tokens * family.hidden_size if family.mixture(index) and data else 0
        statistics = max(statistics, summed + kept)
        solve = max(solve, work + scaled + outputs + summed - largest)
        forward = max(forward, _forward(checkpoint, family, widest, batch_tokens, gram) if data else 0)
    if data:
        head = 0 if family.tied else 2 * checkpoint.config["vocab_size"] * family.hidden_size
        forward = max(
            forward,
            _gradients(checkpoint, family, max(batch_tokens if careful else 0, min(tokens, BATCH * TOKENS)))
            + head
            - statistics,
        )
    return Need(weights, statistics, forward, solve, batch_tokens)


def _block(checkpoint: Checkpoint, family: Family, index: int):  # type: ignore[no-untyped-def]
    """(name within the block, (shape, bytes in memory)) of each of its tensors."""
    prefix = family.block(index) + "."
    for name, info in checkpoint.tensors.items():
        if name.startswith(prefix):
            count = math.prod(info.shape)
            yield name.removeprefix(prefix), (info.shape, 2 * count + (info.nbytes if info.dtype != "BF16" else 0))


def _solve(width: int, count: int, square: int, awq: bool, thrifty: bool) -> int:
    """Bytes of solving one group of `count` weights with inputs of `width`."""
    rows = min(count, PIECE) if thrifty and count > LARGE else count
    factor = square * (1 if thrifty and width > WIDE else 4)
    return factor + square // 2 + 4 * rows * 7 + (4 * count * 3 if awq else 0)


def _inner(checkpoint: Checkpoint) -> int:
    """The widest layer within an MLP."""
    keys = ("intermediate_size", "shared_expert_intermediate_size", "moe_intermediate_size")
    return max(int(checkpoint.config.get(key) or 0) for key in keys)


def _forward(checkpoint: Checkpoint, family: Family, widest: int, tokens: int, gram: bool) -> int:
    """Bytes of one batch on its way through a block: hidden states, projections, and a product's panels."""
    states = tokens * (2 * 8 * family.hidden_size + 2 * 4 * _inner(checkpoint) + 8 * widest)
    product = 2 * widest**2 if gram and widest <= WIDE else 0
    return states + product


def _gradients(checkpoint: Checkpoint, family: Family, tokens: int) -> int:
    """Bytes of weighing tokens: one block's steps kept for the way back, and logits in pieces."""
    steps = 2 * tokens * (24 * family.hidden_size + 12 * _inner(checkpoint))
    return steps + 5 * 4 * min(tokens, HEAD_TOKENS) * int(checkpoint.config["vocab_size"])


def _depth(checkpoint: Checkpoint) -> int:
    """Numbers in one token's hidden states in front of all blocks."""
    return int(checkpoint.config["num_hidden_layers"] * checkpoint.config["hidden_size"])


def free_bytes() -> int:
    """Host memory that this process could still take: the system's, or its control group's if that is less."""
    free = int(psutil.virtual_memory().available)
    try:
        most = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if most != "max":
            free = min(free, int(most) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no control groups, or the older kind
    return max(0, free)


@dataclass(frozen=True)
class Fit:
    """What a pass does to stay within its memory. room: for the hidden states between blocks; tape: for the blocks'
    inputs while tokens are weighed; notice: what the user should know ("": nothing)."""

    batch_tokens: int
    room: Room
    tape: Room
    notice: str = ""


def fit(
    checkpoint: Checkpoint,
    jobs: Sequence[Job],
    sequences: Sequence[torch.Tensor] | None,
    device: str,
    batch_tokens: int,
    limit: int | None,
    scratch: Path | None = None,
) -> Fit:
    """Arrange a pass in `limit` bytes of host memory beyond what the process has now (None: a share of what is free).

    Raises HalfbyteError where a limit of the user's is less than the least that the pass can do with.
    """
    if limit is not None:
        return_at_once()
    stated, limit = limit is not None, int(SHARE * free_bytes()) if limit is None else limit
    tokens = sum(map(len, sequences or ()))
    if torch.device(device).type == "cuda":
        room = _on_gpu(checkpoint, jobs, tokens, device, batch_tokens, limit, scratch)
        return Fit(batch_tokens, room, Room(scratch=scratch))
    longest = max(map(len, sequences or ()), default=1)
    asked = batch_tokens
    wanted = need(checkpoint, jobs, tokens, batch_tokens, sequences is not None)
    while stated and wanted.total > limit and batch_tokens > longest:
        batch_tokens = max(longest, batch_tokens // 2)
        wanted = need(checkpoint, jobs, tokens, batch_tokens, sequences is not None)
    notice = ""
    if wanted.total > limit:
        least = f"it needs some {human_size(wanted.total)} ({wanted})"
        if stated:
            raise HalfbyteError(f"--memory of {human_size(limit)} is too little for this model and recipe: {least}")
        notice = f"{human_size(limit)} of memory is free to use, which may be too little for this model: {least}"
    elif batch_tokens < asked:
        notice = (
            f"batches of {batch_tokens:,} tokens, not {asked:,}, to stay within {human_size(limit)}: sums may be "
            "rounded otherwise"
        )
    left = max(0, limit - wanted.total)
    weighed = min(left // 2, 2 * min(tokens, max(batch_tokens, BATCH * TOKENS)) * _depth(checkpoint))
    return Fit(batch_tokens, Room(None, left - weighed, scratch), Room(None, weighed, scratch), notice)


def _on_gpu(
    checkpoint: Checkpoint,
    jobs: Sequence[Job],
    tokens: int,
    device: str,
    batch_tokens: int,
    limit: int,
    scratch: Path | None,
) -> Room:
    """There the host holds hidden states alone, page-locked; the card holds them as far as a pass leaves it room."""
    free, _ = torch.cuda.mem_get_info(device)
    takes = need(checkpoint, jobs, tokens, batch_tokens, thrifty=False)
    return Room(max(0, int(SHARE * free) - 2 * takes.weights - takes.total), limit, scratch)
