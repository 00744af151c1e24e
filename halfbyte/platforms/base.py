"""What every data file of this room is made of: strict models, evidence, versions."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Flags = dict[str, str | None]
KV_FLAG = "--kv-cache-dtype"
"""Command-line flags of `vllm serve`: name with its dashes -> value, or None for a switch."""


class Data(BaseModel):
    """A piece of data that is complete as it is read: no unknown keys, no later change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Evidence(Data):
    """Where a claim comes from."""

    kind: Literal["measured", "source", "assumed"] = Field(
        description="measured: it was run; source: read in vLLM's source or a data sheet; assumed: neither"
    )
    vllm: str = Field("", description="the version it was seen in")
    date: datetime.date = Field(description="the day it was recorded here")
    shape: str = Field("", description="model shape and workload, where measured")
    note: str = ""
    device: str = Field("", description="the platform that it was measured on, where that is another")

    def __str__(self) -> str:
        where = f" on {self.device}" if self.device else ""
        return f"{self.kind}{where}{', vLLM ' + self.vllm if self.vllm else ''}, {self.date}"


def measured_on(tree: Any, name: str) -> Any:
    """A platform's data with that name in everything that was measured there: for another one that takes it over."""
    if isinstance(tree, Mapping):
        known = {"device": tree.get("device") or name} if tree.get("kind") == "measured" and "date" in tree else {}
        return {**{key: measured_on(value, name) for key, value in tree.items()}, **known}
    return [measured_on(value, name) for value in tree] if isinstance(tree, list) else tree


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


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Both mappings' keys, `over`'s values where both have one; mappings within are merged alike."""
    whole = dict(under)
    for key, value in over.items():
        below = whole.get(key)
        whole[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return whole
