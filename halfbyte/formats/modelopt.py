"""NVFP4 in the layout of NVIDIA's ModelOpt, which vLLM reads as `modelopt_fp4`.

    weight          uint8   [N, K/2]   two E2M1 codes a byte, the even input in the low nibble
    weight_scale    float8_e4m3 [N, K/16]  one scale per block of 16, whatever group size the recipe shares it over
    weight_scale_2  float32 []         one per linear, equal over the linears that vLLM fuses (it takes their maximum)
    input_scale     float32 []         amax of the input / (6 * 448); with `NVFP4` alone, and there vLLM needs it
    weight = e2m1(code) * weight_scale * weight_scale_2

Two files say the same, from one dict: config.json (flat, `ignore`) and hf_quant_config.json (`exclude_modules`).
vLLM takes an exclusion exactly, then as a part of a name, then as a wildcard, so that entries are full names; a fused
module is listed by its own name and by its shards'.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch

from halfbyte.formats.base import Format, Shape, all_or_none, fused_groups, is_expert, modules_of, required
from halfbyte.formats.bits import FormatError, exact, pack_bytes, unpack_bytes
from halfbyte.types import NVFP4_BLOCK, QuantizedLinear, Scheme

ALGORITHMS = {"bf16": "W4A16_NVFP4", "fp4": "NVFP4"}
"""quant_algo by what the activations are."""


def blocks_of_16(name: str, q: QuantizedLinear) -> torch.Tensor:
    """float8_e4m3 [O, I/16]: the block scales, shared ones repeated. Raises FormatError where they do not fit."""
    if q.group_size % NVFP4_BLOCK:
        raise FormatError(f"{name}: NVFP4 shares scales over multiples of {NVFP4_BLOCK} weights, not {q.group_size}")
    scales = q.scales.repeat_interleave(q.group_size // NVFP4_BLOCK, dim=1)
    return exact(scales, torch.float8_e4m3fn, f"{name}: a block scale")


def check_blocks(name: str, in_features: int) -> None:
    """Raise FormatError for a width that has no whole number of blocks."""
    if in_features % NVFP4_BLOCK:
        raise FormatError(f"{name}: {in_features} inputs are not a multiple of {NVFP4_BLOCK}: ignore it")


@dataclass(frozen=True)
class ModelOpt(Format):
    """NVFP4 as ModelOpt writes it. `activations`: bf16 (weight-only) or fp4 (with an input_scale)."""

    activations: str = "bf16"
    name = "modelopt"
    grids = ("nvfp4",)
    mixed_groups = True

    def pack(self, name: str, q: QuantizedLinear) -> dict[str, torch.Tensor]:
        self._take(q, name)
        assert q.global_scale is not None
        tensors = {
            f"{name}.weight": pack_bytes(q.codes),
            f"{name}.weight_scale": blocks_of_16(name, q),
            f"{name}.weight_scale_2": torch.tensor(q.global_scale, dtype=torch.float32),
        }
        if self.activations == "fp4":
            if q.input_scale is None:
                raise FormatError(f"{name} has no input_scale, which NVFP4 activations need: calibrate, or use bf16")
            tensors[f"{name}.input_scale"] = torch.tensor(q.input_scale, dtype=torch.float32)
        return tensors

    def unpack(self, name: str, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedLinear:
        input_scale = tensors.get(f"{name}.input_scale")
        return QuantizedLinear(
            codes=unpack_bytes(tensors[f"{name}.weight"]),
            scales=tensors[f"{name}.weight_scale"].float(),
            group_size=NVFP4_BLOCK,
            grid="nvfp4",
            global_scale=float(tensors[f"{name}.weight_scale_2"]),
            input_scale=None if input_scale is None else float(input_scale),
        )

    def expected(
        self, name: str, out_features: int, in_features: int, scheme: Scheme
    ) -> dict[str, tuple[torch.dtype, Shape]]:
        check_blocks(name, in_features)
        tensors: dict[str, tuple[torch.dtype, Shape]] = {
            f"{name}.weight": (torch.uint8, (out_features, in_features // 2)),
            f"{name}.weight_scale": (torch.float8_e4m3fn, (out_features, in_features // NVFP4_BLOCK)),
            f"{name}.weight_scale_2": (torch.float32, ()),
        }
        if self.activations == "fp4":
            tensors[f"{name}.input_scale"] = (torch.float32, ())
        return tensors

    def config(self, schemes: Mapping[str, Scheme | None], fused: Mapping[str, str], **meta: Any) -> dict:
        self._only_grids(schemes)
        values = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": NVFP4_BLOCK}
        kept = modules_of((n for n, s in schemes.items() if s is None), fused)
        return {
            "quant_method": "modelopt",
            "quant_algo": ALGORITHMS[self.activations],
            "group_size": NVFP4_BLOCK,
            "ignore": kept,
            "config_groups": {
                "group_0": {
                    "weights": values,
                    "input_activations": dict(values) if self.activations == "fp4" else None,
                    "targets": ["Linear"],
                }
            },
            "producer": dict(meta.get("producer") or {"name": "halfbyte"}),
        }

    def extra_files(self, config: dict) -> dict[str, dict]:
        quantization = {
            "quant_algo": required(config, "quant_algo"),
            "kv_cache_quant_algo": None,
            "group_size": config.get("group_size", NVFP4_BLOCK),
            "exclude_modules": config.get("ignore", []),
        }
        return {"hf_quant_config.json": {"producer": config.get("producer", {}), "quantization": quantization}}

    def parse(self, config: dict, names: Iterable[str]) -> dict[str, Scheme | None]:
        nested = config.get("quantization")
        inner = nested if isinstance(nested, dict) else config
        algorithm = declared(config)
        if algorithm != ALGORITHMS[self.activations]:
            raise FormatError(f"quant_algo {algorithm!r} is not what is read here: {ALGORITHMS[self.activations]}")
        if int(inner.get("group_size") or NVFP4_BLOCK) != NVFP4_BLOCK:
            raise FormatError(f"group_size {inner['group_size']!r}: vLLM's NVFP4 kernels know blocks of 16 alone")
        excluded = inner.get("exclude_modules" if inner is nested else "ignore") or []
        found: dict[str, Scheme | None] = {}
        for fused, shards in fused_groups(names).items():
            scheme = None if _excluded(fused, shards, excluded) else Scheme("nvfp4", NVFP4_BLOCK)
            found |= {shard: scheme for shard in shards}
        return found


def declared(config: Mapping[str, Any]) -> str:
    """The algorithm that vLLM takes a ModelOpt config for: NVFP4 without quantized inputs counts as weight-only."""
    nested = config.get("quantization")
    algorithm = str(required(nested if isinstance(nested, dict) else config, "quant_algo")).upper()
    if algorithm not in ALGORITHMS.values():
        raise FormatError(f"quant_algo {algorithm!r} is not read: only {' and '.join(ALGORITHMS.values())}")
    groups = config.get("config_groups")
    if isinstance(groups, dict) and groups and all(g.get("input_activations") is None for g in groups.values()):
        return ALGORITHMS["bf16"]
    return algorithm


def _excluded(fused: str, shards: list[str], entries: list[str]) -> bool:
    if is_expert(shards[0]) and any(fused in entry for entry in entries):
        return True
    if fused in entries or all_or_none(fused, shards, entries.__contains__):
        return True
    return any(entry in fused or fnmatch(fused, entry) for entry in entries)
