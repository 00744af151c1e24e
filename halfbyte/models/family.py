"""What a decoder block looks like, per architecture: which linears share an input, and what precedes them.

Supported are decoders whose blocks are `model.layers.N` with `self_attn` and an MLP. The MLP is dense, or a mixture of
experts: a router that chooses, for each token, a few of many small MLPs, beside which some families have a shared one.
A family is data; a new one is a new row in FAMILIES (and a tiny model in the tests). Names are the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from halfbyte.errors import HalfbyteError
from halfbyte.types import LinearGroup


@dataclass(frozen=True)
class Fold:
    """Where an input scale of one LinearGroup can be absorbed, so that the BF16 model computes the same.

    kind       the key of the LinearGroup whose inputs are scaled
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
class Mixture:
    """The sparse MLP of a family's blocks. Names are relative to the block, `projections` to an expert.

    module       what holds router and experts
    projections  (gate, up, down) of an expert
    width        key of config.json: the experts' hidden width
    shared       the MLP that every token goes through beside the chosen ones, or ""; `gate` scales its output
    """

    module: str
    projections: tuple[str, str, str]
    width: str
    shared: str = ""

    @property
    def router(self) -> str:
        return f"{self.module}.gate"

    @property
    def experts(self) -> str:
        """What holds the experts: one fused module in vLLM."""
        return f"{self.module}.experts"

    @property
    def gate(self) -> str:
        return f"{self.shared}_gate" if self.shared else ""


@dataclass(frozen=True)
class Architecture:
    """The shape of a family's block. `norm_offset`: the norm multiplies by (offset + weight).

    groups and folds are a dense block's; `mixture` is what sparse blocks have instead of the dense MLP.
    """

    groups: tuple[LinearGroup, ...]
    folds: tuple[Fold, ...]
    norm_offset: float = 0.0
    mixture: Mixture | None = None


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
_LLAMA = _split("post_attention_layernorm")
_QWEN = Mixture("mlp", ("gate_proj", "up_proj", "down_proj"), "moe_intermediate_size")

FAMILIES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _split("pre_feedforward_layernorm", norm_offset=1.0),
    "gemma3_text": _split("pre_feedforward_layernorm", norm_offset=1.0),
    "phi3": _PHI3,
    "mixtral": replace(_LLAMA, mixture=Mixture("block_sparse_moe", ("w1", "w3", "w2"), "intermediate_size")),
    "qwen2_moe": replace(_LLAMA, mixture=replace(_QWEN, shared="mlp.shared_expert")),
    "qwen3_moe": replace(_LLAMA, mixture=_QWEN),
}
"""By `model_type` of config.json."""


