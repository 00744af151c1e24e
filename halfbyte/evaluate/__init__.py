"""What 4 bits cost: a quantized model against its BF16 baseline, token by token, and real vLLM against both."""

from halfbyte.evaluate.fidelity import Fidelity, TokenScores, compare, noise_floor, summary, write_result
from halfbyte.evaluate.scoring import score_reference
from halfbyte.evaluate.served import compare_served, write_served
from halfbyte.evaluate.windows import Windows, set_windows, text_windows

__all__ = [
    "Fidelity",
    "TokenScores",
    "Windows",
    "compare",
    "compare_served",
    "noise_floor",
    "score_reference",
    "set_windows",
    "summary",
    "text_windows",
    "write_result",
    "write_served",
]
