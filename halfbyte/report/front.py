"""The Pareto plots: what is lost (KL) against what is gained (tokens/s, else bytes), a panel each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.report.blocks import Charts, Section, Words
from halfbyte.report.chart import Rule, Value
from halfbyte.report.plane import Point, scatter
from halfbyte.report.sources import Sources
from halfbyte.report.speed import points_of
from halfbyte.report.words import count, dig, listing, mapping, measure, number, significant, size, text

LOOKS = {
    "gptq": ("attention", "dot"),
    "awq": ("mlp", "square"),
    "nvfp4": ("lm_head", "diamond"),
    "rtn": ("other", "triangle"),
}
"""Colour and shape of a method's points."""
BASE = ("base", "square")
Panel = tuple[str, float | None]
"""Platform and concurrency; None where it is not said."""


@dataclass(frozen=True)
class Candidate:
    """One recipe's place: KL to BF16, bytes, tokens/s by panel."""

    name: str
    method: str
    kl: Value
    bytes: float | None
    rates: dict[Panel, Value]


def run_front(sources: Sources) -> Section | None:
    """BF16 and this artifact, a panel for each platform and concurrency, or against bytes where no speed is known."""
    kl = measure(dig(sources.evaluation, "metrics", "kl_mean"))
    if kl[0] is None:
        return None
    plan, manifest = mapping(sources.plan.get("bytes")), sources.manifest
    recipe = mapping(manifest.get("recipe")) or mapping(sources.plan.get("recipe"))
    method = text(recipe.get("method"), "4-bit")
    after = number(manifest.get("bytes")) or number(plan.get("after"))
    before = number(plan.get("before")) or number(manifest.get("bytes_bf16"))
    made = Candidate("4-bit", method, kl, after, bench_rates(sources.benches, "model"))
    base = Candidate("BF16", "", (0.0, None, None), before, bench_rates(sources.benches, "baseline"))
    floor = number(dig(sources.evaluation, "noise_floor", "kl_mean"))
    return front_section([made], base, floor, with_bytes=not made.rates)


def front_section(
    made: Sequence[Candidate], base: Candidate | None, floor: float | None, with_bytes: bool
) -> Section | None:
    """The panels of `made`; `base` is BF16, drawn where it was measured too."""
    panels = sorted({panel for one in made for panel in one.rates}, key=lambda p: (p[0], p[1] or 0))
    charts = [_speed_panel(panel, made, base, floor) for panel in panels]
    if with_bytes:
        charts.append(_byte_panel(made, base, floor))
    drawn = [chart for chart in charts if chart]
    if not drawn:
        return None
    notes = [
        "Up: KL divergence from BF16, nats a token, lower is closer. The dashed level is BF16 against itself: below it "
        "no difference means anything." + " Ringed: nothing is better in both." * (len(made) > 1),
        *(["Speed was not measured, so bytes stand in for it."] if not panels else []),
    ]
    title = "What is lost against what is gained" if panels else "What is lost against what it weighs"
    return Section(
        "front", title, [Charts(drawn), *(Words(note, soft=True) for note in notes)], "Loss against gain", True
    )


def _speed_panel(
    panel: Panel, made: Sequence[Candidate], base: Candidate | None, floor: float | None
) -> dict[str, Any] | None:
    here = [one for one in made if panel in one.rates]
    best = _ringed([(one.kl[0], -(one.rates[panel][0] or 0)) for one in here])
    dots = [
        _dot(one, one.rates[panel], best[i], f"{count(one.rates[panel][0])} tokens/s") for i, one in enumerate(here)
    ]
    if base and panel in base.rates:
        dots.append(
            Point("BF16", base.rates[panel], base.kl, *BASE, title=f"BF16: {count(base.rates[panel][0])} tokens/s")
        )
    names = ("KL, nats", "output tokens a second")
    return scatter(
        panel_words(panel), dots, (count, significant2), names=names, rules=_floor(floor), legend=legend(here)
    )


def _byte_panel(made: Sequence[Candidate], base: Candidate | None, floor: float | None) -> dict[str, Any] | None:
    here = [one for one in made if one.bytes is not None]
    best = _ringed([(one.kl[0], one.bytes or 0) for one in here])
    dots = [_dot(one, (one.bytes, None, None), best[i], size(one.bytes)) for i, one in enumerate(here)]
    if base and base.bytes is not None:
        dots.append(Point("BF16", (base.bytes, None, None), base.kl, *BASE, title=f"BF16: {size(base.bytes)}"))
    names = ("KL, nats", "bytes of the checkpoint")
    grain = next(
        (unit for unit in (2**40, 2**30, 2**20, 2**10) if max((one.bytes or 0 for one in here), default=0) >= unit), 1
    )
    return scatter(
        "Against bytes", dots, (size, significant2), names=names, rules=_floor(floor), legend=legend(here), grain=grain
    )


def _dot(one: Candidate, x: Value, front: bool, told: str) -> Point:
    look, shape = LOOKS.get(one.method, LOOKS["rtn"])
    title = f"{one.name}: KL {significant(one.kl[0], 3)}, {told}"
    return Point(one.name, x, one.kl, look, shape, front, title)


def legend(made: Sequence[Candidate]) -> list[tuple[str, str, str]]:
    """An entry for each method, where there are several."""
    methods = sorted({one.method for one in made})
    return [(name.upper(), *LOOKS.get(name, LOOKS["rtn"])) for name in methods] if len(methods) > 1 else []


def significant2(value: float) -> str:
    return significant(value, 2)


def _floor(floor: float | None) -> list[Rule]:
    return [] if floor is None else [Rule(floor, "noise floor")]


def panel_words(panel: Panel) -> str:
    platform, concurrency = panel
    return ", ".join(
        [platform or "Tokens a second", *([f"{concurrency:g} at once"] if concurrency is not None else [])]
    )


def pareto(places: Sequence[tuple[float | None, float]]) -> list[bool]:
    """Whether no other place is at least as small in both and smaller in one; False without a first coordinate."""
    known = [(a, b) for a, b in places if a is not None]

    def beaten(a: float, b: float) -> bool:
        return any(x <= a and y <= b and (x < a or y < b) for x, y in known)

    return [a is not None and not beaten(a, b) for a, b in places]


def _ringed(places: Sequence[tuple[float | None, float]]) -> list[bool]:
    """The front, where there is something to choose from."""
    return pareto(places) if len(places) > 1 else [False] * len(places)


def bench_rates(benches: Sequence[dict[str, Any]], side: str) -> dict[Panel, Value]:
    """Output tokens/s of BF16 ("baseline") or the artifact ("model"), by platform and concurrency."""
    found: dict[Panel, Value] = {}
    for bench in benches:
        for point in points_of(bench):
            rate = measure(dig(point, side, "output_tokens_per_second"))
            if rate[0] is not None:
                found[(text(bench.get("platform"), ""), number(point.get("concurrency")))] = rate
    return found


def cell_rates(cell: dict[str, Any], side: str = "model") -> dict[Panel, Value]:
    """The same of a sweep's cell: from its bench results, else its one tokens_per_second."""
    told = cell.get("bench")
    benches = [
        mapping(bench)
        for bench in (told if isinstance(told, list) else listing(mapping(told).get("platforms")) or [told])
    ]
    rates = bench_rates(benches, side)
    only = number(cell.get("tokens_per_second"))
    return rates or ({("", None): (only, None, None)} if side == "model" and only is not None else {})
