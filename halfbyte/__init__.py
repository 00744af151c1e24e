"""halfbyte: from a BF16 language model to the best 4-bit checkpoint that vLLM can serve, with the proof."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["Recipe", "__version__", "load_recipe", "quantize", "sweep"]


def __getattr__(name: str) -> Any:
    """Load what is heavy (torch, transformers) when it is first asked for."""
    if name == "quantize":
        from halfbyte.experiments.quantize import quantize

        return quantize
    if name == "sweep":
        from halfbyte.experiments.sweep import sweep

        return sweep
    if name in ("Recipe", "load_recipe"):
        import halfbyte.recipe as recipe

        return getattr(recipe, name)
    raise AttributeError(f"module 'halfbyte' has no attribute {name!r}")
