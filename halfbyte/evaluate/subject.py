"""A model that answers: a loaded transformers model, or one that vLLM serves. The same three questions to both.

Prompts are token ids, so both read exactly the same, chat template included. Everything is greedy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from transformers import DynamicCache, GenerationConfig

from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.scoring import token_loglik
from halfbyte.serving import Client
from halfbyte.types import Progress, Quiet

PIECE = 512
"""Tokens that go through a loaded model at a time: their logits are all that is held of a long sequence's."""
BATCH_TOKENS = 4096
"""Tokens of a batch of prompts, with padding and room for the answers."""


class Subject(Protocol):
    """What evaluations ask of a model."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        stop_ids: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> list[str]:
        """The greedy answer to each prompt, special tokens left out."""

    def choose(
        self, prompts: Sequence[Sequence[int]], candidates: Sequence[int], progress: Progress | None = None
    ) -> list[int]:
        """For each prompt, which of the candidate tokens is the most likely to come next."""

    def logliks(self, windows: Sequence[Sequence[int]], progress: Progress | None = None) -> list[np.ndarray]:
        """Log-likelihoods in nats of all tokens but the first of each window, float64 [T - 1]."""


class Loaded:
    """A transformers causal LM in memory."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        stop_ids: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> list[str]:
        stops = list(stop_ids)
        pad = stops[0] if stops else 0
        greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=stops or None,
            pad_token_id=pad,
            repetition_penalty=1.0,
        )
        answers = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        while order:
            longest = len(prompts[order[0]])
            size = max(1, BATCH_TOKENS // (longest + max_tokens))
            members, order = order[:size], order[size:]
            ids, mask = _padded_left([prompts[i] for i in members], pad)
            ids, mask = ids.to(self.model.device), mask.to(self.model.device)
            said = self.model.generate(ids, attention_mask=mask, generation_config=greedy)[:, longest:]
            for i, row in zip(members, said.tolist()):
                answers[i] = self.tokenizer.decode(_until(row, stops), skip_special_tokens=True)
            (progress or Quiet()).advance(len(members))
        return answers

    def choose(
        self, prompts: Sequence[Sequence[int]], candidates: Sequence[int], progress: Progress | None = None
    ) -> list[int]:
        chosen = []
        for prompt in prompts:
            for _, logits in _pieces(self.model, torch.tensor([list(prompt)]), keep=1):
                last = logits
            scores = last[0, -1, list(candidates)].float()
            if torch.isnan(scores).any():
                raise HalfbyteError("a model gives NaN on a long prompt: run `halfbyte check` on the artifact")
            chosen.append(int(candidates[int(scores.argmax())]))
            (progress or Quiet()).advance()
        return chosen

    def logliks(self, windows: Sequence[Sequence[int]], progress: Progress | None = None) -> list[np.ndarray]:
        found = []
        for window in windows:
            ids = torch.tensor([list(window)])
            parts = []
            for start, logits in _pieces(self.model, ids):
                size = min(logits.shape[1], ids.shape[1] - 1 - start)
                position = torch.arange(1, size + 1)
                piece = ids[:, start : start + size + 1]
                parts.append(token_loglik(logits, piece, torch.zeros_like(position), position))
            found.append(torch.cat(parts).double().numpy())
            (progress or Quiet()).advance()
        return found


class Served:
    """A model behind vLLM's HTTP API."""

    def __init__(self, client: Client, url: str) -> None:
        self.client, self.url = client, url

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        stop_ids: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> list[str]:
        return self.client.answers(prompts, max_tokens, stop_ids=stop_ids, progress=progress)

    def choose(
        self, prompts: Sequence[Sequence[int]], candidates: Sequence[int], progress: Progress | None = None
    ) -> list[int]:
        return self.client.choose(prompts, candidates, progress=progress)

    def logliks(self, windows: Sequence[Sequence[int]], progress: Progress | None = None) -> list[np.ndarray]:
        scored = []
        for window in windows:
            scored += self.client.score([window], batch=1)
            (progress or Quiet()).advance()
        return [np.array(row[1:], dtype=np.float64) for row in scored]


def stop_tokens(tokenizer: Any, *configs: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those of the models' generation configs."""
    found: list[int] = []
    for ending in (tokenizer.eos_token_id, *(getattr(config, "eos_token_id", None) for config in configs)):
        found += [ending] if isinstance(ending, int) else list(ending or [])
    return list(dict.fromkeys(found))


def _until(row: list[int], stops: Sequence[int]) -> list[int]:
    end = next((i for i, token in enumerate(row) if token in stops), len(row))
    return row[:end]


def _padded_left(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask [B, T], both int64, the prompts at the right."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


@torch.inference_mode()
def _pieces(model: Any, ids: torch.Tensor, keep: int = 0) -> Iterator[tuple[int, torch.Tensor]]:
    """(start, logits [1, PIECE, V]) of ids [1, T] through the key-value cache; keep: of a piece's last tokens alone."""
    ids = ids.to(model.device)
    cache = DynamicCache(config=model.config)
    for start in range(0, ids.shape[1], PIECE):
        piece = ids[:, start : start + PIECE]
        yield start, model(piece, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits
