"""plan.json: everything that can be said of a model and a recipe before a weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from halfbyte.errors import HalfbyteError
from halfbyte.models import Checkpoint
from halfbyte.plan import inventory
from halfbyte.plan.decision import Decision, badly_served, choose, hindrance, nvfp4_for, refusal
from halfbyte.plan.forecast import Forecast
from halfbyte.plan.layers import assign
from halfbyte.plan.notices import Setting, notices
from halfbyte.plan.parallel import rank_inputs, refuse_bad_tp
from halfbyte.plan.rules import Reason
from halfbyte.plan.speed import Model, nearest_first
from halfbyte.plan.strategy import STRATEGY_FIRST, disagreements, promise
from halfbyte.plan.words import title, variant_of
from halfbyte.platforms import Platform, facts_for
from halfbyte.recipe.schema import Recipe

Commands = Mapping[str, str] | Callable[[Recipe, Platform], str]
"""The serve command of a recipe on a platform: made by a room above this one, by platform name or by a function."""
ASSUMED_CONCURRENCY = 64


def make_plan(
    checkpoint: Checkpoint,
    recipe: Recipe | None,
    platforms: Sequence[Platform],
    context: int | None = None,
    concurrency: int | Sequence[int] | None = None,
    text_given: bool = False,
    commands: Commands | None = None,
    *,
    gates: Mapping[str, float | None] | None = None,
    tp: int = 1,
) -> dict[str, Any]:
    """The plan as plain data (plan.json). Bytes are of tensors alone and equal the artifact's.

    A reason (or warning) is {"rule", "text", "source"}. Memory is per tensor-parallel rank. Gains are times BF16.

    schema, kind    1, "plan"
    model           family, sizes, parameters, bytes, dtypes, context_limit; moe (None for a dense model): see
                    `experts_of`
    request         platforms, context, concurrency (the largest; None where not asked), levels (every concurrency),
                    tp, gates (name -> limit), text_given, recipe_given
    recipe          the resolved recipe; `title` in words; `reasons` (empty when given)
    alternatives    title, recipe, reason, source
    avoided         title, platform, rule, reason, source
    strategy        first: the strategy's first choice where every platform serves it, else its portable one;
                    disagreements: rows of platform, concurrency, strategy {title, kernel, gain}, evidence [{title,
                    kernel, flags, gain}], do, near, elsewhere, source; gain: for each platform where "+60-100 %"
                    holds (see `promise`)
    linears         a row for each kind and shape: kind, linear, count, out_features, in_features, parameters, grid,
                    group_size, bytes_before, bytes_after, bits_per_weight
    group_sizes     a row for each input width: divides, does_not_divide, used, text
    exemptions      by reason: linears, names, bytes, bytes_added (over quantizing them)
    bytes           before, after, linears_before, linears_after, quantized_linears, bf16_linears, other_tensors,
                    bits_per_quantized_weight (scales counted), bits_per_linear_weight, bits_per_parameter
    kv_cache        for each platform: kv_cache_dtype, reason, source
    memory          a row for each platform at the largest concurrency: see `Forecast.memory`; `levels` has the rows of
                    the other concurrencies, `bf16_*` the unquantized model's
    speed           for each platform: vllm, context, prompt_tokens, output_tokens, evidence, near, roofline,
                    rows (see `speed.predict`), served (the chosen recipe by the kernel of the serve command)
    pins            for each platform: vllm, since, before, torch, runtime, note, source
    commands        platform name -> shell command
    warnings        reasons; `notices` are their texts
    facts           what vLLM of that version is known to do with this format: platform, id, text, do, source

    Raises UsageError where the recipe does not fit the model, HalfbyteError where the checkpoint is broken.
    """
    levels = _levels(concurrency, platforms)
    model = inventory.model_facts(checkpoint)
    refuse_bad_tp(model, tp)
    size = Model(model["parameters"], tp)
    platforms = [nearest_first(platform, size) for platform in platforms]
    limits, experts = dict(gates or {}), bool(model["moe"])
    if recipe:
        decision = Decision(recipe, avoided=_against(recipe, platforms, experts))
    else:
        decision = choose(rank_widths(checkpoint, tp), platforms, levels, limits.get("ppl"), experts, size)
    chosen = decision.recipe
    linears = inventory.footprints(chosen, checkpoint)
    forecast = Forecast(checkpoint, model, context, levels, tp)
    memory = [forecast.memory(platform, chosen, linears) for platform in platforms]
    rivals = _rivals(decision, platforms, levels)
    speed = [forecast.speed(platform, chosen, rivals) for platform in platforms]
    sizes, kept = inventory.totals(linears, checkpoint), inventory.exemptions(linears)
    told = notices(Setting(chosen, linears, model, kept, sizes, memory, platforms, levels, context, tp, text_given))
    lines, refused = _commands(commands, chosen, platforms)
    warnings = [*refused, *told]
    return {
        "schema": 1,
        "kind": "plan",
        "model": model,
        "request": {
            "platforms": [platform.name for platform in platforms],
            "context": context,
            "concurrency": max(levels) if concurrency else None,
            "levels": list(levels),
            "tp": tp,
            "gates": limits,
            "text_given": text_given,
            "recipe_given": recipe is not None,
        },
        "recipe": chosen.identity(),
        "title": title(chosen),
        "reasons": [reason.plain() for reason in decision.reasons],
        "alternatives": decision.alternatives,
        "avoided": decision.avoided,
        "strategy": {
            "first": _strategy_first(platforms),
            "disagreements": disagreements(platforms, rivals, levels, size),
            "gain": promise(speed, levels),
        },
        "linears": inventory.by_kind(linears),
        "group_sizes": inventory.group_table(linears, chosen),
        "exemptions": kept,
        "bytes": sizes,
        "kv_cache": [forecast.kv_cache(platform, chosen) for platform in platforms],
        "memory": memory,
        "speed": speed,
        "pins": [pins(platform) for platform in platforms],
        "commands": lines,
        "warnings": [warning.plain() for warning in warnings],
        "notices": list(dict.fromkeys(warning.text for warning in warnings)),
        "facts": _facts(chosen, platforms),
    }


def rank_widths(checkpoint: Checkpoint, tp: int) -> list[int]:
    """The input widths of the linears inside the blocks on one rank, each once."""
    plans = assign(Recipe.model_validate({"method": "rtn", "group_size": -1}), checkpoint)
    widths = {rank_inputs(plan, tp) for plan in plans if plan.kind not in ("router", "lm_head")}
    odd = sorted(width for width in widths if width != int(width))
    if odd:
        raise HalfbyteError(f"--tp {tp} does not divide the {odd[0] * tp:g} inputs of a linear: use another")
    return sorted(map(int, widths))


def pins(platform: Platform) -> dict[str, Any]:
    """The versions that a platform's data stands on: the one assumed, the range it holds for, torch, CUDA or ROCm."""
    held = platform.pins
    return {
        "platform": platform.name,
        "vllm": platform.vllm,
        "since": held.since if held else None,
        "before": held.before if held else None,
        "torch": facts_for(platform.vllm).torch,
        "runtime": held.runtime if held else "",
        "note": held.note if held else "",
        "source": str(held.evidence) if held else "",
    }


