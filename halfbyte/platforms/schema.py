"""The shape of the platform and vLLM data files. Every claim carries its evidence: measured, or read in a source."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from halfbyte.platforms.base import Data, Evidence, Flags, version_tuple, within
from halfbyte.platforms.speed import SpeedTable

EVER = "999.0.0"
"""A version that no release reaches: the end of what holds until further notice."""


class Capabilities(Data):
    """What code may ask before it branches."""

    accelerator: bool = Field(description="a GPU, as opposed to the host's own processor")
    fp4_gemm: bool = Field(description="the chip multiplies in FP4; without it 4-bit weights are expanded to 16 bits")
    fp8_gemm: bool
    fp8_kv: bool = Field(description="an FP8 key/value cache is a sound default")
    graphs: bool = Field(description="graph capture pays; without it serve eagerly")
    reports_weight_memory: bool = Field(description="vLLM's log says how much memory the weights take")


class Kernel(Data):
    """One kernel that vLLM may take for a linear, and what it asks of it."""

    name: str
    since: str = "0.0.0"
    before: str = EVER
    group_sizes: tuple[int, ...] = Field((), description="group sizes it takes (-1: one group a row); empty: any")
    in_multiple: int = Field(1, ge=1, description="in_features (per tensor-parallel rank) must be a multiple of this")
    out_multiple: int = Field(1, ge=1, description="out_features (fused, per rank) must be a multiple of this")
    dtypes: tuple[str, ...] = Field((), description="activations it computes in; empty: any")

    def refuses(self, in_features: int, out_features: int, group_size: int, dtype: str) -> str:
        """Why a linear (per rank, group_size -1 for one group a row) is not for it; empty where it takes it."""
        if self.group_sizes and group_size not in self.group_sizes:
            return f"groups of {group_size}, and it takes {', '.join(map(str, self.group_sizes))}"
        if in_features % self.in_multiple:
            return f"{in_features} inputs are no multiple of {self.in_multiple}"
        if out_features % self.out_multiple:
            return f"{out_features} outputs are no multiple of {self.out_multiple}"
        if self.dtypes and dtype not in self.dtypes:
            return f"{dtype}, and it computes in {', '.join(self.dtypes)}"
        return ""


class Avoid(Data):
    """A way of serving a format that works badly or not at all, and what to do instead."""

    what: str
    why: str
    do: str
    since: str = "0.0.0"
    before: str = EVER
    evidence: Evidence


class ExpertSupport(Data):
    """Whether and how vLLM runs the experts of a mixture from one checkpoint format here: they have kernels of their
    own."""

    loads: bool
    reason: str = ""
    kernels: tuple[str, ...] = Field((), description="in the order in which vLLM tries them")
    notes: tuple[str, ...] = ()
    evidence: Evidence

    @model_validator(mode="after")
    def _reasoned(self) -> ExpertSupport:
        if not self.loads and not self.reason:
            raise ValueError("experts that do not load need their reason")
        return self


class FormatSupport(Data):
    """Whether and how vLLM serves one checkpoint format here."""

    loads: bool
    advised: bool = Field(True, description="False: it loads, but something else is better; `reason` says why")
    reason: str = ""
    kernels: tuple[Kernel, ...] = Field((), description="in the order in which vLLM tries them; a name alone will do")
    in_multiple: int = Field(1, description="in_features (per tensor-parallel rank) must be a multiple of this")
    out_multiple: int = Field(1, description="out_features (per rank) must be a multiple of this")
    flags: Flags = Field(default_factory=dict, description="over the platform's own flags")
    env: dict[str, str] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    avoid: tuple[Avoid, ...] = ()
    experts: ExpertSupport | None = Field(None, description="of a mixture of experts; None: not looked at")
    evidence: Evidence

    def kernels_in(self, vllm: str) -> tuple[Kernel, ...]:
        """The kernels of a vLLM version, in the order in which it tries them."""
        return tuple(kernel for kernel in self.kernels if within(kernel.since, vllm, kernel.before))

    @field_validator("kernels", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return value
        return [{"name": item} if isinstance(item, str) else item for item in value]

    @model_validator(mode="after")
    def _reasoned(self) -> FormatSupport:
        if not (self.loads and self.advised) and not self.reason:
            raise ValueError("a format that does not load or is not advised needs its reason")
        return self


class Efficiency(Data):
    """The shares of the data sheet's peaks that a kernel reaches."""

    memory: float = Field(gt=0, le=1, description="of the memory bandwidth, while it reads weights")
    compute: float = Field(gt=0, le=1, description="of the dense BF16 peak")


