"""What a page is made of, as data. The templates draw each kind of block once, in HTML and in Markdown.

A block's `kind` names the macro that draws it. Words are plain text: the templates escape them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Cell:
    """A table's cell.

    note    smaller words beneath
    status  passed, failed or open: the words stand on a badge of that colour
    swatch  a colour's class, shown before the words
    bullet  an interval beside its limit (halfbyte.report.plots), drawn in place of the words
    code    the words are a name or a piece of text: in a fixed width, spaces kept
    """

    text: str = ""
    note: str = ""
    status: str = ""
    swatch: str = ""
    bullet: dict[str, Any] | None = None
    bold: bool = False
    code: bool = False


@dataclass(frozen=True)
class Column:
    """A table's column; `right` aligns numbers, `wide` gives a cell a line of its own on a narrow screen, and a
    `picture` is left out of Markdown."""

    label: str
    right: bool = False
    wide: bool = False
    picture: bool = False


def left(label: str, wide: bool = False) -> Column:
    return Column(label, wide=wide)


def right(label: str, wide: bool = False) -> Column:
    return Column(label, right=True, wide=wide)


class Block:
    """One kind of content; `kind` names the macro of both templates that draws it."""

    kind: ClassVar[str]


def picture(label: str) -> Column:
    return Column(label, wide=True, picture=True)


@dataclass(frozen=True)
class Table(Block):
    """Rows of cells, the first of each row its header. `stack`: on a narrow screen a row becomes a small card.

    fold    a few words: the table is folded away behind them
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    stack: bool = False
    fold: str = ""
    kind: ClassVar[str] = "table"

    def in_words(self) -> Table:
        """The table without its pictures."""
        kept = [i for i, column in enumerate(self.columns) if not column.picture]
        return replace(
            self,
            columns=[self.columns[i] for i in kept],
            rows=[[row[i] for i in kept if i < len(row)] for row in self.rows],
        )


def table(columns: Sequence[Column], rows: Iterable[Sequence[object]], stack: bool = False, fold: str = "") -> Table:
    """A Table of cells; what is no Cell becomes the words of one."""
    cells = [[cell if isinstance(cell, Cell) else Cell(str(cell)) for cell in row] for row in rows]
    return Table(columns, cells, stack, fold)


@dataclass(frozen=True)
class Facts(Block):
    """Labels and values, one pair a line."""

    pairs: Pairs
    kind: ClassVar[str] = "facts"


@dataclass(frozen=True)
class Words(Block):
    """A paragraph, or with `badge` (passed, failed, open) a word on a badge and what follows."""

    text: str
    soft: bool = False
    badge: tuple[str, str] | None = None
    kind: ClassVar[str] = "words"


@dataclass(frozen=True)
class Heading(Block):
    text: str
    kind: ClassVar[str] = "heading"


@dataclass(frozen=True)
class Code(Block):
    """Text as it is: a command, a completion."""

    text: str
    kind: ClassVar[str] = "code"


@dataclass(frozen=True)
class Items(Block):
    items: Sequence[str]
    kind: ClassVar[str] = "items"


@dataclass(frozen=True)
class Charts(Block):
    """Charts side by side (halfbyte.report.chart), with the numbers that they draw; Markdown shows these alone."""

    charts: Sequence[dict[str, Any]]
    numbers: Table | None = None
    note: str = ""
    kind: ClassVar[str] = "charts"


@dataclass(frozen=True)
class Bars(Block):
    """Stacked bars on one scale: halfbyte.report.plots.byte_bars."""

    bars: Sequence[dict[str, Any]]
    kind: ClassVar[str] = "bars"


@dataclass(frozen=True)
class Heat(Block):
    """halfbyte.report.plots.heat_map, and what its shades mean."""

    heat: dict[str, Any]
    meaning: str
    kind: ClassVar[str] = "heat"


@dataclass(frozen=True)
class Section:
    """One card of the page; `menu` is its name in the contents. A `picture` shows nothing that is not said elsewhere:
    it is left out of Markdown."""

    id: str
    title: str
    blocks: Sequence[Block]
    menu: str = ""
    picture: bool = False


@dataclass(frozen=True)
class Missing:
    """A section whose result file is not there: what it would show, what is said instead, what measures it."""

    what: str
    words: str
    command: str


@dataclass(frozen=True)
class Page:
    """A whole report.

    verdict     word, status (passed, failed, open), text
    facts       what a reader must know first, a sentence each, with a lead word
    tiles       label, value, note
    """

    eyebrow: str
    title: str
    subtitle: str
    verdict: dict[str, str]
    facts: Pairs
    tiles: Sequence[dict[str, str]]
    sections: Sequence[Section]
    missing: Sequence[Missing]
    footer: str
