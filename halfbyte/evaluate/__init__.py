"""What 4 bits cost: a quantized model against its BF16 baseline, token by token, and real vLLM against both."""

from halfbyte.evaluate.cache import cached_reference
from halfbyte.evaluate.fidelity import Fidelity, TokenScores, summary, write_result
from halfbyte.evaluate.reference import compare, compare_with_reference, noise_floor
from halfbyte.evaluate.scoring import score_reference
from halfbyte.evaluate.served import compare_served, write_served
from halfbyte.evaluate.windows import Windows, mixed_windows, set_windows, text_windows

__all__ = [
    "Fidelity",
    "TokenScores",
    "Windows",
    "cached_reference",
    "compare",
    "compare_served",
    "compare_with_reference",
    "mixed_windows",
    "noise_floor",
    "score_reference",
    "set_windows",
    "summary",
    "text_windows",
    "write_result",
    "write_served",
]
