"""Tensor parallelism: what each rank holds, and what of it the formats can cut.

vLLM cuts q, k, v, gate, up and lm_head by their outputs and o and down by their inputs; a group of weights that share a
scale must not be cut, so the inputs of o and down on a rank are whole groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from halfbyte.errors import UsageError
from halfbyte.plan.inventory import Footprint
from halfbyte.plan.layers import LinearPlan

BY_INPUTS = ("o", "down")
"""Kinds of linears whose inputs are spread over the ranks."""


def refuse_bad_tp(model: dict[str, Any], tp: int) -> None:
    """Raises UsageError where vLLM could not spread the attention heads over `tp` ranks."""
    heads, kv_heads = model["heads"], model["kv_heads"]
    if heads % tp or (kv_heads % tp and tp % kv_heads):
        fitting = [n for n in (1, 2, 4, 8, 16) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
        raise UsageError(
            f"--tp {tp} does not divide the {heads} attention heads ({kv_heads} of keys and values): "
            f"use {', '.join(map(str, fitting))}"
        )


def rank_inputs(plan: LinearPlan, tp: int) -> float:
    """in_features of a linear on one rank; not a whole number where the ranks do not divide them."""
    return plan.in_features / tp if plan.kind in BY_INPUTS else plan.in_features


def rank_shape(group: Sequence[LinearPlan], tp: int) -> tuple[int, int]:
    """(out_features, in_features) of a fused group on one rank."""
    out = sum(plan.out_features for plan in group)
    by_inputs = group[0].kind in BY_INPUTS
    return (out if by_inputs else out // tp), int(rank_inputs(group[0], tp))


def odd_widths(linears: Sequence[Footprint], tp: int) -> list[tuple[str, str, int]]:
    """(name, inputs on a rank, group size) of every quantized linear whose groups the ranks would cut."""
    found = []
    for plan in (linear.plan for linear in linears):
        width = rank_inputs(plan, tp)
        if plan.scheme and plan.scheme.group_size != plan.in_features and width % plan.scheme.group_size:
            found.append((plan.name, f"{width:g}", plan.scheme.group_size))
    return found


def rank_bytes(linears: Sequence[Footprint], embedding: int, other: int, kv_heads: int, tp: int, before: bool) -> int:
    """Weight bytes of one rank: linears and embeddings are cut (k and v no finer than a head), `other` is on each."""
    repeated = max(1, tp // kv_heads)
    total = 0.0
    for linear in linears:
        size = linear.before if before else linear.after
        own_kv = linear.plan.name.endswith((".k_proj", ".v_proj"))
        total += size * (repeated if own_kv else 1) / tp
    return int(total + embedding / tp + other)
