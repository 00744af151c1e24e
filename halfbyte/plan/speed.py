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
from halfbyte.platforms.speed import LEAST_NOISE
from halfbyte.recipe.schema import Recipe


@dataclass(frozen=True)
class Model:
    """What decides whether a measurement is near."""

    parameters: int
    tp: int = 1


def is_near(table: SpeedTable, model: Model) -> bool:
    """Whether a table's figures speak for a model."""
    near = _apart(table, model) <= math.log(guide().near.parameters)
    return not table.lent and table.tensor_parallel == model.tp and near


def elsewhere(table: SpeedTable, model: Model) -> str:
    """What a measurement that is not near is one of, in words."""
    if table.lent:
        return f"on {table.device}"
    size = _apart(table, model) > math.log(guide().near.parameters)
    return "on a model of another size" if size else "on another number of devices"


def nearest_first(platform: Platform, model: Model) -> Platform:
    """The platform with its speed tables in the order in which this model should ask them: near ones as they are (the
    newest first), then others of this device, with as many devices, of the nearest size."""

    def rank(table: SpeedTable) -> tuple[float, ...]:
        if is_near(table, model):
            return (0,)
        return (1, table.lent, table.tensor_parallel != model.tp, _apart(table, model))

    return platform.model_copy(update={"speed": tuple(sorted(platform.speed, key=rank))})


def _apart(table: SpeedTable, model: Model) -> float:
    """The size of the measured model against this one, as a logarithm."""
    return abs(math.log(table.model.parameters / max(1, model.parameters)))


def described(table: SpeedTable) -> str:
    """A measurement in a line: when, on what, and how."""
    return ", ".join(part for part in (str(table.evidence), table.evidence.shape, table.note) if part)


def speed_table(platform: Platform, format_name: str | None = None, variant: str | None = None) -> SpeedTable | None:
    """The first table that holds for the vLLM version that the platform's data assumes, and has a row for the format
    where one has."""
    tables = [table for table in platform.speed if table.covers(platform.vllm)]
    having = [table for table in tables if format_name and table.rows_for(format_name, variant)]
    return next(iter([*having, *tables]), None)


def comparing(platform: Platform, first: Recipe, others: Sequence[Recipe], model: Model | None = None) -> Platform:
    """The platform with one speed table alone, that which decides between a recipe and others: the first that has rows
    for it and for one of them; none where there is no such table, for figures of two are not compared. Where a table
    near the model has the recipe, only near ones count (without a model: all are taken for near)."""
    tables = [t for t in platform.speed if t.covers(platform.vllm) and has_rows(t, first)]
    near = [table for table in tables if model is None or is_near(table, model)]
    deciding = [table for table in near or tables if any(has_rows(table, other) for other in others)]
    return platform.model_copy(update={"speed": tuple(deciding[:1])})


def has_rows(table: SpeedTable, recipe: Recipe) -> bool:
    """Whether a recipe was measured there, in whatever kernel."""
    return bool(table.rows_for(str(recipe.format), variant_of(recipe)))


def beyond_noise(table: SpeedTable, row: SpeedRow, at: int) -> bool:
    """Whether a kernel's speed differs from BF16's at a measured concurrency by more than noise."""
    gain = table.speedup(row, at)
    return max(gain, 1 / gain) > 1 + table.noise(at)


def times(gain: float, told: bool | None) -> str:
    """A gain in words: "1.31x", "~1.05x" where noise does not tell it from BF16."""
    return f"{'~' if told is False else ''}{gain:.2f}x"


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
    """The geometric mean of the best measured gain over the concurrencies that were measured nearest to these, each
    once; None where nothing was measured."""
    table = speed_table(platform, recipe.format, variant_of(recipe))
    measured = table.measured_near(levels) if table else []
    gains = [best[1] for level in measured if (best := best_speed(recipe, platform, level))]
    return math.exp(sum(map(math.log, gains)) / len(gains)) if gains else None


def least_gain(recipe: Recipe, platform: Platform, levels: Sequence[int]) -> float:
    """The ratio of two speeds at these concurrencies from which they differ by more than noise."""
    table = speed_table(platform, recipe.format, variant_of(recipe))
    return 1 + max([LEAST_NOISE, *(table.noise(level) for level in levels if table)])


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
    concurrency), `told` (whether it is more than noise; None: not measured), `tokens_per_second`
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
        "evidence": described(table) if table else None,
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
                "told": beyond_noise(table, row, at),
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
