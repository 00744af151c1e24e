"""How close the 4-bit model is to BF16, token by token: figures, where they differ, and the tokens that differ most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from halfbyte.report.blocks import Block, Cell, Charts, Heading, Missing, Section, Words, left, right, table
from halfbyte.report.chart import Rule, Series, histogram, trend
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
    visible,
)

METRICS: tuple[tuple[str, str, Any], ...] = (
    ("ppl_baseline", "Perplexity, BF16", significant),
    ("ppl", "Perplexity, 4-bit", significant),
    ("ppl_ratio", "Perplexity, change", change),
    ("kl_mean", "KL divergence, mean, nats", significant),
    ("kl_median", "KL divergence, median, nats", significant),
    ("kl_p99", "KL divergence, 99th percentile, nats", significant),
    ("kl_p999", "KL divergence, 99.9th percentile, nats", significant),
    ("top1", "Same most likely next token", percent),
    ("flips", "Right in one, wrong in the other", percent),
    ("loglik_gap", "Log-likelihood lost a token, nats", significant),
)
FEW = 10
"""Tokens that are shown unasked, and edges of a histogram that all have a label."""
CONTEXT = 160
"""Characters of context that are shown before a token."""


def fidelity(sources: Sources) -> Section | Missing:
    """The figures with their intervals and the noise floor."""
    evaluation = sources.evaluation
    metrics, floor = mapping(evaluation.get("metrics")), mapping(evaluation.get("noise_floor"))
    if not metrics:
        return Missing("Fidelity to BF16", "Not measured", sources.command("evaluation"))
    columns = [
        left("Measure", wide=True),
        right("Value"),
        right(f"{level(evaluation)} interval", wide=True),
        right("Noise floor"),
    ]
    rows = [
        [label, Cell(shown(metrics[name], show), bold=True), between(metrics[name], show), shown(floor.get(name), show)]
        for name, label, show in METRICS
        if name in metrics
    ]
    notes = [Words(note, soft=True) for note in _notes(evaluation, floor)]
    return Section("fidelity", "Fidelity: how close to BF16", [table(columns, rows), *notes], "Fidelity")


def level(result: dict[str, Any]) -> str:
    """The confidence level of a result's intervals, as 95%."""
    known = number(result.get("confidence"))
    return f"{known:.0%}" if known is not None else "stated"


def _notes(evaluation: dict[str, Any], floor: dict[str, Any]) -> list[str]:
    source = mapping(evaluation.get("text"))
    tokens, windows, window, stride = (number(source.get(key)) for key in ("tokens", "windows", "window", "stride"))
    notes = []
    if tokens is not None:
        cut = ""
        if windows is not None and window is not None and stride is not None:
            cut = f", {windows:,.0f} windows of {window:,.0f}, stride {stride:,.0f}"
        own = evaluation.get("self_generated")
        of = "that the BF16 model wrote itself" if own else f"of {text(source.get('source'))}"
        notes.append(f"Measured on {tokens:,.0f} tokens {of}{cut}.")
    if evaluation.get("self_generated"):
        notes.append("On a model's own text the log-likelihood lost estimates the KL divergence.")
    if floor:
        how = text(floor.get("how"), "BF16 measured against itself")
        notes.append(f"Noise floor: {how}. A difference no larger than it means nothing.")
    return notes


def where(sources: Sources) -> Section | Missing | None:
    """KL and agreement by position and by BF16's confidence, and how KL is spread over tokens."""
    evaluation = sources.evaluation
    if not mapping(evaluation.get("metrics")):
        return None
    blocks = [
        *_by(evaluation, "by_position", "By position in the window", "position in the window"),
        *_by(evaluation, "by_confidence", "By BF16's confidence", "BF16's probability of its most likely token"),
        *_spread(evaluation),
    ]
    if not blocks:
        what = "Where the two differ (position, confidence, worst tokens)"
        return Missing(what, "Not measured", sources.command("evaluation"))
    return Section("where", "Where the two differ", [*blocks, *_worst(evaluation)], "Where they differ")


def _by(evaluation: dict[str, Any], key: str, title: str, axis_name: str) -> list[Block]:
    rows = [mapping(row) for row in listing(evaluation.get(key))]
    rows = [row for row in rows if measure(row.get("kl"))[0] is not None or measure(row.get("top1"))[0] is not None]
    if not rows:
        return []
    steps, floor = span_labels(rows), number(mapping(evaluation.get("noise_floor")).get("kl_mean"))
    kl = Series("KL", "four", [measure(row.get("kl")) for row in rows])
    top1 = Series("same token", "four", [measure(row.get("top1")) for row in rows])
    rules = [] if floor is None else [Rule(floor, "noise floor")]
    charts = [
        trend("KL to BF16", steps, [kl], significant, names=("nats a token, mean", axis_name), rules=rules),
        trend(
            "Same most likely next token",
            steps,
            [top1],
            percent,
            tick=percent_tick,
            names=("share of tokens", axis_name),
            zero=False,
            cap=1.0,
        ),
    ]
    counted = any(number(row.get("tokens")) is not None for row in rows)
    columns = [
        left("From–to"),
        *([right("Tokens")] if counted else []),
        right("KL"),
        right("Interval"),
        right("Same token"),
        right("Interval"),
    ]
    numbers = [
        [
            step,
            *([count(row.get("tokens"))] if counted else []),
            shown(row.get("kl"), significant),
            between(row.get("kl"), significant),
            shown(row.get("top1"), percent),
            between(row.get("top1"), percent),
        ]
        for step, row in zip(steps, rows)
    ]
    drawn = [chart for chart in charts if chart]
    return [Heading(title), Charts(drawn, table(columns, numbers, fold="The numbers"))]


