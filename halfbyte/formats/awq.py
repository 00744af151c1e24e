"""The `awq` format (its `gemm` version): asymmetric int4, codes packed along the outputs in an interleaved order.

    qweight  int32   [K, N/8]    nibble i of word j is the code of output 8j + (0, 2, 4, 6, 1, 3, 5, 7)[i]
    qzeros   int32   [K/g, N/8]  zero points as they are, packed alike
    scales   float16 [K/g, N]
    weight = (code - zero) * scale

One group size holds for the whole checkpoint. Modules in `modules_to_not_convert` stay as they are: vLLM looks for
each entry anywhere in a module's name, so that entries are full names (`model.layers.1` would take layer 10 as well).
"""

from __future__ import annotations

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
    most_common_group,
    required,
    stated_groups,
)
from halfbyte.formats.bits import FormatError, exact, pack_int32, unpack_int32
from halfbyte.types import QuantizedLinear, Scheme

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output, among eight neighbours, that each nibble of a word holds."""
_BACK = tuple(ORDER.index(i) for i in range(8))


class AWQ(Format):
    """Asymmetric int4 in vLLM's `awq` layout."""

    name = "awq"
    grids = ("int4_asym",)
    mixed_groups = False

    def pack(self, name: str, q: QuantizedLinear) -> dict[str, torch.Tensor]:
        self._take(q, name)
        _check_width(name, q.out_features)
        check_int4_group(name, q)
        assert q.zeros is not None
        return {
            f"{name}.qweight": pack_int32(_reorder(q.codes.t(), ORDER)),
            f"{name}.qzeros": pack_int32(_reorder(q.zeros.t(), ORDER)),
            f"{name}.scales": exact(q.scales, torch.float16, f"{name}: a scale").t().contiguous(),
        }

    def unpack(self, name: str, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedLinear:
        codes, zeros = (_reorder(unpack_int32(tensors[f"{name}.{t}"]), _BACK) for t in ("qweight", "qzeros"))
        return QuantizedLinear(
            codes=codes.t().contiguous(),
            scales=tensors[f"{name}.scales"].t().float().contiguous(),
            group_size=columns(scheme.group_size, codes.shape[0]),
            grid="int4_asym",
            zeros=zeros.t().contiguous(),
        )

    def expected(
        self, name: str, out_features: int, in_features: int, scheme: Scheme
    ) -> dict[str, tuple[torch.dtype, Shape]]:
        _check_width(name, out_features)
        groups = in_features // columns(scheme.group_size, in_features)
        return {
            f"{name}.qweight": (torch.int32, (in_features, out_features // 8)),
            f"{name}.qzeros": (torch.int32, (groups, out_features // 8)),
            f"{name}.scales": (torch.float16, (groups, out_features)),
        }

    def config(self, schemes: Mapping[str, Scheme | None], fused: Mapping[str, str], **meta: Any) -> dict:
        self._only_grids(schemes)
        stated = stated_groups(schemes, fused)
        groups = sorted(set(stated.values()))
        if len(groups) > 1:
            sizes = " and ".join(map(str, groups))
            raise FormatError(f"an awq file has one group size, not {sizes}: use the smallest, or compressed-tensors")
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": most_common_group(stated.values()),
            "zero_point": True,
            "version": "gemm",
            "lm_head": any(is_head(n) and s is not None for n, s in schemes.items()),
            "modules_to_not_convert": modules_of((n for n, s in schemes.items() if s is None), fused),
        }

    def parse(self, config: dict, names: Iterable[str]) -> dict[str, Scheme | None]:
        scheme = _stated(config)
        kept = config.get("modules_to_not_convert") or []
        found: dict[str, Scheme | None] = {}
        for fused, shards in fused_groups(names).items():
            skip = is_head(fused) and not config.get("lm_head", False)
            skip = skip or _contains(fused, kept)
            if not is_expert(shards[0]):
                skip = skip or all_or_none(fused, shards, lambda n: _contains(n, kept))
            found |= {shard: None if skip else scheme for shard in shards}
        return found


def _contains(name: str, parts: list[str]) -> bool:
    return any(part in name for part in parts)


def _reorder(values: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """[R, N] with every eight neighbouring columns taken in `order`."""
    return values.unflatten(1, (-1, 8))[:, :, order].flatten(1)


def _check_width(name: str, out_features: int) -> None:
    if out_features % 8:
        raise FormatError(f"{name}: {out_features} outputs are not a multiple of 8, which awq files need: ignore it")


def _stated(config: Mapping[str, Any]) -> Scheme:
    bits, group = required(config, "bits", "w_bit"), required(config, "group_size", "q_group_size")
    if bits != 4 or required(config, "zero_point") is not True:
        raise FormatError("an awq config other than 4 bits with zero_point true is not read")
    if str(config.get("version", "gemm")).lower() != "gemm":
        raise FormatError(f"awq version {config['version']!r} is not read: only 'gemm'")
    if group not in INT4_GROUPS:
        raise FormatError(f"group_size {group!r} is none that vLLM takes: {', '.join(map(str, INT4_GROUPS))}")
    return Scheme("int4_asym", group)
