"""What a run measures of its artifact's quality beside eval.json: tasks, and drift on long context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.artifact import load_fake_quantized
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.long_context import LONGEST, SHORTEST, evaluate_long_context
from halfbyte.evaluate.pair import Pair, Serving
from halfbyte.evaluate.tasks import DEFAULT, evaluate_tasks, refuse_tasks, task_words, with_named
from halfbyte.evaluate.windows import text_windows
from halfbyte.experiments.mitigation import KV_FLAG
from halfbyte.files import portable, stamps
from halfbyte.models.library import load_model, load_tokenizer
from halfbyte.serving import find_vllm

if TYPE_CHECKING:
    from halfbyte.experiments.measurements import Asked, Subject

FP8 = "fp8"


def task_names(asked: Asked) -> list[str]:
    """What --tasks names (names, YAML files, with commas between; by themselves the default set), and the tasks that
    gates name; these alone where nothing else is said."""
    said = task_words(asked.options.get("tasks", ""))
    named = asked.arguments("task")
    return with_named(said, named, asked.data) if said else named or [DEFAULT]


def refuse_task_names(asked: Asked) -> None:
    """Raises UsageError for a task that nobody knows, or that has no data; HalfbyteError without lm-eval."""
    refuse_tasks(task_names(asked), asked.arguments("task"), asked.data)


def tasks_key(subject: Subject) -> Mapping[str, Any]:
    """What tasks.json depends on beside the artifact."""
    names = task_names(subject)
    files = [*map(Path, names), *(subject.data.rglob("*.jsonl") if subject.data else [])]
    key = {"tasks": names, "device": subject.device, "files": stamps(sorted(files))}
    return key | ({} if subject.limit is None else {"limit": subject.limit})


def tasks(subject: Subject) -> Mapping[str, Any]:
    """tasks.json, of the models in memory."""
    names = task_names(subject)
    return evaluate_tasks(_pair(subject), names, data=subject.data, limit=subject.limit, progress=subject.progress)


def lengths(subject: Subject) -> list[int] | None:
    """4096 and its doubles up to the context that is served; None: up to what the model allows."""
    if subject.context is None:
        return None
    found = [SHORTEST << step for step in range(6) if SHORTEST << step <= min(subject.context, LONGEST)]
    return found or [subject.context]


def long_context_key(subject: Subject) -> Mapping[str, Any]:
    """What long_context.json depends on beside the artifact and its platforms."""
    return {"lengths": lengths(subject), "vllm": subject.vllm, "device": subject.device}


def long_context(subject: Subject) -> Mapping[str, Any]:
    """long_context.json: of vLLM where an FP8 KV cache is served (nothing else has one), else of the models in
    memory."""
    served = [p.name for p in subject.platforms if str(p.flags.get(KV_FLAG, "")).startswith(FP8)]
    place = Serving(subject.out, served[0], subject.vllm) if served and _has_vllm(subject) else None
    pair = _pair(subject, place)
    return evaluate_long_context(
        pair,
        lengths(subject),
        text=_long_text(subject, pair),
        portion=subject.held_out,
        progress=subject.progress,
    )


def _long_text(subject: Subject, pair: Pair) -> Sequence[Path]:
    """The user's text, where its held-out part gives a piece of the least length; else none: retrieval alone."""
    least = (lengths(subject) or [min(SHORTEST, pair.context() or SHORTEST)])[0]
    if not subject.text:
        return ()
    try:
        text_windows(list(subject.text), pair.tokenizer, window=least - 1, portion=subject.held_out)
    except HalfbyteError as error:
        subject.progress.say(f"no perplexity on long context: {error}")
        return ()
    return subject.text


def _pair(subject: Subject, serving: Serving | None = None) -> Pair:
    """The two models in memory, or to be served: then vLLM has the memory to itself."""
    names, tokenizer = (portable(subject.model), "model"), load_tokenizer(subject.path)
    if serving:
        return Pair(subject.path, subject.artifact, tokenizer, names, serving)
    quantized = load_fake_quantized(subject.artifact, device=subject.device)
    return Pair(load_model(subject.path, subject.device), quantized, tokenizer, names)


def _has_vllm(subject: Subject) -> bool:
    try:
        find_vllm(subject.vllm)
    except HalfbyteError:
        return False
    return True
