"""Runs in vLLM's own environment: what vLLM's code makes of our tensors and configs. Usage: vllm_oracle.py DIR

Reads DIR/cases.safetensors, DIR/configs.json and the artifacts in DIR/experts, writes DIR/weights.safetensors,
DIR/decisions.json and DIR/experts.json.
"""

import json
import sys
from pathlib import Path

import torch
import vllm.model_executor.parameter as parameter
from safetensors.torch import load_file, save_file
from torch import nn
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig, _convert_awq_to_standard_format
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
from vllm.model_executor.layers.quantization.utils.gptq_utils import get_dynamic_override, is_layer_gptq_quantized
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    gptq_pack,
    is_layer_skipped,
    unpack_quantized_values_into_int32,
)
from vllm.scalar_type import scalar_types
from vllm_experts import load_all

parameter.get_tensor_model_parallel_rank = lambda: 0
parameter.get_tensor_model_parallel_world_size = lambda: 1
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
PACKED_SPARSE = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
"""Of families with experts."""
CLASSES = {
    "qkv_proj": "QKVParallelLinear",
    "gate_up_proj": "MergedColumnParallelLinear",
    "lm_head": "ParallelLMHead",
    "gate": "GateLinear",
}


def gptq(t):
    codes = unpack_quantized_values_into_int32(t["qweight"], scalar_types.uint4b8, packed_dim=0)
    assert torch.equal(gptq_pack(codes, 4, *codes.shape), t["qweight"])
    scales = t["scales"].float().repeat_interleave(codes.shape[0] // t["scales"].shape[0], 0)
    return ((codes - 8) * scales).t()


def awq(t):
    layer = nn.Module()
    for name in ("qweight", "qzeros"):
        layer.register_parameter(name, nn.Parameter(t[name], requires_grad=False))
    _convert_awq_to_standard_format(layer, "qweight", "qzeros", 4)
    codes = unpack_quantized_values_into_int32(layer.qweight.data, scalar_types.uint4, packed_dim=0)
    zeros = unpack_quantized_values_into_int32(layer.qzeros.data, scalar_types.uint4, packed_dim=0).t()
    repeat = codes.shape[0] // zeros.shape[0]
    return ((codes - zeros.repeat_interleave(repeat, 0)) * t["scales"].float().repeat_interleave(repeat, 0)).t()


def modelopt(t):
    outer = t["weight_scale_2"].reshape(1).max()
    return dequantize_to_dtype(t["weight"], t["weight_scale"], outer, torch.float32, swizzle=False)


def compressed(t):
    if "weight_global_scale" in t:
        outer = 1.0 / t["weight_global_scale"].max()
        return dequantize_to_dtype(t["weight_packed"], t["weight_scale"], outer, torch.float32, swizzle=False)
    kind = scalar_types.uint4 if "weight_zero_point" in t else scalar_types.uint4b8
    codes = unpack_quantized_values_into_int32(t["weight_packed"], kind, packed_dim=1)
    zeros = torch.full_like(t["weight_scale"], 8, dtype=torch.int32)
    if "weight_zero_point" in t:
        zeros = unpack_quantized_values_into_int32(t["weight_zero_point"], kind, packed_dim=0)
    repeat = codes.shape[1] // zeros.shape[1]
    scales = t["weight_scale"].float().repeat_interleave(repeat, 1)
    return (codes - zeros.repeat_interleave(repeat, 1)) * scales


def decide_experts(config, module, shards):
    """The same for a module of experts, as each config's get_quant_method asks for RoutedExperts."""
    method = config["quant_method"]
    if method == "gptq":
        c = AutoGPTQConfig.from_config(config)
        if get_dynamic_override(c, layer_name=module) == False:  # noqa: E712
            return None
        return get_dynamic_override(c, module, "group_size", c.group_size)
    if method == "awq":
        c = AutoAWQConfig.from_config(config)
        return None if is_layer_skipped(module, c.modules_to_not_convert, match_mode="substring") else c.group_size
    if method == "modelopt":
        c = ModelOptNvFp4Config.from_config(config)
        c.packed_modules_mapping = PACKED_SPARSE
        return None if c.is_layer_excluded(module) else c.group_size
    c = CompressedTensorsConfig.from_config(config)
    c.packed_modules_mapping = PACKED_SPARSE
    c._add_fused_moe_to_target_scheme_map()
    layer = type("RoutedExperts", (nn.Module,), {})()
    first = [s for s in shards if s.startswith(f"{module}.0.")]
    schemes = [c.get_scheme_dict(layer, name) for name in first]
    if any(scheme != schemes[0] for scheme in schemes):
        raise ValueError("All MoE projections need to have same quantization scheme")
    return None if schemes[0] is None else (schemes[0]["weights"].group_size or -1)


def decide(config, fused, shards):
    """The group size that vLLM gives a module, or None where it leaves it alone."""
    method = config["quant_method"]
    if fused.endswith(".experts"):
        return decide_experts(config, fused, shards)
    if method == "gptq":
        c = AutoGPTQConfig.from_config(config)
        if fused == "lm_head" and not c.lm_head_quantized:
            return None
        quantized = is_layer_gptq_quantized(fused, [*c.modules_in_block_to_quantize], PACKED)
        if get_dynamic_override(c, layer_name=fused) == False or not quantized:  # noqa: E712
            return None
        return get_dynamic_override(c, fused, "group_size", c.group_size)
    if method == "awq":
        c = AutoAWQConfig.from_config(config)
        skipped = is_layer_skipped(fused, c.modules_to_not_convert, PACKED, match_mode="substring")
        return None if skipped or (fused == "lm_head" and not c.lm_head_quantized) else c.group_size
    if method == "modelopt":
        c = ModelOptNvFp4Config.from_config(config)
        c.packed_modules_mapping = PACKED
        return None if c.is_layer_excluded(fused) else c.group_size
    c = CompressedTensorsConfig.from_config(config)
    c.packed_modules_mapping = PACKED
    layer = type(CLASSES.get(fused.rsplit(".", 1)[-1], "RowParallelLinear"), (nn.Module,), {})()
    scheme = c.get_scheme_dict(layer, fused)
    return None if scheme is None else (scheme["weights"].group_size or -1)


def main(directory):
    functions = {"gptq": gptq, "awq": awq, "modelopt": modelopt, "compressed-tensors": compressed}
    cases = {}
    for name, tensor in load_file(directory / "cases.safetensors").items():
        case, _, part = name.partition("/")
        cases.setdefault(case, {})[part] = tensor
    weights = {case: functions[case.partition(":")[0]](t).float().contiguous() for case, t in cases.items()}
    save_file(weights, directory / "weights.safetensors")
    decisions = []
    for entry in json.loads((directory / "configs.json").read_text()):
        try:
            decisions.append({f: decide(entry["config"], f, s) for f, s in entry["modules"].items()})
        except (ValueError, KeyError) as error:
            decisions.append(f"refused: {error}")
    (directory / "decisions.json").write_text(json.dumps(decisions))
    (directory / "experts.json").write_text(json.dumps(load_all(directory / "experts")))


main(Path(sys.argv[1]))
