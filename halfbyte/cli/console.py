"""What the command line shows: data to stdout, progress and notices to stderr, errors in one line."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import psutil
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

MIB = 1 << 20


class Format(StrEnum):
    """How results are printed."""

    human = "human"
    json = "json"


class TerminalProgress:
    """halfbyte.types.Progress drawn by rich on a terminal, and as plain lines elsewhere."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, soft_wrap=True, highlight=False)
        self.live = self.console.is_terminal
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[memory]} {task.fields[note]}"),
            console=self.console,
            transient=False,
        )
        self.task: Any = None
        self.label, self.total, self.done, self.began, self.printed = "", 0, 0, 0.0, 0.0

    def start(self, label: str, total: int) -> None:
        self.finish()
        self.label, self.total, self.done = label, total, 0
        self.began = self.printed = time.monotonic()
        if self.live:
            self.bar.start()
            self.task = self.bar.add_task(label, total=total, memory=_memory(), note="")
        else:
            self.console.print(f"{label} ...", markup=False)

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.done += steps
        if self.live:
            self.bar.update(self.task, advance=steps, memory=_memory(), note=note)
        elif self.done >= self.total:
            self.finish()
        elif time.monotonic() - self.printed > 10:
            self.printed = time.monotonic()
            left = (self.printed - self.began) / max(self.done, 1) * (self.total - self.done)
            line = f"  {self.label}: {self.done}/{self.total}, {left:.0f} s left, {_memory()} {note}"
            self.console.print(line.rstrip(), markup=False)

    def say(self, message: str) -> None:
        self.console.print(f"note: {message}", markup=False)

    def finish(self) -> None:
        """End the running stage, if there is one."""
        if self.label and not self.live:
            self.console.print(f"  {self.label}: {time.monotonic() - self.began:.1f} s, {_memory()}", markup=False)
        if self.task is not None:
            self.bar.update(self.task, note="")
            self.bar.stop()
            self.bar.remove_task(self.task)
            self.task = None
        self.label = ""


def _memory() -> str:
    return f"{psutil.Process().memory_info().rss // MIB:,} MiB"


@contextmanager
def progress() -> Iterator[TerminalProgress]:
    """A TerminalProgress that is ended whatever happens."""
    shown = TerminalProgress()
    try:
        yield shown
    finally:
        shown.finish()


def emit(value: Mapping[str, Any], style: Format, text: str) -> None:
    """The result on stdout: `text` for people, all of `value` as JSON for machines."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str) if style is Format.json else text.rstrip())


def own_command() -> str:
    """The command line as it was given, for a manifest: absolute paths in it by their last name alone, no secrets."""
    from halfbyte.files import portable, redacted

    def shown(word: str) -> str:
        option, equals, value = word.partition("=")
        return option + equals + portable(value) if equals and option.startswith("-") else portable(word)

    return shlex.join(["halfbyte", *map(shown, redacted(sys.argv[1:]))])
