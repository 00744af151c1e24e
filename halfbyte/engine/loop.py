"""The pass over the blocks. Statistics come from the BF16 model and do not depend on the recipe, so one pass serves
any number of recipes: at each block the inputs' Gram matrices are collected once and every recipe solves with them.

Peak memory: one block's weights, its statistics, the activations between blocks, and what one solve needs. The experts
of a mixture are solved one after the other, each with its own statistics (experts.py).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfbyte.algo import Stats, dequantize
from halfbyte.engine.activations import Activations
from halfbyte.engine.backprop import call
from halfbyte.engine.block import BlockResult, solve_block
from halfbyte.engine.collect import Collector, Collectors
from halfbyte.engine.experts import ExpertInputs
from halfbyte.engine.importance import EXPERTS, Importance, every_token, first_token
from halfbyte.engine.memory import Fit, fit
from halfbyte.engine.parts import Part
from halfbyte.engine.skeleton import Skeleton
from halfbyte.engine.solving import Job, Solving
from halfbyte.engine.weights import Weights
from halfbyte.engine.workers import Here, Seat, Workers
from halfbyte.errors import HalfbyteError
from halfbyte.models import Checkpoint, family_of
from halfbyte.recipe.schema import Recipe
from halfbyte.types import Progress, Quiet

ALGORITHM_VERSION = 6
"""Raised whenever the same inputs give other codes: it is a part of every piece of work's name."""
BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Tokens of one forward of a block: a GPU's products and sums want more."""
SAMPLE_TOKENS = 16_384
"""How many tokens the statistics are of where effort is fast: more made scales no better (docs/log.md)."""
HEAD = -1
"""The `block` under which lm_head is emitted."""


def work_id(recipe: Recipe, model_fingerprint: str, calibration_sha256: str | None) -> str:
    """The name of a piece of work: resolved recipe, model, calibration tokens, algorithm version."""
    parts = {
        "recipe": recipe.identity(),
        "model": model_fingerprint,
        "calibration": calibration_sha256 if recipe.needs_calibration or calibration_sha256 else None,
        "algorithm": ALGORITHM_VERSION,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def sample(sequences: Sequence[torch.Tensor], tokens: int) -> list[torch.Tensor]:
    """Evenly spread sequences of about `tokens` tokens together; all of them where they have no more."""
    step = max(1.0, sum(map(len, sequences)) / tokens)
    return [sequences[int(i * step)] for i in range(max(1, int(len(sequences) / step)))]


def make_batches(sequences: Sequence[torch.Tensor], budget: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Sequences (int64 [t]) as right-padded batches of at most `budget` tokens, longest first.

    Returns (ids [B, T], keep): keep is bool [B*T], False on padding, or None where there is none. Right padding is
    safe in a causal model: no token sees what comes after it.
    """
    batches = []
    row: list[torch.Tensor] = []
    for sequence in [*sorted(sequences, key=len, reverse=True), None]:
        if row and (sequence is None or len(row[0]) * (len(row) + 1) > budget):
            ids = torch.zeros(len(row), len(row[0]), dtype=torch.int64)
            keep = torch.zeros(ids.shape, dtype=torch.bool)
            for i, tokens in enumerate(row):
                ids[i, : len(tokens)] = tokens
                keep[i, : len(tokens)] = True
            batches.append((ids, None if bool(keep.all()) else keep.flatten()))
            row = []
        if sequence is not None:
            row.append(sequence)
    return batches


@torch.no_grad()
def solve_part(seat: Seat, part: Part) -> list[BlockResult | Exception]:
    """An errand: what each of the part's recipes makes of it, or the error that it raised."""
    part = part.to(seat.device)
    results: list[BlockResult | Exception] = []
    for recipe, schemes in part.wanted:
        started = time.monotonic()
        try:
            one = solve_block(
                recipe, part.family, part.block, schemes, part.tensors, part.stats, part.factors, part.groups
            )
            one.seconds = time.monotonic() - started
            results.append(one)
        except Exception as error:
            results.append(error)
    return results


@torch.no_grad()
def quantize_blocks(
    checkpoint: Checkpoint,
    jobs: Sequence[Job],
    sequences: Sequence[torch.Tensor] | None = None,
    device: str = "cpu",
    batch_tokens: int | None = None,
    progress: Progress | None = None,
    workers: Workers | None = None,
    memory: int | None = None,
    scratch: Path | None = None,
) -> list[str]:
    """Run the pass: every job's `emit` gets every block it has not `done`.

    sequences   calibration token ids (int64 [t] each); None only where every recipe is data-free
    batch_tokens    of one forward; None: BATCH_TOKENS, by the device
    workers     who solves while the pass goes on; None: this process, on `device`
    memory      bytes of the host's that the pass may take beyond what the process has; None: a share of what is free
    scratch     a directory for the hidden states that do not fit (memory.py); None: the system's temporary one
    Returns notices: what was done to stay within the memory, beyond putting hidden states on disk.
    Raises HalfbyteError where a recipe needs calibration and there is none, or where propagation is asked for
    more than one recipe.
    """
    progress = progress or Quiet()
    _refuse(jobs, sequences)
    tokens = batch_tokens or BATCH_TOKENS[torch.device(device).type]
    fitted = fit(checkpoint, jobs, sequences, device, tokens, memory, scratch)
    notices = [fitted.notice] if fitted.notice else []
    for notice in notices:
        progress.say(notice)
    run = _Pass(checkpoint, jobs, device, progress, workers)
    try:
        if sequences is None:
            run.without_data()
        else:
            run.with_data(sequences, fitted)
    finally:
        run.solving.keeping.close()
    return notices


def _refuse(jobs: Sequence[Job], sequences: Sequence[torch.Tensor] | None) -> None:
    for job in jobs:
        if sequences is None and (job.recipe.needs_calibration or job.recipe.propagate):
            raise HalfbyteError(f"method {job.recipe.method} needs calibration data: give --calibration")
    if len(jobs) > 1 and any(job.recipe.propagate for job in jobs):
        raise HalfbyteError(
            "propagate serves one recipe at a time: statistics behind quantized blocks differ by recipe"
        )
    if len({job.recipe.statistics for job in jobs}) > 1:
        raise HalfbyteError("recipes of such different effort collect other statistics: they share no pass")


class _Pass:
    def __init__(
        self,
        checkpoint: Checkpoint,
        jobs: Sequence[Job],
        device: str,
        progress: Progress,
        workers: Workers | None,
    ):
        self.checkpoint, self.jobs, self.progress, self.device = checkpoint, jobs, progress, torch.device(device)
        self.family = family_of(checkpoint.config)
        self.solving = Solving(self.family, workers or Here(device, progress), solve_part, progress, device)
        self.importance = Importance()
        self.statistics = jobs[0].recipe.statistics if jobs else "all"
        self.gram = any(job.recipe.needs_gram for job in jobs)

    @cached_property
    def skeleton(self) -> Skeleton:
        """The model that runs the blocks; only calibration needs it."""
        return Skeleton(self.checkpoint, str(self.device))

    def without_data(self) -> None:
        count = self.family.num_blocks
        weights = Weights(self.checkpoint, self.device)
        self.progress.start("quantizing", count)
        for index in range(count):
            waiting = [j for j in self.jobs if not j.done(index)]
            if waiting:
                self.solving.solve(index, waiting, weights.block(index, then=index + 1), {})
            self.progress.advance(note=f"block {index + 1}/{count}")
        self._finish(None)

    def with_data(self, sequences: Sequence[torch.Tensor], fitted: Fit) -> None:
        with Activations(self.device, fitted.room) as hidden:
            self._with_hidden(sequences, fitted, hidden)

    def _with_hidden(self, sequences: Sequence[torch.Tensor], fitted: Fit, hidden: Activations) -> None:
        count = self.family.num_blocks
        if self.statistics == "sample":
            sequences = sample(sequences, SAMPLE_TOKENS)
        batches = make_batches(sequences, fitted.batch_tokens)
        arguments = self.skeleton.embed((ids for ids, _ in batches), hidden)[1]
        keeps = [None if keep is None else keep.to(self.device) for _, keep in batches]
        shapes = [tuple(ids.shape) for ids, _ in batches]
        last = max((i for i in range(count) for j in self.jobs if not j.done(i)), default=-1)
        if any(not j.done(HEAD) for j in self._head_jobs()):
            last = count - 1
        if last >= 0 and self.statistics == "weighted":
            self.importance = every_token(self.skeleton, batches, progress=self.progress, room=fitted.tape)
        elif last >= 0 and self.statistics == "all":
            self.importance = first_token(self.skeleton, sequences, progress=self.progress, room=fitted.tape)
        self.skeleton.drop_head()
        self.progress.start("quantizing", count)
        for index in range(count):
            if index <= last:
                kwargs = [arguments[shape][index] for shape in shapes]
                self._one_block(index, hidden, keeps, kwargs)
            self.progress.advance(note=f"block {index + 1}/{count}")
        self._finish((hidden, keeps))

    def _finish(self, activations: tuple[Activations, list[Any]] | None) -> None:
        self.solving.finish()
        self._head(activations)
        self.solving.keeping.settle()

    def _one_block(self, index: int, hidden: Activations, keeps: list[Any], kwargs: list[dict[str, Any]]) -> None:
        block = self.skeleton.load_block(index, then=index + 1)
        waiting = [j for j in self.jobs if not j.done(index)]
        propagate = self.jobs[0].recipe.propagate
        if waiting or propagate:
            collectors, experts = self._watched(index, block, waiting or list(self.jobs))
            with ExitStack() as stack:
                stack.enter_context(collectors)
                if experts:
                    stack.enter_context(experts)
                for i, x in enumerate(hidden):
                    self._expect(index, i, tuple(x.shape[:2]), keeps[i], collectors, experts)
                    out = call(block, x, kwargs[i])
                    if not propagate:
                        hidden[i] = out
            jobs, tensors = waiting or list(self.jobs), self._tensors(block)
            results = self.solving.solve(index, jobs, tensors, collectors.stats(), experts)
            if propagate:
                self._replace(block, index, results[0])
        if propagate or not waiting:
            for i, x in enumerate(hidden):
                hidden[i] = call(block, x, kwargs[i])
        self.skeleton.drop_block(index)

    def _watched(self, index: int, block: nn.Module, jobs: Sequence[Job]) -> tuple[Collectors, ExpertInputs | None]:
        """What collects the statistics that `jobs` need of a block."""
        prefix, mixture = self.family.block(index) + ".", self.family.mixture(index)
        needed = [g for g in self.family.groups_of(index) if any(prefix + g.names[0] in j.schemes for j in jobs)]
        plain = {g: self.gram for g in needed if g.expert is None}
        experts = None
        if mixture and len(plain) < len(needed):
            module: Any = block.get_submodule(mixture.experts)
            experts = ExpertInputs(module, self.gram)
        return Collectors(block, plain, self.device, mixture), experts

    def _expect(
        self,
        index: int,
        batch: int,
        shape: tuple[int, ...],
        keep: torch.Tensor | None,
        collectors: Collectors,
        experts: ExpertInputs | None,
    ) -> None:
        device = self.device
        counts = {g.key: self.importance.of_group(index, g, batch, shape, device) for g in collectors.groups}
        collectors.expect(keep, counts)
        if experts:
            experts.expect(keep, self.importance.weights((index, EXPERTS), batch, shape, device))

    @staticmethod
    def _tensors(block: nn.Module) -> dict[str, torch.Tensor]:
        return {name: parameter.data for name, parameter in block.named_parameters()}

    def _replace(self, block: nn.Module, index: int, result: BlockResult) -> None:
        prefix = self.family.block(index) + "."
        new = {f"{name}.weight": dequantize(s.q) for name, s in result.linears.items()} | result.tensors
        for name, value in new.items():
            parameter = block.get_parameter(name.removeprefix(prefix))
            parameter.data = value.to(parameter.device, parameter.dtype)

    def _head_jobs(self) -> list[Job]:
        return [j for j in self.jobs if self.family.lm_head in j.schemes]

    def _head(self, activations: tuple[Activations, list[Any]] | None) -> None:
        """Quantize lm_head for the recipes that ask for it: its input is the final norm's output."""
        from halfbyte.algo import solve_group
        from halfbyte.engine.block import options_of

        waiting = [j for j in self._head_jobs() if not j.done(HEAD)]
        if not waiting:
            return
        name = self.family.lm_head
        weight = self.checkpoint.load(f"{name}.weight").to(self.device)
        stats = Stats.uniform(weight.shape[1], weight.device)
        if activations is not None:
            collector = Collector(weight.shape[1], self.gram, self.device)
            for x, keep in zip(*activations):
                flat = self.skeleton.normed(x).flatten(0, -2)
                collector.add(flat if keep is None else flat[keep])
            stats = collector.stats()
        for job in waiting:
            try:
                solved, _ = solve_group([weight], stats, job.schemes[name].group_size, options_of(job.recipe))
            except Exception as error:
                if job.failed is None:
                    raise
                job.failed(HEAD, error)
                continue
            job.emit(HEAD, BlockResult(linears={name: solved[0]}))
