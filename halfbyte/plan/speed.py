"""Speed against BF16 at each concurrency: measured where a measurement is near, by the roofline where none is.

A measurement is near when its vLLM range covers the platform's version, its device is the platform (and not one that
this is `ranked_by`), its tensor parallelism is the same, and its model has half to twice the parameters (guide.yaml). A
far one still says which kernels there are and which is faster; its figures are not taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.plan.roofline import Load, Work, batch_seconds
from halfbyte.plan.rules import guide
from halfbyte.plan.words import flag_words, title, variant_of
from halfbyte.platforms import Platform, SpeedRow, SpeedTable
from halfbyte.recipe.schema import Recipe


@dataclass(frozen=True)
class Model:
    """What decides whether a measurement is near."""

    parameters: int
    tp: int = 1


def is_near(table: SpeedTable, model: Model) -> bool:
    """Whether a table's figures speak for a model."""
    ratio = table.model.parameters / max(1, model.parameters)
    limit = guide().near.parameters
    return not table.lent and table.tensor_parallel == model.tp and 1 / limit <= ratio <= limit


def elsewhere(table: SpeedTable) -> str:
    """What a measurement that is not near is one of, in words."""
    return f"on {table.device}" if table.lent else "on a model of another size"


def nearest_first(platform: Platform, model: Model) -> Platform:
    """The platform with its speed tables in the order in which this model should ask them: near ones, then newest."""
    return platform.model_copy(update={"speed": tuple(sorted(platform.speed, key=lambda t: not is_near(t, model)))})


def speed_table(platform: Platform, format_name: str | None = None, variant: str | None = None) -> SpeedTable | None:
    """The first table that holds for the vLLM version that the platform's data assumes, and has a row for the format
    where one has."""
    tables = [table for table in platform.speed if table.covers(platform.vllm)]
    having = [table for table in tables if format_name and table.rows_for(format_name, variant)]
    return next(iter([*having, *tables]), None)


def comparing(platform: Platform, recipes: Sequence[Recipe]) -> Platform:
    """The platform with the first table alone that has rows for all of these recipes, so that figures of two tables are
    not set against each other; as it is where none has."""
    tables = [table for table in platform.speed if table.covers(platform.vllm)]
    having = [t for t in tables if all(t.rows_for(str(r.format), variant_of(r)) for r in recipes)]
    return platform.model_copy(update={"speed": tuple(having[:1])}) if having else platform


def best_speed(recipe: Recipe, platform: Platform, concurrency: int) -> tuple[SpeedRow, float] | None:
    """The fastest measured kernel for a recipe there and its gain over BF16; None where nothing was measured."""
    table = speed_table(platform, recipe.format, variant_of(recipe))
    kv_cache = platform.flags.get("--kv-cache-dtype")
    rows = table.rows_for(str(recipe.format), variant_of(recipe), kv_cache) if table else ()
    if not table or not rows:
        return None
    row = table.fastest(rows, concurrency)
    return row, table.speedup(row, concurrency)


def mean_speed(recipe: Recipe, platform: Platform, levels: Sequence[int]) -> float | None:
    """The geometric mean over concurrencies of the best measured gain; None where nothing was measured."""
    gains = [best[1] for level in levels if (best := best_speed(recipe, platform, level))]
    return math.exp(sum(map(math.log, gains)) / len(gains)) if gains else None


def least_gain(recipe: Recipe, platform: Platform, levels: Sequence[int]) -> float:
    """The ratio of two speeds at these concurrencies from which they differ: guide.yaml's, or that of repeats."""
    table = speed_table(platform, recipe.format, variant_of(recipe))
    return max([guide().margin.ratio, *(1 + table.apart_at(level) for level in levels if table)])


def half_and_half(context: int) -> tuple[int, int]:
    """Prompt and answer of the sequence that a prediction is made for: half of the context each."""
    return max(1, context // 2), max(1, context - context // 2)


def predict(
    recipe: Recipe,
    platform: Platform,
    model: Model,
    works: tuple[Work, Work],
    context: int,
    levels: Sequence[int],
) -> list[dict[str, Any]]:
    """A row for every kernel that may serve a recipe there.

    title, method, format, variant, kernel, flags (as words), note, evidence, and `gains`: for every concurrency `gain`
    (times BF16; None: not known), `basis` ("measured", "roofline" or None), `measured_at` (the measurement's
    concurrency), `told` (whether the measurement's repeats tell it from BF16; None: not measured), `tokens_per_second`
    (written, all sequences together), `roofline` (the roofline's gain at the stated context).
    """
    table = speed_table(platform, recipe.format, variant_of(recipe))
    rows = table.rows_for(str(recipe.format), variant_of(recipe)) if table else ()
    if table and rows:
        return [_row(recipe, platform, table, row, row.kernel, model, works, context, levels) for row in rows]
    support = platform.formats.get(f"{recipe.format}/{variant_of(recipe)}") or platform.formats.get(str(recipe.format))
    kernels = [k.name for k in support.kernels_in(platform.vllm)] if support and support.loads else []
    if not kernels:
        return []
    return [_row(recipe, platform, None, None, kernels[0], model, works, context, levels)]


def _row(
    recipe: Recipe,
    platform: Platform,
    table: SpeedTable | None,
    row: SpeedRow | None,
    kernel: str,
    model: Model,
    works: tuple[Work, Work],
    context: int,
    levels: Sequence[int],
) -> dict[str, Any]:
    prompt, output = half_and_half(context)
    gains = []
    for level in levels:
        guess = _roofline(recipe, platform, kernel, works, Load(level, prompt, output))
        gains.append({"concurrency": level, **_measured(table, row, model, level, guess)})
    return {
        "title": title(recipe),
        "method": recipe.method,
        "format": recipe.format,
        "variant": variant_of(recipe),
        "kernel": kernel,
        "flags": flag_words(row.all_flags) if row else "",
        "note": row.note if row else "",
        "evidence": f"{table.evidence}, {table.evidence.shape}" if table else None,
        "gains": gains,
    }


def _measured(
    table: SpeedTable | None, row: SpeedRow | None, model: Model, level: int, guess: tuple[float, float] | None
) -> dict[str, Any]:
    roofline = None if guess is None else round(guess[0], 2)
    if table and row and is_near(table, model):
        at = table.nearest(level)
        if abs(math.log(at / level)) <= math.log(guide().near.concurrency):
            written = at * table.output_tokens / row.seconds[at]
            return {
                "gain": round(table.speedup(row, level), 2),
                "basis": "measured",
                "measured_at": at,
                "told": table.told(row, at),
                "tokens_per_second": round(written, 1),
                "roofline": roofline,
            }
    return {
        "gain": roofline,
        "basis": None if guess is None else "roofline",
        "measured_at": None,
        "told": None,
        "tokens_per_second": None if guess is None else round(guess[1], 1),
        "roofline": roofline,
    }


def _roofline(
    recipe: Recipe, platform: Platform, kernel: str, works: tuple[Work, Work], load: Load
) -> tuple[float, float] | None:
    """(gain over BF16, tokens written in a second)."""
    if platform.roofline is None:
        return None
    ours = batch_seconds(works[0], platform, platform.roofline.efficiency(str(recipe.format), kernel), load)
    bf16 = batch_seconds(works[1], platform, platform.roofline.bf16, load)
    if not ours or not bf16:
        return None
    return bf16 / ours, load.concurrency * load.output / ours
