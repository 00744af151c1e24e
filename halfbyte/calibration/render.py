"""Chat templates, which are programs of a stranger: rendered in transformers' sandbox, in a process of their own.

The sandbox keeps a template from Python's internals, and not from looping for ever or from filling the memory. So a
forked child renders, one conversation after the other, under the kernel's own limits: an alarm that ends it, a bound on
its memory, no open file but its two pipes. Where it ends, the template is refused in one line.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import signal
import struct
import weakref
from typing import Any, BinaryIO

from halfbyte.calibration.tokens import Tokenizer
from halfbyte.errors import HalfbyteError

SECONDS = 10
"""For one conversation; real templates take a millisecond."""
MEMORY = 1 << 30
"""Bytes that rendering may take beside what the process has."""
TEXT = 64 << 20
"""Bytes of rendered text; a line of JSONL may not be longer either."""


def render_chat(tokenizer: Tokenizer, messages: list, *, answer: bool = False) -> str:
    """The text of a conversation by the tokenizer's chat template; `answer`: up to where the assistant's begins. Raises
    HalfbyteError where the template refuses it, or takes more time, memory or text than any template needs."""
    child = _CHILDREN.get(tokenizer)
    if child is None or not child.alive or child.template != tokenizer.chat_template or child.owner != os.getpid():
        child = _CHILDREN[tokenizer] = _Child(tokenizer)
    return child.render(messages, answer)


class _Child:
    """A forked process that renders; it ends with this object, with its parent, or at a limit."""

    def __init__(self, tokenizer: Tokenizer):
        import jinja2.sandbox  # noqa: F401  before the fork, so that the child waits for no import

        mine, theirs = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _serve(tokenizer, theirs[0], mine[1])
        os.close(theirs[0])
        os.close(mine[1])
        self.asks, self.answers = os.fdopen(theirs[1], "wb"), os.fdopen(mine[0], "rb")
        self.alive, self.owner, self.template = True, os.getpid(), tokenizer.chat_template
        self._end = weakref.finalize(self, _end, os.getpid(), self.pid, self.asks, self.answers)

    def render(self, messages: list, answer: bool) -> str:
        try:
            _write(self.asks, pickle.dumps((messages, answer)))
            told = json.loads(_read(self.answers, TEXT * 2))
        except (OSError, EOFError, ValueError) as error:
            self.alive = False
            self._end()
            raise HalfbyteError(
                f"it takes more than {SECONDS} s, {MEMORY >> 30} GiB or {TEXT >> 20} MiB of text"
            ) from error
        if "error" in told:
            raise HalfbyteError(told["error"])
        return told["text"]


_CHILDREN: weakref.WeakKeyDictionary[Any, _Child] = weakref.WeakKeyDictionary()


def _end(owner: int, pid: int, *pipes: BinaryIO) -> None:
    for pipe in pipes:
        with contextlib.suppress(OSError):
            pipe.close()
    if os.getpid() == owner:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _serve(tokenizer: Tokenizer, asks: int, answers: int) -> None:
    """The child: never returns."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        _close_others({asks, answers})
        with open("/proc/self/statm") as handle:
            held = int(handle.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
        reader, writer = os.fdopen(asks, "rb"), os.fdopen(answers, "wb")
        while True:
            messages, answer = pickle.loads(_read(reader, 1 << 40))
            signal.alarm(SECONDS)
            _write(writer, json.dumps(_rendered(tokenizer, messages, answer)).encode())
            signal.alarm(0)
    except BaseException:
        os._exit(1)


def _rendered(tokenizer: Tokenizer, messages: list, answer: bool) -> dict[str, str]:
    try:
        more = {"add_generation_prompt": True} if answer else {}
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, **more))
    except Exception as error:  # a template may raise anything
        return {"error": (str(error).strip().splitlines() or [type(error).__name__])[0][:500]}
    return {"text": text} if len(text) <= TEXT else {"error": f"it makes {len(text):,} characters of them"}


def _close_others(kept: set[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(name))


def _write(pipe: BinaryIO, data: bytes) -> None:
    pipe.write(struct.pack("<Q", len(data)) + data)
    pipe.flush()


def _read(pipe: BinaryIO, limit: int) -> bytes:
    head = pipe.read(8)
    if len(head) < 8:
        raise EOFError
    length = struct.unpack("<Q", head)[0]
    if length > limit:
        raise ValueError(length)
    data = pipe.read(length)
    if len(data) < length:
        raise EOFError
    return data
