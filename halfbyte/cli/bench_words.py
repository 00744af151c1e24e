"""What `bench` and `tune` say on a terminal."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from halfbyte.evaluate.speed_result import GIB, sides

HEAD = ("", "tokens/s", "95 % interval", "x BF16", "95 % interval", "TTFT p50/p95", "ITL p50/p95", "e2e p50/p95/p99")


def bench_words(output: Path, result: Mapping[str, Any], evidence: Path | None, left_out: Sequence[str]) -> str:
    """A table for every concurrency, memory, what it means, where it stands."""
    shape = f"{result['input_tokens']} tokens in, {result['output_tokens']} out, {result['repeats']} runs each"
    lines = [f"{result['platform']}: {result['hardware']}, vLLM {result['vllm']}; {shape}; times in ms", ""]
    names = sides(result["called"])
    rows: list[Sequence[str]] = [HEAD]
    for point in result["points"]:
        rows += list(_rows(f"{point['concurrency']} at once", names, point, "output_tokens_per_second"))
    if result["prefill"]:
        prefill = result["prefill"]
        name = f"{prefill['prompts']} prompts of {prefill['input_tokens']}"
        rows += list(_rows(name, names, prefill, "total_tokens_per_second"))
    lines += [*_aligned(rows), ""]
    lines += [_memory(names.get(name, name), entry) for name, entry in result["memory"].items()]
    lines += [f"{text[:1].upper()}{text[1:]}." for text in result["text"]]
    lines += _stability(result.get("stability"))
    lines += [f"evidence: {evidence} (halfbyte serve, plan --evidence {evidence})"] if evidence else []
    lines += [f"not in it: {text}" for text in left_out]
    return "\n".join([*lines, f"results: {output / 'bench.json'}"])


def tune_words(directory: Path, output: Path, result: Mapping[str, Any], on: str | None = None) -> str:
    """Every flag that was tried, what was kept, and the command. `on`: where `halfbyte serve` would say just that."""
    lines = [f"{result['platform']}: {result['hardware']}, vLLM {result['vllm']}; {result['concurrency']} at once", ""]
    rows: list[Sequence[str]] = [("flag", "value", "tokens/s", "against before", "95 % interval", "")]
    for knob in result["knobs"]:
        for tried in knob["tried"]:
            gain = tried["against"]
            rows.append(
                (
                    knob["flag"],
                    tried["value"] or (f"({knob['stands']})" if knob["stands"] else "(without)"),
                    _rate(tried["output_tokens_per_second"]) if tried["status"] == "ok" else tried["status"],
                    f"{gain['value']:.2f}x" if gain else "",
                    f"{gain['low']:.2f}..{gain['high']:.2f}" if gain else "",
                    _fate(knob) if tried["value"] and tried["value"] == knob["kept"] else "",
                )
            )
    lines += [*_aligned(rows), ""]
    lines += [
        f"{knob['flag']} is never kept by itself: {knob['changes']}" for knob in result["knobs"] if knob["changes"]
    ]
    lines += [f"{result['text'][:1].upper()}{result['text'][1:]}.", "", result["command"], ""]
    lines.append(f"results: {output / 'tune.json'}")
    if on:
        words = f" -- {shlex.join(result['words'])}" if result["words"] else ""
        told = f"{shlex.quote(str(directory))} --on {shlex.quote(on)} --concurrency {result['concurrency']}{words}"
        lines.append(f"next: halfbyte serve {told}")
    return "\n".join(lines)


def _fate(knob: Mapping[str, Any]) -> str:
    return "kept by the platform's measurements" if knob["known"] else "kept"


def _rows(name: str, names: Mapping[str, str], point: Mapping[str, Any], rate: str) -> Iterable[Sequence[str]]:
    sides = {side: point.get(side) for side in names} | point.get("configs", {})
    for side, entry in sides.items():
        if entry is None:
            continue
        title = f"{name}, {names.get(side, side)}"
        if entry["status"] != "ok":
            yield (title, entry["status"], *[""] * 6)
            continue
        gain = point["speedup"] if side == "model" else entry.get("speedup")
        speed = entry[rate]
        yield (
            title,
            _rate(speed),
            f"{speed['low']:,.1f}..{speed['high']:,.1f}",
            f"{gain['value']:.2f}" if gain else "",
            f"{gain['low']:.2f}..{gain['high']:.2f}" if gain else "",
            _times(entry["ttft_ms"], ("p50", "p95")),
            _times(entry["itl_ms"], ("p50", "p95")),
            _times(entry["e2el_ms"], ("p50", "p95", "p99")),
        )


def _rate(metric: Mapping[str, float]) -> str:
    return f"{metric['value']:,.1f}"


def _times(metric: Mapping[str, float | None], keys: Sequence[str]) -> str:
    values = [metric[key] for key in keys]
    return "/".join(f"{value:,.0f}" if value >= 100 else f"{value:.1f}" for value in values if value is not None)


def _memory(name: str, entry: Mapping[str, Any]) -> str:
    words = [f"weights {entry['weight_bytes'] / GIB:.2f} GiB ({entry['weight_bytes_from']})"]
    if entry["peak_device_bytes"]:
        words.append(f"most memory in use {entry['peak_device_bytes'] / GIB:.2f} GiB")
    if entry["kv_cache_tokens"]:
        words.append(f"room for {entry['kv_cache_tokens']:,} tokens of keys and values")
    return f"{name}: {', '.join(words)}"


def _stability(stable: Mapping[str, Any] | None) -> list[str]:
    if stable is None:
        return []
    if not stable["ok"]:
        return ["Not stable: " + "; ".join(stable["reasons"]) + "."]
    share, load = stable["repetition"], stable["load"]
    other = "" if share["baseline"] is None else f" (BF16: {share['baseline']:.1%})"
    words = f"Stable: of {stable['generations']} long answers {share['model']:.1%} run into a loop{other}"
    if load:
        words += f"; {load['requests']} requests at concurrency {load['concurrency']}"
        words += f" in {load['seconds']:.0f} s, none failed"
    return [words + "."]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    shown = [i for i in range(len(widths)) if any(row[i] for row in rows[1:])]
    lines = []
    for row in rows:
        words = [row[i].ljust(widths[i]) if i == 0 else row[i].rjust(widths[i]) for i in shown]
        lines.append("  ".join(words).rstrip())
    return lines
