"""Configs: written for a layer policy, read back by vLLM's rules to the same policy; damaged ones refused."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from halfbyte.formats import Format, FormatError, detect_format, get_format
from halfbyte.formats.base import patterns
from halfbyte.types import Scheme

PARTS = {
    "self_attn.q_proj": "self_attn.qkv_proj",
    "self_attn.k_proj": "self_attn.qkv_proj",
    "self_attn.v_proj": "self_attn.qkv_proj",
    "self_attn.o_proj": "self_attn.o_proj",
    "mlp.gate_proj": "mlp.gate_up_proj",
    "mlp.up_proj": "mlp.gate_up_proj",
    "mlp.down_proj": "mlp.down_proj",
}
FUSED = {f"model.layers.{i}.{p}": f"model.layers.{i}.{f}" for i in range(12) for p, f in PARTS.items()}
FUSED["lm_head"] = "lm_head"
KINDS = [
    ("gptq", "int4_sym", 64),
    ("awq", "int4_asym", 64),
    ("modelopt", "nvfp4", 16),
    ("compressed-tensors", "int4_sym", 64),
    ("compressed-tensors", "int4_asym", 128),
    ("compressed-tensors", "nvfp4", 16),
]
POLICIES = {
    "head": "lm_head$",
    "none": "$^",
    "second block": r"layers\.1\.|lm_head",
    "edges": r"layers\.(0|11)\.(mlp\.down|self_attn\.o)|lm_head",
    "attention": "self_attn|lm_head",
}


def policy(keep: str, grid: str, group: int) -> dict[str, Scheme | None]:
    return {n: None if re.search(keep, n) else Scheme(grid, group) for n in FUSED}


@pytest.mark.parametrize("keep", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize(("kind", "grid", "group"), KINDS)
def test_a_policy_comes_back(kind: str, grid: str, group: int, keep: str) -> None:
    kept_as = get_format(kind)
    schemes = policy(keep, grid, group)
    config = kept_as.config(schemes, FUSED, producer={"name": "halfbyte", "version": "1"})
    assert type(detect_format(config)) is type(kept_as)
    assert kept_as.parse(config, FUSED) == schemes
    assert all(isinstance(v, dict) for v in kept_as.extra_files(config).values())


@pytest.mark.parametrize(("kind", "grid"), [("gptq", "int4_sym"), ("compressed-tensors", "int4_asym")])
def test_modules_may_have_group_sizes_of_their_own(kind: str, grid: str) -> None:
    schemes = policy(r"layers\.10\.|lm_head", grid, 128)
    for name in schemes:
        if "down_proj" in name and schemes[name]:
            schemes[name] = Scheme(grid, 32 if ".1." in name else 64)
    assert get_format(kind).mixed_groups
    config = get_format(kind).config(schemes, FUSED)
    assert get_format(kind).parse(config, FUSED) == schemes
    if kind == "gptq":
        assert config["group_size"] == 128 and len(config["dynamic"]) < 12


def test_awq_refuses_two_group_sizes() -> None:
    schemes = policy("lm_head", "int4_asym", 128)
    schemes["model.layers.0.mlp.down_proj"] = Scheme("int4_asym", 64)
    assert not get_format("awq").mixed_groups
    with pytest.raises(FormatError, match="one group size, not 64 and 128"):
        get_format("awq").config(schemes, FUSED)


@pytest.mark.parametrize(
    ("kind", "grid"), [("gptq", "int4_sym"), ("awq", "int4_asym"), ("compressed-tensors", "int4_sym")]
)
def test_whole_rows_are_stated_as_minus_one(kind: str, grid: str) -> None:
    schemes: dict[str, Scheme | None] = dict(policy("lm_head", grid, 576))
    for name in schemes:
        if "down_proj" in name:
            schemes[name] = Scheme(grid, 1536)
    config = get_format(kind).config(schemes, FUSED)
    assert {s.group_size for s in get_format(kind).parse(config, FUSED).values() if s} == {-1}
    assert "dynamic" not in config and config.get("group_size", -1) == -1


def test_gptq_patterns_match_shards_and_fused_names_and_no_neighbours() -> None:
    kept = [n for n in FUSED if ".layers.1." in n and "self_attn" in n]
    compiled = [re.compile(p) for p in patterns(kept, FUSED)]

    def hit(name: str) -> bool:
        return any(p.match(name) for p in compiled)

    assert all(hit(n) and hit(FUSED[n]) for n in kept)
    assert not any(hit(n) or hit(FUSED[n]) for n in FUSED if n not in kept)
    assert not hit("model.layers.1.self_attn.q_proj_extra") and not hit("modelXlayers.1.self_attn.q_proj")
    assert len(compiled) == 2


def test_gptq_lm_head_is_stated_only_where_it_is_quantized() -> None:
    gptq = get_format("gptq")
    assert gptq.config(policy("lm_head", "int4_sym", 64), FUSED)["lm_head"] is False
    schemes = policy("$^", "int4_sym", 64)
    assert gptq.config(schemes, FUSED)["lm_head"] is True
    schemes["lm_head"] = Scheme("int4_sym", 32)
    assert gptq.parse(gptq.config(schemes, FUSED), FUSED) == schemes


def test_gptq_rules_written_for_shards_alone_do_not_reach_vllm() -> None:
    gptq = get_format("gptq")
    config = gptq.config(policy("lm_head", "int4_sym", 64), FUSED)
    config["dynamic"] = {r"-:model\.layers\.0\.self_attn\.[qkv]_proj": {}}
    assert gptq.parse(config, FUSED)["model.layers.0.self_attn.q_proj"] is not None
    config["dynamic"] = {"+:.*down_proj": {"group_size": 32}, "-:.*": {}}
    found = gptq.parse(config, FUSED)
    assert found["model.layers.3.mlp.down_proj"] == Scheme("int4_sym", 32)
    assert found["model.layers.3.mlp.up_proj"] is None


def test_gptq_listed_modules() -> None:
    gptq = get_format("gptq")
    config = gptq.config(policy("lm_head", "int4_sym", 64), FUSED)
    config["modules_in_block_to_quantize"] = [["mlp.down_proj"], ["mlp.gate_proj", "mlp.up_proj"]]
    found = gptq.parse(config, FUSED)
    assert {n for n, s in found.items() if s} == {n for n in FUSED if ".mlp." in n}
    config["modules_in_block_to_quantize"] = ["mlp.gate_proj"]
    with pytest.raises(FormatError, match="only a part of"):
        gptq.parse(config, FUSED)


def test_modelopt_lists_shards_and_fused_names_and_writes_two_files_alike() -> None:
    for activations, algorithm in (("bf16", "W4A16_NVFP4"), ("fp4", "NVFP4")):
        kept_as = get_format("modelopt", activations)
        schemes = policy(r"layers\.0\.self_attn\.[qkv]|lm_head", "nvfp4", 64)
        config = kept_as.config(schemes, FUSED)
        (extra,) = kept_as.extra_files(config).values()
        assert config["quant_algo"] == extra["quantization"]["quant_algo"] == algorithm
        assert config["ignore"] == extra["quantization"]["exclude_modules"]
        assert "kv_cache_quant_algo" in extra["quantization"]
        assert "model.layers.0.self_attn.qkv_proj" in config["ignore"]
        assert "model.layers.0.self_attn.v_proj" in config["ignore"]
        for stated in (config, extra | {"quant_method": "modelopt", "config_groups": config["config_groups"]}):
            assert detect_format(stated) == kept_as
            found = kept_as.parse(stated, FUSED)
            assert {n for n, s in found.items() if s is None} == {n for n, s in schemes.items() if s is None}
            assert {s for s in found.values() if s} == {Scheme("nvfp4", 16)}


def test_nvfp4_without_quantized_inputs_counts_as_weight_only() -> None:
    config = get_format("modelopt", "fp4").config(policy("lm_head", "nvfp4", 16), FUSED)
    config["config_groups"]["group_0"]["input_activations"] = None
    assert detect_format(config) == get_format("modelopt")


def test_modelopt_exclusions_match_as_part_and_as_wildcard() -> None:
    kept_as = get_format("modelopt")
    config = kept_as.config(policy("lm_head", "nvfp4", 16), FUSED)
    config["ignore"] = ["model.layers.1", "*down_proj"]
    found = kept_as.parse(config, FUSED)
    kept = {n for n, s in found.items() if s is None}
    assert kept == {n for n in FUSED if re.search(r"layers\.1|down_proj", n)}
    config["ignore"] = ["model.layers.0.self_attn.q_proj"]
    with pytest.raises(FormatError, match="only a part of"):
        kept_as.parse(config, FUSED)


def test_awq_entries_match_anywhere_in_a_name() -> None:
    kept_as = get_format("awq")
    config = kept_as.config(policy("lm_head", "int4_asym", 64), FUSED)
    config["modules_to_not_convert"] = ["model.layers.1"]
    found = kept_as.parse(config, FUSED)
    assert {n for n, s in found.items() if s is None} == {n for n in FUSED if "layers.1" in n} | {"lm_head"}
    config["modules_to_not_convert"] = ["up_proj"]
    with pytest.raises(FormatError, match="only a part of"):
        kept_as.parse({**config, "modules_to_not_convert": [".up_proj"]}, FUSED)


def test_compressed_tensors_targets_by_name_before_class() -> None:
    kept_as = get_format("compressed-tensors")
    config = kept_as.config(policy("$^", "int4_sym", 64), FUSED)
    assert config["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]
    config["config_groups"]["group_0"]["targets"] = ["Linear"]
    assert kept_as.parse(config, FUSED)["lm_head"] is None
    other = copy.deepcopy(config["config_groups"]["group_0"])
    other["weights"]["group_size"], other["targets"] = 32, [r"re:.*down_proj$"]
    config["config_groups"]["group_1"] = other
    assert kept_as.parse(config, FUSED)["model.layers.0.mlp.down_proj"] == Scheme("int4_sym", 32)
    config["ignore"] = ["model.layers.0.mlp.up_proj"]
    with pytest.raises(FormatError, match="only a part of"):
        kept_as.parse(config, FUSED)


def test_compressed_tensors_targets_take_a_fused_module_whole_or_not_at_all() -> None:
    kept_as = get_format("compressed-tensors")
    config = kept_as.config(policy("lm_head", "int4_sym", 64), FUSED)
    config["config_groups"]["group_0"]["targets"] = ["re:.*q_proj", "re:.*gate_proj", "re:.*up_proj"]
    found = kept_as.parse(config, FUSED)
    assert {n for n, s in found.items() if s} == {n for n in FUSED if "gate_proj" in n or "up_proj" in n}


def test_phi3_names_are_fused_already() -> None:
    names = {f"model.layers.{i}.{n}": f"model.layers.{i}.{n}" for i in range(2) for n in sorted(set(PARTS.values()))}
    for kind, grid, group in KINDS:
        schemes = {n: None if "layers.1.self_attn" in n else Scheme(grid, group) for n in names}
        config = get_format(kind).config(schemes, names)
        assert get_format(kind).parse(config, names) == schemes


WRONG: list[tuple[str, str, dict[str, Any], str]] = [
    ("gptq", "int4_sym", {"bits": 8}, "only symmetric 4 bits"),
    ("gptq", "int4_sym", {"sym": False}, "only symmetric 4 bits"),
    ("gptq", "int4_sym", {"group_size": 48}, "none that vLLM takes"),
    ("gptq", "int4_sym", {"desc_act": True}, "static groups"),
    ("gptq", "int4_sym", {"dynamic": {"+:.*": {"desc_act": True}}}, "static groups"),
    ("gptq", "int4_sym", {"checkpoint_format": "gptq_v2"}, "only 'gptq'"),
    ("awq", "int4_asym", {"zero_point": False}, "zero_point true"),
    ("awq", "int4_asym", {"version": "gemv"}, "only 'gemm'"),
    ("awq", "int4_asym", {"group_size": 16}, "none that vLLM takes"),
    ("modelopt", "nvfp4", {"group_size": 64}, "blocks of 16"),
    ("modelopt", "nvfp4", {"quant_algo": "FP8"}, "is not read"),
    ("compressed-tensors", "int4_sym", {"format": "int-quantized", "config_groups": {}}, ""),
]


@pytest.mark.parametrize(("kind", "grid", "change", "message"), WRONG)
def test_configs_that_vllm_would_refuse(kind: str, grid: str, change: dict, message: str) -> None:
    kept_as = get_format(kind)
    config = kept_as.config(policy("lm_head", grid, 64 if grid != "nvfp4" else 16), FUSED) | change
    if not message:
        assert not any(kept_as.parse(config, FUSED).values())
        return
    with pytest.raises(FormatError, match=message):
        kept_as.parse(config, FUSED)


@pytest.mark.parametrize(("kind", "grid", "group"), KINDS)
def test_a_missing_key_is_named(kind: str, grid: str, group: int) -> None:
    kept_as: Format = get_format(kind)
    config = kept_as.config(policy("lm_head", grid, group), FUSED)
    key = {"gptq": "bits", "awq": "zero_point", "modelopt": "quant_algo"}.get(kind, "config_groups")
    del config[key]
    with pytest.raises(FormatError, match=f"lacks '{key}'"):
        kept_as.parse(config, FUSED)


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(FormatError, match="quant_method 'fp8' is not read"):
        detect_format({"quant_method": "fp8"})
    with pytest.raises(FormatError, match="cannot hold the grid nvfp4"):
        get_format("gptq").config(policy("lm_head", "nvfp4", 16), FUSED)
