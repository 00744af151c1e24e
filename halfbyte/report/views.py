"""The report's contents as words in order, the same for the HTML page and for Markdown."""

from __future__ import annotations

from typing import Any

from halfbyte.report import measured, plots
from halfbyte.report.sources import Sources
from halfbyte.report.words import (
    MISSING,
    command,
    dig,
    listing,
    mapping,
    number,
    percent,
    seconds,
    significant,
    size,
    text,
)

Pairs = list[tuple[str, str]]
VERDICTS = {
    "accepted": ("Accepted", "passed"),
    "rejected": ("Rejected", "failed"),
    "incomplete": ("Incomplete", "open"),
}


def build_views(sources: Sources) -> dict[str, Any]:
    """Everything that the templates print, keyed by section; a section without results is None or empty."""
    errors = plots.errors_by_linear(sources.manifest, sources.plan)
    return {
        "model": _model_name(sources),
        "recipe_name": _recipe_name(sources),
        "verdict": _verdict(sources),
        "tiles": _tiles(sources),
        "commands": _serve_commands(sources),
        "gates": [measured.gate(mapping(gate)) for gate in listing(sources.gates.get("gates"))],
        "fidelity": measured.fidelity(sources.evaluation),
        "served": measured.served(sources.served),
        "check": measured.check(sources.check),
        "bytes": plots.byte_bars(sources.plan),
        "memory": _memory(sources.plan),
        "heat": plots.heat_map(errors),
        "worst": plots.worst_linears(errors),
        "exemptions": _exemptions(sources.plan),
        "groups": _groups(sources.plan),
        "notices": _notices(sources),
        "calibration": _calibration(sources),
        "recipe": _recipe(sources),
        "provenance": _provenance(sources),
        "made_with": _made_with(sources),
    }


def _model_name(sources: Sources) -> str:
    named = (
        dig(sources.manifest, "model", "name"),
        sources.manifest.get("model"),
        sources.evaluation.get("baseline"),
        dig(sources.plan, "model", "name"),
        dig(sources.plan, "model", "path"),
    )
    name = next((value for value in named if isinstance(value, str) and value), sources.run.name)
    return name.rstrip("/").rsplit("/", 1)[-1] or name


def _recipe_name(sources: Sources) -> str:
    recipe = mapping(sources.manifest.get("recipe")) or mapping(sources.plan.get("recipe"))
    if not recipe.get("method"):
        return ""
    method, group, kept_as = (text(recipe.get(key)) for key in ("method", "group_size", "format"))
    return f"{method.upper()}, group {group}, {kept_as} format"


def _verdict(sources: Sources) -> dict[str, str]:
    word, status = VERDICTS.get(str(sources.gates.get("verdict")), ("Not judged", "open"))
    default = "No gate was applied: run `halfbyte run`, or `halfbyte eval` and then the gates."
    return {"word": word, "status": status, "text": text(sources.gates.get("text"), _gate_sentence(sources) or default)}


def _gate_sentence(sources: Sources) -> str:
    rows = (mapping(gate) for gate in listing(sources.gates.get("gates")))
    return " ".join(f"{text(row.get('text'))}." for row in rows if row.get("text"))


def _tiles(sources: Sources) -> list[dict[str, str]]:
    metrics, plan = mapping(sources.evaluation.get("metrics")), mapping(sources.plan.get("bytes"))
    after = number(sources.manifest.get("bytes")) or number(plan.get("after"))
    before = number(plan.get("before"))
    smaller = f"{before / after:.1f}× smaller than BF16 ({size(before)})" if before and after else ""
    bits = number(sources.manifest.get("bits_per_weight")) or number(plan.get("bits_per_quantized_weight"))
    ratio = number(dig(metrics, "ppl_ratio", "value"))
    change = percent(None if ratio is None else ratio - 1, signed=True)
    pair = [significant(dig(metrics, name, "value")) for name in ("ppl_baseline", "ppl")]
    kl, same = dig(metrics, "kl_mean", "value"), dig(metrics, "top1", "value")
    served = sources.served
    return [
        {"label": "Size", "value": size(after), "note": smaller},
        {"label": "Bits a weight", "value": significant(bits, 3), "note": "quantized linears, scales counted"},
        {"label": "Perplexity", "value": change, "note": "" if MISSING in pair else f"{pair[0]} → {pair[1]}"},
        {"label": "Same next token", "value": percent(same), "note": "as BF16, most likely one"},
        {"label": "KL to BF16", "value": significant(kl, 3), "note": "nats a token, mean"},
        {"label": "vLLM", "value": text(served.get("status"), "not served"), "note": _served_note(served)},
    ]


