"""Our compressed-tensors files against the library of that name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from halfbyte.algo import dequantize
from halfbyte.formats import get_format
from halfbyte.types import Scheme
from tests.handmade import make_artifact
from tests.unit.test_formats_roundtrip import NAME, make

pytest.importorskip("compressed_tensors", reason="the compressed-tensors library is not installed")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme


def stated(grid: str, group: int) -> tuple[QuantizationScheme, str]:
    """The scheme that the library reads from our config, and its layout."""
    config = get_format("compressed-tensors").config({NAME: Scheme(grid, group)}, {NAME: NAME})
    read = QuantizationConfig.model_validate(config)
    assert read.format == config["format"]
    return read.config_groups["group_0"], config["format"]


CASES = [("int4_sym", 32), ("int4_sym", 64), ("int4_sym", 192), ("int4_asym", 64), ("int4_asym", 192), ("nvfp4", 16)]


@pytest.mark.parametrize(("grid", "group"), CASES)
def test_the_library_reads_the_same_weights(grid: str, group: int) -> None:
    q = make(grid, 40, 192, group)
    scheme, layout = stated(grid, group)
    tensors = {n.removeprefix(f"{NAME}."): t for n, t in get_format("compressed-tensors").pack(NAME, q).items()}
    weight = BaseCompressor.get_value_from_registry(layout).decompress(tensors, scheme)["weight"]
    assert torch.equal(weight.float(), dequantize(q).to(weight.dtype).float())


@pytest.mark.parametrize(("grid", "group"), CASES)
def test_the_library_writes_the_same_bytes(grid: str, group: int) -> None:
    q = make(grid, 40, 192, group)
    scheme, layout = stated(grid, group)
    ours = {n.removeprefix(f"{NAME}."): t for n, t in get_format("compressed-tensors").pack(NAME, q).items()}
    given = {"weight": dequantize(q), "weight_scale": q.scales}
    if q.zeros is not None:
        given["weight_zero_point"] = q.zeros.to(torch.int8) - 8
    if grid == "nvfp4":
        given["weight_global_scale"] = ours["weight_global_scale"]
    theirs = BaseCompressor.get_value_from_registry(layout).compress(given, scheme)
    assert set(theirs) == set(ours)
    for name in set(ours) - {"weight_scale"}:
        if grid == "nvfp4" and name == "weight_packed":
            assert torch.equal(_without_minus_zero(theirs[name]), _without_minus_zero(ours[name]))
        else:
            assert torch.equal(theirs[name], ours[name]) and theirs[name].dtype == ours[name].dtype
    assert torch.equal(theirs["weight_scale"].float(), ours["weight_scale"].float())


def _without_minus_zero(packed: torch.Tensor) -> torch.Tensor:
    low, high = packed & 15, packed >> 4
    return torch.where(low == 8, 0, low) + 16 * torch.where(high == 8, 0, high)


@pytest.mark.parametrize(("grid", "group"), [("int4_asym", 32), ("nvfp4", 16)])
def test_transformers_loads_an_artifact_through_the_library(tmp_path: Path, grid: str, group: int) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    done = make_artifact(tmp_path, "compressed-tensors", grid, group, keep=r"layers\.1\.mlp|lm_head")
    plain = CompressedTensorsConfig(run_compressed=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=plain)
    modules = dict(model.named_modules())
    assert done and any("layers.0.mlp" in name for name in done) and not any("layers.1.mlp" in name for name in done)
    for name, q in done.items():
        assert torch.equal(modules[name].weight.float(), dequantize(q).bfloat16().float()), name
