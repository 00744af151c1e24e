"""Questions as the tokens of a prompt: through the tokenizer's chat template where there is one, else as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from halfbyte.calibration.records import clean, parse_record
from halfbyte.calibration.render import render_chat
from halfbyte.errors import HalfbyteError, UsageError

Message = Mapping[str, str]
PLAIN = {"user": "Question: ", "assistant": "Answer: ", "system": ""}
PLAIN_STOP = "\nQuestion:"
"""Where an answer ends that was asked for without a chat template: a base model goes on with a question of its own."""


def prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The tokens of a conversation whose next words are the assistant's.

    Raises HalfbyteError when the chat template refuses the messages.
    """
    if not tokenizer.chat_template:
        lines = [PLAIN.get(message["role"], "") + message["content"] for message in messages]
        return list(tokenizer("\n".join([*lines, PLAIN["assistant"].rstrip()]))["input_ids"])
    try:
        text = render_chat(tokenizer, [dict(m) for m in messages], answer=True)
    except HalfbyteError as error:
        raise HalfbyteError(f"the chat template refuses a conversation: {error}") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def trimmed(tokenizer: Any, answer: str) -> str:
    """The answer without what a base model writes behind it."""
    return answer.strip() if tokenizer.chat_template else answer.partition(PLAIN_STOP)[0].strip()


def read_lines(file: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """(where it stands, the record) of each line of a JSONL file that is not empty.

    Raises UsageError where there is no such file or no record in it, HalfbyteError for a line that is no record.
    """
    if not file.is_file():
        raise UsageError(f"{file} is no file: name a JSONL file")
    records = []
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{file.name} line {number}"
                record = parse_record(line, where)
                if not isinstance(record, Mapping):
                    raise HalfbyteError(f"{where} is no record of fields: write one {{...}} a line")
                records.append((where, record))
    if not records:
        raise UsageError(f"{file} is empty: write one record a line")
    return records


def text_of(record: Mapping[str, Any], field: str, where: str) -> str:
    """A field that has to be text."""
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        raise HalfbyteError(f"{where} has no text in {field!r}: add it")
    return clean(value)


def messages_of(value: Any, where: str) -> list[dict[str, str]]:
    """Messages of a role and a content each, the last of them not the assistant's."""
    good = (
        isinstance(value, list)
        and value
        and all(
            isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in value
        )
    )
    if not good:
        raise HalfbyteError(f"{where}: `messages` is not a list of role and content: mend it")
    if value[-1]["role"] == "assistant":
        raise HalfbyteError(f"{where}: the last message is the assistant's: put it in `answer`")
    return [{"role": m["role"], "content": clean(m["content"])} for m in value]