def _levels(concurrency: int | Sequence[int] | None, platforms: Sequence[Platform]) -> tuple[int, ...]:
    if not concurrency:
        return (next((p.concurrency for p in platforms if p.concurrency), None) or ASSUMED_CONCURRENCY,)
    return (concurrency,) if isinstance(concurrency, int) else tuple(sorted(set(concurrency)))


def _against(recipe: Recipe, platforms: Sequence[Platform], experts: bool) -> list[dict[str, str]]:
    refused = [entry for platform in platforms if (entry := refusal(recipe, platform, experts))]
    return [*refused, *badly_served([recipe], platforms)]


def _rivals(decision: Decision, platforms: Sequence[Platform], levels: Sequence[int]) -> list[Recipe]:
    """What is shown and compared beside the chosen recipe: the alternatives, and ModelOpt's NVFP4 in its faster
    declaration."""
    shown = [decision.recipe, *(Recipe.model_validate(entry["recipe"]) for entry in decision.alternatives)]
    if any((recipe.method, recipe.format) == ("nvfp4", "modelopt") for recipe in shown):
        shown.append(nvfp4_for(platforms, levels))
    unique: dict[tuple[str | None, str | None], Recipe] = {}
    for recipe in shown:
        unique.setdefault((recipe.format, variant_of(recipe)), recipe)
    return list(unique.values())


def _strategy_first(platforms: Sequence[Platform]) -> str:
    portable = not platforms or any(hindrance(STRATEGY_FIRST, platform) for platform in platforms)
    return "GPTQ or AWQ (portable across vendors)" if portable else "NVFP4 (where every platform serves it)"


def _facts(recipe: Recipe, platforms: Sequence[Platform]) -> list[dict[str, str]]:
    rows = []
    for platform in platforms:
        for quirk in facts_for(platform.vllm).quirks:
            if not quirk.formats or recipe.format in quirk.formats:
                row = {"platform": platform.name, "id": quirk.id, "text": quirk.text, "do": quirk.do}
                rows.append({**row, "source": quirk.source})
    return rows


def _commands(
    commands: Commands | None, recipe: Recipe, platforms: Sequence[Platform]
) -> tuple[dict[str, str], list[Reason]]:
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
                refused.append(Reason("command", f"no serve command for {platform.name}: {error}", platform.name))
    return lines, refused
