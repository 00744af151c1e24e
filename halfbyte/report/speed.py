"""Speed and memory against BF16, measured: speed-up by concurrency, latency, what each kept in memory."""

from __future__ import annotations

from typing import Any

from halfbyte.report.blocks import Block, Cell, Charts, Heading, Items, Missing, Section, Words, left, right, table
from halfbyte.report.chart import Rule, Series, Value, trend
from halfbyte.report.plots import limit_number
from halfbyte.report.quality import level
from halfbyte.report.sources import Sources
from halfbyte.report.words import (
    MISSING,
    between,
    change,
    command,
    count,
    dig,
    listing,
    mapping,
    measure,
    number,
    shown,
    signed,
    significant,
    size,
    text,
)

RATE = "output_tokens_per_second"
MORE = (("mlp", "triangle"), ("lm_head", "diamond"), ("other", "square"))
"""Colour and shape of further configurations of the 4-bit model."""
GOAL = 0.6
"""The strategy's example of what 4 bits should gain: +60 % tokens/s."""
SIDES = {"baseline": "BF16", "model": "4-bit"}
LATENCIES = {"ttft_ms": "First token", "itl_ms": "Between tokens", "e2el_ms": "Whole answer"}


def speed(sources: Sources) -> Section | Missing:
    """Throughput, latency and memory of every platform that was measured."""
    benches = [bench for bench in sources.benches if points_of(bench)]
    if not benches:
        return Missing("Speed, latency, memory in use", "Not measured", sources.command("bench"))
    goal = _goal(sources)
    return Section(
        "speed", "Speed against BF16", [block for bench in benches for block in _bench(bench, goal)], "Speed"
    )


def points_of(bench: dict[str, Any]) -> list[dict[str, Any]]:
    """The measured concurrencies of a bench.json, in order."""
    points = [mapping(point) for point in listing(bench.get("points"))]
    points = [point for point in points if number(point.get("concurrency")) is not None]
    return sorted(points, key=lambda point: number(point.get("concurrency")) or 0)


def _goal(sources: Sources) -> Rule:
    """The speed-up that a gate asks for, else the strategy's."""
    for row in map(mapping, listing(sources.gates.get("gates"))):
        limit = limit_number(row.get("limit"))
        if "speed" in str(row.get("name")) and limit is not None:
            return Rule(limit, f"the gate: {text(row.get('limit'))}")
    return Rule(GOAL, f"the goal: {100 * GOAL:+g}%")


def gain(point: dict[str, Any]) -> Value:
    """A point's speed-up as a gain: 1.6 times is 0.6."""
    value, low, high = (None if x is None else x - 1 for x in measure(point.get("speedup")))
    return value, low, high


def _bench(bench: dict[str, Any], goal: Rule) -> list[Block]:
    points = points_of(bench)
    steps = [f"{number(point.get('concurrency')):g}" for point in points]
    more = list(dict.fromkeys(name for point in points for name in mapping(point.get("configs"))))[: len(MORE)]
    sides = _sides(bench)
    called = sides["model"]
    gains, rates = [Series(called, "four", [gain(point) for point in points])], []
    for (side, label), look, shape in zip(sides.items(), ("base", "four"), ("square", "dot")):
        rates.append(Series(label, look, [measure(dig(point, side, RATE)) for point in points], shape))
    for name, (look, shape) in zip(more, MORE):
        own = [mapping(dig(point, "configs", name)) for point in points]
        gains.append(Series(name, look, [gain(one) for one in own], shape, dashed=True))
        rates.append(Series(name, look, [measure(one.get(RATE)) for one in own], shape, dashed=True))
    names = "sequences at once"
    up = (f"{called} against BF16", names)
    charts = [
        trend("Gain in tokens/s", steps, gains, signed, tick=_tick, names=up, rules=[goal, Rule(0, "")]),
        trend("Output tokens/s", steps, rates, count, names=("tokens a second", names)),
    ]
    vllm = [f"vLLM {text(bench['vllm'])}"] if bench.get("vllm") else []
    where = " · ".join([text(bench[key]) for key in ("platform", "hardware") if text(bench.get(key), "")] + vllm)
    drawn = [chart for chart in charts if chart]
    told = [text(line) for line in [*listing(bench.get("text")), *listing(bench.get("notes"))]]
    return [
        *([Heading(where)] if where else []),
        *([Words(_shape(bench), soft=True)] if _shape(bench) else []),
        *([Items(told)] if told else []),
        *([Charts(drawn)] if drawn else []),
        _throughput(points, called),
        *_latency(points, sides),
        *_memory(bench),
    ]


def _sides(bench: dict[str, Any]) -> dict[str, str]:
    """What the two sides are called."""
    return {**SIDES, "model": text(bench.get("called"), SIDES["model"])}


