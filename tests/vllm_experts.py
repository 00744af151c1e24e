"""Runs in vLLM's own environment, called by vllm_oracle.py: what vLLM's loader makes of an artifact's experts.

The module of experts is built as a model builds it, but for the choice of a kernel, of which a CPU has none.
"""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
from vllm.model_executor.layers.quantization import auto_awq, auto_gptq, modelopt
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w4a4_nvfp4,
    compressed_tensors_moe_wna16,
)

for place in (auto_gptq, auto_awq, compressed_tensors_moe_wna16):
    place.select_wna16_moe_backend = lambda *_, **__: (WNA16MoEBackend.MARLIN, None)
for place in (modelopt, compressed_tensors_moe_w4a4_nvfp4):
    place.select_nvfp4_moe_backend = lambda *_, **__: (NvFp4MoeBackend.MARLIN, None)
CONFIGS = {
    "gptq": auto_gptq.AutoGPTQConfig,
    "awq": auto_awq.AutoAWQConfig,
    "modelopt": modelopt.ModelOptNvFp4Config,
    "compressed-tensors": CompressedTensorsConfig,
}


def load_all(directory: Path) -> dict:
    """For each artifact below `directory`: what vLLM calls the method, what was loaded, what was not, what differs."""
    init_distributed_environment(1, 0, f"file://{tempfile.mktemp()}", 0, "gloo")
    config = VllmConfig()
    with set_current_vllm_config(config):
        initialize_model_parallel(1, 1)
        found = {}
        for path in sorted(directory.iterdir()):
            config.compilation_config.static_forward_context.clear()
            found[path.name] = load(path)
    return found


def load(path: Path) -> dict:
    config = json.loads((path / "config.json").read_text())
    mixtral = config["model_type"] == "mixtral"
    module = f"model.layers.0.{'block_sparse_moe' if mixtral else 'mlp'}.experts"
    gate, down, up = names = ("w1", "w2", "w3") if mixtral else ("gate_proj", "down_proj", "up_proj")
    quantization = config["quantization_config"]
    quant = CONFIGS[quantization["quant_method"]].from_config(quantization)
    quant.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    count = config.get("num_local_experts", config.get("num_experts"))
    experts = FusedMoEFactory(
        num_experts=count,
        top_k=2,
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size" if mixtral else "moe_intermediate_size"],
        params_dtype=torch.bfloat16,
        quant_config=quant,
        prefix=module,
        ckpt_names=names,
    ).routed_experts
    tensors = {n.removeprefix(f"{module}."): t for n, t in load_file(path / "model.safetensors").items()}
    tensors = {n: t for n, t in tensors.items() if n[0].isdigit() and not n.endswith(".g_idx")}  # vLLM drops them first
    loaded = set(experts.load_weights(tensors.items()))
    wrong = []
    for name in loaded - {"w13_weight_shape", "w2_weight_shape"}:
        leaf = name.partition("_")[2]
        for number in range(count):
            got = getattr(experts, name)[number].detach()
            parts = [tensors[f"{number}.{p}.{leaf}"] for p in ((down,) if name.startswith("w2") else (gate, up))]
            parts = [p.reshape(1) if p.numel() == 1 else p for p in parts]
            side = 0 if got.ndim < 2 or got.shape[-1] == parts[0].shape[-1] else 1
            want = torch.cat(parts, side)
            same = want.numel() == got.numel() and torch.equal(
                got.flatten().float(), want.to(got.dtype).flatten().float()
            )
            wrong += [] if same else [f"{name}[{number}]"]
    left = sorted({n for n, _ in experts.named_parameters()} - loaded)
    return {"method": type(experts.quant_method).__name__, "loaded": sorted(loaded), "left": left, "wrong": wrong}
