"""Long context: retrieval by length and perplexity by position, BF16 beside 4-bit and an FP8 KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from halfbyte.report.blocks import Block, Cell, Charts, Facts, Heading, Missing, Section, Words, left, right, table
from halfbyte.report.chart import Rule, Series, Value, trend
from halfbyte.report.quality import level
from halfbyte.report.sources import Sources
from halfbyte.report.words import (
    between,
    change,
    count,
    listing,
    mapping,
    measure,
    number,
    percent,
    percent_tick,
    shown,
    significant,
    text,
)

SETTINGS = {
    "bf16": ("BF16", "base", "square", False),
    "bf16+fp8kv": ("BF16, FP8 KV cache", "base", "triangle", True),
    "4bit": ("4-bit", "four", "dot", False),
    "4bit+fp8kv": ("4-bit, FP8 KV cache", "four", "diamond", True),
}
"""Name, colour, shape, dashed of each setting that is measured."""


def long_context(sources: Sources) -> Section | Missing:
    """Curves of what is retrieved at which length, of the perplexity ratio, and the drift that they add up to."""
    found = sources.long_context
    retrieval = [mapping(row) for row in listing(found.get("retrieval"))]
    buckets = [mapping(row) for row in listing(found.get("perplexity"))]
    if not retrieval and not buckets:
        return Missing("Long context", "Not measured", sources.command("long_context"))
    blocks: list[Block] = [*_drift(found), *_lost(found, retrieval), *_retrieval(retrieval), *_perplexity(buckets)]
    blocks += [
        Words(f"{setting(name)}: {text(why)}.", soft=True) for name, why in mapping(found.get("not_measured")).items()
    ]
    blocks.append(
        Words(f"Bars are {level(found)} intervals. Drift is the largest loss against BF16 over the lengths.", soft=True)
    )
    return Section("long-context", "Long context", blocks)


def _drift(found: dict[str, Any]) -> list[Block]:
    rows = []
    for key, label in (("drift", "Retrieval lost at worst"), ("ppl_drift", "Perplexity ratio grown at worst")):
        for name, value in mapping(found.get(key)).items():
            if measure(value)[0] is not None:
                words = shown(value, percent)
                interval = between(value, percent)
                rows.append((f"{label}, {setting(name)}", words if interval == "–" else f"{words} ({interval})"))
    return [Facts(rows)] if rows else []


def _lost(found: dict[str, Any], retrieval: Sequence[dict[str, Any]]) -> list[Block]:
    """What is lost against BF16 at each length, over all tasks: the drift as a curve."""
    rows = [mapping(row) for row in listing(found.get("by_length"))]
    lengths = sorted({x for row in [*rows, *retrieval] if (x := number(row.get("length"))) is not None})
    names = [name for name in SETTINGS if name != "bf16"]
    told = {number(row.get("length")): mapping(row.get("drop")) for row in rows}
    series = []
    for name in names:
        own = [measure(told[n].get(name)) if n in told else _mean_drop(retrieval, name, n) for n in lengths]
        series += [_series(name, own)] if any(value[0] is not None for value in own) else []
    up = ("share of answers lost against BF16, all tasks", "tokens of context")
    steps = [length_words(length) for length in lengths]
    chart = trend("Drift by length", steps, series, percent, tick=percent_tick, names=up, rules=[Rule(0.0, "")])
    columns = [right("Tokens"), *(right(f"{one.name}, lost") for one in series)]
    numbers = [[step, *(_with_ends(one.values[i]) for one in series)] for i, step in enumerate(steps)]
    return [Heading("Drift"), Charts([chart], table(columns, numbers, fold="The numbers"))] if chart else []


def _with_ends(value: Value) -> Cell:
    data = dict(zip(("value", "low", "high"), value))
    ends = between(data, percent)
    return Cell(shown(data, percent), note="" if ends == "–" else ends)


def _mean_drop(rows: Sequence[dict[str, Any]], name: str, length: float) -> Value:
    """BF16's score less a setting's, the mean over tasks; no interval, since tasks are not paired here."""
    here = [row for row in rows if number(row.get("length")) == length]
    drops = []
    for task in dict.fromkeys(text(row.get("task")) for row in here):
        own = [row for row in here if text(row.get("task")) == task]
        base, mine = (over_depths(own, key, length)[0] for key in ("bf16", name))
        drops += [base - mine] if base is not None and mine is not None else []
    return (sum(drops) / len(drops) if drops else None, None, None)


def setting(name: str) -> str:
    """What a key of scores stands for."""
    return SETTINGS[name][0] if name in SETTINGS else name


def _retrieval(rows: Sequence[dict[str, Any]]) -> list[Block]:
    tasks = list(dict.fromkeys(text(row.get("task")) for row in rows))
    lengths = sorted({x for row in rows if (x := number(row.get("length"))) is not None})
    steps = [length_words(length) for length in lengths]
    charts, numbers = [], []
    for task in tasks:
        own = [row for row in rows if text(row.get("task")) == task]
        names = [n for n in SETTINGS if any(n in mapping(row.get("scores")) for row in own)]
        found = {name: [over_depths(own, name, length) for length in lengths] for name in names}
        series = [_series(name, found[name]) for name in names]
        chart = trend(task, steps, series, percent, tick=percent_tick, names=("found", "tokens of context"), cap=1.0)
        charts += [chart] if chart else []
        numbers += [
            _at(task, step, [found.get(name, [])[i : i + 1] for name in SETTINGS]) for i, step in enumerate(steps)
        ]
    if not charts:
        return []
    shown_settings = [name for i, name in enumerate(SETTINGS) if any(row[2 + i] != "–" for row in numbers)]
    keep = [0, 1, *(2 + i for i, name in enumerate(SETTINGS) if name in shown_settings)]
    columns = [left("Task"), right("Tokens"), *(right(setting(name)) for name in shown_settings)]
    whole = table(columns, [[row[i] for i in keep] for row in numbers], fold="The numbers")
    return [Heading("Retrieval"), Charts(charts, whole), *_by_depth(rows)]


def _at(task: str, step: str, values: Sequence[Sequence[Value]]) -> list[str]:
    return [task, step, *(percent(v[0][0]) if v and v[0][0] is not None else "–" for v in values)]


def over_depths(rows: Sequence[dict[str, Any]], name: str, length: float) -> Value:
    """A setting's score at a length: the row without a depth, else the mean over the depths (then no interval)."""
    here = [row for row in rows if number(row.get("length")) == length and name in mapping(row.get("scores"))]
    whole = [row for row in here if row.get("depth") is None] or (here if len(here) == 1 else [])
    if whole:
        return measure(mapping(whole[0].get("scores"))[name])
    values = [x for row in here if (x := measure(mapping(row.get("scores"))[name])[0]) is not None]
    return (sum(values) / len(values) if values else None, None, None)


