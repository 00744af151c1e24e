"""Tasks against BF16: paired differences with their intervals, recovery, flips and the length of answers."""

from __future__ import annotations

from typing import Any

from halfbyte.report.blocks import Block, Cell, Facts, Missing, Pairs, Section, Words, left, picture, right, table
from halfbyte.report.plots import difference_bullet
from halfbyte.report.quality import level
from halfbyte.report.sources import Sources
from halfbyte.report.words import (
    between,
    count,
    dig,
    listing,
    mapping,
    measure,
    number,
    percent,
    points,
    shown,
    significant,
    text,
)


def tasks(sources: Sources) -> Section | Missing:
    """A row for each task and their average."""
    found = sources.tasks
    rows = [mapping(row) for row in listing(found.get("tasks"))]
    if not rows:
        return Missing("Tasks", "Not measured", sources.command("tasks"))
    average = mapping(found.get("average"))
    reach = max(
        [abs(x) for row in [*rows, average] for x in measure(row.get("difference")) if x is not None], default=0
    )
    columns = [
        left("Task", wide=True),
        right("Items"),
        right("BF16"),
        right("4-bit"),
        right("Difference"),
        right(f"{level(found)} interval"),
        picture(f"±{show_reach(reach)}"),
        right("Recovery"),
        right("Flips"),
        right("Length"),
    ]
    drawn = [_row(row, reach) for row in rows]
    if average:
        drawn.append(_average(average, reach))
    notes = [
        "Differences are 4-bit minus BF16 on the same items, in points where the metric is a share; the line is no "
        "difference. Recovery is 4-bit over BF16. Flips: items whose answer became right or wrong. Length: generated "
        "tokens against BF16's.",
        f"Measured with {text(found.get('backend'), 'a backend that is not named')}.",
    ]
    blocks: list[Block] = [
        table(columns, drawn, stack=True),
        *(Words(note, soft=True) for note in notes),
        *_others(rows),
    ]
    return Section("tasks", "Tasks", blocks)


def _others(rows: list[dict[str, Any]]) -> list[Block]:
    """The tasks' other metrics, folded away."""
    columns = [left("Task"), left("Metric"), right("BF16"), right("4-bit"), right("Difference"), right("Interval")]
    drawn: list[list[Cell | str]] = []
    for row in rows:
        for other in map(mapping, listing(row.get("others"))):
            show, differ = _spelling(other)
            moved = [shown(other.get("difference"), differ), between(other.get("difference"), differ)]
            drawn.append(
                [
                    text(row.get("name")),
                    text(other.get("metric")),
                    *(shown(other.get(side), show) for side in ("baseline", "model")),
                    *moved,
                ]
            )
    return [table(columns, drawn, fold="Other metrics of these tasks")] if drawn else []


def chat(sources: Sources) -> Section | None:
    """Answers to open questions, compared by a judge; shown where it was asked for."""
    found = sources.chat
    rate = found.get("win_rate")
    if measure(rate)[0] is None:
        return None
    judge = mapping(found.get("judge"))
    who = " at ".join(text(judge[key]) for key in ("model", "host") if text(judge.get(key), ""))
    facts: Pairs = [
        ("Win rate of 4-bit, a tie counts half", f"{shown(rate, percent)} ({between(rate, percent)})"),
        ("Won, tied, lost", ", ".join(count(found.get(key)) for key in ("wins", "ties", "losses"))),
        ("Questions", count(found.get("questions"))),
        ("Verdicts that could not be read", count(found.get("unread"))),
        ("Verdicts that changed with the order", shown(found.get("inconsistent"), percent)),
        ("Length of answers against BF16's", shown(found.get("length"), lambda x: f"{x:.2f}×")),
        ("Judge", who or "–"),
    ]
    rows = [mapping(row) for row in listing(found.get("by_category"))]
    drawn = [
        [text(row.get("category")), count(row.get("questions")), shown(row.get("win_rate"), percent)] for row in rows
    ]
    by = [table([left("Category"), right("Questions"), right("Win rate")], drawn, fold="By category")] if drawn else []
    return Section("chat", "Chat, judged", [Facts(facts), *by], "Chat")


def show_reach(reach: float) -> str:
    return f"{100 * reach:.3g} points" if reach <= 1 else significant(reach, 3)


def _row(row: dict[str, Any], reach: float) -> list[Cell | str]:
    show, differ = _spelling(row)
    value, low, high = measure(row.get("difference"))
    ratio = dig(row, "length", "ratio")
    better = "" if row.get("higher_is_better", True) else ", less is better"
    return [
        Cell(text(row.get("name")), note=f"{text(row.get('metric'), '')}{better}"),
        count(row.get("items")),
        shown(row.get("baseline"), show),
        Cell(shown(row.get("model"), show), bold=True),
        "–" if value is None else differ(value),
        between(row.get("difference"), differ),
        Cell(bullet=difference_bullet(value, low, high, reach)),
        shown(row.get("recovery"), percent),
        "–" if number(row.get("flips")) is None else percent(row.get("flips")),
        Cell(shown(ratio, lambda x: f"{x:.2f}×"), note="rambles" if dig(row, "length", "passed") is False else ""),
    ]


def _average(average: dict[str, Any], reach: float) -> list[Cell | str]:
    value, low, high = measure(average.get("difference"))
    bullet = Cell(bullet=difference_bullet(value, low, high, reach))
    moved = [shown(average.get("difference"), points), between(average.get("difference"), points)]
    return [Cell("Average", bold=True), "", "", "", *moved, bullet, shown(average.get("recovery"), percent), "", ""]


def _spelling(row: dict[str, Any]) -> tuple[Any, Any]:
    """How a task's scores and differences are written: shares in percent, others (BLEU) as they are."""
    scores = [x for side in ("baseline", "model") if (x := measure(row.get(side))[0]) is not None]
    if all(-1 <= x <= 1 for x in scores):
        return percent, points
    return significant, lambda x: f"{x:+.4g}"


def recovery(sources: Sources) -> tuple[str, str]:
    """The average recovery and its interval, in words."""
    average = mapping(sources.tasks.get("average"))
    kept = average.get("recovery")
    amount = len(listing(sources.tasks.get("tasks")))
    between_words = between(kept, percent)
    note = f"of BF16's score, {amount} task{'s' * (amount != 1)}"
    return shown(kept, percent), note if between_words == "–" else f"{note}; {between_words}"
