"""What each kind of hardware and each range of vLLM versions can do, as data with its evidence."""

from halfbyte.platforms.base import Data, Evidence, version_tuple, within
from halfbyte.platforms.evidence import load_evidence
from halfbyte.platforms.loader import facts_for, list_platforms, load_platform
from halfbyte.platforms.schema import (
    Avoid,
    Capabilities,
    Efficiency,
    ExpertSupport,
    FormatFacts,
    FormatSupport,
    Kernel,
    Knob,
    Pins,
    Platform,
    Quirk,
    Roofline,
    VllmFacts,
    versions,
)
from halfbyte.platforms.speed import MeasuredModel, Prefill, SpeedRow, SpeedTable

__all__ = [
    "Avoid",
    "Capabilities",
    "Data",
    "Efficiency",
    "Evidence",
    "ExpertSupport",
    "FormatFacts",
    "FormatSupport",
    "Kernel",
    "Knob",
    "MeasuredModel",
    "Pins",
    "Platform",
    "Prefill",
    "Quirk",
    "Roofline",
    "SpeedRow",
    "SpeedTable",
    "VllmFacts",
    "facts_for",
    "list_platforms",
    "load_evidence",
    "load_platform",
    "version_tuple",
    "versions",
    "within",
]
