"""How a model is made to write by itself: what opens a text, and what is put in when a turn ends.

With a chat template the text opens with the template's own header of a user turn, so that the model writes the
question too; where it ends a turn, the template's words up to the next turn are put in. Without a template the
text opens with the token that begins documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from halfbyte.calibration.render import render_chat
from halfbyte.calibration.tokens import Tokenizer, leading_special
from halfbyte.errors import HalfbyteError

_MARKS = ("halfbyteone", "halfbytetwo", "halfbytethree")


@dataclass(frozen=True)
class Script:
    """Token ids of the frame that a model writes into.

    opening     what every text starts with.
    turns       after the user's and after the assistant's turn: the end-of-turn token and the next turn's header;
                empty without a chat template.
    stops       tokens that end a text (an end-of-turn token does not).
    kind        "chat template" | "document start", for manifests.
    """

    opening: tuple[int, ...]
    turns: tuple[tuple[int, ...], ...]
    stops: frozenset[int]
    kind: str


def write_script(tokenizer: Tokenizer, model: Any, max_tokens: int) -> Script:
    """The frame for this model: its chat template where there is one that leaves room to write, else plain."""
    stops = _stop_ids(tokenizer, model)
    chat = _chat_script(tokenizer, stops) if tokenizer.chat_template else None
    if chat is not None and len(chat.opening) <= max_tokens // 2:
        return chat
    return Script(_document_start(tokenizer, stops, model), (), stops, "document start")


def _stop_ids(tokenizer: Tokenizer, model: Any) -> frozenset[int]:
    stops: set[int] = set()
    for source in (tokenizer.eos_token_id, model.config.eos_token_id, model.generation_config.eos_token_id):
        stops |= set(source) if isinstance(source, (list, tuple)) else {source}
    return frozenset(stop for stop in stops if stop is not None)


def _document_start(tokenizer: Tokenizer, stops: frozenset[int], model: Any) -> tuple[int, ...]:
    special = leading_special(tokenizer)
    if special:
        return tuple(special)
    for candidate in (tokenizer.bos_token_id, tokenizer.eos_token_id, model.config.bos_token_id, *sorted(stops)):
        if isinstance(candidate, int):
            return (candidate,)
    return (0,)


def _chat_script(tokenizer: Tokenizer, stops: frozenset[int]) -> Script | None:
    """None where the template does not take user, assistant, user, or marks the end of a turn with no special token."""
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, _MARKS)]
    try:
        text = render_chat(tokenizer, messages)
    except HalfbyteError:  # one that refuses is one we do without
        return None
    parts: list[str] = []
    for mark in _MARKS:
        before, found, text = text.partition(mark)
        if not found:
            return None
        parts.append(before)
    opening, *turns = (tokenizer.encode(part, add_special_tokens=False) for part in parts)
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    framed = []
    for ids in turns:
        first = next((i for i, token in enumerate(ids) if token in special), None)
        if first is None:
            return None
        framed.append(tuple(ids[first:]))
    ends = {ids[0] for ids in framed}
    return Script(tuple(opening), tuple(framed), stops - ends, "chat template")
