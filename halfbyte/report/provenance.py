"""How it was made: exact commands, versions, hashes, the recipe and where recipes differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from halfbyte.report.blocks import (
    Block,
    Cell,
    Code,
    Facts,
    Heading,
    Items,
    Missing,
    Pairs,
    Section,
    Words,
    left,
    table,
)
from halfbyte.report.sources import Sources
from halfbyte.report.speed import bench_commands
from halfbyte.report.words import command, dig, listing, mapping, number, seconds, size, text

LONG = 400
"""Characters of a value that are shown."""
APART = frozenset(
    [
        "recipe",
        "linears",
        "versions",
        "git",
        "seconds",
        "peak_rss_mib",
        "notices",
        "command",
        "schema",
        "kind",
        "bytes",
        "bits_per_weight",
        "files",
        "tensors",
        "calibration",
    ]
)
"""Keys of the manifest that stand elsewhere, or are too many to read."""


def serve(sources: Sources) -> Section | None:
    """The commands that serve it, by platform."""
    lines = [(str(name), command(line)) for name, line in mapping(sources.plan.get("commands")).items()]
    blocks = [block for name, line in lines if line for block in (Heading(name), Code(line))]
    if not blocks:
        return None
    return Section("serve", "Serve it", [Words("In the run's directory, with vLLM on the PATH:", soft=True), *blocks])


def notices(sources: Sources) -> Section | None:
    """Whatever was done that nobody asked for, and files that could not be read."""
    told = [*listing(sources.plan.get("notices")), *listing(sources.manifest.get("notices")), *sources.problems]
    lines = list(dict.fromkeys(text(notice) for notice in told))
    return Section("notices", "Notices", [Items(lines)]) if lines else None


def provenance(sources: Sources) -> Section:
    """Commands, versions, hashes, recipe, calibration; what is not there is said."""
    recipe = mapping(sources.manifest.get("recipe")) or mapping(sources.plan.get("recipe"))
    blocks = [*_commands(sources), *_made(sources), *_recipes(sources, recipe), *_calibration(sources)]
    return Section("provenance", "Provenance", blocks)


def _commands(sources: Sources) -> list[Block]:
    told = [
        ("Quantized with", sources.manifest.get("command")),
        ("Served with", sources.served.get("command")),
        ("Tasks measured with", sources.tasks.get("command")),
        ("Long context measured with", sources.long_context.get("command")),
    ]
    lines = [(label, line) for label, one in told if (line := command(one))]
    lines += [pair for bench in sources.benches for pair in bench_commands(bench)]
    merged: dict[str, list[str]] = {}
    for label, line in lines:
        merged.setdefault(label, []).append(line)
    return [block for label, own in merged.items() for block in (Heading(label), *(Code(line) for line in own))]


def _made(sources: Sources) -> list[Block]:
    manifest = sources.manifest
    if not manifest:
        return [Words("Not known: the artifact's manifest is not here.")]
    rows: Pairs = [(str(name), text(value)) for name, value in mapping(manifest.get("versions")).items() if value]
    peak = number(manifest.get("peak_rss_mib"))
    rows += [
        ("Git commit", text(manifest.get("git"))),
        ("Quantized in", seconds(manifest.get("seconds"))),
        ("Peak memory of the host", size(None if peak is None else peak * 2**20)),
    ]
    rest = {key: value for key, value in manifest.items() if key not in APART and value is not None}
    return [Heading("Versions, times, hashes"), Facts(rows + flat(rest))]


def _recipes(sources: Sources, recipe: dict[str, Any]) -> list[Block]:
    planned = mapping(sources.plan.get("recipe"))
    made = mapping(sources.manifest.get("recipe"))
    blocks: list[Block] = [Heading("Recipe"), Facts(flat(recipe))] if recipe else []
    if planned and made:
        both = [dict(flat({k: v for k, v in one.items() if k in planned and k in made})) for one in (planned, made)]
        rows = [[Cell(key, code=True), *(one.get(key, "–") for one in both)] for key in differing_keys(both)]
        told = table([left("Key"), left("Planned"), left("Made")], rows)
        blocks += [Heading("Where the artifact's recipe differs from the plan's"), told] if rows else []
    return blocks


def differing_keys(recipes: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys that are not the same in all recipes."""
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    return [key for key in keys if len({recipe.get(key) for recipe in recipes}) > 1]


def _calibration(sources: Sources) -> list[Block]:
    held = sources.calibration or mapping(sources.manifest.get("calibration"))
    if not held:
        return [Heading("Calibration"), Words("No calibration manifest here.")]
    lengths = [
        f"{text(row.get('from'))}–{text(row.get('to'))} tokens: {text(row.get('sequences'))}"
        for row in map(mapping, listing(held.get("histogram")))
    ]
    rows = flat(held, skip=("schema", "kind", "histogram"))
    return [Heading("Calibration"), Facts([*rows, ("sequences by length", ", ".join(lengths))] if lengths else rows)]


def missing_calibration(sources: Sources) -> Missing | None:
    """Said beside the other missing results, where nothing tells what the artifact was calibrated on."""
    if sources.calibration or mapping(sources.manifest.get("calibration")) or sources.alone:
        return None
    return Missing("Calibration", "No calibration manifest here", sources.command("calibration"))


def flat(tree: Mapping[str, Any], skip: Sequence[str] = (), above: str = "") -> Pairs:
    """A tree as pairs of dotted names and words."""
    rows: Pairs = []
    for key, value in tree.items():
        name = f"{above}{key}"
        if name in skip:
            continue
        if isinstance(value, dict) and value:
            rows += flat(value, skip, f"{name}.")
        else:
            spelled = ", ".join(map(text, value)) if isinstance(value, list) else text(value)
            rows.append((name, spelled if len(spelled) <= LONG else spelled[:LONG] + " …"))
    return rows


def recipe_words(sources: Sources) -> str:
    """Method, group and format in a few words."""
    recipe = mapping(sources.manifest.get("recipe")) or mapping(sources.plan.get("recipe"))
    if not recipe.get("method"):
        return ""
    method, group, kept_as = (text(recipe.get(key)) for key in ("method", "group_size", "format"))
    tuned = dig(sources.manifest, "tuning")
    trained = ", scales and norms trained" if isinstance(tuned, dict) else ""
    return f"{method.upper()}, group {group}, {kept_as} format{trained}"
