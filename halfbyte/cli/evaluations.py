"""`halfbyte eval` beyond fidelity: tasks, the user's questions, chat with a judge, long context."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli.console import Format, TerminalProgress, emit, progress
from halfbyte.errors import UsageError

if TYPE_CHECKING:
    from halfbyte.evaluate.pair import Pair


class Backend(StrEnum):
    """What runs the models."""

    hf = "hf"
    vllm = "vllm"


def _file(*names: str, help: str) -> Any:
    return typer.Option(*names, metavar="FILE", exists=True, dir_okay=False, help=help)


Task = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        "--tasks",
        metavar="NAME",
        help="A task of lm-eval's, a YAML file or directory of them, or `default`; several with commas. Repeatable.",
    ),
]
ChatTemplate = Annotated[bool, typer.Option("--chat-template", help="Tasks go through the model's chat template.")]
Qa = Annotated[Path | None, _file("--qa", help="Your questions with answers, JSONL.")]
Metric = Annotated[str, typer.Option("--qa-metric", metavar="NAME", help="f1, em, rouge_l or bleu: which one leads.")]
Chat = Annotated[Path | None, _file("--chat", help="Open questions of one or more turns, JSONL; needs --judge.")]
JudgeUrl = Annotated[
    str | None,
    typer.Option("--judge", metavar="URL", help="An OpenAI-compatible endpoint; its key in HALFBYTE_JUDGE_KEY."),
]
JudgeModel = Annotated[str | None, typer.Option("--judge-model", metavar="NAME", help="Which of its models judges.")]
MaxTokens = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Where an answer is cut (--qa: 256; --chat: 512).")
]
LongContext = Annotated[
    bool, typer.Option("--long-context", help="Retrieval at growing lengths; with --text, perplexity by position.")
]
Samples = Annotated[int, typer.Option(metavar="N", min=1, help="--long-context: prompts a task, length and depth.")]
BackendOption = Annotated[
    Backend, typer.Option("--backend", metavar="NAME", help="hf (transformers), or vllm with both models in turn.")
]
On = Annotated[
    str | None,
    typer.Option("--on", metavar="PLATFORM", help="Where vLLM runs; none: the platform that this machine is."),
]
Vllm = Annotated[str | None, typer.Option(metavar="PATH", help="vLLM's executable or environment.")]


@dataclass(frozen=True)
class Asked:
    """What was asked for beyond fidelity."""

    task: list[str] | None = None
    data: Path | None = None
    limit: int | None = None
    chat_template: bool = False
    qa: Path | None = None
    qa_metric: str = "f1"
    chat: Path | None = None
    judge: str | None = None
    judge_model: str | None = None
    max_tokens: int | None = None
    long_context: bool = False
    lengths: str | None = None
    samples: int = 4
    backend: Backend = Backend.hf
    on: str | None = None
    vllm: str | None = None
    text: list[Path] | None = None
    device: str = "cpu"
    seed: int = 0

    @classmethod
    def of(cls, given: dict[str, Any]) -> Asked:
        """From a command's own arguments, those that are no concern of ours left out."""
        return cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})

    def wanted(self) -> bool:
        """Whether anything was asked for. Raises UsageError for options that lack each other."""
        if bool(self.chat) != bool(self.judge) or bool(self.chat) != bool(self.judge_model):
            raise UsageError("--chat FILE, --judge URL and --judge-model NAME go together: give all three")
        wanted = bool(self.task or self.qa or self.chat or self.long_context)
        if not wanted and self.backend is not Backend.hf:
            raise UsageError("--backend vllm is for --task, --qa, --chat and --long-context: name one of them")
        if not self.task and (self.data or self.chat_template):
            raise UsageError(f"{'--data' if self.data else '--chat-template'} is for --task: name one")
        if self.limit and not (self.task or self.qa or self.chat):
            raise UsageError("--limit is for --task, --qa and --chat: name one of them (--windows: of text)")
        return wanted


def evaluate_asked(directory: Path, baseline: str | None, asked: Asked, output: Path | None, style: Format) -> None:
    """Measure what was asked, write the result files, print. Exit code 3 where the 4-bit model rambles."""
    from halfbyte.cli.evaluation_words import evaluations_words

    _check(asked)
    with progress() as shown, ExitStack() as stack:
        logs = output or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        results = _measure(_pair(directory, baseline, asked, logs, shown), asked, output, shown)
    emit(results, style, f"{evaluations_words(results)}\n\nnext: halfbyte serve {directory} --on PLATFORM --print")
    if any(row["length"] and not row["length"]["passed"] for row in _answering(results)):
        raise typer.Exit(3)


