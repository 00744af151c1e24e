"""The shape of a speed evidence file: kernels measured side by side in one run, on one device, one vLLM, one model."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from halfbyte.platforms.base import KV_FLAG, Data, Evidence, Flags, version_tuple, within

LEAST_NOISE = 0.03
"""Tables are medians of a few repeats: speeds closer than this are equal, whatever a file says."""


class MeasuredModel(Data):
    """The model that was measured: its name, and the sizes that say whether another one is near it."""

    name: str
    parameters: int = Field(gt=0, description="of the whole model; what decides whether another model is near")
    hidden_size: int | None = None
    intermediate_size: int | None = None
    blocks: int | None = None
    vocab_size: int | None = None

    @property
    def shape(self) -> str:
        """The name, up to its first comma."""
        return self.name.split(",")[0]


class Prefill(Data):
    """A workload of prompts alone."""

    prompts: int = Field(gt=0)
    tokens: int = Field(gt=0, description="of each prompt")


class SpeedRow(Data):
    """One kernel's measured seconds. format "bf16" without flags is a baseline."""

    kernel: str
    method: str = Field("", description="how the weights were made, where that is known: gptq, awq, nvfp4")
    format: str
    variants: tuple[str, ...] = Field((), description="the declarations it was measured with or stands for; empty: any")
    group_size: int | None = None
    flags: Flags = Field(default_factory=dict, description="what makes vLLM take this kernel; empty: it does by itself")
    kv_cache: str = Field("auto", description="the --kv-cache-dtype that it was measured with (or one of the flags)")
    weights_gib: float = Field(gt=0)
    seconds: dict[int, float] = Field(description="concurrency -> seconds for the whole batch")
    prefill: float | None = Field(None, gt=0, description="seconds for the table's prefill workload")
    note: str = ""

    @model_validator(mode="before")
    @classmethod
    def _cache_apart(cls, row: Any) -> Any:
        """The KV cache is no way to a kernel: which one is served is a question of accuracy and room."""
        if not isinstance(row, dict) or not isinstance(flags := row.get("flags"), dict) or KV_FLAG not in flags:
            return row
        kept = {flag: value for flag, value in flags.items() if flag != KV_FLAG}
        return {**row, "flags": kept, "kv_cache": flags[KV_FLAG]}

    @property
    def all_flags(self) -> Flags:
        """What it was measured with, the KV cache too."""
        return self.flags if self.kv_cache == "auto" else {**self.flags, KV_FLAG: self.kv_cache}

    @model_validator(mode="after")
    def _positive(self) -> SpeedRow:
        if not self.seconds or min(self.seconds) < 1 or not all(0 < s < math.inf for s in self.seconds.values()):
            raise ValueError(f"{self.kernel}: seconds wants concurrency -> seconds, all above 0")
        return self


