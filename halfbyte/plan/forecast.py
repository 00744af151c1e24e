"""Memory and speed of a model on a platform, in one place: what a rank holds, reads and multiplies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from halfbyte.models import Checkpoint
from halfbyte.plan import inventory
from halfbyte.plan.inventory import Footprint
from halfbyte.plan.memory import KV_BYTES, Device, KVShape, memory_estimate
from halfbyte.plan.parallel import rank_bytes
from halfbyte.plan.roofline import Work, work_of
from halfbyte.plan.rules import CONFIGURATION
from halfbyte.plan.speed import Model, best_speed, described, half_and_half, is_near, predict, speed_table
from halfbyte.plan.windows import windows
from halfbyte.plan.words import flag_words, variant_of
from halfbyte.platforms import Platform, SpeedRow, facts_for
from halfbyte.recipe.schema import Recipe

ASSUMED_CONTEXT = 4096
GIB = 2**30


class Forecast:
    """What the model would take and give, at one context and several concurrencies, on `tp` ranks."""

    def __init__(
        self, checkpoint: Checkpoint, model: dict[str, Any], context: int | None, levels: Sequence[int], tp: int
    ):
        self.checkpoint, self.model, self.asked, self.levels, self.tp = checkpoint, model, context, levels, tp
        self.kv = KVShape.of(model, windows(checkpoint.config, model["blocks"]), tp)
        self.linears: dict[str, list[Footprint]] = {}

    def context(self, platform: Platform) -> int:
        """The context asked for, else what the platform's data says, else an assumption; at most the model's limit."""
        limit = self.model["context_limit"] or ASSUMED_CONTEXT
        return self.asked or min(platform.context or ASSUMED_CONTEXT, limit)

    def kv_cache_dtype(self, platform: Platform, recipe: Recipe) -> str:
        """--kv-cache-dtype of the serve command."""
        support = platform.formats.get(f"{recipe.format}/{variant_of(recipe)}") or platform.formats.get(
            str(recipe.format)
        )
        flags = {**platform.flags, **(support.flags if support else {})}
        return flags.get("--kv-cache-dtype") or "auto"

    def kv_cache(self, platform: Platform, recipe: Recipe) -> dict[str, str]:
        """The KV cache's type there and why."""
        dtype = self.kv_cache_dtype(platform, recipe)
        if dtype in KV_BYTES:
            reason = "an FP8 KV cache is a sound default on this hardware, and holds twice the tokens"
        elif platform.capabilities.accelerator:
            reason = "an FP8 KV cache is experimental on this hardware: 16 bits until your build proves it"
        else:
            reason = "what an FP8 KV cache would gain on a processor is not known: 16 bits"
        return {"platform": platform.name, "kv_cache_dtype": dtype, "reason": reason, "source": CONFIGURATION}

    def memory(self, platform: Platform, recipe: Recipe, linears: Sequence[Footprint]) -> dict[str, Any]:
        """A row of `memory`, in bytes of one rank.

        platform, kv_cache_dtype, kv_bytes_per_token, weights_bytes, overhead_bytes, device_bytes, usable_bytes,
        utilization, sources; at the largest concurrency what `memory_estimate` gives; `levels`: the same for each
        concurrency; bf16_weights_bytes, bf16_total_bytes, bf16_max_concurrency, bf16_fits.
        """
        facts = facts_for(platform.vllm)
        dtype, context = self.kv_cache_dtype(platform, recipe), self.context(platform)
        memory = None if platform.memory_gib is None else int(platform.memory_gib * GIB)
        device = Device(memory, facts.gpu_memory_utilization, int(platform.overhead_gib * GIB), facts.step_tokens)
        weights = {before: self._weights(linears, before) for before in (False, True)}

        def at(level: int, before: bool = False) -> dict[str, Any]:
            return memory_estimate(self.model, self.kv, weights[before], device, context, level, dtype, self.tp)

        most = max(self.levels)
        plain = at(most, True)
        return {
            "platform": platform.name,
            "kv_cache_dtype": dtype,
            "kv_bytes_per_token": self.kv.token_bytes(dtype),
            "weights_bytes": weights[False],
            "overhead_bytes": device.overhead,
            "device_bytes": memory,
            "usable_bytes": device.usable,
            "utilization": device.utilization,
            "tp": self.tp,
            **at(most),
            "levels": [at(level) for level in self.levels],
            "bf16_weights_bytes": weights[True],
            "bf16_total_bytes": plain["total_bytes"],
            "bf16_max_concurrency": plain["max_concurrency"],
            "bf16_fits": plain["fits"],
            "sources": {
                "weights_bytes": "the model's headers and the recipe; on more ranks: a share of linears and embeddings",
                "kv_bytes": "config.json: blocks, KV heads, head size, windows; whole pages of 16 tokens",
                "activation_bytes": f"estimate: one step of {device.step_tokens} tokens in 16 bits, and FP32 logits",
                "overhead_bytes": "estimate: driver context, captured graphs, buffers (the platform's overhead_gib)",
                "utilization": f"vLLM's --gpu-memory-utilization by default, facts of {facts.since}",
            },
        }

    def speed(self, platform: Platform, chosen: Recipe, shown: Sequence[Recipe]) -> dict[str, Any]:
        """A row of `speed`: predictions for every recipe of `shown`, and the chosen one as its command serves it."""
        context = self.context(platform)
        prompt, output = half_and_half(context)
        size = Model(self.model["parameters"], self.tp)
        rows = []
        for recipe in shown:
            rows += predict(recipe, platform, size, self._works(platform, recipe), context, self.levels)
        table = speed_table(platform, chosen.format, variant_of(chosen))
        return {
            "platform": platform.name,
            "vllm": platform.vllm,
            "context": context,
            "prompt_tokens": prompt,
            "output_tokens": output,
            "evidence": described(table) if table else None,
            "measured_tokens": table.prompt_tokens + table.output_tokens if table else None,
            "near": bool(table and is_near(table, size)),
            "roofline": str(platform.roofline.evidence) if platform.roofline else None,
            "rows": rows,
            "served": _served(platform, chosen, rows),
        }

    def _works(self, platform: Platform, recipe: Recipe) -> tuple[Work, Work]:
        key = recipe.model_dump_json()
        if key not in self.linears:
            self.linears[key] = inventory.footprints(recipe, self.checkpoint)
        moe = self.model["moe"] or {}
        used = moe.get("experts_per_token")
        return work_of(
            self.linears[key],
            self.model["embedding_bytes"],
            self.model["blocks"],
            self.model["heads"] // self.tp,
            self.kv,
            self.kv_cache_dtype(platform, recipe),
            self.tp,
            (moe["experts"], used) if moe and used else (0, 0),
        )

    def _weights(self, linears: Sequence[Footprint], before: bool) -> int:
        rest = self.checkpoint.total_bytes - sum(linear.before for linear in linears)
        embedding = self.model["embedding_bytes"]
        return rank_bytes(linears, embedding, rest - embedding, self.model["kv_heads"], self.tp, before)


def _name(row: SpeedRow) -> tuple[str, str]:
    return row.kernel, flag_words(row.all_flags)


def _served(platform: Platform, chosen: Recipe, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The gains of the chosen recipe by the kernel that its command takes: a server has one for every concurrency."""
    mine = [row for row in rows if (row["format"], row["variant"]) == (chosen.format, variant_of(chosen))]
    if not mine:
        return []
    fastest = best_speed(chosen, platform, mine[0]["gains"][-1]["concurrency"])
    same = [row for row in mine if fastest and (row["kernel"], row["flags"]) == _name(fastest[0])]
    best = (same or mine)[0]
    return [{**gain, "kernel": best["kernel"], "flags": best["flags"]} for gain in best["gains"]]