def _check(asked: Asked) -> None:
    """Raises UsageError or HalfbyteError for what can be known to be wrong before a model is loaded."""
    from halfbyte.evaluate import chat, qa
    from halfbyte.evaluate.judge import Judge

    if asked.long_context:
        parse_lengths(asked.lengths)
    if asked.qa:
        qa.require_metric(asked.qa_metric)
        qa.read_questions(asked.qa)
    if asked.chat:
        with Judge(str(asked.judge), str(asked.judge_model)):
            chat.read_questions(asked.chat)


def _pair(directory: Path, baseline: str | None, asked: Asked, logs: Path, shown: TerminalProgress) -> Pair:
    from halfbyte.artifact import load_fake_quantized, work_of
    from halfbyte.evaluate.pair import Pair, Serving
    from halfbyte.evaluate.speed_machine import platform_here
    from halfbyte.experiments.run import baseline_model
    from halfbyte.files import portable
    from halfbyte.models.library import load_model, load_tokenizer
    from halfbyte.serving import find_vllm

    if asked.backend is Backend.vllm:
        find_vllm(asked.vllm)
    name, path = baseline_model(directory, baseline, shown)
    names = portable(name), portable(directory)
    if asked.backend is Backend.vllm:
        serving = Serving(logs, asked.on or platform_here(), asked.vllm)
        return Pair(path, directory, load_tokenizer(path), names, serving, work_of(directory))
    quantized = load_fake_quantized(directory, device=asked.device)
    bf16 = load_model(path, asked.device)
    return Pair(bf16, quantized, load_tokenizer(path), names, work=work_of(directory))


def _measure(pair: Pair, asked: Asked, output: Path | None, shown: TerminalProgress) -> dict[str, Any]:
    from halfbyte.evaluate import chat, long_context, tasks

    results: dict[str, Any] = {}
    if asked.task or asked.qa:
        results["tasks"] = _tasks(pair, asked, output, shown)
        if output:
            tasks.write_tasks(output, results["tasks"])
    if asked.chat:
        from halfbyte.evaluate.judge import Judge

        options = {"max_tokens": asked.max_tokens} if asked.max_tokens else {}
        with Judge(str(asked.judge), str(asked.judge_model)) as judge:
            results["chat"] = chat.evaluate_chat(
                pair, asked.chat, judge, limit=asked.limit, seed=asked.seed, progress=shown, **options
            )
        if output:
            chat.write_chat(output, results["chat"])
    if asked.long_context:
        results["long_context"] = long_context.evaluate_long_context(
            pair,
            parse_lengths(asked.lengths),
            text=asked.text or (),
            samples=asked.samples,
            seed=asked.seed,
            progress=shown,
        )
        if output:
            long_context.write_long_context(output, results["long_context"])
    return results


def _tasks(pair: Pair, asked: Asked, output: Path | None, shown: TerminalProgress) -> dict[str, Any]:
    """Tasks and the user's questions in one result; the answers themselves in qa.jsonl."""
    import time

    from halfbyte.evaluate.qa import MAX_TOKENS, compare_qa, write_answers
    from halfbyte.evaluate.tasks import compare_tasks, task_words, tasks_result

    started, rows = time.monotonic(), []
    if asked.task:
        rows += compare_tasks(
            pair,
            [word for words in asked.task for word in task_words(words)],
            data=asked.data,
            limit=asked.limit,
            chat=asked.chat_template,
            seed=asked.seed,
            progress=shown,
        )
    if asked.qa:
        row, answers = compare_qa(
            pair,
            asked.qa,
            metric=asked.qa_metric,
            limit=asked.limit,
            max_tokens=asked.max_tokens or MAX_TOKENS,
            seed=asked.seed,
            progress=shown,
        )
        rows.append(row)
        if output:
            write_answers(output, answers)
    return tasks_result(pair, rows, time.monotonic() - started)


def parse_lengths(words: str | None) -> list[int] | None:
    """ "4k,16384" as numbers of tokens, k for 1024. Raises UsageError for anything else."""
    if words is None:
        return None
    found = []
    for word in words.split(","):
        number, unit = word.strip().lower().removesuffix("k"), 1024 if word.strip().lower().endswith("k") else 1
        if not number.isdecimal() or not int(number):
            raise UsageError(f"{word!r} is no length: write --lengths 4k,16k or --lengths 4096,16384")
        found.append(int(number) * unit)
    return found


def _answering(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What has answers with a length: rows of tasks, the chat."""
    return [*results.get("tasks", {}).get("tasks", []), *([results["chat"]] if "chat" in results else [])]
