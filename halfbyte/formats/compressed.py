"""The `compressed-tensors` format: pack-quantized int4, symmetric or asymmetric, and weight-only NVFP4 (NVFP4A16).

pack-quantized:
    weight_packed      int32    [N, K/8]    code of input 8j+i in bits 4i..4i+3 of word j
    weight_scale       bfloat16 [N, K/g]
    weight_zero_point  int32    [ceil(N/8), K/g]  asymmetric alone: zero points packed likewise along the outputs
    weight_shape       int64    [2]         (N, K)
nvfp4-pack-quantized:
    weight_packed      uint8    [N, K/2]    two E2M1 codes a byte, the even input in the low nibble
    weight_scale       float8_e4m3 [N, K/16]
    weight_global_scale float32 [1]         the *reciprocal* of the multiplier that ModelOpt stores

The config lists groups of modules with one scheme each. A module is taken by its name before its class, and vLLM's
class of an lm_head has no "Linear" in its name, so that a quantized lm_head is a target of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from halfbyte.formats.base import (
    INT4_GROUPS,
    Format,
    Shape,
    all_or_none,
    check_int4_group,
    columns,
    fused_groups,
    is_expert,
    is_head,
    modules_of,
    patterns,
    required,
    stated_groups,
)
from halfbyte.formats.bits import FormatError, exact, pack_bytes, pack_int32, unpack_bytes, unpack_int32
from halfbyte.formats.modelopt import blocks_of_16, check_blocks
from halfbyte.types import NVFP4_BLOCK, QuantizedLinear, Scheme

INT4, NVFP4 = "pack-quantized", "nvfp4-pack-quantized"
_CLASSES = {
    "qkv_proj": "QKVParallelLinear",
    "gate_up_proj": "MergedColumnParallelLinear",
    "o_proj": "RowParallelLinear",
    "down_proj": "RowParallelLinear",
    "lm_head": "ParallelLMHead",
}
"""vLLM's class of each module, which a target without a dot may name a part of."""


