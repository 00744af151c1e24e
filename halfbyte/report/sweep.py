"""A sweep's results as one page, in HTML and in Markdown, from sweep.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from halfbyte.errors import UsageError
from halfbyte.files import write_text
from halfbyte.report.build import SWEEP, html_environment, markdown_environment, style
from halfbyte.report.sweep_plot import pareto_plot
from halfbyte.report.words import (
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

VERDICTS = {
    "accepted": ("Accepted", "passed"),
    "rejected": ("Rejected", "failed"),
    "failed": ("Failed", "failed"),
    "incomplete": ("Incomplete", "open"),
}
SHORT = {
    "boundary block": "end blocks",
    "boundary projection": "ends' o, down",
    "tied to the embeddings": "lm_head",
}
STAGES = {
    "calibration": "Text: calibration and held out",
    "statistics": "Statistics, once for all cells",
    "solving": "Solving, what differs",
    "writing": "Writing",
    "reference": "BF16 reference, once for all cells",
    "evaluating": "Evaluating, every cell that differs",
    "total": "In all",
}


def build_sweep_report(directory: Path) -> tuple[Path, Path]:
    """Write report.html and report.md into a sweep's directory; returns both paths.

    Raises UsageError where sweep.json is not there or is none.
    """
    directory = Path(directory)
    try:
        result = json.loads((directory / SWEEP).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{directory / SWEEP} cannot be read: run `halfbyte sweep` again") from error
    views = sweep_views(mapping(result))
    page, plain = directory / "report.html", directory / "report.md"
    write_text(page, html_environment().get_template("sweep.html.j2").render(views, style=style()))
    write_text(plain, markdown_environment().get_template("sweep.md.j2").render(views))
    return page, plain


def sweep_views(result: dict[str, Any]) -> dict[str, Any]:
    """Everything that the templates print, as words."""
    cells = [mapping(cell) for cell in listing(result.get("cells"))]
    judged = [cell for cell in cells if cell.get("status") == "judged"]
    word, status = VERDICTS.get(str(result.get("verdict")), ("Not judged", "open"))
    return {
        "model": text(dig(result, "model", "name")),
        "matrix": text(dig(result, "matrix", "name")),
        "description": text(dig(result, "matrix", "description"), ""),
        "verdict": {"word": word, "status": status, "text": _summary(result, cells, judged)},
        "tiles": _tiles(result, judged),
        "plot": pareto_plot([point for point in map(_point, judged) if point]),
        "rows": [_row(cell) for cell in judged],
        "failed": [
            {key: text(cell.get(key)) for key in ("name", "status", "stage", "reason")}
            for cell in cells
            if cell.get("status") != "judged"
        ],
        "ranking": _ranking(result),
        "notices": _notices(cells),
        "seconds": [(label, seconds(dig(result, "seconds", key))) for key, label in STAGES.items()],
        "cost": cost_words(result),
        "spent": [_spent(cell) for cell in cells if mapping(cell.get("seconds"))],
        "provenance": _provenance(result),
    }


def cost_words(result: dict[str, Any]) -> str:
    """What quantizing the matrix took beside one of its runs, in a sentence; empty where it was not measured."""
    cost = mapping(result.get("cost"))
    ratio = number(cost.get("ratio"))
    if ratio is None:
        return ""
    whole, one = seconds(cost.get("matrix_seconds")), seconds(cost.get("one_run_seconds"))
    name = text(cost.get("one_run"))
    return f"Quantizing the matrix took {whole}, {ratio:.2f} times what {name} alone takes ({one}); evaluations apart."


def _summary(result: dict[str, Any], cells: list[dict[str, Any]], judged: list[dict[str, Any]]) -> str:
    accepted = [text(cell.get("name")) for cell in judged if dig(cell, "gates", "verdict") == "accepted"]
    passed = f"{len(accepted)} of {len(cells)} cells pass the gates{': ' if accepted else ''}{', '.join(accepted)}."
    best = mapping(result.get("best"))
    if not best:
        return passed
    how = "The best" if best.get("accepted") else "None passes; the best of them"
    where = "" if best.get("portable") else " (not every platform that was named serves it)"
    return f"{passed} {how} is {text(best.get('cell'))}{where}."


def _tiles(result: dict[str, Any], judged: list[dict[str, Any]]) -> list[dict[str, str]]:
    best = next((c for c in judged if c.get("name") == dig(result, "best", "cell")), {})
    sharing = mapping(result.get("sharing"))
    ratio = number(dig(best, "eval", "metrics", "ppl_ratio", "value"))
    made = f"{text(sharing.get('distinct'))} of {text(sharing.get('cells'))}"
    parts = f"{text(sharing.get('distinct_parts'))} of {text(sharing.get('parts'))}"
    return [
        {"label": "Best", "value": text(best.get("name")), "note": text(best.get("title"), "")},
        {"label": "Its KL to BF16", "value": significant(_kl(best, "value"), 3), "note": "nats a token, mean"},
        {"label": "Its perplexity", "value": percent(None if ratio is None else ratio - 1, signed=True), "note": ""},
        {"label": "Its size", "value": size(best.get("bytes")), "note": f"BF16: {size(best.get('bytes_bf16'))}"},
        {"label": "Artifacts that differ", "value": made, "note": "the others have the same bytes"},
        {"label": "Parts solved", "value": parts, "note": "the others are shared"},
    ]


def _kl(cell: dict[str, Any], key: str) -> float | None:
    return number(dig(cell, "eval", "metrics", "kl_mean", key))


def _point(cell: dict[str, Any]) -> dict[str, Any] | None:
    kl, weight = _kl(cell, "value"), number(cell.get("bytes"))
    if kl is None or weight is None:
        return None
    bounds = {"low": _kl(cell, "low") or kl, "high": _kl(cell, "high") or kl}
    method = dig(cell, "recipe", "method")
    named = {"name": text(cell.get("name")), "method": method, "pareto": bool(cell.get("pareto"))}
    return {**named, "bytes": weight, "kl": kl, **bounds}


def _row(cell: dict[str, Any]) -> dict[str, str]:
    metrics = mapping(dig(cell, "eval", "metrics"))
    ratio = number(dig(metrics, "ppl_ratio", "value"))
    verdict = text(dig(cell, "gates", "verdict"))
    speed = number(cell.get("tokens_per_second"))
    same = cell.get("same_as")
    return {
        "rank": text(cell.get("rank")),
        "name": text(cell.get("name")),
        "note": f"same bytes as {same}" if same else "",
        "method": text(dig(cell, "recipe", "method")).upper(),
        "groups": "/".join(text(group) for group in listing(cell.get("groups"))),
        "exempt": exemption_words(cell),
        "bits": significant(cell.get("bits_per_linear_weight"), 3),
        "bytes": size(cell.get("bytes")),
        "kl": significant(_kl(cell, "value"), 3),
        "interval": f"{significant(_kl(cell, 'low'), 3)} to {significant(_kl(cell, 'high'), 3)}",
        "ppl": percent(None if ratio is None else ratio - 1, signed=True),
        "top1": percent(dig(metrics, "top1", "value")),
        "speed": "not measured" if speed is None else f"{speed:,.0f}",
        "gates": verdict,
        "class": VERDICTS.get(verdict, ("", "open"))[1],
        "front": "yes" if cell.get("pareto") else "–",
        "portable": "" if cell.get("portable") else "not portable",
    }


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


def _notices(cells: list[dict[str, Any]]) -> list[str]:
    told: dict[str, list[str]] = {}
    for cell in cells:
        for notice in listing(cell.get("notices")):
            told.setdefault(text(notice), []).append(text(cell.get("name")))
    return [f"{', '.join(names)}: {notice}" for notice, names in told.items()]


def _spent(cell: dict[str, Any]) -> dict[str, str]:
    spent = mapping(cell.get("seconds"))
    shown = {key: seconds(spent.get(key, 0.0)) for key in ("solving", "shared", "writing", "evaluating")}
    return {"name": text(cell.get("name")), **shown}


def _provenance(result: dict[str, Any]) -> list[tuple[str, str]]:
    sets = [mapping(data) for data in listing(result.get("calibration"))]
    return [
        ("halfbyte", text(result.get("halfbyte"))),
        ("Command", text(result.get("command"))),
        ("Model, SHA-256", text(dig(result, "model", "sha256"))),
        *(("Calibration tokens, SHA-256", f"{text(d.get('sha256'))} ({text(d.get('tokens'))} tokens)") for d in sets),
        ("Held-out tokens, SHA-256", text(dig(result, "text", "sha256"))),
    ]