class SpeedTable(Data):
    """An evidence file. `concurrency` sequences of `prompt_tokens` in and `output_tokens` out start at once."""

    schema_: Literal[1] = Field(alias="schema")
    kind: Literal["speed"]
    measured: Literal[True] = Field(description="only what was run is evidence")
    device: str = Field(description="a platform's name, as in `halfbyte ls platforms`")
    hardware: str = Field("", description="the device as its driver calls it")
    vllm: str = Field(description="the version it was measured on")
    since: str = Field("", description="first version in which these kernels are chosen so; empty: that minor version")
    before: str = Field("", description="first version in which that is no longer so; empty: the next minor version")
    date: datetime.date
    model: MeasuredModel
    dtype: str = "bfloat16"
    tensor_parallel: int = Field(1, ge=1)
    prompt_tokens: int = Field(gt=0)
    output_tokens: int = Field(gt=0)
    prefill: Prefill | None = None
    note: str = ""
    apart: dict[int, float] = Field(
        default_factory=dict,
        description="concurrency -> noise (0.1: 10 %): how far repeats of one kernel lay apart or, where that is more, "
        "how far the interval of its median reaches",
    )
    rows: tuple[SpeedRow, ...]
    lent: bool = Field(False, description="set where another platform is `ranked_by` this one's")

    @model_validator(mode="after")
    def _comparable(self) -> SpeedTable:
        major, minor, _ = version_tuple(self.vllm)
        object.__setattr__(self, "since", self.since or f"{major}.{minor}")
        object.__setattr__(self, "before", self.before or f"{major}.{minor + 1}")
        if not within(self.since, self.vllm, self.before):
            raise ValueError(f"vllm {self.vllm} lies outside since {self.since}, before {self.before}")
        caches = [row.kv_cache for row in self._baselines]
        if not caches or len(caches) > len(set(caches)):
            raise ValueError("rows wants the format bf16 without flags, once for a KV cache: the baseline")
        if any(not 0 <= share < math.inf for share in self.apart.values()):
            raise ValueError("apart wants concurrency -> a share, 0 and more")
        odd = [row.kernel for row in self.rows if set(row.seconds) != set(self.baseline.seconds)]
        if odd:
            raise ValueError(f"{odd[0]} was not measured at the concurrencies of the baseline")
        return self

    @property
    def evidence(self) -> Evidence:
        """The claim in one line, as other data states it."""
        work = f"{self.prompt_tokens} tokens in and {self.output_tokens} out"
        if self.tensor_parallel > 1:
            work += f", tensor parallel {self.tensor_parallel}"
        if self.prefill:
            work += f"; prefill is {self.prefill.prompts} prompts of {self.prefill.tokens}"
        if self.baseline.kv_cache != "auto":
            work += f"; BF16 with an {self.baseline.kv_cache.upper()} KV cache too"
        shape = f"{self.model.name}, {work}"
        return Evidence(
            kind="measured",
            vllm=self.vllm,
            date=self.date,
            shape=shape,
            note=self.note,
            device=self.device if self.lent else "",
        )

    @property
    def _baselines(self) -> list[SpeedRow]:
        return [row for row in self.rows if row.format == "bf16" and not row.flags]

    @property
    def baseline(self) -> SpeedRow:
        """BF16 with the KV cache that vLLM has by itself, where that was measured."""
        return min(self._baselines, key=lambda row: row.kv_cache != "auto")

    def covers(self, vllm: str) -> bool:
        """Whether the kernel choices measured here hold for that version."""
        return within(self.since, vllm, self.before)

    def nearest(self, concurrency: int) -> int:
        """The measured concurrency closest to the one asked for (as a ratio)."""
        return self.by_nearness(concurrency)[0]

    def rows_for(
        self, format_name: str, variant: str | None = None, kv_cache: str | None = None
    ) -> tuple[SpeedRow, ...]:
        """The kernels that may serve a format (and its declared variant).

        kv_cache   the KV cache that will be served with ("fp8"): of each kernel the row that was measured with it;
                   where none was, the one with the KV cache that vLLM has by itself
        """
        rows = tuple(
            row
            for row in self.rows
            if row.format == format_name and (variant is None or not row.variants or variant in row.variants)
        )
        if kv_cache is None:
            return rows
        kept: dict[Any, SpeedRow] = {}
        for row in sorted(rows, key=lambda row: (row.kv_cache != kv_cache, row.kv_cache != "auto")):
            kept.setdefault((frozenset(row.flags.items()), row.method, row.group_size, row.variants), row)
        return tuple(row for row in rows if row in kept.values())

    def noise(self, concurrency: int) -> float:
        """By how much two speeds must differ at the nearest measured concurrency (0.1: 10 %)."""
        return max(LEAST_NOISE, self.apart.get(self.nearest(concurrency), 0.0))

    def differ(self, row: SpeedRow, other: SpeedRow, at: int) -> bool:
        """Whether two kernels lie further apart at a measured concurrency than noise."""
        slow, fast = sorted((row.seconds[at], other.seconds[at]), reverse=True)
        return slow > fast * (1 + self.noise(at))

    def telling(self, row: SpeedRow, other: SpeedRow, concurrency: int) -> int | None:
        """The measured concurrency, nearest first, at which two kernels differ; None where they do at none."""
        return next((at for at in self.by_nearness(concurrency) if self.differ(row, other, at)), None)

    def measured_near(self, concurrencies: Iterable[int]) -> list[int]:
        """The measured concurrencies nearest to these, each once."""
        return list(dict.fromkeys(map(self.nearest, concurrencies)))

    def by_nearness(self, concurrency: int) -> list[int]:
        """The measured concurrencies, the closest one (as a ratio) first."""
        return sorted(self.baseline.seconds, key=lambda c: abs(math.log(c / max(concurrency, 1))))

    def fastest(self, rows: Sequence[SpeedRow], concurrency: int) -> SpeedRow:
        """The kernel that measured fastest at the nearest concurrency. Of those that noise does not tell apart, the
        fastest at the next concurrency that does."""
        left = list(rows)
        for at in self.by_nearness(concurrency):
            first = min(left, key=lambda row: row.seconds[at])
            left = [row for row in left if row is first or not self.differ(row, first, at)]
        return min(left, key=lambda row: row.seconds[self.nearest(concurrency)])

    def speedup(self, row: SpeedRow, concurrency: int) -> float:
        """How many times faster than BF16 at the nearest measured concurrency (below 1: slower)."""
        at = self.nearest(concurrency)
        return self.baseline.seconds[at] / row.seconds[at]
