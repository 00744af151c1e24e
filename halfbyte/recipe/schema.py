"""The recipe: what to make of a model, whole and checked. CLI (`--set`) beats YAML beats defaults.

A recipe says nothing of files or machines, so that its resolved form can name a piece of work.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Method = Literal["rtn", "gptq", "awq", "nvfp4"]
Format = Literal["gptq", "awq", "modelopt", "compressed-tensors"]
GRID_OF_METHOD = {"rtn": "int4_sym", "gptq": "int4_sym", "awq": "int4_asym", "nvfp4": "nvfp4"}
FORMATS_OF_GRID = {
    "int4_sym": ("gptq", "compressed-tensors"),
    "int4_asym": ("awq", "compressed-tensors"),
    "nvfp4": ("modelopt", "compressed-tensors"),
}
GROUP_SIZES = {"int4_sym": (-1, 32, 64, 128), "int4_asym": (-1, 32, 64, 128), "nvfp4": (16, 32, 64, 128)}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Boundary(_Strict):
    """Protection of the first and last blocks."""

    blocks: int = Field(default=1, ge=0, description="how many blocks at each end are protected")
    keep: Literal["nothing", "projections", "blocks"] = Field(
        default="nothing",
        description="what stays in BF16 there: nothing, the projections (down_proj and o_proj), or the blocks whole",
    )


class CalibrationSpec(_Strict):
    """How much calibration text a method asks for."""

    sequences: int = Field(default=128, ge=1, description="sequences (the strategy: 128-512)")
    max_tokens: int = Field(default=512, ge=16, description="tokens of the longest sequence")
    seed: int = Field(default=0, description="seed of sampling and self-generation")


class Recipe(_Strict):
    """One 4-bit checkpoint: method, rounding, group size, format, exemptions."""

    method: Method = Field(
        default="gptq", description="rtn | gptq | awq | nvfp4: which grid, and how the weights are prepared"
    )
    rounding: Literal["rtn", "gptq"] | None = Field(
        default=None, description="how codes are chosen; follows the method unless said (awq and nvfp4 take both)"
    )
    scaling: Literal["none", "awq"] | None = Field(
        default=None,
        description="input scales folded into what precedes; unless said, awq with method awq or GPTQ rounding",
    )
    grid: Literal["int4_sym", "int4_asym", "nvfp4"] | None = Field(
        default=None, description="the values a weight may take; follows the method unless said"
    )
    group_size: int = Field(
        default=128, description="weights that share a scale: -1 (a row), 32, 64, 128; nvfp4: 16 (native), 32, 64, 128"
    )
    format: Format | None = Field(
        default=None, description="gptq | awq | modelopt | compressed-tensors; follows the grid unless said"
    )
    ignore: tuple[str, ...] = Field(
        default=("lm_head",), description="modules kept in BF16: full names, or re:patterns (re.fullmatch)"
    )
    boundary: Boundary = Field(default_factory=Boundary, description="protection of the first and last blocks")
    indivisible: Literal["error", "smaller", "keep"] = Field(
        default="error",
        description="where group_size does not divide in_features: an error, the next smaller size, or BF16",
    )
    activations: Literal["bf16", "fp4"] = Field(
        default="bf16",
        description="nvfp4 in the modelopt format: fp4 writes input_scale and declares NVFP4 (W4A4 kernels need it)",
    )
    calibration: CalibrationSpec = Field(default_factory=CalibrationSpec, description="how much calibration text")
    effort: Literal["fast", "default", "max"] = Field(
        default="default", description="fast: no Hessian, and few calibration tokens; max: ten times the default"
    )
    damp: float | None = Field(
        default=None, gt=0, le=1, description="GPTQ damping as a share of the mean Hessian diagonal"
    )
    act_order: bool = Field(
        default=True, description="GPTQ visits columns by falling importance (static groups: no g_idx)"
    )
    tune: Literal["none", "auto", "light", "full"] | None = Field(
        default=None,
        description="scales and norms trained against the BF16 logits, 16 small steps (light); the rounding learned "
        "block by block, then two passes over the calibration text (full); auto: light for a model of at most 10^9 "
        "weights with 32,768 calibration tokens or more; unless said, auto with GPTQ rounding, full with effort max",
    )
    propagate: bool = Field(
        default=False, description="collect statistics behind the quantized blocks instead of the BF16 ones"
    )
    description: str = Field(
        default="", description="one line for `halfbyte ls recipes`; not part of the work's identity"
    )

    @model_validator(mode="after")
    def _coherent(self) -> Recipe:
        def fill(name: str, value: object) -> None:
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

        fill("grid", GRID_OF_METHOD[self.method])
        fill("rounding", "rtn" if self.method == "rtn" or self.effort == "fast" else "gptq")
        fill("scaling", "awq" if self.method == "awq" or self.rounding == "gptq" else "none")
        assert self.grid is not None
        fill("format", FORMATS_OF_GRID[self.grid][0])
        fill("damp", 0.05)
        fill("tune", "none" if self.rounding != "gptq" else "full" if self.effort == "max" else "auto")
        if self.format not in FORMATS_OF_GRID[self.grid]:
            holds = " or ".join(FORMATS_OF_GRID[self.grid])
            raise ValueError(f"format {self.format} cannot hold the grid {self.grid}: use {holds}")
        if self.group_size not in GROUP_SIZES[self.grid]:
            sizes = ", ".join(map(str, GROUP_SIZES[self.grid]))
            raise ValueError(f"group_size {self.group_size} is none that vLLM accepts for {self.grid}: use {sizes}")
        if self.activations == "fp4" and self.grid != "nvfp4":
            raise ValueError("activations: fp4 goes with method nvfp4 alone")
        return self

    def identity(self) -> dict:
        """The resolved recipe without its description: what names the work."""
        return self.model_dump(mode="json", exclude={"description"})

    @property
    def needs_calibration(self) -> bool:
        """Whether the recipe cannot be carried out without calibration data."""
        return self.needs_gram or self.activations == "fp4" or self.tune != "none"

    @property
    def statistics(self) -> Literal["sample", "all", "weighted"]:
        """What is collected of calibration inputs: of a sample of the sequences, where effort is fast and the recipe
        can do without; of all; with every token's own weight. Recipes that differ here share no pass."""
        if self.effort == "max":
            return "weighted"
        return "sample" if self.effort == "fast" and not self.needs_calibration else "all"

    @property
    def needs_gram(self) -> bool:
        """Whether the inputs' Gram matrices are needed, not their diagonals alone."""
        return self.rounding == "gptq" or self.scaling == "awq"
