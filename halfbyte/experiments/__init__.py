"""Recipes compared and judged: gates now, the matrix and its ranking on top."""

from halfbyte.experiments.gates import (
    DEFAULT_GATES,
    Gate,
    evaluate_gates,
    parse_gate,
    resolve_gates,
    verdict_text,
)

__all__ = ["DEFAULT_GATES", "Gate", "evaluate_gates", "parse_gate", "resolve_gates", "verdict_text"]
