"""What a plan says of a mixture of experts: how many experts, how many a token goes through, what the routers weigh."""

from __future__ import annotations

import math
from typing import Any

from halfbyte.models import Checkpoint, family_of


def experts_of(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What the mixture is; None for a dense model.

    experts, experts_per_token, expert_width; blocks (sparse ones); routers and router_bytes (the gate of a shared
    expert counts as one); active_parameters: those that one token goes through
    """
    family = family_of(checkpoint.config)
    mixture = family.architecture.mixture
    if mixture is None or not family.sparse:
        return None
    routers = [f"{name}.weight" for index in family.sparse for name in family.routers(index)]
    sizes = {name: math.prod(info.shape) for name, info in checkpoint.tensors.items()}
    of_experts = sum(size for name, size in sizes.items() if f".{mixture.experts}." in name)
    asleep = 1 - family.experts_per_token / family.experts
    return {
        "experts": family.experts,
        "experts_per_token": family.experts_per_token,
        "expert_width": checkpoint.config.get(mixture.width),
        "blocks": len(family.sparse),
        "routers": len(routers),
        "router_bytes": sum(checkpoint.tensors[name].nbytes for name in routers if checkpoint.has(name)),
        "active_parameters": round(sum(sizes.values()) - of_experts * asleep),
    }
