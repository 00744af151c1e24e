"""What a format is, and the rules of names that formats share."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from halfbyte.formats.bits import FormatError
from halfbyte.types import QuantizedLinear, Scheme

Shape = tuple[int, ...]
FUSED_SHARDS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""vLLM's fused modules and the checkpoint's names of their parts, in vLLM's order."""
_FUSED_OF = {shard: fused for fused, shards in FUSED_SHARDS.items() for shard in shards}
_EXPERT = re.compile(r"(.+\.experts)\.\d+\.[^.]+")
"""A linear of one expert, and the module into which vLLM fuses all experts of a block."""
_ONE_SCALE = _FUSED_OF | {"w1": "w13", "w3": "w13"}
"""Gate and up of an expert may be called w1 and w3; those of each expert share a global scale."""
INT4_GROUPS = (-1, 32, 64, 128)
"""Group sizes that vLLM's int4 kernels take; -1 is one group per row."""


class Format(ABC):
    """How a quantized linear lies in a checkpoint. Pure: tensors and dicts in, tensors and dicts out."""

    name: str
    grids: tuple[str, ...]
    mixed_groups: bool
    """Whether linears of one checkpoint may have different group sizes."""

    @abstractmethod
    def pack(self, name: str, q: QuantizedLinear) -> dict[str, torch.Tensor]:
        """The tensors of linear `name`, by full tensor name. Raises FormatError where `q` does not fit."""

    @abstractmethod
    def unpack(self, name: str, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedLinear:
        """The exact inverse of pack; `tensors` may hold others too. Raises FormatError for contradictory tensors."""

    @abstractmethod
    def expected(
        self, name: str, out_features: int, in_features: int, scheme: Scheme
    ) -> dict[str, tuple[torch.dtype, Shape]]:
        """dtype and shape of every tensor that pack writes for such a linear."""

    @abstractmethod
    def config(self, schemes: Mapping[str, Scheme | None], fused: Mapping[str, str], **meta: Any) -> dict:
        """The `quantization_config` of config.json.

        schemes   every linear's full name, lm_head too; None stays unquantized
        fused     full name -> full name of the module that vLLM fuses it into (itself where it does not)
        meta      producer: {"name": ..., "version": ...}
        """

    @abstractmethod
    def parse(self, config: dict, names: Iterable[str]) -> dict[str, Scheme | None]:
        """What vLLM would make of `config`: the scheme of each linear in `names`, by vLLM's own matching rules.

        A config does not know the widths, so that one group per row comes back as group_size -1 (expected and unpack
        take it). Raises FormatError for a config that vLLM refuses or that splits a fused module.
        """

    def extra_files(self, config: dict) -> dict[str, dict]:
        """JSON files beside config.json that other loaders read: file name -> contents."""
        return {}

    def _take(self, q: QuantizedLinear, name: str) -> None:
        if q.grid not in self.grids:
            raise FormatError(f"{name}: the format {self.name} cannot hold the grid {q.grid}")

    def _only_grids(self, schemes: Mapping[str, Scheme | None]) -> list[Scheme]:
        quantized = [s for s in schemes.values() if s is not None]
        for scheme in quantized:
            if scheme.grid not in self.grids:
                raise FormatError(f"the format {self.name} cannot hold the grid {scheme.grid}")
        return quantized


def stated_group(group_size: int) -> int:
    """A group size as int4 configs state it: itself where vLLM takes it, else -1 (it can only be a whole row)."""
    return group_size if group_size in INT4_GROUPS else -1


def stated_groups(schemes: Mapping[str, Scheme | None], fused: Mapping[str, str]) -> dict[str, int]:
    """The stated group size of each quantized linear. A module of experts has one for all: where its linears have other
    widths, that of one group per row is -1."""
    stated = {n: stated_group(s.group_size) for n, s in schemes.items() if s is not None}
    modules: dict[str, set[int]] = {}
    for name, size in stated.items():
        modules.setdefault(fused.get(name, name), set()).add(size)
    mixed = {module for module, sizes in modules.items() if len(sizes) > 1}
    return {n: -1 if is_expert(n) and fused.get(n, n) in mixed else g for n, g in stated.items()}


def check_int4_group(name: str, q: QuantizedLinear) -> None:
    """Raise FormatError for a group size that a config could not state."""
    if q.group_size not in INT4_GROUPS and q.group_size != q.in_features:
        sizes = ", ".join(map(str, INT4_GROUPS))
        raise FormatError(f"{name}: vLLM takes no int4 group size of {q.group_size}: use {sizes}")


def columns(group_size: int, in_features: int) -> int:
    """A group size in columns: -1 is the whole row."""
    return in_features if group_size == -1 else group_size


def most_common_group(stated: Iterable[int]) -> int:
    """The stated group size of most linears (the larger of equals; 128 where nothing is quantized)."""
    counts = Counter(stated)
    return max(counts, key=lambda g: (counts[g], g)) if counts else 128


def is_head(name: str) -> bool:
    """Whether a linear is the language-model head, which vLLM treats apart."""
    return name.rsplit(".", 1)[-1] == "lm_head"


def fused_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Full fused name -> its shards among `names`, as vLLM fuses the supported families."""
    groups: dict[str, list[str]] = {}
    for name in names:
        expert = _EXPERT.fullmatch(name)
        groups.setdefault(expert[1] if expert else _renamed(name, _FUSED_OF), []).append(name)
    return groups


def scale_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """As `fused_groups`, for what vLLM takes one global scale of: of the experts only gate and up of each."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_renamed(name, _ONE_SCALE), []).append(name)
    return groups


def _renamed(name: str, names: Mapping[str, str]) -> str:
    parent, _, last = name.rpartition(".")
    return f"{parent}.{names.get(last, last)}" if parent else names.get(last, last)


def is_expert(name: str) -> bool:
    """Whether a linear belongs to an expert that a router chooses."""
    return _EXPERT.fullmatch(name) is not None


def modules_of(names: Iterable[str], fused: Mapping[str, str]) -> list[str]:
    """`names` as lists of exclusions hold them: those of a fused module follow its own name (of some families vLLM does
    not know which modules it fused), and all experts of a block are their one module."""
    found = (n for name in names for n in (fused.get(name, name), *(() if is_expert(name) else (name,))))
    return list(dict.fromkeys(found))


def all_or_none(fused: str, shards: list[str], match: Callable[[str], bool]) -> bool:
    """Whether `match` takes every shard of a fused module. Raises FormatError when it takes some, as vLLM does."""
    hits = [match(s) for s in shards]
    if any(hits) and not all(hits):
        raise FormatError(f"the config names only a part of {fused}, which vLLM refuses: name all its shards")
    return all(hits)


def patterns(names: Iterable[str], fused: Mapping[str, str]) -> list[str]:
    """Regular expressions for re.match, anchored at both ends, that match `names` and their fused names alone (and all
    that is in a fused module of experts).

    Blocks that differ in nothing but their index share one expression, so that configs stay short.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(fused.get(name, name), []).append(name)
    buckets: dict[tuple[str, str], list[str]] = {}
    for whole, shards in groups.items():
        parent, _, last = whole.rpartition(".")
        lasts = dict.fromkeys([*(s.rpartition(".")[2] for s in shards), last])
        tail = "|".join(map(re.escape, lasts))
        tail = f"(?:{tail})" if len(lasts) > 1 else tail
        if shards[0].startswith(f"{whole}."):
            tail = rf"{re.escape(last)}(?:\..+)?"
        found = re.match(r"(.*?\.)(\d+)(\..*)?$", parent)
        if found is None:
            buckets.setdefault((f"{re.escape(parent)}\\." if parent else "", f"{tail}$"), [])
        else:
            middle = re.escape(found[3] or "")
            buckets.setdefault((re.escape(found[1]), f"{middle}\\.{tail}$"), []).append(found[2])
    return [head + (_any_of(indices) if indices else "") + tail for (head, tail), indices in buckets.items()]


def _any_of(indices: list[str]) -> str:
    return indices[0] if len(indices) == 1 else f"(?:{'|'.join(indices)})"


def required(config: Mapping[str, Any], key: str, *others: str) -> Any:
    """The value of the first of the keys that `config` has. Raises FormatError where it has none."""
    for k in (key, *others):
        if k in config:
            return config[k]
    raise FormatError(f"the quantization config lacks {key!r}")
