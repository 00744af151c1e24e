"""Where pieces of work are done: here, one after the other, or by workers apart from this process.

A piece of work is a function of plain data: `function(seat, *arguments)`, found by its name in a module, so that it
can be sent. Whoever has work to do knows these few words alone, and gets the same bytes whoever does it: a worker has
as many threads as this process. A worker that dies costs a retry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, field
from typing import Any, Protocol

from halfbyte.types import Progress, Quiet

ATTEMPTS = 3
"""How often a piece of work is begun before its workers' deaths are its own fault."""


@dataclass(frozen=True)
class Seat:
    """What the one who works is given. device: torch's name; progress: where to report."""

    device: str = "cpu"
    progress: Progress = field(default_factory=Quiet)


@dataclass(frozen=True)
class Errand:
    """A piece of work. label: for people; on: the platform whose hardware it must run on ("": any)."""

    label: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    on: str = ""


class Workers(Protocol):
    """Those who do pieces of work. `apart`: not in this process; `count`: how many at a time."""

    apart: bool
    count: int

    def open(self) -> None:
        """Be ready; called again, nothing. Raises HalfbyteError or UsageError where there can be no workers."""

    def submit(self, errand: Errand) -> Future[Any]:
        """Begin it; its result or what it raised comes with the future."""


class Here:
    """This very process: a piece of work is done when `submit` returns."""

    apart, count = False, 1

    def __init__(self, device: str = "cpu", progress: Progress | None = None):
        self.seat = Seat(device, progress or Quiet())

    def open(self) -> None:
        pass

    def submit(self, errand: Errand) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(errand.function(self.seat, *errand.arguments))
        except Exception as error:
            done.set_exception(error)
        return done


def as_done(workers: Workers, errands: Iterable[Errand]) -> Iterator[tuple[Errand, Future[Any]]]:
    """Every errand with its finished future: in order and one by one here, as they come from workers apart."""
    if not workers.apart:
        yield from ((errand, workers.submit(errand)) for errand in errands)
        return
    sent = {workers.submit(errand): errand for errand in errands}
    yield from ((sent[future], future) for future in as_completed(sent))
