"""Our tensors and configs as vLLM's own code reads them, in vLLM's own environment."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.algo import dequantize
from halfbyte.errors import HalfbyteError
from halfbyte.formats import FormatError, fused_groups, get_format
from halfbyte.serving import find_vllm
from halfbyte.types import QuantizedLinear, Scheme
from tests.handmade import make_artifact
from tests.unit import test_formats_experts as experts
from tests.unit.test_formats_config import FUSED, KINDS, POLICIES, policy
from tests.unit.test_formats_roundtrip import NAME, make

pytestmark = pytest.mark.vllm
ORACLE = Path(__file__).parents[1] / "vllm_oracle.py"
GROUPS = {"int4_sym": (32, 64, 128, 384), "int4_asym": (32, 64, 128, 384), "nvfp4": (16, 32, 64, 128)}

Oracle = tuple[dict[str, torch.Tensor], list, dict[str, dict]]
"""Weights by case, decisions by config, what became of experts by artifact."""
EXPERTS = {
    f"{family} {kind} {grid} {activations}": (family, kind, grid, group, activations)
    for kind, grid, group, activations in [*((*k, "bf16") for k in KINDS), ("modelopt", "nvfp4", 16, "fp4")]
    for family in (("mixtral", "qwen3_moe") if kind == "gptq" else ("mixtral",))
}
"""Artifacts whose experts vLLM's loader is given."""


def linears() -> dict[str, tuple[str, QuantizedLinear]]:
    """Case name -> (format, linear): every format, grid and group size."""
    kinds = {(kind, grid) for kind, grid, _ in KINDS}
    return {f"{k}:{g}:{n}": (k, make(g, 48, 384, n, seed=n)) for k, g in sorted(kinds) for n in GROUPS[g]}


def configs() -> list[tuple[str, dict[str, Any]]]:
    """(format, config): every policy in every format, and configs that only look right."""
    made = []
    for kind, grid, group in KINDS:
        kept_as = get_format(kind)
        made += [(kind, kept_as.config(policy(keep, grid, group), FUSED)) for keep in POLICIES.values()]
    mixed = policy("lm_head", "int4_sym", 128)
    for name in mixed:
        if "down_proj" in name:
            mixed[name] = Scheme("int4_sym", 32 if ".1." in name else 384)
    made += [(kind, get_format(kind).config(mixed, FUSED)) for kind in ("gptq", "compressed-tensors")]
    gptq, awq, modelopt, compressed = (
        get_format(k).config(policy("lm_head", g, n), FUSED) for k, g, n in [KINDS[0], KINDS[1], KINDS[2], KINDS[3]]
    )
    made.append(("gptq", gptq | {"dynamic": {r"-:model\.layers\.0\.self_attn\.[qkv]_proj": {}, "down": {"bits": 4}}}))
    made.append(("gptq", gptq | {"dynamic": {"+:.*down_proj": {"group_size": 32}, "-:.*": {}}}))
    made.append(("gptq", gptq | {"modules_in_block_to_quantize": ["mlp.gate_proj", "mlp.up_proj"]}))
    made.append(("gptq", gptq | {"modules_in_block_to_quantize": ["mlp.gate_proj"]}))
    made.append(("awq", awq | {"modules_to_not_convert": ["model.layers.1"]}))
    made.append(("awq", awq | {"modules_to_not_convert": [".up_proj"]}))
    made.append(("modelopt", modelopt | {"ignore": ["model.layers.1", "*down_proj"]}))
    made.append(("modelopt", modelopt | {"ignore": ["model.layers.1.self_attn.q_proj"]}))
    made.append(("compressed-tensors", compressed | {"ignore": []}))
    made.append(("compressed-tensors", compressed | {"ignore": ["re:.*self_attn", "model.layers.0.mlp.up_proj"]}))
    made.append(("compressed-tensors", compressed | {"ignore": ["re:.*qkv_proj", "re:.*layers.1"]}))
    partly = json.loads(json.dumps(compressed))
    partly["config_groups"]["group_0"]["targets"] = ["re:.*q_proj", "re:.*gate_proj", "re:.*up_proj"]
    made.append(("compressed-tensors", partly))
    return made


