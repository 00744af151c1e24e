"""Tiny random models of every supported family, made in the test, with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.utils import logging

logging.disable_progress_bar()

DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
SPARSE = ("mixtral", "qwen2_moe", "qwen3_moe")
FAMILIES = (*DENSE, *SPARSE)
VOCAB = 320

_COMMON = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_SPECIAL: dict[str, dict] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 16, "head_dim": 32},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32},
    "gemma3": {
        "head_dim": 32,
        "sliding_window": 16,
        "query_pre_attn_scalar": 32,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128},
    "qwen2_moe": {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
    },
    "qwen3_moe": {
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "norm_topk_prob": True,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
    },
}
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with 256 byte tokens and a few special ones."""
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(special + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    tokenizer.chat_template = CHAT
    return tokenizer


def _config(model_type: str, settings: dict[str, object]) -> PreTrainedConfig:
    if model_type == "gemma3_text":
        return Gemma3TextConfig(**settings)
    return AutoConfig.for_model(model_type, **settings)


def make_tiny(family: str, directory: Path, seed: int = 0, **overrides: object) -> Path:
    """Write a random BF16 model of `family` to `directory` as a transformers directory; returns the directory."""
    model_type = "gemma3_text" if family == "gemma3" else family
    config = _config(model_type, {**_COMMON, **_SPECIAL[family], **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.add_(0.1 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                columns = 1 + 3 * torch.rand(parameter.shape[-1], generator=generator) ** 4
                if (
                    parameter.ndim == 3
                ):  # experts that are alike, so that another choice of the router is no other model
                    noise = 0.9 * noise[:1] + 0.4 * noise
                decided = 3 if name.endswith("mlp.gate.weight") else 1
                parameter.copy_(noise * columns * decided * parameter.shape[-1] ** -0.5)
    model.to(torch.bfloat16).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return Path(directory)
