"""A run's directory, or an artifact alone, as a page: the verdict first, then what it stands on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from halfbyte.report import front, judged, ladder, long_context, provenance, quality, sound, speed, tasks, weights
from halfbyte.report.blocks import Missing, Page, Pairs, Section
from halfbyte.report.sources import Sources
from halfbyte.report.words import MISSING, change, dig, measure, percent, shown, significant, text

Builder = Callable[[Sources], Section | Missing | None]
SECTIONS: tuple[Builder, ...] = (
    judged.gates,
    ladder.mitigation,
    provenance.serve,
    front.run_front,
    quality.fidelity,
    quality.where,
    tasks.tasks,
    tasks.chat,
    long_context.long_context,
    speed.speed,
    sound.stability,
    sound.served,
    sound.check,
    weights.byte_section,
    weights.memory,
    weights.errors,
    provenance.notices,
    provenance.missing_calibration,
    provenance.provenance,
)
"""Every section, in order."""


def run_page(sources: Sources) -> Page:
    """Everything that the templates print."""
    built = [build(sources) for build in SECTIONS]
    missing = [one for one in built if isinstance(one, Missing)]
    name = sources.baseline.rstrip("/").rsplit("/", 1)[-1] if sources.baseline != "MODEL" else sources.run.name
    return Page(
        eyebrow="halfbyte report",
        title=f"{name or sources.run.name} in 4 bits",
        subtitle=provenance.recipe_words(sources),
        verdict=judged.verdict(sources.gates),
        facts=_facts(sources, missing),
        tiles=_tiles(sources),
        sections=[one for one in built if isinstance(one, Section)],
        missing=missing,
        footer="Made by halfbyte from the result files of this run alone.",
    )


def _facts(sources: Sources, missing: Sequence[Missing]) -> Pairs:
    told = [
        ("What bound", judged.binding_words(sources.gates)),
        ("What was done", ladder.mitigation_words(sources)),
        ("Not measured", "; ".join(one.what[:1].lower() + one.what[1:] for one in missing)),
    ]
    return [(label, words) for label, words in told if words]


def _tiles(sources: Sources) -> list[dict[str, str]]:
    bytes_now, smaller, bits = weights.byte_words(sources)
    metrics = dig(sources.evaluation, "metrics")
    pair = [shown(dig(metrics, name), significant) for name in ("ppl_baseline", "ppl")]
    ratio, kl, same = (measure(dig(metrics, name))[0] for name in ("ppl_ratio", "kl_mean", "top1"))
    gain = speed.headline(sources)
    served = sources.served
    vllm = (
        f"version {text(served['vllm'])}"
        if served.get("status") == "served" and served.get("vllm")
        else text(served.get("reason"), "")
    )
    tiles = [
        ("Size", bytes_now, smaller),
        ("Bits a weight", bits, "quantized linears, scales counted"),
        ("Perplexity", MISSING if ratio is None else change(ratio), "" if "–" in pair else f"{pair[0]} → {pair[1]}"),
        ("Same next token", percent(same), "as BF16, most likely one"),
        ("KL to BF16", significant(kl, 3), "nats a token, mean"),
        ("Tokens/s", *(gain or (MISSING, "against BF16"))),
        ("vLLM", text(served.get("status"), "not served"), vllm),
    ]
    if sources.tasks:
        tiles.insert(5, ("Tasks", *tasks.recovery(sources)))
    return [{"label": label, "value": value, "note": note} for label, value, note in tiles]
