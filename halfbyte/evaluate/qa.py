"""The user's own questions with answers: exact match, F1, ROUGE-L and BLEU of both models, as a task of tasks.json.

A JSONL file, a record a line: {"question", "answer"} or {"messages", "answer"}; `answers` may list several.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.calibration.records import clean
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate import metrics
from halfbyte.evaluate.pair import LABELS, SIDES, Pair
from halfbyte.evaluate.paired import MEAN, Compared, compare_items
from halfbyte.evaluate.prompting import messages_of, prompt_ids, read_lines, text_of, trimmed
from halfbyte.evaluate.tasks import tasks_result, tokens_of, with_others
from halfbyte.files import make_directory, write_text
from halfbyte.types import Progress, Quiet

METRICS = {
    "f1": (metrics.f1, MEAN),
    "em": (metrics.exact_match, MEAN),
    "rouge_l": (metrics.rouge_l, MEAN),
    "bleu": (metrics.bleu_statistics, metrics.BLEU),
}
"""How an answer is scored, and how items become a figure; BLEU is 0..100, the others shares."""
MAX_TOKENS = 256
ANSWERS = "qa.jsonl"


@dataclass(frozen=True)
class Question:
    """A conversation that ends with a question, and its accepted answers."""

    messages: list[dict[str, str]]
    accepted: list[str]


def evaluate_qa(
    pair: Pair,
    file: Path | str,
    *,
    metric: str = "f1",
    limit: int | None = None,
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Both models' greedy answers to the questions in `file`, compared in pairs; the content of tasks.json, one task.

    metric      the one of METRICS that leads; the others stand in `others`
    limit       the first questions alone; max_tokens: where an answer is cut
    Raises UsageError for a file or metric that is not there, HalfbyteError for a bad record or a question too long.
    """
    started = time.monotonic()
    compared, _ = compare_qa(
        pair, file, metric=metric, limit=limit, max_tokens=max_tokens, seed=seed, progress=progress
    )
    return tasks_result(pair, [compared], time.monotonic() - started)


def compare_qa(
    pair: Pair,
    file: Path | str,
    *,
    metric: str = "f1",
    limit: int | None = None,
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Compared, list[dict[str, Any]]]:
    """The row of `evaluate_qa`, and each question with both answers and their scores."""
    require_metric(metric)
    file, progress = Path(file), progress or Quiet()
    questions = read_questions(file)[:limit]
    prompts = [prompt_ids(pair.tokenizer, question.messages) for question in questions]
    context = max(map(len, prompts)) + max_tokens
    if (most := pair.context()) and context > most:
        raise HalfbyteError(
            f"the longest question of {file.name} and {max_tokens} tokens of answer take {context} tokens, the model "
            f"has {most}: shorten it"
        )
    answers: dict[str, list[str]] = {}
    for side in SIDES:
        with pair.open(side, context, progress) as subject:
            progress.start(f"questions of {file.name}, {LABELS[side]}", len(prompts))
            said = subject.generate(prompts, max_tokens, pair.stop_ids(), progress)
            answers[side] = [trimmed(pair.tokenizer, answer) for answer in said]
    scored = {side: _scores(questions, answers[side]) for side in SIDES}
    lengths = tokens_of(answers["baseline"], pair.tokenizer), tokens_of(answers["model"], pair.tokenizer)
    rows = [
        compare_items(
            f"qa:{file.name}",
            name,
            scored["baseline"][name],
            scored["model"][name],
            statistic=METRICS[name][1],
            correct=(scored["baseline"]["em"], scored["model"]["em"]),
            lengths=lengths,
            seed=seed,
        )
        for name in [metric, *(other for other in METRICS if other != metric)]
    ]
    shown = ("em", "f1", "rouge_l")
    items = [
        {
            "messages": question.messages,
            "accepted": question.accepted,
            **{side: {"answer": answers[side][i], **{name: scored[side][name][i] for name in shown}} for side in SIDES},
        }
        for i, question in enumerate(questions)
    ]
    return with_others(rows), items


def require_metric(name: str) -> None:
    """Raises UsageError for a name that is not among METRICS."""
    if name not in METRICS:
        raise UsageError(f"{name!r} is no metric of answers: use one of {', '.join(METRICS)}")


def write_answers(directory: Path | str, answers: list[dict[str, Any]]) -> Path:
    """Write qa.jsonl (whole or not at all) into `directory`: each question with both answers; returns its path."""
    path = Path(directory) / ANSWERS
    make_directory(path.parent)
    write_text(path, "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
    return path


def read_questions(file: Path) -> list[Question]:
    """The records of a file. Raises UsageError for no file, HalfbyteError that names the line for a bad record."""
    return [_question(record, where) for where, record in read_lines(file)]


def _question(record: Mapping[str, Any], where: str) -> Question:
    if "messages" in record:
        messages = messages_of(record["messages"], where)
    else:
        messages = [{"role": "user", "content": text_of(record, "question", where)}]
    given = record.get("answers", record.get("answer"))
    accepted = [given] if isinstance(given, str) else given
    if not isinstance(accepted, list) or not accepted or not all(isinstance(a, str) and a.strip() for a in accepted):
        raise HalfbyteError(f"{where} has no text in `answer`, nor a list of texts in `answers`: add it")
    return Question(messages, [clean(a) for a in accepted])


def _scores(questions: list[Question], answers: list[str]) -> dict[str, list[Any]]:
    return {
        name: [score(answer, question.accepted) for question, answer in zip(questions, answers)]
        for name, (score, _) in METRICS.items()
    }
