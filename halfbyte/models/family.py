"""What a decoder block looks like, per architecture: which linears share an input, and what precedes them.

All supported families are dense decoders whose blocks are `model.layers.N` with `self_attn` and `mlp`.
A family is data; a new one is a new row in FAMILIES (and a tiny model in the tests).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from halfbyte.errors import HalfbyteError
from halfbyte.types import LinearGroup


@dataclass(frozen=True)
class Fold:
    """Where an input scale of one LinearGroup can be absorbed, so that the BF16 model computes the same.

    kind       the LinearGroup whose inputs are scaled
    norm       a norm whose weight is divided (block-relative), or ""
    linear     a linear whose output rows are divided, or ""
    part       which rows of that linear: "all" | "v" (the value part of a fused qkv) | "up" (the second half)
    per_head   True where the rows are value heads, each repeated over the query heads that share it
    """

    kind: str
    norm: str = ""
    linear: str = ""
    part: str = "all"
    per_head: bool = False


@dataclass(frozen=True)
class Architecture:
    """The shape of a family's block. `norm_offset`: the norm multiplies by (offset + weight)."""

    groups: tuple[LinearGroup, ...]
    folds: tuple[Fold, ...]
    norm_offset: float = 0.0


def _split(mlp_norm: str, norm_offset: float = 0.0) -> Architecture:
    attn = "self_attn."
    return Architecture(
        groups=(
            LinearGroup("qkv", (f"{attn}q_proj", f"{attn}k_proj", f"{attn}v_proj"), f"{attn}qkv_proj"),
            LinearGroup("o", (f"{attn}o_proj",), f"{attn}o_proj"),
            LinearGroup("gate_up", ("mlp.gate_proj", "mlp.up_proj"), "mlp.gate_up_proj"),
            LinearGroup("down", ("mlp.down_proj",), "mlp.down_proj"),
        ),
        folds=(
            Fold("qkv", norm="input_layernorm"),
            Fold("o", linear=f"{attn}v_proj", per_head=True),
            Fold("gate_up", norm=mlp_norm),
            Fold("down", linear="mlp.up_proj"),
        ),
        norm_offset=norm_offset,
    )


_PHI3 = Architecture(
    groups=(
        LinearGroup("qkv", ("self_attn.qkv_proj",), "self_attn.qkv_proj"),
        LinearGroup("o", ("self_attn.o_proj",), "self_attn.o_proj"),
        LinearGroup("gate_up", ("mlp.gate_up_proj",), "mlp.gate_up_proj"),
        LinearGroup("down", ("mlp.down_proj",), "mlp.down_proj"),
    ),
    folds=(
        Fold("qkv", norm="input_layernorm"),
        Fold("o", linear="self_attn.qkv_proj", part="v", per_head=True),
        Fold("gate_up", norm="post_attention_layernorm"),
        Fold("down", linear="mlp.gate_up_proj", part="up"),
    ),
)

FAMILIES: dict[str, Architecture] = {
    "llama": _split("post_attention_layernorm"),
    "mistral": _split("post_attention_layernorm"),
    "qwen2": _split("post_attention_layernorm"),
    "qwen3": _split("post_attention_layernorm"),
    "gemma2": _split("pre_feedforward_layernorm", norm_offset=1.0),
    "gemma3_text": _split("pre_feedforward_layernorm", norm_offset=1.0),
    "phi3": _PHI3,
}
"""By `model_type` of config.json."""


@dataclass(frozen=True)
class Family:
    """An architecture together with one model's config: names, counts, head sizes."""

    model_type: str
    architecture: Architecture
    num_blocks: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tied: bool
    embedding: str = "model.embed_tokens"
    lm_head: str = "lm_head"

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return self.architecture.groups

    def block(self, index: int) -> str:
        """The full module name of block `index`."""
        return f"model.layers.{index}"

    def linears(self, index: int) -> Iterator[str]:
        """Full names of the linears of block `index`."""
        for group in self.groups:
            for name in group.names:
                yield f"{self.block(index)}.{name}"


def family_of(config: dict) -> Family:
    """The family of a model's config.json. Raises HalfbyteError for an architecture that is not known."""
    model_type = config.get("model_type")
    architecture = FAMILIES.get(str(model_type))
    if architecture is None:
        known = ", ".join(FAMILIES)
        raise HalfbyteError(
            f"model_type {model_type!r} is not supported: which linears share an input is known for {known} only"
        )
    counts = {k: config.get(k) for k in ("num_hidden_layers", "hidden_size", "num_attention_heads")}
    missing = [k for k, v in counts.items() if type(v) is not int or v < 1]
    if missing:
        raise HalfbyteError(f"config.json lacks {', '.join(missing)}: is it a whole {model_type} config?")
    heads = config["num_attention_heads"]
    return Family(
        model_type=str(model_type),
        architecture=architecture,
        num_blocks=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        tied=bool(config.get("tie_word_embeddings", model_type in ("gemma2", "gemma3_text"))),
    )
