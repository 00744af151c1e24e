"""What each kind of hardware and each range of vLLM versions can do, as data with its evidence."""

from halfbyte.platforms.loader import facts_for, list_platforms, load_platform
from halfbyte.platforms.schema import (
    Capabilities,
    Evidence,
    FormatFacts,
    FormatSupport,
    Platform,
    Quirk,
    SpeedRow,
    SpeedTable,
    VllmFacts,
    version_tuple,
)

__all__ = [
    "Capabilities",
    "Evidence",
    "FormatFacts",
    "FormatSupport",
    "Platform",
    "Quirk",
    "SpeedRow",
    "SpeedTable",
    "VllmFacts",
    "facts_for",
    "list_platforms",
    "load_platform",
    "version_tuple",
]
