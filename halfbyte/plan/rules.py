"""What a rule of the plan says, with its source, and the numbers that rules go by (guide.yaml)."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

import yaml
from pydantic import Field

from halfbyte.platforms import Data, Evidence

GUIDE = "strategy, Decision Guide"
CONFIGURATION = "strategy, vLLM Configuration"
POLICY = "strategy, Layer/Module Policy"
GROUPS = "strategy, Group Size"
RISKS = "strategy, Risks & Mitigations"
HEADERS = "the model's headers and config"
EVERY_FORMAT = "vLLM facts, every format (source, 0.26.0 and 0.32.0)"
NVFP4_BLOCKS = "vLLM facts, NVFP4 (source, 0.26.0 and 0.32.0)"


@dataclass(frozen=True)
class Reason:
    """One sentence of a rule: its name, what it says here, and where that comes from."""

    rule: str
    text: str
    source: str

    def plain(self) -> dict[str, str]:
        """As plan.json holds it."""
        return asdict(self)


class SpeedGain(Data):
    low: float
    high: float
    source: str


class Near(Data):
    parameters: float
    concurrency: float
    source: str


class Tokens(Data):
    tokens: int
    source: str


class Share(Data):
    share: float
    source: str


class Size(Data):
    parameters: float
    source: str


class Calibration(Data):
    sequences: tuple[int, int]
    nvfp4_tokens: tuple[int, int]
    source: str


class Tier(Data):
    """What a perplexity budget asks of a recipe."""

    up_to: float | None = Field(description="a budget of at most this increase; None: any")
    groups: tuple[int, ...] = Field(description="group sizes of the int4 grids to try, largest first")
    boundary: str
    source: str


class Guide(Data):
    """guide.yaml."""

    speed_gain: SpeedGain
    near: Near
    long_context: Tokens
    over_exemption: Share
    small_model: Size
    calibration: Calibration
    quality: tuple[Tier, ...]

    def tier(self, budget: float | None) -> Tier:
        """The tier of a perplexity budget (0.05 is +5 %); None, where no budget is stated: the last."""
        if budget is None:
            return self.quality[-1]
        return next(tier for tier in self.quality if tier.up_to is None or budget <= tier.up_to)


@functools.cache
def guide() -> Guide:
    """The numbers that rules go by."""
    text = resources.files(__package__).joinpath("guide.yaml").read_text(encoding="utf-8")
    tree: dict[str, Any] = yaml.safe_load(text)
    return Guide.model_validate(tree)


def data_source(platform: str, evidence: Evidence) -> str:
    """A claim of a platform's data file, with its evidence."""
    return f"{platform} data ({evidence})"
