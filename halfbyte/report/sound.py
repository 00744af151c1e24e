"""What shows that an artifact can be served: its files checked, its score in real vLLM, and its stability."""

from __future__ import annotations

from typing import Any

from halfbyte.report.blocks import Block, Cell, Code, Facts, Heading, Items, Missing, Section, Words, left, right, table
from halfbyte.report.sources import Sources
from halfbyte.report.words import (
    dig,
    listing,
    mapping,
    measure,
    number,
    percent,
    plural,
    seconds,
    significant,
    size,
    text,
)


def stability(sources: Sources) -> Section | Missing:
    """Long generations and sustained load."""
    found = sources.stability
    if not found:
        return Missing("Stability", "Not measured", sources.command("stability"))
    load, good = mapping(found.get("load")), found.get("ok")
    word = ("stable", "passed") if good else ("not stable", "failed") if good is False else ("not known", "open")
    amount = plural(int(number(found.get("generations")) or 0), "long generation")
    told = f"{amount}{_length_words(found.get('length_ratio'))}."
    rows = [
        [name.capitalize(), shown_share(found, name, "baseline"), shown_share(found, name, "model")]
        for name in ("repetition", "empty", "invalid")
        if mapping(found.get(name))
    ]
    reasons = [text(reason) for reason in listing(found.get("reasons"))]
    blocks: list[Block] = [Words(told, badge=word)]
    blocks += [Items(reasons)] if reasons else []
    blocks += [table([left("Share of answers with"), right("BF16"), right("4-bit")], rows)] if rows else []
    blocks += [Words(_load_words(load))] if load else []
    return Section("stability", "Stability", blocks)


def shown_share(found: dict[str, Any], name: str, side: str) -> str:
    value = number(dig(found, name, side))
    return "–" if value is None else percent(value)


def _length_words(ratio: Any) -> str:
    value = measure(ratio)[0]
    return "" if value is None else f"; answers are {value:.2f} times as long as BF16's"


def _load_words(load: dict[str, Any]) -> str:
    failed = number(load.get("failed")) or 0
    return (
        f"Under load: {text(load.get('concurrency'))} at once for {seconds(load.get('seconds'))}, "
        f"{text(load.get('requests'))} requests, {failed:,.0f} failed ({text(load.get('status'))})."
    )


def served(sources: Sources) -> Section | Missing:
    """What real vLLM computed, beside the same weights in transformers."""
    found = sources.served
    if not found:
        return Missing("Served by vLLM", "Not served", sources.command("served"))
    reported, artifact = (number(found.get(key)) for key in ("weight_gib_reported", "artifact_gib"))
    facts = Facts(
        [
            ("vLLM", text(found.get("vllm"))),
            ("Perplexity, served by vLLM", significant(found.get("ppl_served"))),
            ("Perplexity, the same weights in transformers", significant(found.get("ppl_reference"))),
            ("Apart", f"{percent(found.get('relative_difference'))} (limit {percent(found.get('limit'))})"),
            ("Weights in vLLM's memory", "not reported" if reported is None else size(reported * 2**30)),
            ("Artifact", size(None if artifact is None else artifact * 2**30)),
            ("Loaded in", seconds(found.get("load_seconds"))),
        ]
    )
    is_served = found.get("status") == "served"
    status = "passed" if found.get("passed") else "failed" if is_served else "open"
    blocks: list[Block] = [
        Words(text(found.get("reason"), ""), badge=(text(found.get("status"), "not served"), status))
    ]
    blocks += [facts] if is_served else []
    completion = text(found.get("completion"), "")
    blocks += [Heading("A completion"), Code(completion)] if completion else []
    return Section("served", "Served by vLLM", blocks, "Served")


def check(sources: Sources) -> Section | Missing:
    """The artifact's structure, values and hashes."""
    found = sources.check
    if not found:
        return Missing("The files, checked", "Not checked", sources.command("check"))
    findings = [mapping(finding) for finding in listing(found.get("findings"))]
    amount = f"{text(found.get('tensors'))} tensors, {size(found.get('bytes'))}"
    if found.get("ok"):
        told = Words(f"{amount}: names, shapes, dtypes, values and hashes hold.", badge=("whole", "passed"))
    else:
        told = Words(f"{plural(len(findings), 'finding')}.", badge=("broken", "failed"))
    rows = [
        [Cell(text(f.get("code")), code=True), Cell(text(f.get("where")), code=True), text(f.get("message"))]
        for f in findings
    ]
    blocks: list[Block] = [told]
    blocks += (
        [table([left("Finding"), left("Where", wide=True), left("What", wide=True)], rows, stack=True)] if rows else []
    )
    return Section("check", "Checked", blocks)
