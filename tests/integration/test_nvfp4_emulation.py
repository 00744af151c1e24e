"""Real vLLM on the CPU reads every 4-bit layout as it was meant: its log-probabilities are those of transformers.

NVFP4 has no CPU kernel in vLLM, so that nvfp4_cpu_plugin lends it one: emulated W4A4, dequantized W4A16. The models
are tiny and random; what is tested is layout, scales and activation rounding, not quality.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from halfbyte import Recipe, quantize
from halfbyte.algo.nvfp4 import snap_e2m1
from halfbyte.artifact import load_fake_quantized
from halfbyte.calibration import CalibrationSet
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.served import format_of
from halfbyte.models.library import load_model
from halfbyte.serving import Client, ServeCommand, Server, VllmInstall, find_vllm, serve_command
from tests.tiny import VOCAB, make_tiny

pytestmark = pytest.mark.vllm
PLUGIN = Path(__file__).with_name("nvfp4_cpu_plugin")
WINDOWS, WINDOW = 8, 48
BLOCK, E4M3_MAX = 16, 448.0
FLAGS = ("--kv-cache-dtype", "auto", "--enforce-eager")
TRACKED = ("--model-loader-extra-config", '{"enable_weights_track": true}')
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
RECIPES = {
    "w4a4": {"method": "nvfp4", "group_size": 16, "activations": "fp4"},
    "w4a16": {"method": "nvfp4", "group_size": 32},
    "nvfp4a16": {"method": "nvfp4", "group_size": 16, "format": "compressed-tensors"},
    "int4-sym": {"method": "gptq", "group_size": 64, "format": "compressed-tensors"},
    "awq": {"method": "awq", "group_size": 64},
    "mixed": {
        "method": "gptq",
        "group_size": 128,
        "indivisible": "smaller",
        "boundary": {"blocks": 1, "keep": "projections"},
        "ignore": [r"re:model\.layers\.1\.mlp\.(gate|up)_proj"],
    },
}
KERNELS = dict.fromkeys(RECIPES, "CPUWNA16LinearKernel") | {
    "w4a4": "EmulationNvFp4LinearKernel",
    "w4a16": "WeightOnlyNvFp4LinearKernel",
    "nvfp4a16": "WeightOnlyNvFp4LinearKernel",
}
DTYPES = {name: torch.float16 if recipe["method"] == "nvfp4" else torch.bfloat16 for name, recipe in RECIPES.items()}
"""FP4 inputs make a step of every rounding: the finer dtype keeps two implementations together longer."""
LIMITS = dict.fromkeys(RECIPES, 0.1) | {"w4a4": 0.3, "w4a16": 0.02, "nvfp4a16": 0.02}
"""Nats, root mean square: two to five times what was seen. With FP4 inputs, three times the input_scale, blocks of 32
or block scales not rounded to E4M3 move the reference by 0.6 and more; the original model is 0.67 away or more."""
SHAPES: dict[str, dict[str, Any]] = {name: {"num_hidden_layers": 2} for name in RECIPES} | {
    "w4a4": {"num_hidden_layers": 1},
    "mixed": {"num_hidden_layers": 3, "intermediate_size": 192, "tie_word_embeddings": False},
}
"""mixed: groups of 128 and, where 192 inputs are not divisible, 64; exempt projections and names; lm_head in 4 bits."""
UNTRACKED = ("w4a16",)
"""vLLM 0.32 gives a W4A16_NVFP4 linear an input_scale that old files had, and then misses it in ours."""


def random_tokens(seed: int, sequences: int, length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(5, VOCAB, (sequences, length), generator=generator))


@pytest.fixture(scope="module")
def install() -> VllmInstall:
    try:
        return find_vllm()
    except HalfbyteError as error:
        pytest.skip(str(error))


def make_artifact(name: str, model: Path, out: Path) -> Path:
    data = CalibrationSet.of(random_tokens(1, 48, 64), {"source": {"kind": "random", "seed": 1}})
    quantize(str(model), Recipe.model_validate(RECIPES[name]), out, data)
    return out


def command_for(name: str, directory: Path, install: VllmInstall) -> ServeCommand:
    """Halfbyte's own command; for NVFP4, which it refuses on a CPU, one with the plugin."""
    options: dict[str, Any] = {"vllm_version": install.version, "context": WINDOW + 1, "concurrency": WINDOWS}
    if RECIPES[name]["method"] != "nvfp4":
        return serve_command(directory, format_of(directory), "cpu", extra=(*FLAGS, *TRACKED), **options)
    with pytest.raises(HalfbyteError, match="no CPU kernel for NVFP4"):
        serve_command(directory, format_of(directory), "cpu", **options)
    words = ["--dtype", "float16", "--max-model-len", str(WINDOW + 1), "--max-num-seqs", str(WINDOWS), *FLAGS]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": str(PLUGIN), "VLLM_PLUGINS": "nvfp4_cpu"}
    return ServeCommand(["vllm", "serve", str(directory), *words, *(() if name in UNTRACKED else TRACKED)], env)


