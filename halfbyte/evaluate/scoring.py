"""Token log-likelihoods, and the KL divergence between two models, from logits, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.windows import Windows, batches
from halfbyte.types import Progress, Quiet

CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Logits turned to float32 at a time, by device: a buffer that stays in a CPU's cache, one that fills a GPU."""


@torch.inference_mode()
def logits_of(model: Any, ids: Tensor, split: int = 0) -> Tensor:
    """Logits [B, T, V] in the model's dtype for ids [B, T].

    With `split`, the first `split` tokens run on their own and the others upon their key-value cache: the same
    mathematics in other shapes, which shows the noise of the arithmetic.
    """
    ids = ids.to(model.device)
    if not split:
        return model(ids, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    first = model(ids[:, :split], past_key_values=cache, use_cache=True).logits
    second = model(ids[:, split:], past_key_values=cache, use_cache=True).logits
    return torch.cat([first, second], dim=1)


def scored_positions(windows: Windows, members: list[int], longest: int) -> tuple[Tensor, Tensor]:
    """(row, position) of every scored token in a batch, both int64 [N], row by row."""
    mask = torch.zeros(len(members), longest, dtype=torch.bool)
    for i, index in enumerate(members):
        mask[i, : len(windows.scored[index])] = windows.scored[index]
    mask[:, 0] = False
    row, position = mask.nonzero(as_tuple=True)
    return row, position


@torch.inference_mode()
def pair_statistics(p: Tensor, q: Tensor, ids: Tensor, row: Tensor, position: Tensor) -> dict[str, Tensor]:
    """Per scored token: log p, log q, KL(p || q) in nats, whether the most likely token is the same.

    p, q: logits [B, T, V]; the token at `position` is predicted by the logits one before it. All results [N], on the
    CPU; float32 from logits taken to float32.
    """
    parts: dict[str, list[Tensor]] = {"loglik_baseline": [], "loglik": [], "kl": [], "top1": []}
    for at_row, at, token in _chunks(ids, row, position, p):
        zp = p[at_row.to(p.device), at.to(p.device)].float()
        zq = q[at_row.to(q.device), at.to(q.device)].to(zp.device).float()
        token = token.to(zp.device).unsqueeze(1)
        lse_p, lse_q = zp.logsumexp(-1), zq.logsumexp(-1)
        parts["loglik_baseline"].append(zp.gather(1, token).squeeze(1) - lse_p)
        parts["loglik"].append(zq.gather(1, token).squeeze(1) - lse_q)
        parts["top1"].append(zp.argmax(-1) == zq.argmax(-1))
        weight = (zp - lse_p.unsqueeze(1)).exp_()
        expected = zp.sub_(zq).mul_(weight).sum(-1, dtype=torch.float64).float()
        parts["kl"].append((expected - lse_p + lse_q).clamp_min_(0.0))
    return {name: torch.cat(values).cpu() for name, values in parts.items()}


@torch.inference_mode()
def token_loglik(logits: Tensor, ids: Tensor, row: Tensor, position: Tensor) -> Tensor:
    """Log-likelihood in nats of every scored token, float32 [N] on the CPU, from logits [B, T, V]."""
    parts = []
    for at_row, at, token in _chunks(ids, row, position, logits):
        z = logits[at_row.to(logits.device), at.to(logits.device)].float()
        token = token.to(z.device).unsqueeze(1)
        parts.append(z.gather(1, token).squeeze(1) - z.logsumexp(-1))
    return torch.cat(parts).cpu()


def score_reference(
    model: Any, windows: Windows, *, batch_tokens: int = 1024, progress: Progress | None = None
) -> dict[str, float]:
    """One model's perplexity over the tokens that vLLM's prompt_logprobs scores: all but the first of each window.

    Returns {"perplexity", "loglik" (nats a token), "tokens"}. Raises HalfbyteError when the model gives NaN.
    """
    progress = progress or Quiet()
    everything = Windows(
        windows.ids, [torch.ones_like(i).bool() for i in windows.ids], windows.source, windows.window, windows.stride
    )
    progress.start("scoring the reference", len(windows))
    total, count = 0.0, 0
    for members, ids in batches(everything, batch_tokens):
        row, position = scored_positions(everything, members, ids.shape[1])
        values = token_loglik(logits_of(model, ids), ids, row, position)
        total += float(values.double().sum())
        count += len(values)
        progress.advance(len(members))
    loglik = total / count
    if loglik != loglik:
        raise HalfbyteError("the reference model gives NaN log-likelihoods: run `halfbyte check` on the artifact")
    return {"perplexity": float(torch.tensor(-loglik, dtype=torch.float64).exp()), "loglik": loglik, "tokens": count}


def _chunks(ids: Tensor, row: Tensor, position: Tensor, logits: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows, positions of the predicting logits, and the tokens they predict, a bounded number at a time."""
    size = max(1, CHUNK_ELEMENTS.get(logits.device.type, 1 << 20) // logits.shape[-1])
    for start in range(0, len(row), size):
        at_row, at = row[start : start + size], position[start : start + size]
        yield at_row, at - 1, ids[at_row, at]
