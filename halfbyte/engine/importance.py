"""How much a token's error matters: measured with gradients.

GPTQ minimises the error of each linear's output summed over tokens, as if all tokens mattered alike. They do not: the
first token of a sequence is the attention sink, and an error in its key and value reaches every later token, while the
same token's MLP in a late block hardly reaches anything. To second order, an error dz in a linear's output costs

    E[KL(p || p_hat)]  =  1/2 dz^T F dz,      F = E_{y ~ p}[g g^T],   g = d(-log p(y)) / dz

(the Fisher information), so a token counts by the size of its gradient, E||g||^2, taken for each group of linears. y is
drawn once a token, which is noisy. So there are two ways:

    first token   a few sequences; the first position's mean over the others' mean (the rest counts once)
    every token   all sequences; w = (||g||^2 / mean ||g||^2 + SMOOTH) / (1 + SMOOTH)

In a mixture of experts the gradient is taken at the output of all experts together; that of one expert is this times
the router's weight, which experts.py adds.

Measured on SmolLM2-135M (docs/log.md), first token against the rest: qkv 50 to 4,600; o, gate_up and down 2 to 50 in
the first third of the blocks and 0.0 to 0.2 behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from halfbyte.engine.activations import Room
from halfbyte.engine.backprop import Tape, equal_lengths
from halfbyte.engine.heap import trim
from halfbyte.engine.skeleton import Skeleton
from halfbyte.models import Family
from halfbyte.types import LinearGroup, Progress, Quiet

SEQUENCES, TOKENS, BATCH = 8, 512, 4
"""For the first token: so many sequences, cut to so many tokens; so many at a time where their lengths differ."""
LEAST = 32
"""A sequence shorter than this says nothing about its first token."""
SINK = 16.0
"""Weight of the first token where nothing was measured."""
MOST = 4096.0
"""No token counts more often than this."""
SMOOTH = 3.0
"""How many means are added to a single token's noisy gradient."""

EXPERTS = "experts"
"""The key that stands for every expert of a block."""

Key = tuple[int, str]
"""A block and the key of a group in it, or EXPERTS."""
Batch = tuple[torch.Tensor, torch.Tensor | None]
"""Token ids int64 [B, T]; bool [B*T], False on padding, or None where there is none."""


@dataclass
class Importance:
    """first: weight of each sequence's first token, by group; tokens: by group, for each batch float32 [B, T]."""

    first: Mapping[Key, float] = field(default_factory=dict)
    tokens: Mapping[Key, Sequence[torch.Tensor]] = field(default_factory=dict)

    def weights(self, key: Key, batch: int, shape: tuple[int, ...], device: torch.device | str = "cpu") -> torch.Tensor:
        """How often each token of a batch [B, T] counts: float32 [B, T] on `device`."""
        if key in self.tokens:
            return self.tokens[key][batch].to(device)
        weights = torch.ones(shape, device=device)
        weights[:, 0] = self.first.get(key, SINK)
        return weights

    def of_group(
        self, index: int, group: LinearGroup, batch: int, shape: tuple[int, ...], device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """The same for a group of block `index`, by what the gradient of its outputs was taken at."""
        return self.weights((index, EXPERTS if group.owner else group.key), batch, shape, device)


def first_token(
    skeleton: Skeleton,
    sequences: Sequence[torch.Tensor],
    seed: int = 0,
    progress: Progress | None = None,
    room: Room | None = None,
) -> Importance:
    """Measure the first token's weight on a few of `sequences` (int64 [t]). Nothing where none is long enough, or where
    the model's outputs are not finite (solving says where). room: for the blocks' inputs."""
    progress = progress or Quiet()
    long = [s[:TOKENS] for s in sequences if len(s) >= LEAST]
    chosen = long[:: max(1, len(long) // SEQUENCES)][:SEQUENCES]
    batches = list(equal_lengths(chosen, SEQUENCES if len({*map(len, chosen)}) == 1 else BATCH))
    progress.start("weighing the first token", len(batches))
    powers = _powers(skeleton, [(ids, None) for ids in batches], seed, progress, room)
    weights = {}
    for key, rows in powers.items():
        first = torch.cat([row[:, 0] for row in rows]).mean()
        rest = torch.cat([row[:, 1:].flatten() for row in rows]).mean()
        weights[key] = float((first / rest).clamp(0, MOST)) if bool(rest > 0) else SINK
    return Importance(first=weights)


def every_token(
    skeleton: Skeleton,
    batches: Sequence[Batch],
    seed: int = 0,
    progress: Progress | None = None,
    room: Room | None = None,
) -> Importance:
    """Measure every token's weight. Nothing where the model's outputs are not finite (solving says where)."""
    progress = progress or Quiet()
    progress.start("weighing tokens", len(batches))
    powers = _powers(skeleton, batches, seed, progress, room)
    kept = [torch.ones(ids.shape) if keep is None else keep.cpu().view(ids.shape).float() for ids, keep in batches]
    count = sum(float(k.sum()) for k in kept)
    tokens = {}
    for key, rows in powers.items():
        mean = sum(float((row * k).sum()) for row, k in zip(rows, kept)) / count
        if mean > 0:
            tokens[key] = [((row / mean).clamp_(max=MOST) + SMOOTH) / (1 + SMOOTH) for row in rows]
    return Importance(tokens=tokens)


def _powers(
    skeleton: Skeleton, batches: Sequence[Batch], seed: int, progress: Progress, room: Room | None
) -> dict[Key, list[torch.Tensor]]:
    """||g||^2 of every group's outputs: for each batch float32 [B, T], on the CPU."""
    generator = torch.Generator(device=skeleton.device).manual_seed(seed)
    powers: dict[Key, list[torch.Tensor]] = {}
    for ids, keep in batches:
        tape = Tape(skeleton, ids, room=room)
        if not bool(tape.output.isfinite().all()):
            return {}
        gradient, _ = tape.head(partial(_surprise, generator=generator, keep=keep))
        watch = _Watch(skeleton.family)
        tape.backward(gradient, watch)
        tape.kept.close()
        for key, power in watch.powers.items():
            powers.setdefault(key, []).append(power.cpu().view(ids.shape))
        trim()
        progress.advance()
    return powers


def _surprise(
    logits: torch.Tensor, piece: slice, generator: torch.Generator, keep: torch.Tensor | None
) -> torch.Tensor:
    """-log p(y), summed over the tokens kept, with every y drawn from the model's own distribution."""
    log_p = torch.log_softmax(logits, -1)
    y = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
    surprise = -log_p.gather(1, y).squeeze(1)
    return surprise.sum() if keep is None else (surprise * keep[piece].to(surprise.device)).sum()


class _Watch:
    """Adds up ||g||^2 over each group's linears, and takes it at the output of a block's experts."""

    def __init__(self, family: Family):
        self.family = family
        self.powers: dict[Key, torch.Tensor] = {}

    @contextmanager
    def __call__(self, index: int, block: nn.Module) -> Iterator[None]:
        mixture = self.family.mixture(index)
        watched = [(g.key, name) for g in self.family.groups_of(index) if not g.owner for name in g.names]
        watched += [(EXPERTS, mixture.experts)] if mixture else []
        handles = [block.get_submodule(name).register_forward_hook(self._hook((index, key))) for key, name in watched]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, key: Key) -> Callable[..., None]:
        def forward(_module: nn.Module, _args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            output.register_hook(lambda g: self._add(key, g))

        return forward

    def _add(self, key: Key, gradient: torch.Tensor) -> None:
        power = gradient.float().square().sum(-1)
        self.powers[key] = self.powers[key] + power if key in self.powers else power
