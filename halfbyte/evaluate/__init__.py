"""What 4 bits cost: a quantized model against BF16, by tokens, tasks, chat and length, in transformers and in vLLM."""

from halfbyte.evaluate.cache import cached_reference
from halfbyte.evaluate.chat import evaluate_chat, write_chat
from halfbyte.evaluate.fidelity import Fidelity, TokenScores, summary, write_result
from halfbyte.evaluate.judge import Judge
from halfbyte.evaluate.long_context import evaluate_long_context, write_long_context
from halfbyte.evaluate.pair import Pair, Serving
from halfbyte.evaluate.qa import evaluate_qa
from halfbyte.evaluate.reference import compare, compare_with_reference, noise_floor
from halfbyte.evaluate.scoring import score_reference
from halfbyte.evaluate.served import compare_served, write_served
from halfbyte.evaluate.tasks import evaluate_tasks, write_tasks
from halfbyte.evaluate.windows import Windows, mixed_windows, set_windows, text_windows

__all__ = [
    "Fidelity",
    "Judge",
    "Pair",
    "Serving",
    "TokenScores",
    "Windows",
    "cached_reference",
    "compare",
    "compare_served",
    "compare_with_reference",
    "evaluate_chat",
    "evaluate_long_context",
    "evaluate_qa",
    "evaluate_tasks",
    "mixed_windows",
    "noise_floor",
    "score_reference",
    "set_windows",
    "summary",
    "text_windows",
    "write_chat",
    "write_long_context",
    "write_result",
    "write_served",
    "write_tasks",
]
