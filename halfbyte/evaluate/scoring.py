"""Token log-likelihoods, and the KL divergence between two models, in bounded memory.

A model is a body, which turns tokens into hidden states, and a head, which turns a hidden state into logits. Logits are
made from hidden states a few rows at a time, and only where a token is scored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import DynamicCache

from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.windows import Windows, batches
from halfbyte.types import Progress, Quiet

CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Logits turned to float32 at a time, by device: a buffer that stays in a CPU's cache, one that fills a GPU."""
HEAD_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 28}
"""Logits that a head makes at a time: enough rows to use its weights well, few enough to hold for two models."""


@dataclass(frozen=True)
class Head:
    """The last step of a causal LM: hidden states [..., D] to logits [..., V], in the model's dtype.

    weight [V, D]; bias [V] or None; cap: logits are cap * tanh(logits / cap), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    cap: float | None = None

    @classmethod
    def of(cls, model: Any) -> Head:
        """The head of a transformers causal LM."""
        last = model.get_output_embeddings()
        return cls(last.weight, getattr(last, "bias", None), getattr(model.config, "final_logit_softcapping", None))

    def to(self, device: Any) -> Head:
        """The same head on a device."""
        bias = None if self.bias is None else self.bias.to(device)
        return Head(self.weight.to(device), bias, self.cap)

    @torch.inference_mode()
    def __call__(self, hidden: Tensor) -> Tensor:
        logits = linear(hidden, self.weight, self.bias)
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits


@torch.inference_mode()
def hidden_of(model: Any, ids: Tensor, split: int = 0) -> Tensor:
    """What the model's head reads, [B, T, D] in the model's dtype, for ids [B, T].

    With `split`, the first `split` tokens run on their own and the others upon their key-value cache: the same
    mathematics in other shapes, which shows the noise of the arithmetic.
    """
    ids, body = ids.to(model.device), model.base_model
    if not split:
        return body(ids, use_cache=False).last_hidden_state
    cache = DynamicCache(config=model.config)
    first = body(ids[:, :split], past_key_values=cache, use_cache=True).last_hidden_state
    second = body(ids[:, split:], past_key_values=cache, use_cache=True).last_hidden_state
    return torch.cat([first, second], dim=1)


def logits_of(model: Any, ids: Tensor, split: int = 0) -> Tensor:
    """Logits [B, T, V] in the model's dtype for ids [B, T]; `split` as in `hidden_of`."""
    return Head.of(model)(hidden_of(model, ids, split))


def scored_positions(windows: Windows, members: list[int], longest: int) -> tuple[Tensor, Tensor]:
    """(row, position) of every scored token in a batch, both int64 [N], row by row."""
    mask = torch.zeros(len(members), longest, dtype=torch.bool)
    for i, index in enumerate(members):
        mask[i, : len(windows.scored[index])] = windows.scored[index]
    mask[:, 0] = False
    row, position = mask.nonzero(as_tuple=True)
    return row, position


@torch.inference_mode()
def token_statistics(p: Tensor, q: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """How two models differ where each scored token is predicted, from their logits [N, V] and the N tokens.

    loglik_baseline, loglik   log-likelihood of the token, nats
    kl                        KL(p || q), nats
    top_baseline, top         the most likely token (the first, of several), int64; top1: whether it is the same
    shares                    [N, 4]: p(top_baseline), p(top), q(top_baseline), q(top)
    All [N] but `shares`, on the CPU; float32 from logits taken to float32.
    """
    zp, zq = p.float(), q.to(p.device).float()
    lp, lq, weight = zp.log_softmax(-1), zq.log_softmax(-1), zp.softmax(-1)
    token = tokens.to(p.device).unsqueeze(1)
    tops = torch.stack([zp.argmax(-1), zq.argmax(-1)], dim=1)
    found = {
        "loglik_baseline": lp.gather(1, token).squeeze(1),
        "loglik": lq.gather(1, token).squeeze(1),
        "token": token.squeeze(1),
        "top_baseline": tops[:, 0],
        "top": tops[:, 1],
        "top1": tops[:, 0] == tops[:, 1],
        "shares": torch.cat([lp.gather(1, tops), lq.gather(1, tops)], dim=1).exp(),
    }
    found["kl"] = lp.sub_(lq).mul_(weight).sum(-1, dtype=torch.float64).float().clamp_min_(0.0)
    return {name: values.cpu() for name, values in found.items()}


def pair_statistics(p: Tensor, q: Tensor, ids: Tensor, row: Tensor, position: Tensor) -> dict[str, Tensor]:
    """`token_statistics` of every scored token, from logits [B, T, V]; the token at `position` is predicted by the
    logits one before it."""
    parts = []
    for at_row, at, token in _chunks(ids, row, position, p):
        zp, zq = (z[at_row.to(z.device), at.to(z.device)] for z in (p, q))
        parts.append(token_statistics(zp, zq, token))
    return _joined(parts)


@torch.inference_mode()
def hidden_statistics(p: Head, hp: Tensor, q: Head, hq: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """`token_statistics` from what both heads read, [N, D] each, and the N tokens.

    Raises HalfbyteError when the vocabularies differ.
    """
    sizes = len(p.weight), len(q.weight)
    if sizes[0] != sizes[1]:
        raise HalfbyteError(
            f"the models have {sizes[0]} and {sizes[1]} tokens in their vocabularies: name the BF16 original"
        )
    kind = hp.device.type
    many = max(1, HEAD_ELEMENTS.get(kind, 1 << 25) // sizes[0])
    few = max(1, CHUNK_ELEMENTS.get(kind, 1 << 20) // sizes[0])
    parts = []
    for start in range(0, len(tokens), many):
        zp, zq = p(hp[start : start + many]), q(hq[start : start + many])
        chunks = zip(zp.split(few), zq.split(few), tokens[start : start + many].split(few))
        parts += [token_statistics(*chunk) for chunk in chunks]
    return _joined(parts)


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


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
