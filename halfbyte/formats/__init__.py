"""Formats: how a quantized linear lies in a checkpoint that vLLM reads, and the config that says so."""

from __future__ import annotations

import re
from collections.abc import Iterable

from halfbyte.formats.awq import AWQ
from halfbyte.formats.base import Format, columns, fused_groups, scale_groups
from halfbyte.formats.bits import FormatError
from halfbyte.formats.compressed import CompressedTensors
from halfbyte.formats.gptq import GPTQ
from halfbyte.formats.modelopt import ALGORITHMS, ModelOpt, declared
from halfbyte.types import Scheme

__all__ = [
    "Format",
    "FormatError",
    "columns",
    "detect_format",
    "fused_groups",
    "get_format",
    "read_config",
    "scale_groups",
]

_FORMATS: dict[str, type[Format]] = {f.name: f for f in (GPTQ, AWQ, ModelOpt, CompressedTensors)}


def get_format(name: str, activations: str = "bf16") -> Format:
    """The format by its recipe name: gptq | awq | modelopt | compressed-tensors.

    activations   "fp4" (modelopt alone): declare NVFP4 and store an input_scale with every linear; else "bf16".
    """
    if name not in _FORMATS:
        raise FormatError(f"no format {name!r}: use {', '.join(_FORMATS)}")
    if activations not in ALGORITHMS or (activations != "bf16" and name != "modelopt"):
        raise FormatError(f"the format {name} does not hold {activations} activations: use modelopt, or bf16")
    return ModelOpt(activations) if name == "modelopt" else _FORMATS[name]()


def detect_format(quantization_config: dict) -> Format:
    """The format that a `quantization_config` declares. Raises FormatError for one that is not known."""
    method = str(quantization_config.get("quant_method", ""))
    if method.startswith("modelopt"):
        by_algorithm = {algorithm: activations for activations, algorithm in ALGORITHMS.items()}
        return ModelOpt(by_algorithm[declared(quantization_config)])
    if method not in _FORMATS:
        raise FormatError(f"quant_method {method!r} is not read here: {', '.join(_FORMATS)}")
    return _FORMATS[method]()


def read_config(stated: object, names: Iterable[str]) -> tuple[Format, dict[str, Scheme | None]]:
    """The format that a file's `quantization_config` declares, and every linear's scheme by it (see Format.parse).

    Raises FormatError for whatever a damaged or hostile config may hold.
    """
    try:
        if not isinstance(stated, dict):
            raise FormatError("there is no quantization_config: vLLM would take the weights for BF16")
        kept_as = detect_format(stated)
        return kept_as, kept_as.parse(stated, names)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError, re.error) as error:
        raise FormatError(f"quantization_config cannot be read: {type(error).__name__} {error}") from error