def sparse_configs() -> list[tuple[str, str, dict[str, Any]]]:
    """(family, format, config): every policy of mixtures of experts in every format."""
    made = []
    for name, family in experts.FAMILIES.items():
        for kind, grid, group in KINDS:
            for keep in experts.POLICIES.values():
                schemes = experts.policy(family, keep, grid, group)
                made.append((name, kind, get_format(kind).config(schemes, experts.fused_of(family))))
    return made


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """What vLLM dequantizes and decides, for all cases at once (it takes long to import)."""
    try:
        python = find_vllm().python
    except HalfbyteError as error:
        pytest.skip(str(error))
    directory = tmp_path_factory.mktemp("oracle")
    tensors = {}
    for case, (kind, q) in linears().items():
        packed = get_format(kind).pack(NAME, q)
        tensors |= {f"{case}/{n.removeprefix(f'{NAME}.')}": t for n, t in packed.items()}
    save_file(tensors, directory / "cases.safetensors")
    entries = [{"config": c, "modules": fused_groups(FUSED)} for _, c in configs()]
    modules = {name: fused_groups(experts.fused_of(family)) for name, family in experts.FAMILIES.items()}
    entries += [{"config": c, "modules": modules[name]} for name, _, c in sparse_configs()]
    (directory / "configs.json").write_text(json.dumps(entries))
    for name, (family, kind, grid, group, activations) in EXPERTS.items():
        make_artifact(directory / "experts" / name, kind, grid, group, family=family, activations=activations)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [python, ORACLE, directory], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    decisions, loaded = (json.loads((directory / f"{name}.json").read_text()) for name in ("decisions", "experts"))
    return load_file(directory / "weights.safetensors"), decisions, loaded


@pytest.mark.parametrize("case", linears())
def test_vllm_dequantizes_to_the_same_weights(case: str, oracle: Oracle) -> None:
    _, q = linears()[case]
    torch.testing.assert_close(oracle[0][case], dequantize(q), rtol=0, atol=0)


@pytest.mark.parametrize("index", range(len(configs())))
def test_vllm_reads_the_same_schemes(index: int, oracle: Oracle) -> None:
    kind, config = configs()[index]
    theirs = oracle[1][index]
    try:
        ours = get_format(kind).parse(config, FUSED)
    except FormatError:
        assert isinstance(theirs, str) and theirs.startswith("refused")
        return
    assert isinstance(theirs, dict), theirs
    for fused, shards in fused_groups(FUSED).items():
        for shard in shards:
            scheme = ours[shard]
            assert (None if scheme is None else scheme.group_size) == theirs[fused], (fused, config)


@pytest.mark.parametrize("index", range(len(sparse_configs())))
def test_vllm_reads_the_same_schemes_of_experts(index: int, oracle: Oracle) -> None:
    name, kind, config = sparse_configs()[index]
    theirs, names = oracle[1][len(configs()) + index], experts.fused_of(experts.FAMILIES[name])
    ours = get_format(kind).parse(config, names)
    assert isinstance(theirs, dict), theirs
    for fused, shards in fused_groups(names).items():
        for shard in shards:
            scheme = ours[shard]
            assert (None if scheme is None else scheme.group_size) == theirs[fused], (fused, config)


@pytest.mark.parametrize("name", EXPERTS)
def test_vllm_loads_every_tensor_of_the_experts_into_its_place(name: str, oracle: Oracle) -> None:
    """Gate and up of each expert stacked, down beside them; nothing is left unfilled that its kernels read."""
    found, kind = oracle[2][name], EXPERTS[name][1]
    unread = {"w13_bias", "w2_bias"} if kind == "gptq" else set()  # zero unless a file has them
    if name.endswith("bf16"):  # of quantized activations, which these are not
        unread |= {f"{w}_{leaf}" for w in ("w13", "w2") for leaf in ("input_scale", "input_global_scale")}
    assert found["wrong"] == [] and set(found["left"]) <= unread
    assert len(found["loaded"]) >= 6 and "MoE" in found["method"]
