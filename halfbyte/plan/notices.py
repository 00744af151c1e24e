"""What a user should know before the work begins: what will hinder, what is guessed, where facts bend the strategy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.plan.decision import hindrance
from halfbyte.plan.inventory import Footprint
from halfbyte.plan.kernels import fall_backs
from halfbyte.plan.layers import EXPERTS_DOWN
from halfbyte.plan.memory import KV_BYTES
from halfbyte.plan.parallel import odd_widths
from halfbyte.plan.rules import (
    CONFIGURATION,
    EVERY_FORMAT,
    HEADERS,
    NVFP4_BLOCKS,
    POLICY,
    RISKS,
    Reason,
    data_source,
    guide,
)
from halfbyte.plan.speed import Model, best_speed, beyond_noise, elsewhere, is_near, speed_table, times
from halfbyte.plan.words import flag_words, joined, variant_of
from halfbyte.platforms import FormatSupport, Platform, facts_for
from halfbyte.recipe.schema import Recipe
from halfbyte.types import NVFP4_BLOCK


@dataclass(frozen=True)
class Setting:
    """All that notices go by."""

    recipe: Recipe
    linears: Sequence[Footprint]
    model: dict[str, Any]
    exemptions: Sequence[dict[str, Any]]
    sizes: dict[str, Any]
    memory: Sequence[dict[str, Any]]
    platforms: Sequence[Platform]
    levels: Sequence[int]
    context: int | None
    tp: int
    text_given: bool

    @property
    def size(self) -> Model:
        return Model(self.model["parameters"], self.tp)


def notices(at: Setting) -> list[Reason]:
    """Every notice, one sentence each, the most important first."""
    found: list[Reason] = []
    for platform in at.platforms:
        against = hindrance(at.recipe, platform, bool(at.model["moe"]))
        found += [Reason("format", f"do not serve this on {against}", platform.name)] if against else []
    found += [*_memory(at), *_parallel(at), *_experts(at)]
    for platform in at.platforms:
        found += fall_backs(at.recipe, at.linears, platform, at.tp)
    found += [*_context(at), *_kernels(at), *_shared_scales(at), *_layers(at), *_calibration(at), *_grounds(at)]
    return [*found, *_spellings(at.platforms)]


def _memory(at: Setting) -> list[Reason]:
    found = []
    for row in at.memory:
        if row["fits"] is False:
            most = row["max_concurrency"]
            way = f"{most:,} such sequences would" if most else "not even one sequence would: use more devices (--tp)"
            text = f"{row['platform']}: {row['concurrency']} sequences of {row['context']:,} tokens do not fit; {way}"
            found.append(Reason("memory", text, "strategy, Acceptance Criteria (no OOM at target concurrency)"))
    return found


def _parallel(at: Setting) -> list[Reason]:
    odd = odd_widths(at.linears, at.tp)
    if not odd:
        return []
    name, width, group = odd[0]
    text = (
        f"tensor parallel {at.tp}: {name} has {width} inputs on a rank, which groups of {group} do not divide"
        f"{f' ({len(odd)} linears)' if len(odd) > 1 else ''}; vLLM refuses it: smaller group_size, or another --tp"
    )
    return [Reason("tensor-parallel", text, EVERY_FORMAT)]


def _experts(at: Setting) -> list[Reason]:
    moe = at.model["moe"]
    if not moe:
        return []
    found = []
    for platform in at.platforms:
        support = _support(at.recipe, platform)
        experts = support.experts if support else None
        if experts and experts.loads:
            words = "; ".join([f"{platform.name}: the experts run in {' or '.join(experts.kernels)}", *experts.notes])
            found.append(Reason("moe-kernels", words, data_source(platform.name, experts.evidence)))
        elif support and support.loads and not experts:
            text = f"{platform.name}: which kernels serve experts of this format was not looked at"
            found.append(Reason("moe-kernels", text, f"{platform.name} data"))
    share = moe["active_parameters"] / at.model["parameters"]
    text = (
        f"a token goes through {moe['experts_per_token']} of {moe['experts']} experts, {share:.0%} of the parameters; "
        "the roofline counts the experts that a step reads, as plain linears: nothing was measured for experts"
    )
    found.append(Reason("moe-speed", text, "the model's config; halfbyte/plan/roofline.py"))
    if any(linear.plan.reason.startswith(EXPERTS_DOWN) for linear in at.linears):
        found.append(Reason("moe-boundary", EXPERTS_DOWN, EVERY_FORMAT))
    return found


def _support(recipe: Recipe, platform: Platform) -> FormatSupport | None:
    try:
        return platform.support(recipe.format, variant_of(recipe))
    except KeyError:
        return None


def _context(at: Setting) -> list[Reason]:
    found = []
    limit = at.model["context_limit"]
    if at.context and limit and at.context > limit:
        text = f"a context of {at.context:,} is beyond the {limit:,} positions of this model"
        found.append(Reason("context-limit", text, HEADERS))
    rule = guide().long_context
    for row in at.memory:
        if row["kv_cache_dtype"] in KV_BYTES and row["context"] >= rule.tokens:
            text = (
                f"{row['platform']}: at {row['context']:,} tokens check the drift of the FP8 KV cache; "
                "--kv-cache-dtype auto is the way back"
            )
            found.append(Reason("long-context", text, f"{rule.source}; {RISKS}"))
    return found


def _shared_scales(at: Setting) -> list[Reason]:
    sizes = sorted({p.scheme.group_size for p in (linear.plan for linear in at.linears) if p.scheme})
    shared = [size for size in sizes if at.recipe.grid == "nvfp4" and size > NVFP4_BLOCK]
    if not shared:
        return []
    blocks = joined([str(size // NVFP4_BLOCK) for size in shared])
    text = (
        f"NVFP4 stores a scale for every {NVFP4_BLOCK} weights: group {joined([*map(str, shared)])} gives {blocks} "
        f"neighbouring blocks the same scale, which saves no bytes and no time over group {NVFP4_BLOCK}, and loses "
        "quality"
    )
    return [Reason("nvfp4-group", text, NVFP4_BLOCKS)]


def _layers(at: Setting) -> list[Reason]:
    found = []
    if not any(linear.plan.scheme for linear in at.linears):
        found.append(Reason("nothing", "nothing is quantized: every linear is exempt", HEADERS))
    if at.model["tied"]:
        text = "lm_head is tied to the embeddings, so it stays in BF16 and exempting it adds no bytes"
        found.append(Reason("tied", text, EVERY_FORMAT))
        for platform in at.platforms:
            quirks = [quirk for quirk in facts_for(platform.vllm).quirks if quirk.id == "tied-modelopt"]
            found += [
                Reason("tied", f"{platform.name}: {quirk.text}: {quirk.do}", quirk.source)
                for quirk in quirks
                if at.recipe.format in quirk.formats
            ]
    rule = guide().over_exemption
    added = sum(row["bytes_added"] for row in at.exemptions if row["names"] != ["lm_head"])
    if added > rule.share * at.sizes["after"]:
        share = added / at.sizes["after"]
        text = (
            f"what is kept in BF16 beside lm_head is {share:.0%} of the artifact: prefer o_proj and down_proj of the "
            "boundary blocks to whole blocks"
        )
        found.append(Reason("over-exemption", text, f"{rule.source}; {POLICY}"))
    if at.model["parameters"] < guide().small_model.parameters:
        text = "a model this small loses more in 4 bits than the strategy's +5 % of perplexity: state a budget"
        found.append(Reason("small-model", text, guide().small_model.source))
    return found


def _calibration(at: Setting) -> list[Reason]:
    if not at.recipe.needs_calibration or at.text_given:
        return []
    rule = guide().calibration
    if at.recipe.method == "nvfp4":
        wanted = f"{rule.nvfp4_tokens[0]:,} to {rule.nvfp4_tokens[1]:,} tokens"
    else:
        wanted = f"{rule.sequences[0]} to {rule.sequences[1]} sequences of mixed lengths"
    text = f"no text was given: the model writes its own calibration text; your own (--text) is better, {wanted}"
    return [Reason("calibration", text, rule.source)]


def _kernels(at: Setting) -> list[Reason]:
    found = []
    for platform in at.platforms:
        table, level = speed_table(platform, at.recipe.format, variant_of(at.recipe)), max(at.levels)
        best = best_speed(at.recipe, platform, level)
        if table is None or best is None:
            continue
        row, _ = best
        rows = table.rows_for(str(at.recipe.format), variant_of(at.recipe), row.kv_cache)
        default = [other for other in rows if not other.flags]
        near = is_near(table, at.size)
        if row.flags and default and not near:
            text = (
                f"{platform.name}: serve with {flag_words(row.flags)} ({row.kernel}, the faster one by a measurement "
                f"{elsewhere(table, at.size)}); without it vLLM takes {default[0].kernel}"
            )
            found.append(Reason("kernel-flag", text, str(table.evidence)))
        elif row.flags and default:
            measured = table.telling(row, default[0], level) or table.nearest(level)
            fast, slow = (
                times(table.speedup(r, measured), beyond_noise(table, r, measured)) for r in (row, default[0])
            )
            text = (
                f"{platform.name}: serve with {flag_words(row.flags)} ({row.kernel}, measured {fast} BF16 at "
                f"concurrency {measured}); without it vLLM takes {default[0].kernel}, {slow}"
            )
            found.append(Reason("kernel-flag", text, str(table.evidence)))
        slower = [c for c in row.seconds if table.speedup(row, c) < 1 and beyond_noise(table, row, c)]
        if slower and near:
            text = (
                f"{platform.name}: at concurrency {joined([*map(str, slower)])} {row.kernel} measured slower than "
                "BF16; what is gained there is memory"
            )
            found.append(Reason("slower", text, str(table.evidence)))
    return found


def _grounds(at: Setting) -> list[Reason]:
    """What the figures stand on, where that is not a measurement of a model like this one."""
    found = []
    for platform in at.platforms:
        notice = facts_for(platform.vllm).notice
        found += [Reason("version", f"{platform.name}: {notice}", "vLLM facts")] if notice else []
        table = speed_table(platform, at.recipe.format, variant_of(at.recipe))
        if table is None and platform.speed:
            text = (
                f"{platform.name}: nothing was measured that holds for vLLM {platform.vllm} "
                f"(there is {platform.speed[0].vllm})"
            )
            found.append(Reason("no-evidence", text, "evidence files"))
        elif table and not is_near(table, at.size):
            other = table.model.shape + (", on one device" if table.tensor_parallel == 1 < at.tp else "")
            text = (
                f"{platform.name}: kernels are ranked by a measurement {elsewhere(table, at.size)} ({other}); "
                "the gains are the roofline's"
            )
            found.append(Reason("far-evidence", text, guide().near.source))
        if platform.roofline and platform.roofline.evidence.kind == "assumed":
            text = f"{platform.name}: the roofline's efficiencies are assumed: they were not fitted to anything"
            found.append(Reason("assumed", text, f"{platform.name} data"))
    return found


def _spellings(platforms: Sequence[Platform]) -> list[Reason]:
    known = [facts_for(p.vllm).misnomers for p in platforms if p.capabilities.accelerator]
    wrong = {flag: value for misnomers in known for flag, value in misnomers.items() if flag.endswith("bf16")}
    if not wrong:
        return []
    spelled = ", ".join(f"{flag} as {value}" for flag, value in wrong.items())
    text = f"the strategy's flags, as vLLM spells them: {spelled}; no --quantization, which vLLM reads from the files"
    return [Reason("spelling", text, f"{CONFIGURATION}; vLLM facts, flags")]
