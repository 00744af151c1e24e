"""Chat: BF16's and the 4-bit model's answers to open questions of one or more turns, compared by a judge: chat.json."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.errors import HalfbyteError
from halfbyte.evaluate import bootstrap
from halfbyte.evaluate.judge import Judge, Verdict
from halfbyte.evaluate.pair import LABELS, SIDES, Pair
from halfbyte.evaluate.paired import length_ratio
from halfbyte.evaluate.prompting import prompt_ids, read_lines, trimmed
from halfbyte.evaluate.subject import Subject
from halfbyte.evaluate.tasks import tokens_of
from halfbyte.files import make_directory, write_json
from halfbyte.types import Progress, Quiet

CHAT = "chat.json"
MAX_TOKENS = 512


@dataclass(frozen=True)
class Question:
    """The user's turns, answers that may be shown to the judge, a category."""

    name: str
    turns: list[str]
    reference: list[str]
    category: str


def evaluate_chat(
    pair: Pair,
    file: Path | str,
    judge: Judge,
    *,
    limit: int | None = None,
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Both models answer the questions in `file`, the judge compares; the content of chat.json.

    The win rate counts a tie as half a win: 0.5 is as good as BF16. Questions of whose verdict nothing can be read are
    counted in `unread` and left out.
    Raises UsageError for no file, HalfbyteError for a bad record, or a judge that refuses or never gives a verdict.
    """
    progress, started = progress or Quiet(), time.monotonic()
    questions = read_questions(Path(file))[:limit]
    context = _context(pair, questions, max_tokens)
    answers: dict[str, list[list[str]]] = {}
    for side in SIDES:
        with pair.open(side, context, progress) as subject:
            turns = sum(len(question.turns) for question in questions)
            progress.start(f"chat, {LABELS[side]}", turns)
            answers[side] = converse(subject, pair, questions, max_tokens, context, progress)
    progress.start("asking the judge", len(questions))
    verdicts = []
    for question, first, second in zip(questions, answers["baseline"], answers["model"]):
        verdicts.append(judge.compare(question.turns, first, second, question.reference))
        progress.advance()
    result = _summary(questions, verdicts, answers, pair, seed)
    return {
        **pair.header("chat"),
        "confidence": bootstrap.CONFIDENCE,
        "judge": judge.describe(),
        **result,
        "seconds": round(time.monotonic() - started, 3),
    }


def write_chat(directory: Path | str, result: dict[str, Any]) -> Path:
    """Write chat.json (whole or not at all) into `directory`; returns its path."""
    path = Path(directory) / CHAT
    make_directory(path.parent)
    write_json(path, result)
    return path


def converse(
    subject: Subject, pair: Pair, questions: Sequence[Question], max_tokens: int, context: int, progress: Progress
) -> list[list[str]]:
    """The model's answers to every turn, each after its own earlier answers; all conversations' turns go together."""
    answers: list[list[str]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        members = [i for i, question in enumerate(questions) if len(question.turns) > turn]
        prompts = [prompt_ids(pair.tokenizer, _messages(questions[i].turns, answers[i])) for i in members]
        room = context - max_tokens
        if (longest := max(map(len, prompts))) > room:
            raise HalfbyteError(f"a conversation takes {longest} tokens, {room} are left: use fewer --max-tokens")
        said = subject.generate(prompts, max_tokens, pair.stop_ids(), progress)
        for i, answer in zip(members, said):
            answers[i].append(trimmed(pair.tokenizer, answer))
    return answers


def read_questions(file: Path) -> list[Question]:
    """MT-bench's records: {"question_id", "category", "turns": [...], "reference": [...]}; `turns` alone is needed."""
    found = []
    for number, (where, record) in enumerate(read_lines(file), 1):
        turns, reference = _texts(record, "turns"), _texts(record, "reference")
        if not turns:
            raise HalfbyteError(f"{where} has no list of texts in `turns`: add the user's turns")
        name = str(record.get("question_id", number))
        found.append(Question(name, turns, reference, str(record.get("category", ""))))
    return found


def _texts(record: Mapping[str, Any], field: str) -> list[str]:
    value = record.get(field)
    return value if isinstance(value, list) and all(isinstance(part, str) for part in value) else []


def _messages(turns: Sequence[str], answers: Sequence[str]) -> list[dict[str, str]]:
    messages = []
    for turn, answer in zip(turns, answers):
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": turns[len(answers)]}]


def _context(pair: Pair, questions: Sequence[Question], max_tokens: int) -> int:
    """Tokens for the longest conversation, or as many as the model has."""
    longest = 0
    for question in questions:
        asked = [{"role": "user", "content": turn} for turn in question.turns]
        spare = 16 * len(asked)  # what a template writes around an answer
        tokens = sum(len(prompt_ids(pair.tokenizer, [turn])) for turn in asked)
        longest = max(longest, tokens + spare + max_tokens * len(asked))
    return min(longest, pair.context() or longest)


def _summary(
    questions: Sequence[Question],
    verdicts: Sequence[Verdict],
    answers: dict[str, list[list[str]]],
    pair: Pair,
    seed: int,
) -> dict[str, Any]:
    read = [i for i, verdict in enumerate(verdicts) if verdict.score is not None]
    if not read:
        raise HalfbyteError("the judge never gave a verdict ([[A]], [[B]] or [[TIE]]): name a more capable judge")
    scores = np.array([verdicts[i].score for i in read], dtype=np.float64)
    counts = bootstrap.draw_counts(len(read), seed)
    rate = bootstrap.interval(counts @ scores / len(read), float(scores.mean()))
    tokens = [[sum(tokens_of(said, pair.tokenizer)) for said in answers[side]] for side in SIDES]
    categories = dict.fromkeys(questions[i].category for i in read)
    return {
        "questions": len(questions),
        "turns": sum(len(question.turns) for question in questions),
        "wins": int((scores == 1).sum()),
        "ties": int((scores == 0.5).sum()),
        "losses": int((scores == 0).sum()),
        "unread": len(questions) - len(read),
        "inconsistent": float(np.mean([not verdicts[i].consistent for i in read])),
        "win_rate": rate,
        "length": length_ratio(tokens[0], tokens[1], bootstrap.draw_counts(len(questions), seed)),
        "by_category": [
            {
                "category": category,
                "questions": len(found := [s for i, s in zip(read, scores) if questions[i].category == category]),
                "win_rate": float(np.mean(found)),
            }
            for category in categories
        ],
        "answers": [
            {
                "question": question.name,
                "category": question.category,
                "turns": question.turns,
                "baseline": answers["baseline"][i],
                "model": answers["model"][i],
                "score": verdicts[i].score,
                "consistent": verdicts[i].consistent,
            }
            for i, question in enumerate(questions)
        ],
    }
