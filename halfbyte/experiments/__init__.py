"""Recipes carried out, compared, judged by gates and mended; what commands do beyond one room."""

from halfbyte.experiments.gates import (
    DEFAULT_GATES,
    Gate,
    evaluate_gates,
    parse_gate,
    resolve_gates,
    verdict_text,
)

__all__ = ["DEFAULT_GATES", "Gate", "evaluate_gates", "parse_gate", "resolve_gates", "verdict_text"]
