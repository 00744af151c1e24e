"""Mixtures of experts, as far as the plan goes: experts found and counted, the router left alone, bytes right.

`halfbyte quantize` does not do them yet; when it does, their rows belong in models/family.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from halfbyte.errors import HalfbyteError
from halfbyte.models import Checkpoint, Family, family_of
from halfbyte.models.family import FAMILIES, Architecture
from halfbyte.types import LinearGroup


@dataclass(frozen=True)
class Mixture:
    """How a family names its experts. `dense`: the family whose attention it has; names are relative to the block."""

    dense: str
    count: str
    width: str
    router: str
    expert: str
    gate_up: tuple[str, ...]
    down: str


MIXTURES = {
    "mixtral": Mixture(
        "mistral",
        "num_local_experts",
        "intermediate_size",
        "block_sparse_moe.gate",
        "block_sparse_moe.experts",
        ("w1", "w3"),
        "w2",
    ),
    "qwen3_moe": Mixture(
        "qwen3",
        "num_experts",
        "moe_intermediate_size",
        "mlp.gate",
        "mlp.experts",
        ("gate_proj", "up_proj"),
        "down_proj",
    ),
}


def plan_family(checkpoint: Checkpoint) -> Family:
    """The family of a checkpoint's config, mixtures of experts among them. Raises HalfbyteError for an unknown one."""
    config = checkpoint.config
    kind = str(config.get("model_type"))
    mixture = MIXTURES.get(kind)
    if mixture is None or kind in FAMILIES:
        return family_of(config)
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise HalfbyteError(f"{kind} with dense layers between the sparse ones cannot be planned yet")
    family = family_of({**config, "model_type": mixture.dense})
    attention = tuple(group for group in family.groups if group.kind in ("qkv", "o"))
    experts = [group for index in range(_count(config, mixture)) for group in _expert(mixture, index)]
    return replace(family, model_type=kind, architecture=Architecture((*attention, *experts), folds=()))


def experts_of(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What the mixture is: experts of a block, those a token uses, routers and their bytes; None for a dense model.

    `supported`: whether `halfbyte quantize` knows the family.
    """
    config = checkpoint.config
    mixture = MIXTURES.get(str(config.get("model_type")))
    if mixture is None:
        return None
    routers = [info for name, info in checkpoint.tensors.items() if name.endswith(f".{mixture.router}.weight")]
    return {
        "supported": config["model_type"] in FAMILIES,
        "experts": _count(config, mixture),
        "experts_per_token": config.get("num_experts_per_tok"),
        "expert_width": config.get(mixture.width),
        "routers": len(routers),
        "router_bytes": sum(info.nbytes for info in routers),
    }


def _count(config: dict[str, Any], mixture: Mixture) -> int:
    count = config.get(mixture.count)
    if type(count) is not int or count < 1:
        raise HalfbyteError(f"config.json lacks {mixture.count}: is it a whole {config.get('model_type')} config?")
    return count


def _expert(mixture: Mixture, index: int) -> tuple[LinearGroup, LinearGroup]:
    name = f"{mixture.expert}.{index}"
    return (
        LinearGroup("gate_up", tuple(f"{name}.{leaf}" for leaf in mixture.gate_up), f"{name}.gate_up_proj"),
        LinearGroup("down", (f"{name}.{mixture.down}",), f"{name}.{mixture.down}"),
    )
