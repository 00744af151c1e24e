"""A sweep's cells as tables: in order with what they lost and weigh, and where their recipes differ."""

from __future__ import annotations

from typing import Any

from halfbyte.report.blocks import Block, Cell, Heading, Section, Words, left, right, table
from halfbyte.report.front import Panel, cell_rates, panel_words
from halfbyte.report.judged import VERDICTS
from halfbyte.report.provenance import differing_keys, flat
from halfbyte.report.words import (
    MISSING,
    between,
    change,
    count,
    dig,
    listing,
    mapping,
    number,
    percent,
    shown,
    significant,
    size,
    text,
)

SHORT = {
    "boundary block": "end blocks",
    "boundary projection": "ends' o, down",
    "tied to the embeddings": "lm_head",
}


def matrix(result: dict[str, Any], judged: list[dict[str, Any]], failed: list[dict[str, Any]]) -> Section:
    """The cells that were judged, a row each, how they were ranked, and those that were not judged."""
    panels = sorted({panel for cell in judged for panel in cell_rates(cell)}, key=lambda p: (p[0], p[1] or 0))
    speeds = [f"Tokens/s, {panel_words(panel)}" if panel[0] else "Tokens/s" for panel in panels] or ["Tokens/s"]
    columns = [
        right("Rank"),
        left("Cell", wide=True),
        left("Gates"),
        right("KL"),
        right("Perplexity"),
        right("Same token"),
        right("Bits/weight"),
        right("Size"),
        *map(right, speeds),
        left("Method"),
        left("In BF16"),
        left("Front"),
    ]
    blocks: list[Block] = [Words("No cell was judged.")]
    if judged:
        blocks = [table(columns, [_row(cell, panels) for cell in judged], stack=True)]
    blocks += [Words(line, soft=True) for line in _ranking(result)]
    blocks.append(
        Words("Bits a weight count every linear, those kept in BF16 too. Front: nothing is better in both.", soft=True)
    )
    if failed:
        rows = [[text(cell.get(key)) for key in ("name", "status", "stage", "reason")] for cell in failed]
        blocks += [
            Heading("Not judged"),
            table([left("Cell"), left("Status"), left("While"), left("Why", wide=True)], rows, stack=True),
        ]
    return Section("matrix", "The cells", blocks, "Cells")


def _row(cell: dict[str, Any], panels: list[Panel]) -> list[Cell | str]:
    metrics, rates = mapping(dig(cell, "eval", "metrics")), cell_rates(cell)
    verdict = text(dig(cell, "gates", "verdict"))
    same, groups = cell.get("same_as"), "/".join(text(group) for group in listing(cell.get("groups")))
    notes = [f"same bytes as {text(same)}"] * bool(same) + ["not portable"] * (not cell.get("portable"))
    known = [count(rates[panel][0]) if panel in rates else "" for panel in panels] or [""]
    speeds = [Cell(words, note="" if words else MISSING) for words in known]
    return [
        text(cell.get("rank")),
        Cell(text(cell.get("name")), note=", ".join(notes)),
        Cell(verdict, status=VERDICTS.get(verdict, ("", "open"))[1]),
        Cell(significant(kl_of(cell, "value"), 3), note=between(dig(metrics, "kl_mean"), lambda x: significant(x, 3))),
        shown(metrics.get("ppl_ratio"), change),
        percent(dig(metrics, "top1", "value")),
        significant(cell.get("bits_per_linear_weight"), 3),
        size(cell.get("bytes")),
        *speeds,
        Cell(text(dig(cell, "recipe", "method")).upper(), note=f"group {groups}" if groups else ""),
        exemption_words(cell),
        "yes" if cell.get("pareto") else "–",
    ]


def by_platform(judged: list[dict[str, Any]]) -> Section | None:
    """What every cell gave on each platform that it was judged on, and the device; None where none was named."""
    rows: list[list[Cell | str]] = []
    for cell in judged:
        for platform, one in mapping(cell.get("judged_on")).items():
            metrics, verdict = mapping(dig(one, "eval", "metrics")), text(dig(one, "gates", "verdict"))
            kl = dig(metrics, "kl_mean")
            rows.append(
                [
                    text(cell.get("name")),
                    text(platform),
                    text(dig(one, "hardware")),
                    Cell(significant(dig(kl, "value"), 3), note=between(kl, lambda x: significant(x, 3))),
                    shown(metrics.get("ppl_ratio"), change),
                    percent(dig(metrics, "top1", "value")),
                    Cell(verdict, status=VERDICTS.get(verdict, ("", "open"))[1]),
                ]
            )
    if not rows:
        return None
    labels = (left("Cell"), left("Platform"), left("Device", wide=True))
    columns = [*labels, right("KL"), right("Perplexity"), right("Same token"), left("Gates")]
    told = "Each against BF16 on the same device. A cell passes its gates where it passes them on every platform."
    return Section(
        "platforms",
        "Where the cells were judged",
        [table(columns, rows, stack=True), Words(told, soft=True)],
        "Platforms",
    )


def differences(judged: list[dict[str, Any]]) -> Section | None:
    """The recipe keys in which the cells differ; None where all have one recipe."""
    recipes = {text(cell.get("name")): dict(flat(mapping(cell.get("recipe")))) for cell in judged}
    keys = differing_keys(list(recipes.values()))
    if not keys:
        return None
    rows = [[name, *(recipe.get(key, "–") for key in keys)] for name, recipe in recipes.items()]
    note = Words("Keys that all have in common are left out.", soft=True)
    return Section(
        "recipes", "Where the recipes differ", [table([left("Cell"), *map(left, keys)], rows), note], "Recipes"
    )


def kl_of(cell: dict[str, Any], key: str) -> float | None:
    """`value`, `low` or `high` of a cell's mean KL."""
    return number(dig(cell, "eval", "metrics", "kl_mean", key))


def exemption_words(cell: dict[str, Any]) -> str:
    """What a cell keeps in BF16, in a few words."""
    reasons = [str(mapping(row).get("reason") or "") for row in listing(cell.get("exemptions"))]
    words = [SHORT.get(reason, reason.removeprefix("ignore: ")) for reason in reasons]
    return ", ".join(dict.fromkeys(words)) or "–"


def _ranking(result: dict[str, Any]) -> list[str]:
    ranking, source = mapping(result.get("ranking")), mapping(result.get("text"))
    by = {"kl": "KL divergence from BF16", "ppl": "perplexity against BF16"}.get(str(ranking.get("by")), "quality")
    told = [f"Ranked by {by}, then by tokens/s where it was measured, then by bytes. Cells of one rank are equal."]
    if ranking.get("method"):
        floor = significant(ranking.get("noise_floor"), 2)
        told.append(f"How two cells are told apart: {text(ranking.get('method'))} ({floor} nats).")
    if number(source.get("tokens")) is not None:
        of = text(source.get("source"))
        told.append(f"All were judged on the same {number(source['tokens']):,.0f} tokens of {of}.")
    return told