class Roofline(Data):
    """The constants of the roofline model (halfbyte/plan/roofline.py) on this hardware."""

    overhead_us: float = Field(ge=0, description="microseconds a block and step that no weight or key explains")
    token_us: float = Field(0, ge=0, description="microseconds of the host for each token that is written")
    bf16: Efficiency
    four_bit: Efficiency = Field(description="a 4-bit kernel that `kernels` does not name")
    kernels: dict[str, dict[str, Efficiency]] = Field(default_factory=dict, description="by format and kernel")
    evidence: Evidence

    def efficiency(self, format_name: str, kernel: str) -> Efficiency:
        """What a kernel reaches with that format ("bf16": the baseline); its name may end with a KV cache."""
        if format_name == "bf16":
            return self.bf16
        return self.kernels.get(format_name, {}).get(kernel.partition(",")[0], self.four_bit)


class Pins(Data):
    """Versions that are known to go together here."""

    since: str = Field(description="oldest vLLM that the data of this platform speaks of")
    before: str = Field(description="first vLLM that it no longer speaks of")
    runtime: str = Field("", description="CUDA, ROCm or what stands in their place")
    note: str = ""
    evidence: Evidence


class Knob(Data):
    """A flag of `vllm serve` whose best value depends on model, load and machine: what `halfbyte tune` tries."""

    flag: str
    values: tuple[str, ...] = Field(min_length=1, description="beside what vLLM does without the flag")
    formats: tuple[str, ...] = Field(
        (), description='what it matters for, by "format" or "format/variant"; empty: any format'
    )
    since: str = "0.0.0"
    before: str = EVER
    least: int = Field(1, ge=1, description="sequences at once from which it is tried")
    changes: str = Field("", description="what it changes beside speed; then the value is not kept by itself")
    note: str = ""
    evidence: Evidence

    def matters(
        self, format_name: str | None, vllm: str, variant: str | None = None, concurrency: int | None = None
    ) -> bool:
        """Whether to try it for a format with that vLLM. Without a variant: for any that the format may declare;
        without a concurrency: at any."""
        if not within(self.since, vllm, self.before) or (concurrency is not None and concurrency < self.least):
            return False
        pairs = [name.partition("/") for name in self.formats]
        return not pairs or any(f == format_name and v in ("", variant or v) for f, _, v in pairs)


class Platform(Data):
    """One kind of hardware. `vllm` is the version that its evidence was taken on, assumed where none is known."""

    name: str
    label: str
    vllm: str
    memory_gib: float | None = Field(gt=0, description="device memory of one unit; None: ask the machine")
    bandwidth_gbs: float | None = Field(gt=0, description="memory bandwidth, GB/s; None: differs by machine")
    bf16_tflops: float | None = Field(gt=0, description="dense BF16 peak, TFLOP/s")
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
    roofline: Roofline | None = Field(None, description="None: no roofline figure is given here")
    overhead_gib: float = Field(
        0, ge=0, description="device memory beside weights, KV cache and activations (context, graphs): an estimate"
    )
    pins: Pins | None = None
    device: str = Field("", description="words in the name that the driver gives its GPU; empty: none are known")
    maker: str = Field("", description="the word before them: a GPU of the same maker runs what is made for this one")
    tune: tuple[Knob, ...] = Field((), description="in the order in which `halfbyte tune` tries them")
    ranked_by: str = Field(
        "", description="another platform whose measured speeds rank the kernels here too; its figures are not told"
    )
    speed: tuple[SpeedTable, ...] = Field((), description="filled from evidence files, newest first")

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


class FormatFacts(Data):
    """What vLLM's loader of one format accepts, whatever the hardware."""

    methods: tuple[str, ...] = Field(description="names that --quantization knows for it")
    group_sizes: tuple[int, ...]
    activations: tuple[str, ...] = Field(description="dtypes it computes in")
    variants: tuple[str, ...] = ()
    needs: tuple[str, ...] = Field((), description="what the file must be, in words")


class Quirk(Data):
    """Something that surprises, and what to do."""

    id: str
    since: str = "0.0.0"
    before: str = EVER
    formats: tuple[str, ...] = Field((), description="empty: every format")
    text: str
    do: str = ""
    evidence: Literal["measured", "source"]

    @property
    def source(self) -> str:
        """The fact, its range and how it is known, in a few words."""
        return f"vLLM fact {self.id}, {versions(self.since, self.before)} ({self.evidence})"


class VllmFacts(Data):
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
    gpu_memory_utilization: float = Field(description="share of a device's memory that vLLM takes by default")
    step_tokens: int = Field(description="--max-num-batched-tokens by default, of a server on a large GPU")
    weights_track: bool = Field(description='--model-loader-extra-config knows "enable_weights_track"')
    formats: dict[str, FormatFacts]
    kernel_group_sizes: dict[str, tuple[int, ...]]
    quirks: tuple[Quirk, ...] = Field((), description="those of the version that was asked for")
    notice: str = Field("", description="set by facts_for when the version asked for lies outside every known range")


def versions(since: str, before: str) -> str:
    """A range of versions in words: `vLLM before 0.32.0`, `vLLM 0.26 and later`."""
    first = "" if version_tuple(since) == (0, 0, 0) else since
    last = "" if before == EVER else before
    if first and last:
        return f"vLLM {first} to before {last}"
    return f"vLLM before {last}" if last else f"vLLM {first} and later" if first else "every vLLM seen"
