"""Text to token ids, the same way for calibration and for evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

Tokenizer = Any
"""A transformers tokenizer (PreTrainedTokenizerBase)."""


def text_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with no special tokens added (those written in the text are recognised)."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def leading_special(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer itself puts before a text: [bos] for Llama-3 or Gemma, nothing for SmolLM2 or Qwen."""
    with_special = list(tokenizer("a")["input_ids"])
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    for start in range(len(with_special) - len(bare) + 1):
        if with_special[start : start + len(bare)] == bare:
            return with_special[:start]
    return []


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """One hash for what a tokenizer does: vocabulary, merges, normalisation, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "to_str"):
        body = json.loads(backend.to_str())
        body.pop("padding", None)
        body.pop("truncation", None)
    else:
        body = tokenizer.get_vocab()
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    text = json.dumps([body, special, str(tokenizer.chat_template)], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
