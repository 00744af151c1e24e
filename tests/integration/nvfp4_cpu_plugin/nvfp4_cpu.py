"""A vLLM plugin for tests: NVFP4 on the CPU, for which vLLM has no kernel. Runs in vLLM's own environment.

W4A4   vLLM's emulation kernel as it is; vLLM offers it on CUDA and ROCm alone.
W4A16  vLLM emulates no weight-only NVFP4: it accepts four GPU kernels there by their classes, and takes Marlin when it
       is not asked otherwise. A kernel made of vLLM's own dequantization stands in for Marlin. Everything before
       it, from config.json to the fused parameters, is vLLM's own.
"""

from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype
from vllm.platforms import PlatformEnum


class WeightOnlyNvFp4LinearKernel(EmulationNvFp4LinearKernel):
    """The weight is dequantized, the input stays as it is."""

    def apply_weights(self, layer, x, bias=None):
        assert not hasattr(layer, "input_global_scale_inv"), "a layer with FP4 inputs reached the weight-only kernel"
        outer = layer.weight_global_scale
        weight = dequantize_to_dtype(layer.weight, layer.weight_scale, outer, x.dtype, swizzle=False)
        out = x @ weight.t()
        return out if bias is None else out + bias


def register() -> None:
    """Called by vLLM in each of its processes, perhaps more than once in one."""
    if linear.MarlinNvFp4LinearKernel is WeightOnlyNvFp4LinearKernel:
        return
    linear.register_linear_kernel(EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")
    linear.MarlinNvFp4LinearKernel = WeightOnlyNvFp4LinearKernel
