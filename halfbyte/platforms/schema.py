"""The shape of the platform and vLLM data files. Every claim carries its evidence: measured, or read in a source."""

from __future__ import annotations

import datetime
import math
import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Flags = dict[str, str | None]
"""Command-line flags of `vllm serve`: name with its dashes -> value, or None for a switch."""


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Evidence(_Data):
    """Where a claim comes from."""

    kind: Literal["measured", "source"] = Field(
        description="measured: it was run; source: read in vLLM's source or a data sheet"
    )
    vllm: str = Field("", description="the version it was seen in")
    date: datetime.date = Field(description="the day it was recorded here")
    shape: str = Field("", description="model shape and workload, where measured")
    note: str = ""

    def __str__(self) -> str:
        return f"{self.kind}{', vLLM ' + self.vllm if self.vllm else ''}, {self.date}"


class Capabilities(_Data):
    """What code may ask before it branches."""

    accelerator: bool = Field(description="a GPU, as opposed to the host's own processor")
    fp4_gemm: bool = Field(description="the chip multiplies in FP4; without it 4-bit weights are expanded to 16 bits")
    fp8_gemm: bool
    fp8_kv: bool = Field(description="an FP8 key/value cache is a sound default")
    graphs: bool = Field(description="graph capture pays; without it serve eagerly")
    reports_weight_memory: bool = Field(description="vLLM's log says how much memory the weights take")


class FormatSupport(_Data):
    """Whether and how vLLM serves one checkpoint format here."""

    loads: bool
    advised: bool = Field(True, description="False: it loads, but something else is better; `reason` says why")
    reason: str = ""
    kernels: tuple[str, ...] = Field((), description="in the order in which vLLM tries them")
    in_multiple: int = Field(1, description="in_features (per tensor-parallel rank) must be a multiple of this")
    out_multiple: int = Field(1, description="out_features (per rank) must be a multiple of this")
    flags: Flags = Field(default_factory=dict, description="over the platform's own flags")
    env: dict[str, str] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    evidence: Evidence

    @model_validator(mode="after")
    def _reasoned(self) -> FormatSupport:
        if not (self.loads and self.advised) and not self.reason:
            raise ValueError("a format that does not load or is not advised needs its reason")
        return self


class SpeedRow(_Data):
    """One kernel's measured seconds. format "bf16" is the baseline."""

    kernel: str
    format: str
    variants: tuple[str, ...] = Field((), description="the declarations it was measured with or stands for; empty: any")
    flags: Flags = Field(default_factory=dict, description="what makes vLLM take this kernel; empty: it does by itself")
    weights_gib: float
    seconds: dict[int, float] = Field(description="concurrency -> seconds for the whole batch")
    prefill: float | None = Field(None, description="seconds for the table's prefill workload")
    note: str = ""


class SpeedTable(_Data):
    """Kernels measured side by side in one run."""

    evidence: Evidence
    since: str = Field(description="first vLLM version in which these kernels are chosen so")
    before: str = Field(description="first version in which that is no longer so")
    rows: tuple[SpeedRow, ...]

    def covers(self, vllm: str) -> bool:
        """Whether the kernel choices measured here hold for that version."""
        return within(self.since, vllm, self.before)

    def nearest(self, concurrency: int) -> int:
        """The measured concurrency closest to the one asked for (as a ratio)."""
        return min(self.baseline.seconds, key=lambda c: abs(math.log(c / max(concurrency, 1))))

    @property
    def baseline(self) -> SpeedRow:
        return next(row for row in self.rows if row.format == "bf16")

    def rows_for(self, format_name: str, variant: str | None = None) -> tuple[SpeedRow, ...]:
        """The kernels that may serve a format (and its declared variant)."""
        return tuple(
            row
            for row in self.rows
            if row.format == format_name and (variant is None or not row.variants or variant in row.variants)
        )

    def speedup(self, row: SpeedRow, concurrency: int) -> float:
        """How many times faster than BF16 at the nearest measured concurrency (below 1: slower)."""
        at = self.nearest(concurrency)
        return self.baseline.seconds[at] / row.seconds[at]