class CompressedTensors(Format):
    """int4 and weight-only NVFP4 in vLLM's own modern layout."""

    name = "compressed-tensors"
    grids = ("int4_sym", "int4_asym", "nvfp4")
    mixed_groups = True

    def pack(self, name: str, q: QuantizedLinear) -> dict[str, torch.Tensor]:
        if q.grid == "nvfp4":
            return _pack_nvfp4(name, q)
        check_int4_group(name, q)
        tensors = {
            f"{name}.weight_packed": pack_int32(q.codes),
            f"{name}.weight_scale": exact(q.scales, torch.bfloat16, f"{name}: a scale"),
            f"{name}.weight_shape": torch.tensor(q.codes.shape, dtype=torch.int64),
        }
        if q.zeros is not None:
            padded = torch.nn.functional.pad(q.zeros, (0, 0, 0, -q.out_features % 8))
            tensors[f"{name}.weight_zero_point"] = pack_int32(padded.t()).t().contiguous()
        return tensors

    def unpack(self, name: str, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedLinear:
        packed, scales = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"].float()
        if scheme.grid == "nvfp4":
            outer = float(1 / tensors[f"{name}.weight_global_scale"])
            return QuantizedLinear(unpack_bytes(packed), scales, NVFP4_BLOCK, "nvfp4", global_scale=outer)
        codes = unpack_int32(packed)
        if tensors[f"{name}.weight_shape"].tolist() != list(codes.shape):
            raise FormatError(f"{name}.weight_shape does not say {list(codes.shape)}, as the packed weight does")
        zeros = None
        if scheme.grid == "int4_asym":
            zeros = unpack_int32(tensors[f"{name}.weight_zero_point"].t()).t()[: codes.shape[0]].contiguous()
        return QuantizedLinear(codes, scales, columns(scheme.group_size, codes.shape[1]), scheme.grid, zeros)

    def expected(
        self, name: str, out_features: int, in_features: int, scheme: Scheme
    ) -> dict[str, tuple[torch.dtype, Shape]]:
        if scheme.grid == "nvfp4":
            check_blocks(name, in_features)
            return {
                f"{name}.weight_packed": (torch.uint8, (out_features, in_features // 2)),
                f"{name}.weight_scale": (torch.float8_e4m3fn, (out_features, in_features // NVFP4_BLOCK)),
                f"{name}.weight_global_scale": (torch.float32, (1,)),
            }
        groups = in_features // columns(scheme.group_size, in_features)
        tensors: dict[str, tuple[torch.dtype, Shape]] = {
            f"{name}.weight_packed": (torch.int32, (out_features, in_features // 8)),
            f"{name}.weight_scale": (torch.bfloat16, (out_features, groups)),
            f"{name}.weight_shape": (torch.int64, (2,)),
        }
        if scheme.grid == "int4_asym":
            tensors[f"{name}.weight_zero_point"] = (torch.int32, (-(-out_features // 8), groups))
        return tensors

    def config(self, schemes: Mapping[str, Scheme | None], fused: Mapping[str, str], **meta: Any) -> dict:
        self._only_grids(schemes)
        sorts: dict[Scheme, list[str]] = {}
        stated = stated_groups(schemes, fused)
        for name, scheme in schemes.items():
            if scheme is not None:
                group = NVFP4_BLOCK if scheme.grid == "nvfp4" else stated[name]
                sorts.setdefault(Scheme(scheme.grid, group), []).append(name)
        if len({s.grid for s in sorts}) > 1:
            raise FormatError("one compressed-tensors file holds one grid: quantize all linears in the same")
        layout = NVFP4 if any(s.grid == "nvfp4" for s in sorts) else INT4
        groups = {}
        for i, (scheme, names) in enumerate(sorts.items()):
            targets = ["Linear", *filter(is_head, names)] if len(sorts) == 1 else []
            targets = targets or [f"re:{p}" for p in patterns(names, fused)]
            rest = {"input_activations": None, "output_activations": None, "format": layout}
            groups[f"group_{i}"] = {"targets": targets, "weights": _arguments(scheme), **rest}
        return {
            "quant_method": "compressed-tensors",
            "format": layout,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": _ignored([n for n, s in schemes.items() if s is None], fused),
            "kv_cache_scheme": None,
        }

    def parse(self, config: dict, names: Iterable[str]) -> dict[str, Scheme | None]:
        targets: dict[str, Scheme] = {}
        for group in required(config, "config_groups").values():
            scheme = _stated(group, config.get("format"))
            targets |= {target: scheme for target in required(group, "targets")}
        ignored = config.get("ignore") or []
        found: dict[str, Scheme | None] = {}
        for fused, shards in fused_groups(names).items():
            if is_expert(shards[0]):
                found |= _experts(fused, shards, ignored, targets)
                continue
            skip = _first(fused, ignored) or all_or_none(fused, shards, lambda n: _first(n, ignored) is not None)
            scheme_or_none = None if skip else _target(fused, shards, targets)
            found |= {shard: scheme_or_none for shard in shards}
        return found


def _ignored(names: list[str], fused: Mapping[str, str]) -> list[str]:
    """Names of what is kept; experts by an expression, since vLLM asks for those of one expert by their names."""
    experts = [n for n in names if is_expert(n)]
    return [*modules_of((n for n in names if not is_expert(n)), fused), *(f"re:{p}" for p in patterns(experts, fused))]


def _pack_nvfp4(name: str, q: QuantizedLinear) -> dict[str, torch.Tensor]:
    assert q.global_scale is not None
    return {
        f"{name}.weight_packed": pack_bytes(q.codes),
        f"{name}.weight_scale": blocks_of_16(name, q),
        f"{name}.weight_global_scale": reciprocal(q.global_scale, name).reshape(1),
    }


def reciprocal(value: float, name: str = "a global scale") -> torch.Tensor:
    """A float32 d with 1/d == value in float32. Raises FormatError where there is none.

    About one float32 in six is no reciprocal of another; 1/(1/x) in float32 always is.
    """
    wanted = torch.tensor(value, dtype=torch.float32)
    near = 1 / wanted
    for d in (near, near.nextafter(torch.tensor(torch.inf)), near.nextafter(torch.tensor(0.0))):
        if 1 / d == wanted:
            return d
    raise FormatError(f"{name}: the global scale {value!r} is no float32 reciprocal: round it to 1/(1/x) first")


def _arguments(scheme: Scheme) -> dict[str, Any]:
    if scheme.grid == "nvfp4":
        shape = {"type": "float", "strategy": "tensor_group", "symmetric": True, "group_size": NVFP4_BLOCK}
        return {"num_bits": 4, **shape, "dynamic": False, "scale_dtype": "torch.float8_e4m3fn"}
    row = scheme.group_size == -1
    shape = {"strategy": "channel" if row else "group", "group_size": None if row else scheme.group_size}
    return {"num_bits": 4, "type": "int", "symmetric": scheme.grid == "int4_sym", "dynamic": False, **shape}


def _stated(group: Mapping[str, Any], layout: str | None) -> Scheme:
    weights = required(group, "weights")
    sort = (weights.get("num_bits"), weights.get("type", "int"), weights.get("strategy"))
    stated = weights.get("group_size")
    if group.get("input_activations") or weights.get("dynamic"):
        raise FormatError("compressed-tensors with quantized activations or dynamic weights is not read")
    layout = group.get("format") or layout
    if sort == (4, "float", "tensor_group") and stated == NVFP4_BLOCK and layout == NVFP4:
        return Scheme("nvfp4", NVFP4_BLOCK)
    grid = "int4_sym" if weights.get("symmetric", True) else "int4_asym"
    if sort == (4, "int", "channel") and layout == INT4:
        return Scheme(grid, -1)
    if sort == (4, "int", "group") and stated in INT4_GROUPS and layout == INT4:
        return Scheme(grid, stated)
    raise FormatError(f"compressed-tensors weights {sort} in groups of {stated} as {layout!r} are not read")


def _first(name: str, entries: Iterable[str], part: bool = False) -> str | None:
    """The first entry that is `name`, or matches it as `re:...`, or (`part`) is contained in it, case aside."""
    for entry in entries:
        if re.match(entry[3:], name) if entry.startswith("re:") else entry == name:
            return entry
        if part and not entry.startswith("re:") and entry.lower() in name.lower():
            return entry
    return None


def _experts(
    fused: str, shards: list[str], ignored: list[str], targets: Mapping[str, Scheme]
) -> dict[str, Scheme | None]:
    """vLLM asks for the projections of one expert, by name; a target `Linear` holds for experts too."""
    number = shards[0].removeprefix(f"{fused}.").partition(".")[0]
    found = set()
    for name in (n for n in shards if n.startswith(f"{fused}.{number}.")):
        hit = None if _first(name, ignored) else _first(name, targets) or _first("Linear", targets)
        found.add(None if hit is None else targets[hit])
    if len(found) > 1:
        raise FormatError(f"the config gives the experts of {fused} several schemes, which vLLM refuses")
    scheme = found.pop()
    return {shard: scheme for shard in shards}


def _target(fused: str, shards: list[str], targets: Mapping[str, Scheme]) -> Scheme | None:
    hit = _first(fused, targets)
    if hit is None:
        hits = [_first(s, targets) for s in shards]
        hit = hits[0] if all(hits) else None
    if hit is None:
        kind = _CLASSES.get(fused.rsplit(".", 1)[-1], "ColumnParallelLinear")
        hit = _first(kind, targets, part=True)
    return None if hit is None else targets[hit]