def fp4_inputs(x: torch.Tensor, input_scale: float) -> torch.Tensor:
    """x as an NVFP4 kernel sees it: E2M1 times an E4M3 scale per 16, found at run time, times the calibrated scale."""
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    scale = (blocks.abs().amax(-1, keepdim=True) / (6 * input_scale)).clamp(max=E4M3_MAX)
    step = scale.to(torch.float8_e4m3fn).float() * input_scale
    snapped = torch.where(step > 0, snap_e2m1(blocks / step), 0.0)
    return (snapped * step).flatten(-2).to(x.dtype)


def round_inputs(network: torch.nn.Module, directory: Path) -> int:
    """Give each linear that has an input_scale FP4 inputs; returns how many have one."""
    tensors: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    scales = {
        name.removesuffix(".input_scale"): float(t) for name, t in tensors.items() if name.endswith("input_scale")
    }
    for name, scale in scales.items():
        network.get_submodule(name).register_forward_pre_hook(
            lambda _module, inputs, scale=scale: (fp4_inputs(inputs[0], scale),)
        )
    return len(scales)


def token_logprobs(network: torch.nn.Module, windows: list[torch.Tensor]) -> torch.Tensor:
    """float32 [windows * (T - 1)]: of each token given those before it."""
    ids = torch.stack(windows)
    with torch.inference_mode():
        logits = network(ids).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).flatten()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square difference in nats."""
    return (a - b).square().mean().sqrt().item()


@pytest.mark.parametrize("name", RECIPES)
def test_vllm_computes_what_the_artifact_says(name: str, install: VllmInstall, tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model", **SHAPES[name])
    directory = make_artifact(name, model, tmp_path / name)
    windows, log = random_tokens(2, WINDOWS, WINDOW), tmp_path / "vllm.log"
    with Server(command_for(name, directory, install), install, log_path=log, env=OFFLINE) as server:
        with Client(server.url) as client:
            scored = client.score([ids.tolist() for ids in windows])
    assert KERNELS[name] in log.read_text()
    served = torch.tensor([value for window in scored for value in window[1:]])
    network = load_fake_quantized(directory, DTYPES[name])
    plain = token_logprobs(network, windows)
    assert round_inputs(network, directory) == (7 if name == "w4a4" else 0)
    reference = token_logprobs(network, windows)
    original = token_logprobs(load_model(model), windows)
    print(
        f"{name}: ready in {server.load_seconds:.0f} s; nats to the reference {distance(served, reference):.4f}, "
        f"to BF16 inputs {distance(served, plain):.4f}, to the original model {distance(served, original):.4f}"
    )
    assert distance(served, reference) < LIMITS[name]
    assert distance(served, original) > 0.5
    if name == "w4a4":
        assert distance(served, plain) > 2 * LIMITS[name]
