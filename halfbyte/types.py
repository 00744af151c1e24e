"""The vocabulary that every room shares: what a quantized linear is, which linears belong together, how work reports.

Shape suffixes used across the project: O = out_features, I = in_features, G = groups along I, T = tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

GRIDS = ("int4_sym", "int4_asym", "nvfp4")
NVFP4_BLOCK = 16
"""Weights per block scale in the NVFP4 format (every vLLM kernel hard-codes it)."""


@dataclass(frozen=True)
class QuantizedLinear:
    """One linear's 4-bit weight, between a method that chose it and a format that stores it.

    codes         uint8 [O, I], each 0..15. int4_sym: value = (code - 8) * scale. int4_asym: (code - zero) * scale.
                  nvfp4: E2M1, bit 3 the sign, bits 0-2 the index into (0, .5, 1, 1.5, 2, 3, 4, 6).
    scales        float32 [O, G], G = I / group_size; exactly representable where they are stored
                  (int4: in float16 and bfloat16 both; nvfp4: in float8_e4m3, a multiplier beside global_scale).
    group_size    columns that share a scale (I itself for one group per row). Groups are contiguous columns.
    grid          one of GRIDS.
    zeros         uint8 [O, G], int4_asym only.
    global_scale  float, nvfp4 only: value = e2m1(code) * scale * global_scale.
    input_scale   float, nvfp4 with quantized activations only: amax of the input / (6 * 448).
    """

    codes: torch.Tensor
    scales: torch.Tensor
    group_size: int
    grid: str
    zeros: torch.Tensor | None = None
    global_scale: float | None = None
    input_scale: float | None = None

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    def __post_init__(self) -> None:
        if self.grid not in GRIDS:
            raise ValueError(f"grid {self.grid!r} is not one of {GRIDS}")
        groups = self.in_features // self.group_size
        if groups * self.group_size != self.in_features or self.scales.shape != (self.out_features, groups):
            raise ValueError(
                f"scales {tuple(self.scales.shape)} do not fit codes {tuple(self.codes.shape)} "
                f"in groups of {self.group_size}"
            )
        if (self.zeros is not None) != (self.grid == "int4_asym"):
            raise ValueError(f"zeros belong to int4_asym alone, not to {self.grid}")
        if (self.global_scale is not None) != (self.grid == "nvfp4"):
            raise ValueError(f"a global scale belongs to nvfp4 alone, not to {self.grid}")


@dataclass(frozen=True)
class LinearGroup:
    """Linears of one decoder block that read the same input; vLLM fuses them into one, so they share a fate.

    kind    "qkv" | "o" | "gate_up" | "down"
    names   module names relative to the block, e.g. ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    fused   the name that vLLM gives the fused module, relative to the block, e.g. "self_attn.qkv_proj"; all experts of
            a block are one module there, so their groups have the same, and share a fate
    owner   the MLP that it belongs to where a block has several ("experts.3", "shared_expert"), else ""
    expert  its number, for one of the experts that a router chooses from
    """

    kind: str
    names: tuple[str, ...]
    fused: str
    owner: str = ""
    expert: int | None = None

    @property
    def key(self) -> str:
        """Names the group within its block: "qkv", "experts.3.down"."""
        return f"{self.owner}.{self.kind}" if self.owner else self.kind


@dataclass(frozen=True)
class Scheme:
    """How one linear is stored, as formats and rules see it. `group_size` is in columns (never -1)."""

    grid: str
    group_size: int


class Progress(Protocol):
    """Where long work reports. The command line draws it; rooms never print."""

    def start(self, label: str, total: int) -> None:
        """A stage of `total` equal steps begins (it ends the stage before it)."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """So many steps are done; `note` is a few words about the last."""

    def say(self, message: str) -> None:
        """A notice that the user should read (a fallback, a warning)."""


@dataclass
class Quiet:
    """A Progress that draws nothing and keeps its notices."""

    notices: list[str] = field(default_factory=list)

    def start(self, label: str, total: int) -> None:
        pass

    def advance(self, steps: int = 1, note: str = "") -> None:
        pass

    def say(self, message: str) -> None:
        self.notices.append(message)
