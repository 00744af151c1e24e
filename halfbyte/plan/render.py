"""A plan as text for a terminal: the verdict first (what to make, on what, what it gives), then the details."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from halfbyte.plan.speed import times
from halfbyte.plan.text import human_size, item, table, wrap

LABEL = "  {:<10}"
UNSURE = "~ within the noise of the measurement: may be faster or slower than BF16"


def render_plan(plan: dict[str, Any], explain: bool = False, budget: Sequence[str] = ()) -> str:
    """The plan in plain text, at most 80 columns wide but for commands.

    budget: the gates as the user writes them; without it their limits as numbers.
    explain: also the sources of warnings and figures, group sizes, and what vLLM is known to do with the format.
    """
    sections = [
        _verdict(plan, budget),
        _reasons(plan),
        _strategy(plan),
        _others(plan),
        *(_speed(row) for row in plan["speed"]),
        _memory(plan),
        _linears(plan),
        _groups(plan, explain),
        _kept(plan),
        _versions(plan),
        _commands(plan),
        _warnings(plan, explain),
        *((_figures(plan), _facts(plan)) if explain else ()),
    ]
    return "\n\n".join(section for section in sections if section)


def _verdict(plan: dict[str, Any], budget: Sequence[str]) -> str:
    model, sizes = plan["model"], plan["bytes"]
    experts = f", {model['moe']['experts']} experts a block" if model["moe"] else ""
    name = model.get("name", model["path"])
    lines = [
        f"{name}: {model['family']}, {model['blocks']} blocks{experts}, {model['parameters'] / 1e6:,.0f} M parameters",
        "",
        _labelled("make", plan["title"]),
        _labelled(
            "size",
            f"{human_size(sizes['before'])} in BF16 -> {human_size(sizes['after'])} "
            f"({sizes['after'] / max(1, sizes['before']):.0%}); "
            f"{_bits(sizes['bits_per_quantized_weight'])} bits a quantized weight, scales counted, "
            f"{_bits(sizes['bits_per_parameter'])} over the whole model",
        ),
    ]
    gates = plan["request"]["gates"].items()
    limits = budget or [f"{name} {limit:g}" for name, limit in gates if limit is not None]
    if limits:
        lines.append(_labelled("quality", f"budget {', '.join(limits)}: halfbyte run measures it, the plan cannot"))
    memory = {row["platform"]: row for row in plan["memory"]}
    promises = {row["platform"]: row["text"] for row in plan["strategy"]["gain"]}
    for row in plan["speed"]:
        lines.append(_labelled(row["platform"], _gains(row)))
        if any(gain["told"] is False for gain in row["served"]):
            lines.append(_labelled("", UNSURE))
        lines.append(_labelled("", f"the strategy's '+60-100 % tokens/s': {promises[row['platform']]}"))
        lines.append(_labelled("", _fits(memory[row["platform"]])))
    return "\n".join(lines)


def _gains(row: dict[str, Any]) -> str:
    known = [gain for gain in row["served"] if gain["gain"] is not None]
    if not known:
        return "speed against BF16 is not known here"
    bases = [_basis(gain) for gain in known]
    shared = len(set(bases)) == 1
    told = [
        f"{times(gain['gain'], gain['told'])} at {gain['concurrency']}{'' if shared else f' ({basis})'}"
        for gain, basis in zip(known, bases)
    ]
    basis = f" ({bases[0]})" if shared else ""
    return f"speed against BF16 by concurrency: {', '.join(told)}{basis}; kernel {known[0]['kernel']}"


def _basis(gain: dict[str, Any]) -> str:
    """measured, measured at 256 (where another concurrency is asked for), roofline."""
    at = gain["measured_at"]
    return gain["basis"] if at in (None, gain["concurrency"]) else f"{gain['basis']} at {at}"


def _fits(row: dict[str, Any]) -> str:
    many = row["concurrency"] > 1
    load = f"{row['concurrency']} sequence{'s' * many} of {row['context']:,} tokens take{'s' * (not many)}"
    if row["usable_bytes"] is None:
        return f"{load} {human_size(row['total_bytes'])}; this platform's memory is not known here"
    verdict = "fits" if row["fits"] else "DOES NOT FIT"
    ranks = f" on each of {row['tp']} devices" if row["tp"] > 1 else ""
    return (
        f"{verdict}: {load} {human_size(row['total_bytes'])} of {human_size(row['usable_bytes'])}{ranks}; "
        f"room for {row['max_concurrency']:,} (BF16: {row['bf16_max_concurrency']:,})"
    )


def _reasons(plan: dict[str, Any]) -> str:
    rows = [item(reason["text"], reason["source"]) for reason in plan["reasons"]]
    rows += [
        item(f"{row['platform']}: --kv-cache-dtype {row['kv_cache_dtype']}: {row['reason']}", row["source"])
        for row in plan["kv_cache"]
    ]
    return _section("Why" if plan["reasons"] else "Why (the recipe is yours)", rows)


def _strategy(plan: dict[str, Any]) -> str:
    rows = []
    for row in plan["strategy"]["disagreements"]:
        text = (
            f"{row['platform']}, concurrency {row['concurrency']}: the strategy's NVFP4, served without a flag "
            f"({row['strategy']['kernel']}), {row['text']}; instead: {row['do']}"
        )
        rows.append(item(text, row["source"]))
    return _section("Where the strategy and the evidence disagree", rows)


def _others(plan: dict[str, Any]) -> str:
    rows = [item(f"{entry['title']}: {entry['reason']}", entry["source"]) for entry in plan["alternatives"]]
    avoided = [
        item(f"{entry['title']} on {entry['platform']}: {entry['reason']}", entry["source"])
        for entry in plan["avoided"]
    ]
    parts = [_section("Alternatives", rows), _section("Avoid", avoided)]
    return "\n\n".join(part for part in parts if part)


def _speed(row: dict[str, Any]) -> str:
    if not row["rows"]:
        return ""
    levels = [str(gain["concurrency"]) for gain in row["rows"][0]["gains"]]
    bases = {gain["basis"] for entry in row["rows"] for gain in entry["gains"]}
    rows = [("recipe", "kernel", *levels), *((*_short(entry), *map(_gain, entry["gains"])) for entry in row["rows"])]
    parts = [f"Speed against BF16 on {row['platform']}, by concurrency", table(rows)]
    sources = dict.fromkeys(entry["evidence"] for entry in row["rows"] if _measured(entry))
    for source in sources:
        of = [" with ".join(_names(entry)) for entry in row["rows"] if _measured(entry) and entry["evidence"] == source]
        whose = f" of {', '.join(of)}" if len(sources) > 1 else ""
        parts.append(wrap(f"m{whose}: {source}; m@N: measured at concurrency N", "  ", "  "))
    if any(gain["told"] is False for entry in row["rows"] for gain in entry["gains"]):
        parts.append(wrap(UNSURE, "  ", "  "))
    if _long(row):
        parts.append(wrap(f"The same at {row['context']:,} tokens, the context asked for:", "  ", "  "))
        parts.append(table([rows[0], *(_at_context(entry) for entry in row["rows"])]))
    if "roofline" in bases or _long(row):
        half = f"{row['prompt_tokens']:,} tokens in and {row['output_tokens']:,} out"
        parts.append(wrap(f"r: roofline, {half} (efficiencies: {row['roofline']})", "  ", "  "))
    for entry in row["rows"]:
        if entry["flags"]:
            parts.append(wrap(f"{' with '.join(_names(entry))}: serve with {entry['flags']}", "  ", "  "))
    return "\n".join(parts)


def _measured(entry: dict[str, Any]) -> bool:
    return any(gain["basis"] == "measured" for gain in entry["gains"])


def _names(entry: dict[str, Any]) -> tuple[str, str]:
    return entry["method"].upper(), entry["kernel"]


def _short(entry: dict[str, Any]) -> tuple[str, str]:
    """The same for a table, which is wide."""
    return entry["method"].upper(), entry["kernel"].replace(" KV cache", " KV")


def _gain(gain: dict[str, Any]) -> str:
    """1.50x m (measured), ~1.05x m (within noise), 1.50x m@16 (measured at another
    concurrency), 1.50x r (roofline), - (not known)."""
    if gain["gain"] is None:
        return "-"
    at = "" if gain["measured_at"] in (None, gain["concurrency"]) else f"@{gain['measured_at']}"
    return f"{times(gain['gain'], gain['told'])} {gain['basis'][0]}{at}"


def _at_context(entry: dict[str, Any]) -> tuple[str, ...]:
    return (*_short(entry), *(f"{gain['roofline']:.2f}x r" for gain in entry["gains"]))


def _long(row: dict[str, Any]) -> bool:
    """Whether measured sequences were so much shorter than the stated context that the roofline has more to say."""
    known = row["near"] and row["roofline"] and any(map(_measured, row["rows"]))
    return bool(known and row["context"] > 4 * (row["measured_tokens"] or 0))


def _memory(plan: dict[str, Any]) -> str:
    parts = []
    for row in plan["memory"]:
        ranks = f", each of {row['tp']} devices" if row["tp"] > 1 else ""
        usable = "not known" if row["usable_bytes"] is None else human_size(row["usable_bytes"])
        share = "" if row["usable_bytes"] is None else f" ({row['utilization']:.0%} of the device)"
        overhead = f", overhead about {human_size(row['overhead_bytes'])}" if row["overhead_bytes"] else ""
        head = (
            f"{row['platform']}{ranks}: weights {human_size(row['weights_bytes'])} "
            f"(BF16: {human_size(row['bf16_weights_bytes'])}), KV cache {human_size(row['kv_bytes_per_token'])} "
            f"a token ({row['kv_cache_dtype']}){overhead}; "
            f"usable {usable}{share}"
        )
        rows = [("sequences", "of tokens", "KV cache", "step", "total", "fits", "at most", "or tokens")]
        for level in row["levels"]:
            fits = {True: "yes", False: "NO", None: "?"}[level["fits"]]
            most, longest = level["max_concurrency"], level["max_context"]
            counts = ("-" if most is None else f"{most:,}", "-" if longest is None else f"{longest:,}")
            cache, step, total = (human_size(level[key]) for key in ("kv_bytes", "activation_bytes", "total_bytes"))
            rows.append((f"{level['concurrency']}", f"{level['context']:,}", cache, step, total, fits, *counts))
        parts.append(f"{wrap(head, '  ')}\n{table(rows)}")
    return "Memory (estimate)\n" + "\n".join(parts) if parts else ""


def _linears(plan: dict[str, Any]) -> str:
    rows = [("linear", "count", "out x in", "stored as", "BF16", "4-bit", "bits")]
    for row in plan["linears"]:
        stored = "BF16" if row["grid"] == "bf16" else f"{row['grid']} g{row['group_size']}"
        before, after = human_size(row["bytes_before"]), human_size(row["bytes_after"])
        shape = f"{row['out_features']}x{row['in_features']}"
        if not row["bytes_before"]:
            stored, before, after = "tied", "-", "-"
        rows.append((row["linear"], str(row["count"]), shape, stored, before, after, _bits(row["bits_per_weight"])))
    other = human_size(plan["bytes"]["other_tensors"])
    rows.append(("other tensors", "", "", "as they are", other, other, ""))
    return "Linears\n" + table(rows)


def _kept(plan: dict[str, Any]) -> str:
    rows = []
    for row in plan["exemptions"]:
        count = f"{row['linears']} linear{'s' * (row['linears'] != 1)}"
        rows.append(f"  {row['reason']}: {count}, +{human_size(row['bytes_added'])} over quantizing")
    return _section("Kept in BF16", rows)


def _versions(plan: dict[str, Any]) -> str:
    rows = []
    for row in plan["pins"]:
        held = f", known for {row['since']} to before {row['before']}" if row["since"] else ""
        parts = [f"vLLM {row['vllm']}{held}", f"torch {row['torch']}", row["runtime"], row["note"]]
        rows.append(item(f"{row['platform']}: {'; '.join(part for part in parts if part)}", row["source"]))
    return _section("Versions", rows)


def _commands(plan: dict[str, Any]) -> str:
    return "\n\n".join(f"Serve on {name}\n{textwrap.indent(line, '  ')}" for name, line in plan["commands"].items())


def _warnings(plan: dict[str, Any], explain: bool) -> str:
    rows = [item(row["text"], f"{row['rule']}; {row['source']}" if explain else "") for row in plan["warnings"]]
    return _section("Warnings", list(dict.fromkeys(rows)))


def _groups(plan: dict[str, Any], explain: bool) -> str:
    """Every width where asked; else only where the wanted group size did not divide one."""
    wanted = plan["recipe"]["group_size"]
    if not explain and all(wanted not in row["does_not_divide"] for row in plan["group_sizes"]):
        return ""
    rows = [f"  {row['in_features']} inputs ({row['linears']} linears): {row['text']}" for row in plan["group_sizes"]]
    return _section("Group size", rows)


def _figures(plan: dict[str, Any]) -> str:
    text = "a roofline figure: weights, flops, keys and values against the data sheet's peaks"
    rows = [item(text, "halfbyte/plan/roofline.py")]
    for row in plan["memory"][:1]:
        rows += [item(f"{name.removesuffix('_bytes')}: {text}") for name, text in row["sources"].items()]
    return _section("Where the figures come from", rows)


def _facts(plan: dict[str, Any]) -> str:
    rows = [item(": ".join(filter(None, (row["text"], row["do"]))), row["source"]) for row in plan["facts"]]
    return _section("What vLLM is known to do with this format", list(dict.fromkeys(rows)))


def _section(title: str, rows: list[str]) -> str:
    return f"{title}\n" + "\n".join(rows) if rows else ""


def _labelled(label: str, text: str) -> str:
    first = LABEL.format(label)
    return wrap(text, first, " " * len(LABEL.format("")))


def _bits(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
