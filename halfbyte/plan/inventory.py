"""What a recipe makes of every linear, in bytes, from safetensors headers and config alone: no weight is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.formats import get_format
from halfbyte.models import Checkpoint, family_of
from halfbyte.plan.layers import LinearPlan, assign
from halfbyte.plan.moe import experts_of
from halfbyte.recipe.schema import GROUP_SIZES, Recipe
from halfbyte.types import Scheme

KINDS = ("qkv", "o", "gate_up", "down", "router", "lm_head")
"""Reading order of the linears of a block, and the head."""


@dataclass(frozen=True)
class Footprint:
    """One linear's bytes: in the BF16 checkpoint, in the artifact, and in it if the recipe did not exempt it."""

    plan: LinearPlan
    before: int
    after: int
    if_quantized: int

    @property
    def expert(self) -> bool:
        """Whether it belongs to one expert of a mixture."""
        return ".experts." in self.plan.name

    @property
    def parameters(self) -> int:
        return self.plan.out_features * self.plan.in_features if self.before else 0


def footprints(recipe: Recipe, checkpoint: Checkpoint) -> list[Footprint]:
    """The footprint of every linear. A tied lm_head has no bytes of its own. Errors: those of `assign`."""
    sizes = _Sizes(recipe)
    return [_footprint(plan, recipe, checkpoint, sizes) for plan in assign(recipe, checkpoint)]


class _Sizes(dict[tuple[int, int, Scheme], int]):
    """`linear_bytes` by shape and scheme: a model has few of them and many linears."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.recipe = recipe

    def of(self, plan: LinearPlan, scheme: Scheme) -> int:
        key = (plan.out_features, plan.in_features, scheme)
        if key not in self:
            self[key] = linear_bytes(plan, self.recipe, scheme)
        return self[key]


def _footprint(plan: LinearPlan, recipe: Recipe, checkpoint: Checkpoint, sizes: _Sizes) -> Footprint:
    name = f"{plan.name}.weight"
    before = checkpoint.tensors[name].nbytes if checkpoint.has(name) else 0
    if plan.scheme is not None:
        after = sizes.of(plan, plan.scheme)
        return Footprint(plan, before, after, after)
    scheme = best_scheme(recipe, plan.in_features) if plan.kind != "router" else None
    if_quantized = sizes.of(plan, scheme) if scheme and before else before
    return Footprint(plan, before, before, if_quantized)


def linear_bytes(plan: LinearPlan, recipe: Recipe, scheme: Scheme) -> int:
    """Bytes of the tensors that the recipe's format stores for this linear: codes, scales, zeros and the rest."""
    assert recipe.format is not None
    kept_as = get_format(recipe.format, recipe.activations)
    tensors = kept_as.expected(plan.name, plan.out_features, plan.in_features, scheme)
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values())


def best_scheme(recipe: Recipe, in_features: int) -> Scheme | None:
    """The recipe's scheme for that width, in its group size or the next smaller one that divides; None if none does."""
    assert recipe.grid is not None
    if recipe.group_size == -1:
        return Scheme(recipe.grid, in_features)
    sizes = sorted((g for g in GROUP_SIZES[recipe.grid] if 0 < g <= recipe.group_size), reverse=True)
    return next((Scheme(recipe.grid, size) for size in sizes if in_features % size == 0), None)