def _shape(bench: dict[str, Any]) -> str:
    """What was asked of the servers, in a sentence."""
    ways = (("input_tokens", "tokens in"), ("output_tokens", "tokens out"), ("repeats", "repeats"))
    told = [f"{count(bench.get(key))} {way}" for key, way in ways if number(bench.get(key)) is not None]
    return f"{', '.join(told)}; {level(bench)} intervals." if told else ""


def _tick(value: float) -> str:
    return f"{100 * value:+.6g}%" if value else "0%"


def _throughput(points: list[dict[str, Any]], called: str) -> Block:
    labels = ("At once", "BF16 tokens/s", f"{called} tokens/s", "Gain", "Interval", "Requests/s", "Failed")
    rows: list[list[Cell | str]] = []
    for point in points:
        base, step = mapping(point.get("baseline")), f"{number(point.get('concurrency')):g}"
        more = [(str(name), mapping(one)) for name, one in mapping(point.get("configs")).items()]
        for name, one, held in [("", mapping(point.get("model")), point), *((n, m, m) for n, m in more)]:
            rows.append(
                [
                    Cell(step, note=name),
                    _rate(base),
                    _rate(one),
                    Cell(shown(held.get("speedup"), change), bold=True),
                    between(held.get("speedup"), change),
                    " → ".join(shown(side.get("requests_per_second"), significant) for side in (base, one)),
                    " → ".join(count(side.get("failed")) for side in (base, one)),
                ]
            )
    return table([right(label) for label in labels], rows, stack=True)


def _rate(side: dict[str, Any]) -> Cell:
    status = text(side.get("status"), "ok")
    if status != "ok":
        return Cell(status, status="" if status == MISSING else "failed", note=text(side.get("reason"), ""))
    return Cell(
        shown(side.get("output_tokens_per_second"), count),
        note=between(side.get("output_tokens_per_second"), count).replace("–", ""),
    )


def _runs(point: dict[str, Any], sides: dict[str, str]) -> list[tuple[str, dict[str, Any]]]:
    """BF16, 4-bit and further configurations at a concurrency."""
    more = [(str(name), mapping(one)) for name, one in mapping(point.get("configs")).items()]
    return [(label, mapping(point.get(side))) for side, label in sides.items()] + more


def _latency(points: list[dict[str, Any]], sides: dict[str, str]) -> list[Block]:
    rows = []
    for point in points:
        for label, found in _runs(point, sides):
            cells = [_three(mapping(found.get(key))) for key in LATENCIES]
            if any(cell != "–" for cell in cells):
                rows.append([f"{number(point.get('concurrency')):g}", label, *cells])
    columns = [right("At once"), left(""), *(right(f"{label}, ms", wide=True) for label in LATENCIES.values())]
    heading = Heading("Latency: median / 95th / 99th percentile")
    return [heading, table(columns, rows)] if rows else []


def _three(found: dict[str, Any]) -> str:
    values = [number(found.get(key)) for key in ("p50", "p95", "p99")]
    return "–" if not any(x is not None for x in values) else " / ".join("–" if x is None else _ms(x) for x in values)


def _ms(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _memory(bench: dict[str, Any]) -> list[Block]:
    rows, sides = [], _sides(bench)
    for side, held in mapping(bench.get("memory")).items():
        found = mapping(held)
        sizes = [number(found.get(key)) for key in ("weight_bytes", "peak_device_bytes")]
        weights, peak = ("not known" if x is None else size(x) for x in sizes)
        rows.append([sides.get(str(side), str(side)), weights, count(found.get("kv_cache_tokens")), peak])
    columns = [left("Memory"), right("Weights"), right("Tokens that the KV cache holds"), right("Peak")]
    return [Heading("Memory in use"), table(columns, rows, stack=True)] if rows else []


def bench_commands(bench: dict[str, Any]) -> list[tuple[str, str]]:
    """The commands of a bench.json (a list, or by what they measure), with what they are for."""
    told, sides = bench.get("commands"), _sides(bench)
    named = [(f", {sides.get(str(key), str(key))}", one) for key, one in told.items()] if isinstance(told, dict) else []
    named = named or [("", one) for one in listing(told)]
    lines = []
    for name, one in named:
        several = one if isinstance(one, list) and one and not isinstance(one[0], str) else [one]
        lines += [
            (f"Measured on {text(bench.get('platform'), 'this machine')}{name}", command(each)) for each in several
        ]
    return [(label, line) for label, line in lines if line]


def headline(sources: Sources) -> tuple[str, str] | None:
    """The gain in tokens/s at the concurrency that was planned for, else the largest that the first platform measured;
    None without one."""
    wanted = number(dig(sources.plan, "request", "concurrency"))
    known = [(bench, point) for bench in sources.benches for point in points_of(bench) if gain(point)[0] is not None]
    if not known:
        return None
    first = [pair for pair in known if pair[0] is known[0][0]]
    bench, point = next((pair for pair in known if number(pair[1].get("concurrency")) == wanted), first[-1])
    where = text(bench.get("platform"), "this machine")
    return signed(gain(point)[0]), f"{number(point.get('concurrency')):g} at once on {where}"