def span_labels(rows: Sequence[dict[str, Any]]) -> list[str]:
    """`from`–`to` of each row: whole numbers as they are, shares in percent."""
    found = []
    for row in rows:
        low, high = number(row.get("from")), number(row.get("to"))
        share = high is not None and 0 < high <= 1
        spell = (lambda x: f"{100 * x:.3g}") if share else (lambda x: f"{x:g}" if x < 1e6 else count(x))
        words = ["" if x is None else spell(x) for x in (low, high)]
        found.append("–".join(words) + ("%" if share else ""))
    return found


def _spread(evaluation: dict[str, Any]) -> list[Block]:
    drawn = mapping(evaluation.get("kl_histogram"))
    edges, counts = ([number(x) for x in listing(drawn.get(key))] for key in ("edges", "counts"))
    if None in counts or len(edges) != len(counts) + 1:
        return []
    total = sum(x or 0 for x in counts)
    if not total:
        return []
    labels = ["∞" if x is None else _edge(x) for x in edges]
    shares = [(x or 0) / total for x in counts]
    ticks = labels if len(edges) <= FEW else [label if _is_decade(x) else "" for x, label in zip(edges, labels)]
    chart = histogram("KL of single tokens", labels, shares, _tick_or_percent, ("share of tokens", "KL, nats"), ticks)
    rows = [[f"{labels[i]} to {labels[i + 1]}", count(counts[i]), percent(share)] for i, share in enumerate(shares)]
    numbers = table([left("KL, nats"), right("Tokens"), right("Share")], rows, fold="The numbers")
    return [Heading("How KL is spread"), Charts([chart], numbers)] if chart else []


def _edge(value: float) -> str:
    return f"{value:.2g}".replace("e-0", "e-")


def _is_decade(value: float | None) -> bool:
    return value is not None and value > 0 and abs(math.log10(value) - round(math.log10(value))) < 1e-3


def _tick_or_percent(value: float) -> str:
    return percent_tick(value) if abs(100 * value - round(100 * value, 1)) < 1e-9 else percent(value)


def _worst(evaluation: dict[str, Any]) -> list[Block]:
    rows = [mapping(row) for row in listing(evaluation.get("worst"))]
    if not rows:
        return []
    drawn = [_worst_row(row) for row in rows]
    columns = [
        right("KL"),
        left("The text, and the token that came", wide=True),
        left("BF16 expected", wide=True),
        left("4-bit expected", wide=True),
        right("Window, position"),
    ]
    return [
        Heading("The tokens that differ most"),
        table(columns, drawn[:FEW], stack=True),
        *([table(columns, drawn[FEW:], stack=True, fold="More of them")] if drawn[FEW:] else []),
        Words(
            "⏎ is a line end, ␣ a space. Beneath a token: the probability that BF16, then 4-bit gives it.",
            soft=True,
        ),
    ]


def _worst_row(row: dict[str, Any]) -> list[Cell | str]:
    before = visible(row.get("context"))
    before = "… " + before[-CONTEXT:] if len(before) > CONTEXT else before
    came = [f"this token: {chances}" for chances in [_chances(row, "token")] if chances]
    return [
        Cell(significant(row.get("kl"), 3), bold=True),
        Cell(_token(row.get("token")), note=" · ".join([before, *came]), code=True),
        Cell(_token(row.get("baseline_top")), note=_chances(row, "baseline_top"), code=True),
        Cell(_token(row.get("model_top")), note=_chances(row, "model_top"), code=True),
        f"{text(row.get('window'))}, {text(row.get('position'))}",
    ]


def _token(value: Any) -> str:
    """A token's text; spaces at its ends, and that there is none, are made visible."""
    words = visible(value) if value != "" else "(no text)"
    bare = words.strip(" ")
    before = len(words) - len(words.lstrip(" "))
    return "␣" * before + bare + "␣" * (len(words) - before - len(bare)) if bare else "␣" * len(words)


def _chances(row: dict[str, Any], which: str) -> str:
    """Both models' probabilities of a row's token, where `probabilities` holds them by place or by token."""
    chances = mapping(row.get("probabilities"))
    held = chances.get(which, chances.get(str(row.get(which))))
    pair = [held.get("baseline"), held.get("model")] if isinstance(held, dict) else listing(held)
    known = [percent(x) for x in pair if number(x) is not None] or ([percent(held)] if number(held) is not None else [])
    return ", ".join(known)
