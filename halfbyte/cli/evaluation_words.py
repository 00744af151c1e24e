"""Tasks, chat and long context in tables for a terminal."""

from __future__ import annotations

from typing import Any


def evaluations_words(results: dict[str, Any]) -> str:
    """Everything that was measured, one part after the other."""
    writers = {"tasks": tasks_words, "chat": chat_words, "long_context": long_context_words}
    return "\n\n".join(write(results[name]) for name, write in writers.items() if name in results)


def tasks_words(result: dict[str, Any]) -> str:
    """A line for each task and metric, then the average, then answers that are too long."""
    lines = [
        f"{'task':28}{'metric':22}{'items':>6}{'BF16':>9}{'4-bit':>9}  {'difference':26}{'recovery':>9}{'flips':>7}"
    ]
    for row in result["tasks"]:
        for metric in [row, *row["others"]]:
            name, items = (row["name"], row["items"]) if metric is row else ("", "")
            flips = "" if metric["flips"] is None else f"{metric['flips']:.1%}"
            figures = f"{metric['baseline']['value']:>9.3f}{metric['model']['value']:>9.3f}"
            difference, recovery = _spread(metric["difference"]), _share(metric["recovery"])
            lines.append(f"{name:28}{metric['metric']:22}{items:>6}{figures}  {difference:26}{recovery:>9}{flips:>7}")
    average = result["average"]
    if average["difference"]:
        kept = _share(average["recovery"])
        lines.append(f"average difference {_spread(average['difference'])}, recovery {kept}")
    return "\n".join([*lines, *_lengths(result["tasks"])])


def chat_words(result: dict[str, Any]) -> str:
    """The verdict of the judge."""
    rate = result["win_rate"]
    lines = [
        f"chat, {result['questions']} questions, judged by {result['judge']['model']}: {result['wins']} won, "
        f"{result['ties']} tied, {result['losses']} lost",
        f"win rate of 4-bit {rate['value']:.1%} ({rate['low']:.1%} .. {rate['high']:.1%}; 50 % is as good as BF16); "
        f"{result['inconsistent']:.0%} of the verdicts turned with the order, {result['unread']} could not be read",
    ]
    return "\n".join([*lines, *_lengths([{**result, "name": "chat"}])])


def long_context_words(result: dict[str, Any]) -> str:
    """Retrieval by length, perplexity by position, drift."""
    keys = list(result["by_length"][0]["scores"])
    lines = [f"{'retrieval, tokens':22}" + "".join(f"{key:>14}" for key in keys) + "   lost"]
    for row in result["by_length"]:
        scores = "".join(f"{row['scores'][key]['value']:>14.1%}" for key in keys)
        lost = ", ".join(f"{key} {_spread(drop)}" for key, drop in row["drop"].items())
        lines.append(f"{row['length']:<22,}{scores}   {lost}")
    lines.append(f"(guessing: {1 / result['candidates']:.1%})")
    if result["perplexity"]:
        lines.append(f"{'perplexity, position':22}" + "".join(f"{key:>14}" for key in keys) + "   ratio")
    for row in result["perplexity"]:
        ppl = "".join(f"{row['ppl'][key]['value']:>14.3f}" for key in keys)
        ratio = ", ".join(f"{key} {_spread(m, plus=False)}" for key, m in row["ratio"].items())
        lines.append(f"{row['from']:>7,} .. {row['to']:<11,}{ppl}   {ratio}")
    for key in keys[1:]:
        growth = f", perplexity ratio grows by {result['ppl_drift'][key]['value']:.1%}" if result["ppl_drift"] else ""
        lines.append(f"drift of {key}: {result['drift'][key]['value']:.1%} of retrieval at worst{growth}")
    lines += [f"not measured: {key}: {reason}" for key, reason in result["not_measured"].items()]
    return "\n".join(lines)


def _lengths(rows: list[dict[str, Any]]) -> list[str]:
    found = []
    for row in rows:
        if length := row["length"]:
            times = f"{length['ratio']['value']:.2f} times" if length["ratio"] else "not to be compared with"
            verdict = "" if length["passed"] else f": it rambles (limit {length['limit']:g})"
            tokens = f"{length['model']:.0f} tokens, {times} BF16's {length['baseline']:.0f}"
            found.append(f"answers of {row['name']}: {tokens}{verdict}")
    return found


def _spread(metric: dict[str, float], plus: bool = True) -> str:
    sign = "+" if plus else ""
    return f"{metric['value']:{sign}.3f} ({metric['low']:{sign}.3f} .. {metric['high']:{sign}.3f})"


def _share(metric: dict[str, float] | None) -> str:
    return "" if metric is None else f"{metric['value']:.1%}"