@dataclass(frozen=True)
class Family:
    """An architecture together with one model's config: names, counts, head sizes.

    sparse     the blocks whose MLP is a mixture of `experts`, `experts_per_token` of which a token goes through
    """

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
    sparse: tuple[int, ...] = ()
    experts: int = 0
    experts_per_token: int = 0

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """Every group that some block has."""
        return tuple(dict.fromkeys(g for i in range(self.num_blocks) for g in self.groups_of(i)))

    def block(self, index: int) -> str:
        """The full module name of block `index`."""
        return f"model.layers.{index}"

    def mixture(self, index: int) -> Mixture | None:
        """The mixture of experts of block `index`; None where its MLP is dense."""
        return self.architecture.mixture if index in self.sparse else None

    def groups_of(self, index: int) -> tuple[LinearGroup, ...]:
        """The linear groups of block `index`, in the order in which the block runs them."""
        return self._sparse_groups if index in self.sparse else self.architecture.groups

    def folds_of(self, index: int) -> tuple[Fold, ...]:
        """The folds of block `index`.

        The router and every expert read the same norm, which could take up one scale for all of them alone: the inputs
        of gate and up are not scaled in a mixture. Those of down are, within each expert.
        """
        return self._sparse_folds if index in self.sparse else self.architecture.folds

    def rows_of(self, fold: Fold, out_features: int) -> slice:
        """Which rows of the fold's linear take up its scale."""
        if fold.part == "v":
            return slice((self.num_heads + self.num_kv_heads) * self.head_dim, out_features)
        return slice(out_features // 2 if fold.part == "up" else 0, out_features)

    def repeat_of(self, fold: Fold) -> tuple[int, int, int] | None:
        """(kv_heads, queries_per_kv, head_dim) of the scaled inputs where they are value heads repeated over the query
        heads; None where each input comes from a row of its own."""
        return (self.num_kv_heads, self.num_heads // self.num_kv_heads, self.head_dim) if fold.per_head else None

    def inputs_of(self, fold: Fold, rows_O: torch.Tensor) -> torch.Tensor:
        """What belongs to the fold's rows (float [O]) for each input of the group that is scaled: float [I]."""
        repeat = self.repeat_of(fold)
        return rows_O if repeat is None else rows_O.view(repeat[0], 1, repeat[2]).expand(repeat).reshape(-1)

    def rows_from(self, fold: Fold, inputs_I: torch.Tensor) -> torch.Tensor:
        """The other way, for inputs that are alike where they are repeated: float [I] to float [O]."""
        repeat = self.repeat_of(fold)
        return inputs_I if repeat is None else inputs_I.view(repeat)[:, 0].reshape(-1)

    def linears(self, index: int) -> Iterator[str]:
        """Full names of the linears of block `index` that can be quantized."""
        for group in self.groups_of(index):
            for name in group.names:
                yield f"{self.block(index)}.{name}"

    def routers(self, index: int) -> list[str]:
        """Full names of what decides where a token goes in block `index`, which is never quantized."""
        mixture = self.mixture(index)
        names = [mixture.router, mixture.gate] if mixture else []
        return [f"{self.block(index)}.{name}" for name in names if name]

    @cached_property
    def _sparse_groups(self) -> tuple[LinearGroup, ...]:
        mixture = self.architecture.mixture
        assert mixture is not None
        groups = [group for group in self.architecture.groups if group.kind in ("qkv", "o")]
        if mixture.shared:
            gate, up, down = (f"{mixture.shared}.{name}" for name in mixture.projections)
            owner = mixture.shared.rpartition(".")[2]
            groups.append(LinearGroup("gate_up", (gate, up), f"{mixture.shared}.gate_up_proj", owner))
            groups.append(LinearGroup("down", (down,), down, owner))
        for expert in range(self.experts):
            gate, up, down = (f"{mixture.experts}.{expert}.{name}" for name in mixture.projections)
            groups.append(LinearGroup("gate_up", (gate, up), mixture.experts, f"experts.{expert}", expert))
            groups.append(LinearGroup("down", (down,), mixture.experts, f"experts.{expert}", expert))
        return tuple(groups)

    @cached_property
    def _sparse_folds(self) -> tuple[Fold, ...]:
        names = {(group.owner, group.kind): group.names for group in self._sparse_groups}
        within = [Fold(f"{o}.down", linear=names[o, "gate_up"][1]) for o, kind in names if o and kind == "down"]
        return (*(fold for fold in self.architecture.folds if fold.kind in ("qkv", "o")), *within)


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
    experts: Any = config.get("num_local_experts", config.get("num_experts"))
    if architecture.mixture:
        counts |= {"num_experts": experts, "num_experts_per_tok": config.get("num_experts_per_tok")}
    missing = [k for k, v in counts.items() if type(v) is not int or v < 1]
    if missing:
        raise HalfbyteError(f"config.json lacks {', '.join(missing)}: is it a whole {model_type} config?")
    heads = config["num_attention_heads"]
    family = Family(
        model_type=str(model_type),
        architecture=architecture,
        num_blocks=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        tied=bool(config.get("tie_word_embeddings", model_type in ("gemma2", "gemma3_text"))),
    )
    if not architecture.mixture:
        return family
    chosen = config["num_experts_per_tok"]
    return replace(family, sparse=_sparse_blocks(config), experts=int(experts), experts_per_token=chosen)


def _sparse_blocks(config: dict) -> tuple[int, ...]:
    """Every `decoder_sparse_step`-th block, but for `mlp_only_layers`."""
    step, dense = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or ()
    return tuple(i for i in range(config["num_hidden_layers"]) if (i + 1) % step == 0 and i not in dense)
