"""Configs of mixtures of experts: one module of experts a block, routers kept, read back by vLLM's rules."""

from __future__ import annotations

import re
from typing import Any

import pytest

from halfbyte.formats import FormatError, get_format
from halfbyte.formats.base import patterns, scale_groups
from halfbyte.models import Family, family_of
from halfbyte.types import Scheme
from tests.unit.test_formats_config import KINDS

COUNTS = {"num_hidden_layers": 12, "hidden_size": 64, "num_attention_heads": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "mixtral": family_of({"model_type": "mixtral", "num_local_experts": 3, **COUNTS}),
    "qwen2_moe": family_of({"model_type": "qwen2_moe", "num_experts": 11, "mlp_only_layers": [1], **COUNTS}),
}
POLICIES = {
    "head": r"lm_head$",
    "second block": r"layers\.1\.|lm_head",
    "experts of some blocks": r"layers\.(0|10)\..*\.experts|lm_head",
    "all but experts": r"self_attn|shared_expert\.|mlp\.(gate|up|down)_proj|lm_head",
    "all experts": r"experts|lm_head",
}


def fused_of(family: Family) -> dict[str, str]:
    """Every linear and router by its fused name."""
    found = {"lm_head": "lm_head"}
    for index in range(family.num_blocks):
        block = family.block(index)
        found |= {f"{block}.{n}": f"{block}.{g.fused}" for g in family.groups_of(index) for n in g.names}
        found |= {name: name for name in family.routers(index)}
    return found


def policy(family: Family, keep: str, grid: str, group: int) -> dict[str, Scheme | None]:
    routers = {name for index in range(family.num_blocks) for name in family.routers(index)}
    return {n: None if n in routers or re.search(keep, n) else Scheme(grid, group) for n in fused_of(family)}


@pytest.mark.parametrize("keep", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize(("kind", "grid", "group"), KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_policy_comes_back(name: str, kind: str, grid: str, group: int, keep: str) -> None:
    family = FAMILIES[name]
    schemes = policy(family, keep, grid, group)
    config = get_format(kind).config(schemes, fused_of(family))
    assert get_format(kind).parse(config, schemes) == schemes
    assert not re.search(r"experts\.\d", str(config)), "experts are named by their module"


@pytest.mark.parametrize(("kind", "grid"), [("gptq", "int4_sym"), ("compressed-tensors", "int4_asym")])
def test_experts_may_have_a_group_size_of_their_own(kind: str, grid: str) -> None:
    family = FAMILIES["mixtral"]
    schemes = policy(family, "lm_head", grid, 128)
    schemes |= {n: Scheme(grid, 32) for n, s in schemes.items() if ".experts." in n}
    assert get_format(kind).parse(get_format(kind).config(schemes, fused_of(family)), schemes) == schemes


@pytest.mark.parametrize(("kind", "grid"), [("gptq", "int4_sym"), ("compressed-tensors", "int4_sym")])
def test_one_group_a_row_of_experts_of_two_widths_is_said_to_be_that(kind: str, grid: str) -> None:
    """64 alone would be taken for groups of 64 of the wider rows."""
    family = FAMILIES["mixtral"]
    schemes = policy(family, "lm_head", grid, 64)
    schemes |= {n: Scheme(grid, 128) for n in schemes if n.endswith(".w2")}
    read = get_format(kind).parse(get_format(kind).config(schemes, fused_of(family)), schemes)
    assert {s.group_size for n, s in read.items() if ".experts." in n and s} == {-1}
    assert {s.group_size for n, s in read.items() if ".self_attn." in n and s} == {64}


def test_experts_of_which_one_projection_is_kept_are_refused() -> None:
    family = FAMILIES["mixtral"]
    config: dict[str, Any] = get_format("compressed-tensors").config(
        policy(family, "lm_head", "int4_sym", 64), fused_of(family)
    )
    config["ignore"] = ["re:.*experts.*w2"]
    with pytest.raises(FormatError, match="several schemes"):
        get_format("compressed-tensors").parse(config, fused_of(family))


def test_one_expression_finds_the_module_and_what_is_in_it() -> None:
    fused = fused_of(FAMILIES["mixtral"])
    names = [n for n in fused if re.search(r"layers\.(0|10)\..*experts", n)]
    (found,) = patterns(names, fused)
    assert {n for n in fused if re.match(found, n)} == set(names)
    assert re.match(found, "model.layers.10.block_sparse_moe.experts")
    assert not re.match(found, "model.layers.1.block_sparse_moe.experts")


def test_global_scales_are_shared_by_gate_and_up_of_an_expert() -> None:
    block = "model.layers.0.block_sparse_moe.experts"
    found = scale_groups([f"{block}.{e}.{w}" for e in (0, 1) for w in ("w1", "w2", "w3")])
    assert sorted(map(sorted, found.values())) == sorted(
        [[f"{block}.{e}.w1", f"{block}.{e}.w3"] for e in (0, 1)] + [[f"{block}.{e}.w2"] for e in (0, 1)]
    )