class Platform(_Data):
    """One kind of hardware. `vllm` is the version that its evidence was taken on, assumed where none is known."""

    name: str
    label: str
    vllm: str
    memory_gib: float | None = Field(description="device memory of one unit; None: ask the machine")
    bandwidth_gbs: float | None = Field(description="memory bandwidth, GB/s; None: differs from machine to machine")
    bf16_tflops: float | None = Field(description="dense BF16 peak, TFLOP/s")
    hardware: Evidence
    capabilities: Capabilities
    flags: Flags
    env: dict[str, str] = Field(default_factory=dict)
    context: int | None = Field(None, description="--max-model-len where the user names none; None: the model's own")
    concurrency: int | None = Field(None, description="--max-num-seqs where the user names none; None: vLLM's own")
    kv_space_env: str = Field("", description="environment variable that sizes the KV cache in GiB, where there is one")
    notes: tuple[str, ...] = ()
    formats: dict[str, FormatSupport] = Field(
        description='by "format" or "format/variant"; "bf16" is the unquantized model'
    )
    speed: tuple[SpeedTable, ...] = ()

    def support(self, format_name: str | None, variant: str | None = None) -> FormatSupport:
        """How this platform serves a format; None is BF16. Without a variant: the default one.

        Raises KeyError for a format the data does not know.
        """
        name = format_name or "bf16"
        variant = variant or self.default_variant(name)
        key = f"{name}/{variant}"
        return self.formats[key] if key in self.formats else self.formats[name]

    def default_variant(self, format_name: str | None) -> str | None:
        """The variant of a format that the file lists first, None where a format has none."""
        prefix = f"{format_name or 'bf16'}/"
        return next((key.removeprefix(prefix) for key in self.formats if key.startswith(prefix)), None)


class FormatFacts(_Data):
    """What vLLM's loader of one format accepts, whatever the hardware."""

    methods: tuple[str, ...] = Field(description="names that --quantization knows for it")
    group_sizes: tuple[int, ...]
    activations: tuple[str, ...] = Field(description="dtypes it computes in")
    variants: tuple[str, ...] = ()
    needs: tuple[str, ...] = Field((), description="what the file must be, in words")


class Quirk(_Data):
    """Something that surprises, and what to do."""

    id: str
    since: str = "0.0.0"
    before: str = "999.0.0"
    formats: tuple[str, ...] = Field((), description="empty: every format")
    text: str
    do: str = ""
    evidence: Literal["measured", "source"]


class VllmFacts(_Data):
    """Facts of a range of vLLM versions: since <= version < before."""

    since: str
    before: str
    torch: str
    seen: dict[str, str] = Field(description="version -> how it was seen")
    dtypes: tuple[str, ...]
    kv_cache_dtypes: tuple[str, ...] = Field(description="known ones; not necessarily all")
    misnomers: dict[str, str] = Field(
        description='spellings that users write and vLLM refuses, as "--flag value" -> value'
    )
    weights_track: bool = Field(description='--model-loader-extra-config knows "enable_weights_track"')
    formats: dict[str, FormatFacts]
    kernel_group_sizes: dict[str, tuple[int, ...]]
    quirks: tuple[Quirk, ...] = Field((), description="those of the version that was asked for")
    notice: str = Field("", description="set by facts_for when the version asked for lies outside every known range")


def within(since: str, version: str, before: str) -> bool:
    """since <= version < before."""
    return version_tuple(since) <= version_tuple(version) < version_tuple(before)


def version_tuple(version: str) -> tuple[int, int, int]:
    """(major, minor, patch) of "0.32.0+cpu" or "0.26"; pre-release and build marks are left out.

    Raises ValueError where no version can be read.
    """
    match = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", version)
    if not match:
        raise ValueError(f"{version!r} is no version")
    return int(match[1]), int(match[2]), int(match[3] or 0)