def _by_depth(rows: Sequence[dict[str, Any]]) -> list[Block]:
    deep = [row for row in rows if row.get("depth") is not None]
    if not deep:
        return []
    names = [name for name in SETTINGS if any(name in mapping(row.get("scores")) for row in deep)]
    columns = [left("Task"), right("Tokens"), right("Depth"), *(right(setting(name)) for name in names)]
    drawn = []
    for row in deep:
        depth, scores = number(row.get("depth")), mapping(row.get("scores"))
        at = "–" if depth is None else percent_tick(depth) if depth <= 1 else f"{depth:g}"
        figures = [shown(scores.get(name), percent) for name in names]
        drawn.append([text(row.get("task")), count(row.get("length")), at, *figures])
    return [table(columns, drawn, fold="By depth")]


def _perplexity(buckets: Sequence[dict[str, Any]]) -> list[Block]:
    rows = [row for row in buckets if mapping(row.get("ratio")) or mapping(row.get("ppl"))]
    if not rows:
        return []
    steps = [f"{length_words(number(row.get('from')))}–{length_words(number(row.get('to')))}" for row in rows]
    names = [name for name in SETTINGS if any(name in mapping(row.get("ratio")) for row in rows)]
    series = [
        _series(name, [_less_one(measure(mapping(row.get("ratio")).get(name))) for row in rows]) for name in names
    ]
    up = ("perplexity against BF16", "token position")
    chart = trend(
        "Perplexity lost by position", steps, series, _signed, tick=_signed_tick, names=up, rules=[Rule(0.0, "")]
    )
    kept = [name for name in SETTINGS if any(name in mapping(row.get("ppl")) for row in rows)]
    columns = [
        right("Position"),
        *(right(f"{setting(n)}, perplexity") for n in kept),
        *(right(f"{setting(n)}, change") for n in names),
    ]
    numbers = [
        [
            step,
            *(shown(mapping(row.get("ppl")).get(name), significant) for name in kept),
            *(
                Cell(
                    shown(mapping(row.get("ratio")).get(name), change),
                    note=between(mapping(row.get("ratio")).get(name), change),
                )
                for name in names
            ),
        ]
        for step, row in zip(steps, rows)
    ]
    return [
        Heading("Perplexity by position"),
        Charts([chart] if chart else [], table(columns, numbers, fold="The numbers")),
    ]


def _less_one(value: Value) -> Value:
    a, b, c = (None if x is None else x - 1 for x in value)
    return a, b, c


def _signed(value: float) -> str:
    return percent(value, signed=True)


def _signed_tick(value: float) -> str:
    return f"{100 * value:+.6g}%" if value else "0%"


def _series(name: str, values: Sequence[Value]) -> Series:
    label, look, shape, dashed = SETTINGS[name]
    return Series(label, look, values, shape, dashed)


def length_words(tokens: float | None) -> str:
    """A length of context: 512, 4k, 128k."""
    if tokens is None:
        return "–"
    return f"{tokens / 1024:g}k" if tokens >= 1024 and tokens % 512 == 0 else f"{tokens:g}"
