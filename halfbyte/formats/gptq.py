"""The `gptq` format: symmetric int4, codes packed along the inputs, read by every vLLM back end.

    qweight  int32   [K/8, N]   code of input 8j+i in bits 4i..4i+3 of row j
    qzeros   int32   [K/g, N/8] zero points minus one (the v1 convention): 7 in every nibble
    scales   float16 [K/g, N]
    g_idx    int32   [K]        the group of each input, k // g: groups are static, whatever order GPTQ went in
    weight = (code - 8) * scale

Modules that differ from the base settings stand in `dynamic`. vLLM matches its keys with re.match against the names
of *fused* modules, other loaders against those of their shards, first match wins: each pattern matches both kinds.
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
    most_common_group,
    patterns,
    required,
    stated_groups,
)
from halfbyte.formats.bits import FormatError, exact, pack_int32, unpack_int32
from halfbyte.types import QuantizedLinear, Scheme

ZEROS_V1 = 0x77777777
"""Eight zero points of 8, each stored minus one."""


class GPTQ(Format):
    """Symmetric int4 in vLLM's `gptq` layout."""

    name = "gptq"
    grids = ("int4_sym",)
    mixed_groups = True

    def pack(self, name: str, q: QuantizedLinear) -> dict[str, torch.Tensor]:
        self._take(q, name)
        out, width, device = q.out_features, q.in_features, q.codes.device
        _check_width(name, out)
        check_int4_group(name, q)
        return {
            f"{name}.qweight": pack_int32(q.codes).t().contiguous(),
            f"{name}.qzeros": torch.full((width // q.group_size, out // 8), ZEROS_V1, dtype=torch.int32, device=device),
            f"{name}.scales": exact(q.scales, torch.float16, f"{name}: a scale").t().contiguous(),
            f"{name}.g_idx": _groups_of(width, q.group_size, device),
        }

    def unpack(self, name: str, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedLinear:
        qweight, g_idx = tensors[f"{name}.qweight"], tensors[f"{name}.g_idx"]
        width = qweight.shape[0] * 8
        group = columns(scheme.group_size, width)
        if not bool((tensors[f"{name}.qzeros"] == ZEROS_V1).all()):
            raise FormatError(f"{name}.qzeros: not 8 everywhere in the v1 convention, so not symmetric")
        if not torch.equal(g_idx, _groups_of(width, group, g_idx.device)):
            raise FormatError(f"{name}.g_idx: groups of {group} are not contiguous, and vLLM ignores g_idx")
        codes = unpack_int32(qweight.t())
        return QuantizedLinear(codes, tensors[f"{name}.scales"].t().float().contiguous(), group, "int4_sym")

    def expected(
        self, name: str, out_features: int, in_features: int, scheme: Scheme
    ) -> dict[str, tuple[torch.dtype, Shape]]:
        _check_width(name, out_features)
        groups = in_features // columns(scheme.group_size, in_features)
        return {
            f"{name}.qweight": (torch.int32, (in_features // 8, out_features)),
            f"{name}.qzeros": (torch.int32, (groups, out_features // 8)),
            f"{name}.scales": (torch.float16, (groups, out_features)),
            f"{name}.g_idx": (torch.int32, (in_features,)),
        }

    def config(self, schemes: Mapping[str, Scheme | None], fused: Mapping[str, str], **meta: Any) -> dict:
        self._only_grids(schemes)
        others = stated_groups(schemes, fused)
        base = most_common_group(others.values())
        skipped = [n for n, s in schemes.items() if s is None and not is_head(n)]
        rules: dict[str, dict] = {f"-:{p}": {} for p in patterns(skipped, fused)}
        for group in sorted(set(others.values()) - {base}):
            override = {"bits": 4, "group_size": group, "sym": True, "desc_act": False}
            names = [n for n, g in others.items() if g == group]
            rules |= {f"+:{p}": override for p in patterns(names, fused)}
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": base,
            "desc_act": False,
            "sym": True,
            "lm_head": any(is_head(n) for n in others),
            "checkpoint_format": "gptq",
        }
        if rules:
            config["dynamic"] = rules
        if producer := meta.get("producer"):
            config["meta"] = {"quantizer": [":".join(str(v) for v in producer.values())]}
        return config

    def extra_files(self, config: dict) -> dict[str, dict]:
        return {"quantize_config.json": config}

    def parse(self, config: dict, names: Iterable[str]) -> dict[str, Scheme | None]:
        _refuse(config)
        found: dict[str, Scheme | None] = {}
        for fused, shards in fused_groups(names).items():
            scheme = _scheme(config, fused, shards)
            found |= {shard: scheme for shard in shards}
        return found


def _groups_of(width: int, group: int, device: torch.device) -> torch.Tensor:
    return torch.arange(width, dtype=torch.int32, device=device) // group


def _check_width(name: str, out_features: int) -> None:
    if out_features % 8:
        raise FormatError(f"{name}: {out_features} outputs are not a multiple of 8, which gptq files need: ignore it")


def _refuse(config: Mapping[str, Any]) -> None:
    if config.get("checkpoint_format", "gptq") != "gptq":
        raise FormatError(f"checkpoint_format {config['checkpoint_format']!r} is not read: only 'gptq' (v1)")
    for key in ("bits", "group_size", "desc_act", "sym"):
        required(config, key)
    for rule in (config, *(v for k, v in (config.get("dynamic") or {}).items() if not k.startswith("-:"))):
        bits, sym = rule.get("bits", config["bits"]), rule.get("sym", config["sym"])
        group, act_order = rule.get("group_size", config["group_size"]), rule.get("desc_act", config["desc_act"])
        if bits != 4 or sym is not True:
            raise FormatError(f"bits {bits!r} with sym {sym!r} is not read: only symmetric 4 bits")
        if group not in INT4_GROUPS:
            raise FormatError(f"group_size {group!r} is none that vLLM takes: {', '.join(map(str, INT4_GROUPS))}")
        if act_order and group != -1:
            raise FormatError("desc_act with a group size is refused by vLLM: use static groups and desc_act false")


def _scheme(config: Mapping[str, Any], fused: str, shards: list[str]) -> Scheme | None:
    if is_head(fused) and not config.get("lm_head", False):
        return None
    listed = _flat(config.get("modules_in_block_to_quantize") or [])
    if (
        listed
        and not is_expert(shards[0])
        and not all_or_none(fused, shards, lambda n: any(part in n for part in listed))
    ):
        return None
    for rule, override in (config.get("dynamic") or {}).items():
        if not re.match(rule.removeprefix("-:").removeprefix("+:"), fused):
            continue
        if rule.startswith("-:"):
            return None
        return Scheme("int4_sym", override.get("group_size", config["group_size"]))
    return Scheme("int4_sym", config["group_size"])


def _flat(items: list) -> list[str]:
    return [leaf for item in items for leaf in (_flat(item) if isinstance(item, list) else [item])]
