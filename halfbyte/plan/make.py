"""plan.json: everything that can be said of a model and a recipe before a weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from halfbyte.errors import HalfbyteError
from halfbyte.models import Checkpoint
from halfbyte.plan import inventory
from halfbyte.plan.decision import Decision, choose, hindrance, nvfp4_for, speed_rows, title, variant_of
from halfbyte.plan.layers import assign
from halfbyte.plan.memory import memory_estimate
from halfbyte.plan.notices import notices
from halfbyte.platforms import Platform
from halfbyte.recipe.schema import Recipe

Commands = Mapping[str, str] | Callable[[Recipe, Platform], str]
"""The serve command of a recipe on a platform: made by a room above this one, by platform name or by a function."""
ASSUMED_CONCURRENCY = 64
ASSUMED_CONTEXT = 4096
USABLE = 0.9
"""Share of a device's memory that vLLM takes unless told otherwise (--gpu-memory-utilization)."""


def make_plan(
    checkpoint: Checkpoint,
    recipe: Recipe | None,
    platforms: Sequence[Platform],
    context: int | None = None,
    concurrency: int | None = None,
    text_given: bool = False,
    commands: Commands | None = None,
) -> dict[str, Any]:
    """The plan as plain data (plan.json). Bytes are of tensors alone and equal the artifact's.

    schema, kind    1, "plan"
    model           family, sizes, parameters, bytes, dtypes, context_limit
    request         platforms, context, concurrency, text_given, recipe_given
    recipe          the resolved recipe; `title` in words; `reasons`, `alternatives`, `avoided` (empty when given)
    linears         a row for each kind and shape: kind, linear, count, out_features, in_features, parameters, grid,
                    group_size, bytes_before, bytes_after, bits_per_weight
    group_sizes     a row for each input width: divides, does_not_divide, used, text
    exemptions      by reason: linears, names, bytes, bytes_added (over quantizing them)
    bytes           before, after, linears_before, linears_after, quantized_linears, bf16_linears, other_tensors,
                    bits_per_quantized_weight (scales counted), bits_per_linear_weight, bits_per_parameter
    memory          a row for each platform: context, concurrency, see `memory_estimate`; the same for BF16 beside it
    speed           measured gains over BF16 per concurrency and kernel, where the platform's data has them
    commands        platform name -> shell command
    notices         sentences

    Raises UsageError where the recipe does not fit the model, HalfbyteError where the checkpoint is broken.
    """
    wanted = concurrency or next((p.concurrency for p in platforms if p.concurrency), None) or ASSUMED_CONCURRENCY
    decision = Decision(recipe) if recipe else choose(block_widths(checkpoint), platforms, wanted)
    chosen = decision.recipe
    linears = inventory.footprints(chosen, checkpoint)
    model = inventory.model_facts(checkpoint)
    sizes = inventory.totals(linears, checkpoint)
    told = notices(chosen, linears, model, platforms, context, wanted, text_given)
    lines, refused = _commands(commands, chosen, platforms)
    return {
        "schema": 1,
        "kind": "plan",
        "model": model,
        "request": {
            "platforms": [platform.name for platform in platforms],
            "context": context,
            "concurrency": concurrency,
            "text_given": text_given,
            "recipe_given": recipe is not None,
        },
        "recipe": chosen.identity(),
        "title": title(chosen),
        "reasons": decision.reasons,
        "alternatives": decision.alternatives,
        "avoided": decision.avoided,
        "linears": inventory.by_kind(linears),
        "group_sizes": inventory.group_table(linears, chosen),
        "exemptions": inventory.exemptions(linears),
        "bytes": sizes,
        "memory": [_memory(p, chosen, checkpoint, model, sizes, context, concurrency) for p in platforms],
        "speed": _speed(chosen, decision, platforms, wanted),
        "commands": lines,
        "notices": list(dict.fromkeys([*refused, *told])),
    }


def block_widths(checkpoint: Checkpoint) -> list[int]:
    """The input widths of the linears inside the blocks, each once."""
    plans = assign(Recipe.model_validate({"method": "rtn", "group_size": -1}), checkpoint)
    return sorted({plan.in_features for plan in plans if plan.block is not None})


def _memory(
    platform: Platform,
    recipe: Recipe,
    checkpoint: Checkpoint,
    model: dict[str, Any],
    sizes: dict[str, Any],
    context: int | None,
    concurrency: int | None,
) -> dict[str, Any]:
    try:
        flags = {**platform.flags, **platform.support(recipe.format, variant_of(recipe)).flags}
    except KeyError:
        flags = platform.flags
    limit = model["context_limit"] or ASSUMED_CONTEXT
    length = context or min(platform.context or ASSUMED_CONTEXT, limit)
    sequences = concurrency or platform.concurrency or ASSUMED_CONCURRENCY
    device = None if platform.memory_gib is None else int(platform.memory_gib * 2**30)
    kv_cache_dtype = flags.get("--kv-cache-dtype") or "auto"
    ours, bf16 = (
        memory_estimate(model, checkpoint.config, weights, device, USABLE, length, sequences, kv_cache_dtype)
        for weights in (sizes["after"], sizes["before"])
    )
    return {
        "platform": platform.name,
        "context": length,
        "concurrency": sequences,
        **ours,
        "bf16_total_bytes": bf16["total_bytes"],
        "bf16_max_concurrency": bf16["max_concurrency"],
    }


def _speed(chosen: Recipe, decision: Decision, platforms: Sequence[Platform], concurrency: int) -> list[dict[str, Any]]:
    shown = [chosen, *(Recipe.model_validate(entry["recipe"]) for entry in decision.alternatives)]
    if chosen.method == "nvfp4" and chosen.activations == "bf16":
        shown.append(nvfp4_for(platforms, concurrency))
    unique = list({(recipe.format, variant_of(recipe)): recipe for recipe in reversed(shown)}.values())[::-1]
    return [table for table in (speed_rows(unique, platform) for platform in platforms) if table]


def _commands(
    commands: Commands | None, recipe: Recipe, platforms: Sequence[Platform]
) -> tuple[dict[str, str], list[str]]:
    if commands is None:
        return {}, []
    if isinstance(commands, Mapping):
        return dict(commands), []
    lines, refused = {}, []
    for platform in platforms:
        try:
            lines[platform.name] = commands(recipe, platform)
        except HalfbyteError as error:
            if not hindrance(recipe, platform):
                refused.append(f"no serve command for {platform.name}: {error}")
    return lines, refused
