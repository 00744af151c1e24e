"""One record of a data set to one text: a named field, `text`, or chat messages through the tokenizer's template."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from halfbyte.calibration.render import render_chat
from halfbyte.calibration.tokens import Tokenizer
from halfbyte.errors import HalfbyteError, UsageError

Kind = Literal["text", "instruction", "chat"]
CHAT_FIELDS = ("messages", "conversations", "conversation")
"""Fields that are looked for when `text` is not there and none is named."""
_QUESTION_FIELDS = ("instruction", "prompt", "question", "query")
_MARKED = re.compile(
    r"\s*(#+ *(instruction|human|user)\b|(instruction|human|user|question|q) *:|<\|im_start\|>|\[INST\])", re.I
)
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}


@dataclass(frozen=True)
class Document:
    """A piece of text.

    continues   it follows the document before it in the same running text.
    kind        "instruction": one exchange of a chat, or a prompt; "chat": more than one; "text": anything else.
    """

    text: str
    origin: str
    continues: bool = False
    kind: Kind = "text"


def parse_record(line: str, where: str) -> object:
    """A line of JSON. Raises HalfbyteError that names the line."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or ["too deep"])[0]
        raise HalfbyteError(f"{where} is not JSON ({reason}): mend or remove it") from error


def record_document(
    record: object, where: str, origin: str, tokenizer: Tokenizer | None, field: str | None = None
) -> Document:
    """The text of one record. Without `field`: `text`, else chat messages.

    A string is taken as it is, a list of messages goes through the chat template, other strings in a list are joined
    by blank lines. Raises HalfbyteError for a record without them, UsageError for a field that is not there.
    """
    if field is None:
        if isinstance(record, Mapping):
            if isinstance(record.get("text"), str):
                return Document(clean(record["text"]), origin, kind=kind_of(record["text"]))
            for name in CHAT_FIELDS:
                if isinstance(record.get(name), list):
                    return _from_list(record[name], where, origin, tokenizer)
        raise HalfbyteError(f"{where} has neither a string `text` nor a list `messages`: add one of them{_has(record)}")
    if not isinstance(record, Mapping) or field not in record:
        raise UsageError(f"{where} has no field {field!r}{did_you_mean(field, record)}")
    value = record[field]
    if isinstance(value, str):
        kind: Kind = "instruction" if field in _QUESTION_FIELDS else kind_of(value)
        return Document(clean(value), origin, kind=kind)
    if isinstance(value, list):
        return _from_list(value, where, origin, tokenizer)
    raise HalfbyteError(f"{where}: field {field!r} is {type(value).__name__}: name one that holds text or messages")


def did_you_mean(field: str, record: object) -> str:
    """The field of `record` that was perhaps meant, or all there are, as the end of an error's line."""
    names = [str(name) for name in record] if isinstance(record, Mapping) else []
    close = difflib.get_close_matches(field, names, n=1, cutoff=0.5)
    if close:
        return f": did you mean {close[0]!r}?"
    return f": it has {_listed(names)}" if names else ": it is no record of fields"


def kind_of(text: str) -> Kind:
    """What a plain text is by its first words: a marked instruction, or just text."""
    return "instruction" if _MARKED.match(text) else "text"


def clean(text: str) -> str:
    """The text with what UTF-8 cannot hold (half a surrogate pair, from an escape in JSON) replaced by "?"."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text


def all_strings(value: object) -> str:
    """Every string in a record, nested ones too, joined by line ends."""
    if isinstance(value, str):
        return clean(value)
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return "\n".join(filter(None, map(all_strings, inner)))


def _from_list(value: list, where: str, origin: str, tokenizer: Tokenizer | None) -> Document:
    if value and all(isinstance(part, str) for part in value):
        return Document(clean("\n\n".join(value)), origin)
    if not value:
        return Document("", origin)
    messages = [_message(part) for part in value]
    if None in messages:
        raise HalfbyteError(f"{where}: its messages are not a list of role and content: mend or remove them")
    turns = sum(message["role"] == "user" for message in messages if message)
    text = _render(messages, where, tokenizer)
    return Document(clean(text), origin, kind="chat" if turns > 1 else "instruction")


def _message(part: object) -> dict[str, Any] | None:
    """A message in transformers' words; ShareGPT's `from` and `value` are understood."""
    if not isinstance(part, Mapping):
        return None
    if "role" in part:
        return dict(part)
    if "from" in part and "value" in part:
        return {"role": _ROLES.get(str(part["from"]), part["from"]), "content": part["value"]}
    return None


def _render(messages: list, where: str, tokenizer: Tokenizer | None) -> str:
    if tokenizer is None or not tokenizer.chat_template:
        raise HalfbyteError(f"{where} has `messages`, and the tokenizer has no chat template: give `text` instead")
    try:
        return render_chat(tokenizer, messages)
    except HalfbyteError as error:
        raise HalfbyteError(f"{where}: the chat template refuses these messages: {error}") from error


def _has(record: object) -> str:
    return f" (it has {_listed([str(name) for name in record])})" if isinstance(record, Mapping) and record else ""


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
