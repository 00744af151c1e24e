"""The model writes its own text: sampled at temperature 1 from its full distribution, seeded, in batches.

Such text needs no data set, and for tokens x that the BF16 model p sampled, mean(log p(x) - log q(x)) is an unbiased
estimate of KL(p || q). Which tokens were sampled, and not put in by the chat template, is kept for that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from halfbyte.calibration.cut import MIN_TOKENS
from halfbyte.calibration.script import Script, write_script
from halfbyte.calibration.tokens import Tokenizer
from halfbyte.errors import HalfbyteError
from halfbyte.types import Progress, Quiet

ROUNDS = 6
"""How often text that ended early is made good by further sequences."""
BATCH_TOKENS = 32768
"""Bound on the tokens in the key-value cache."""


@dataclass
class SelfGenerated:
    """Text of a model: `sequences` int64 [T] each; `sampled` bool [T] each, False where the frame was put in."""

    sequences: list[torch.Tensor]
    sampled: list[torch.Tensor]
    opening: str


@dataclass
class _Text:
    """One text being written."""

    ids: list[int]
    target: int
    draws: torch.Tensor
    sampled: list[bool] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)
    turn: int = 0
    turn_start: int = 0
    done: bool = False

    def next(self, token: int, script: Script) -> int:
        """Take the model's `token`, or the frame's where one is due; notes ends of turns and of the text."""
        self.sampled.append(not self.forced)
        if self.forced:
            token = self.forced.pop(0)
            self.turn_start = len(self.ids) + 1
        elif script.turns:
            after = script.turns[self.turn]
            long_question = self.turn == 0 and len(self.ids) - self.turn_start >= self.target // 2
            if token == after[0] or long_question:
                self.sampled[-1] = token == after[0]
                token, self.forced = after[0], list(after[1:])
                self.turn = 1 - self.turn
        self.ids.append(token)
        self.done = len(self.ids) >= self.target or (self.sampled[-1] and token in script.stops)
        return token


def generate(
    model: Any,
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    *,
    seed: int = 0,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> SelfGenerated:
    """About sum(lengths) tokens that `model` (a transformers causal LM, in eval mode) writes by itself.

    lengths     tokens of each text, opening included; a text that the model ends early is kept as it is, and
                further ones are written for what is missing, so there may be more texts than lengths.
    seed        one seed, one machine: the same tokens. Every text has random numbers of its own.
    Raises HalfbyteError when the model gives NaN or ends nearly every text at once.
    """
    progress = progress or Quiet()
    script = write_script(tokenizer, model, max(lengths))
    shortest = min(max(lengths), len(script.opening) + MIN_TOKENS)
    wanted = [max(n, shortest) for n in lengths]
    batch_size = max(1, min(batch_size, BATCH_TOKENS // max(wanted)))
    budget = sum(wanted)
    progress.start("writing its own text", budget)
    texts: list[_Text] = []
    made = asked = written = 0
    for _ in range(ROUNDS):
        fresh = [_start(script, n, seed, made + i) for i, n in enumerate(sorted(wanted, reverse=True))]
        for first in range(0, len(fresh), batch_size):
            _write(model, fresh[first : first + batch_size], script, progress)
        made, asked = made + len(fresh), asked + sum(wanted)
        for text in fresh:
            if written < budget and len(text.ids) >= len(script.opening) + MIN_TOKENS // 2:
                texts.append(text)
                written += len(text.ids)
        wanted = _missing(budget - written, max(lengths), shortest, written / asked)
        if not wanted:
            break
    _judge(texts, budget, made, progress)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    return SelfGenerated(
        [torch.tensor(texts[i].ids) for i in order],
        [torch.tensor([False] * len(script.opening) + texts[i].sampled) for i in order],
        script.kind,
    )


def _start(script: Script, target: int, seed: int, index: int) -> _Text:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    return _Text(list(script.opening), target, torch.rand(target, generator=generator), turn_start=len(script.opening))


def _missing(tokens: int, longest: int, shortest: int, yielded: float) -> list[int]:
    """Targets of the texts that make good `tokens` missing tokens, where texts give `yielded` of their targets."""
    if tokens < shortest:
        return []
    if tokens < longest and yielded > 0.95:
        return [tokens]
    return [longest] * math.ceil(tokens / longest / max(yielded, 0.1))


def _judge(texts: list[_Text], budget: int, made: int, progress: Progress) -> None:
    written = sum(len(text.ids) for text in texts)
    if written < budget // 2:
        raise HalfbyteError(
            f"the model ends its texts too early: {written:,} of {budget:,} tokens after {made} texts: give text files"
        )
    if written < 0.95 * budget:
        progress.say(f"the model ended its texts early: {written:,} of {budget:,} tokens")


@torch.inference_mode()
def _write(model: Any, texts: list[_Text], script: Script, progress: Progress) -> None:
    """Write one batch to its end. All texts open alike, so there is no padding; finished ones leave the cache."""
    from transformers import DynamicCache  # here, for it takes seconds, and most commands need none

    active = [text for text in texts if len(text.ids) < text.target]
    cache = DynamicCache(config=model.config)
    feed = torch.tensor([text.ids for text in active], device=model.device)
    progress.advance(feed.numel())
    rows = list(range(len(active)))
    while active:
        logits = model(feed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        draws = torch.stack([active[row].draws[len(active[row].ids) - len(script.opening)] for row in rows])
        tokens = _sample(logits, draws).tolist()
        chosen = [active[row].next(token, script) for row, token in zip(rows, tokens)]
        progress.advance(len(rows))
        running = [i for i, row in enumerate(rows) if not active[row].done]
        if not running:
            return
        if len(running) < len(rows):
            cache.batch_select_indices(torch.tensor(running, device=model.device))
            rows = [rows[i] for i in running]
            chosen = [chosen[i] for i in running]
        feed = torch.tensor(chosen, device=model.device).unsqueeze(1)


def _sample(logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Tokens [B] from logits [B, V] by inverting the cumulative distribution at draws [B] in [0, 1)."""
    mass = torch.softmax(logits.float(), dim=-1).cumsum(dim=-1)
    total = mass[:, -1:]
    if not torch.isfinite(total).all():
        raise HalfbyteError("the model gives NaN where it writes its own text: check its weights, or give text files")
    return (
        torch.searchsorted(mass, draws.to(mass.device).unsqueeze(1) * total, right=True)
        .squeeze(1)
        .clamp_(max=logits.shape[-1] - 1)
    )