def model_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the model is: family, sizes, parameters, bytes, dtypes; `moe` where it is a mixture of experts."""
    config, family = checkpoint.config, family_of(checkpoint.config)
    return {
        "path": str(checkpoint.path),
        "family": str(config["model_type"]),
        "blocks": family.num_blocks,
        "hidden_size": family.hidden_size,
        "intermediate_size": config.get("intermediate_size"),
        "vocab_size": config.get("vocab_size"),
        "heads": family.num_heads,
        "kv_heads": family.num_kv_heads,
        "head_dim": family.head_dim,
        "tied": family.tied,
        "context_limit": config.get("max_position_embeddings"),
        "dtypes": sorted({info.dtype for info in checkpoint.tensors.values()}),
        "parameters": _parameters(checkpoint),
        "bytes": checkpoint.total_bytes,
        "embedding_bytes": _bytes_of(checkpoint, family.embedding),
        "moe": experts_of(checkpoint),
    }


def _bytes_of(checkpoint: Checkpoint, name: str) -> int:
    info = checkpoint.tensors.get(f"{name}.weight")
    return info.nbytes if info else 0


def by_kind(linears: Sequence[Footprint]) -> list[dict[str, Any]]:
    """One row for each kind, shape and fate of linear: how many, parameters, bytes before and after, bits a weight."""
    rows: dict[tuple[Any, ...], list[Footprint]] = {}
    for linear in linears:
        plan = linear.plan
        leaf = plan.name.rsplit(".", 1)[-1]
        key = (KINDS.index(plan.kind), leaf, plan.out_features, plan.in_features, plan.scheme)
        rows.setdefault(key, []).append(linear)
    ordered = sorted(rows.items(), key=lambda item: (item[0][0], item[1][0].plan.name.count("."), item[0][4] is None))
    return [_kind_row(group) for _, group in ordered]


def _kind_row(group: list[Footprint]) -> dict[str, Any]:
    first, scheme = group[0].plan, group[0].plan.scheme
    parameters = sum(linear.parameters for linear in group)
    after = sum(linear.after for linear in group)
    return {
        "kind": first.kind,
        "linear": first.name.rsplit(".", 1)[-1],
        "count": len(group),
        "out_features": first.out_features,
        "in_features": first.in_features,
        "parameters": parameters,
        "grid": scheme.grid if scheme else "bf16",
        "group_size": scheme.group_size if scheme else None,
        "bytes_before": sum(linear.before for linear in group),
        "bytes_after": after,
        "bits_per_weight": 8 * after / parameters if parameters else None,
    }


def group_table(linears: Sequence[Footprint], recipe: Recipe) -> list[dict[str, Any]]:
    """For each input width: which group sizes divide it, which do not, and what happens in this recipe."""
    assert recipe.grid is not None
    sizes = [g for g in GROUP_SIZES[recipe.grid] if g > 0]
    plans = [linear.plan for linear in linears if linear.before]
    rows = []
    for width in sorted({plan.in_features for plan in plans}):
        here = [plan for plan in plans if plan.in_features == width]
        used = sorted({plan.scheme.group_size for plan in here if plan.scheme})
        rows.append(
            {
                "in_features": width,
                "linears": len(here),
                "divides": [g for g in sizes if width % g == 0],
                "does_not_divide": [g for g in sizes if width % g],
                "used": used,
                "text": _group_text(width, recipe.group_size, used),
            }
        )
    return rows


def _group_text(width: int, wanted: int, used: list[int]) -> str:
    if not used:
        return "stays in BF16" if wanted == -1 or width % wanted == 0 else f"{wanted} does not divide {width}: BF16"
    if wanted == -1:
        return "one group a row"
    chosen = ", ".join(map(str, used))
    return f"groups of {chosen}" if width % wanted == 0 else f"{wanted} does not divide {width}: {chosen} is used"


def exemptions(linears: Sequence[Footprint]) -> list[dict[str, Any]]:
    """What stays in BF16, by reason, with the bytes that each reason adds to the artifact."""
    rows: dict[str, list[Footprint]] = {}
    for linear in linears:
        if linear.plan.scheme is None:
            rows.setdefault(linear.plan.reason, []).append(linear)
    return [
        {
            "reason": reason,
            "linears": len(group),
            "names": [linear.plan.name for linear in group],
            "bytes": sum(linear.after for linear in group),
            "bytes_added": sum(linear.after - linear.if_quantized for linear in group),
        }
        for reason, group in rows.items()
    ]


def totals(linears: Sequence[Footprint], checkpoint: Checkpoint) -> dict[str, Any]:
    """Bytes of the whole checkpoint before and after, and bits a weight: quantized linears, all linears, the model."""
    quantized = [linear for linear in linears if linear.plan.scheme is not None]
    before, after = sum(linear.before for linear in linears), sum(linear.after for linear in linears)
    rest = checkpoint.total_bytes - before
    return {
        "before": checkpoint.total_bytes,
        "after": rest + after,
        "linears_before": before,
        "linears_after": after,
        "quantized_linears": sum(linear.after for linear in quantized),
        "bf16_linears": after - sum(linear.after for linear in quantized),
        "other_tensors": rest,
        "bits_per_quantized_weight": _bits(quantized),
        "bits_per_linear_weight": _bits(linears),
        "bits_per_parameter": 8 * (rest + after) / max(1, _parameters(checkpoint)),
    }


def _parameters(checkpoint: Checkpoint) -> int:
    return sum(math.prod(info.shape) for info in checkpoint.tensors.values())


def _bits(linears: Sequence[Footprint]) -> float | None:
    parameters = sum(linear.parameters for linear in linears)
    return 8 * sum(linear.after for linear in linears) / parameters if parameters else None