def _served_note(served: dict[str, Any]) -> str:
    if served.get("status") == "served" and served.get("vllm"):
        return f"version {text(served['vllm'])}"
    return text(served.get("reason"), "")


def _serve_commands(sources: Sources) -> Pairs:
    return [(str(name), command(line)) for name, line in mapping(sources.plan.get("commands")).items() if command(line)]


def _memory(plan: dict[str, Any]) -> list[dict[str, str]]:
    rows = []
    for entry in listing(plan.get("memory")):
        need = mapping(entry)
        fits = need.get("fits")
        load = f"{text(need.get('context'))} tokens × {text(need.get('concurrency'))} sequences"
        rows.append(
            {
                "platform": text(need.get("platform")),
                "load": load,
                "weights": size(need.get("weights_bytes")),
                "kv": f"{size(need.get('kv_bytes'))} ({text(need.get('kv_cache_dtype'))})",
                "total": size(need.get("total_bytes")),
                "of": size(need.get("usable_bytes")) if need.get("usable_bytes") else "not known",
                "fits": "–" if fits is None else "yes" if fits else "no",
                "most": text(need.get("max_concurrency")),
            }
        )
    return rows


def _exemptions(plan: dict[str, Any]) -> list[dict[str, str]]:
    rows = (mapping(row) for row in listing(plan.get("exemptions")))
    return [
        {"reason": text(r.get("reason")), "linears": text(r.get("linears")), "added": "+" + size(r.get("bytes_added"))}
        for r in rows
    ]


def _groups(plan: dict[str, Any]) -> Pairs:
    rows = (mapping(row) for row in listing(plan.get("group_sizes")))
    return [(text(row.get("in_features")), text(row.get("text"))) for row in rows]


def _notices(sources: Sources) -> list[str]:
    told = [*listing(sources.plan.get("notices")), *listing(sources.manifest.get("notices")), *sources.problems]
    return list(dict.fromkeys(text(notice) for notice in told))


def _calibration(sources: Sources) -> Pairs:
    manifest = sources.calibration or mapping(sources.manifest.get("calibration"))
    lengths = [
        f"{text(row.get('from'))}–{text(row.get('to'))} tokens: {text(row.get('sequences'))}"
        for row in map(mapping, listing(manifest.get("histogram")))
    ]
    rows = _flat(manifest, skip=("schema", "kind", "histogram"))
    return [*rows, ("sequences by length", ", ".join(lengths))] if lengths else rows


def _recipe(sources: Sources) -> Pairs:
    recipe = mapping(sources.manifest.get("recipe")) or mapping(sources.plan.get("recipe"))
    return _flat(recipe)


def _provenance(sources: Sources) -> Pairs:
    manifest = sources.manifest
    rows: Pairs = [(f"Version of {name}", text(value)) for name, value in mapping(manifest.get("versions")).items()]
    rows.append(("Git commit", text(manifest.get("git"))))
    rows.append(("Quantized in", seconds(manifest.get("seconds"))))
    peak = number(manifest.get("peak_rss_mib"))
    rows.append(("Peak memory of the host", size(None if peak is None else peak * 2**20)))
    known = {"recipe", "linears", "versions", "git", "seconds", "peak_rss_mib", "notices", "command", "schema", "kind"}
    rest = {
        key: value
        for key, value in manifest.items()
        if key not in known | {"bytes", "bits_per_weight", "files", "tensors"}
    }
    return rows + _flat(rest) if manifest else []


def _made_with(sources: Sources) -> Pairs:
    told = (("Quantized with", sources.manifest), ("Served with", sources.served))
    return [(label, line) for label, result in told if (line := command(result.get("command")))]


def _flat(tree: dict[str, Any], skip: tuple[str, ...] = (), above: str = "") -> Pairs:
    rows: Pairs = []
    for key, value in tree.items():
        name = f"{above}{key}"
        if name in skip:
            continue
        if isinstance(value, dict) and value:
            rows += _flat(value, skip, f"{name}.")
        else:
            spelled = ", ".join(map(text, value)) if isinstance(value, list) else text(value)
            rows.append((name, spelled if len(spelled) <= 400 else spelled[:400] + " …"))
    return rows
