"""Made-up result files of a whole run, for the tests of the report and the model card."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

LINEARS = {
    "q_proj": 576,
    "k_proj": 192,
    "v_proj": 192,
    "o_proj": 576,
    "gate_proj": 1536,
    "up_proj": 1536,
    "down_proj": 576,
}
BLOCKS = 30


def manifest() -> dict[str, Any]:
    linears = {}
    for block in range(BLOCKS):
        for index, leaf in enumerate(LINEARS):
            part = "self_attn" if index < 4 else "mlp"
            name = f"model.layers.{block}.{part}.{leaf}"
            edge = block in (0, BLOCKS - 1) and leaf in ("o_proj", "down_proj")
            error = 0.04 + 0.012 * index + 0.002 * ((block * 7 + index * 3) % 13) + (0.05 if block == BLOCKS - 2 else 0)
            scheme = None if edge else {"grid": "int4_sym", "group_size": 64}
            linears[name] = {"scheme": scheme, "error": None if edge else {"relative": error}}
    return {
        "schema": 1,
        "kind": "artifact",
        "model": "smollm2-135m",
        "recipe": {
            "method": "gptq",
            "rounding": "gptq",
            "grid": "int4_sym",
            "group_size": 64,
            "format": "gptq",
            "ignore": ["lm_head"],
            "boundary": {"blocks": 1, "keep": "projections"},
            "damp": 0.05,
        },
        "linears": linears,
        "versions": {"halfbyte": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0", "vllm": "0.32.0"},
        "git": "2f0c1c9d5b7e4a1d9f3b8a6c0e2d4f6a8b0c1d2e",
        "seconds": 112.4,
        "peak_rss_mib": 1420.5,
        "bits_per_weight": 4.36,
        "bytes": 114_100_000,
        "command": [
            "halfbyte",
            "quantize",
            "smollm2-135m",
            "-r",
            "B3",
            "--set",
            "ignore=[lm_head, re:.*x]",
            "-o",
            "runs/demo/model",
        ],
        "model_sha256": "ab" * 32,
        "notices": ["model.layers.3.mlp.down_proj: damping raised to 0.1 after a failed Cholesky"],
    }


def plan() -> dict[str, Any]:
    rows = [
        {"kind": kind, "linear": kind, "count": 30, "bytes_before": before, "bytes_after": after}
        for kind, before, after in (
            ("qkv", 33_177_600, 9_136_800),
            ("o", 19_906_560, 5_431_680),
            ("gate_up", 106_168_320, 28_800_000),
            ("down", 53_084_160, 17_900_000),
            ("lm_head", 0, 0),
        )
    ]
    return {
        "schema": 1,
        "kind": "plan",
        "model": {"path": "/models/smollm2-135m", "family": "llama"},
        "request": {"platforms": ["cpu"], "context": None, "concurrency": None},
        "recipe": {"method": "gptq", "group_size": 64, "format": "gptq"},
        "linears": rows,
        "bytes": {
            "before": 269_060_352,
            "after": 117_992_192,
            "other_tensors": 56_723_712,
            "bits_per_quantized_weight": 4.36,
        },
        "exemptions": [
            {
                "reason": "boundary projection",
                "linears": 4,
                "names": ["model.layers.0.self_attn.o_proj"],
                "bytes_added": 3_400_000,
            },
            {"reason": "ignore: lm_head", "linears": 1, "names": ["lm_head"], "bytes_added": 0},
        ],
        "group_sizes": [
            {"in_features": 576, "text": "128 does not divide 576: 64 is used"},
            {"in_features": 1536, "text": "groups of 64"},
        ],
        "memory": [
            {
                "platform": "cpu",
                "context": 2048,
                "concurrency": 8,
                "weights_bytes": 117_992_192,
                "kv_bytes": 377_487_360,
                "kv_cache_dtype": "auto",
                "total_bytes": 607_000_000,
                "usable_bytes": None,
                "fits": None,
                "max_concurrency": None,
            }
        ],
        "commands": {
            "cpu": "VLLM_CPU_KVCACHE_SPACE=1 \\\nvllm serve runs/demo/model \\\n  --dtype bfloat16 \\\n"
            "  --max-model-len 2048"
        },
        "notices": ["lm_head is tied to the embeddings, so it stays in BF16 and exempting it adds no bytes"],
    }


def evaluation() -> dict[str, Any]:
    numbers = {
        "ppl_baseline": (25.61, 24.9, 26.4),
        "ppl": (28.26, 27.4, 29.2),
        "ppl_ratio": (1.1035, 1.0952, 1.1121),
        "kl_mean": (0.1052, 0.1018, 0.1089),
        "kl_median": (0.0441, 0.043, 0.0453),
        "kl_p99": (0.86, 0.81, 0.93),
        "kl_p999": (2.41, 2.1, 2.9),
        "top1": (0.834, 0.829, 0.8391),
        "loglik_gap": (0.0985, 0.091, 0.106),
        "flips": (0.071, 0.068, 0.0741),
    }
    return {
        "schema": 1,
        "kind": "eval",
        "model": "runs/demo/model",
        "baseline": "smollm2-135m",
        "text": {
            "source": "self-generated, seed 1",
            "sha256": "cd" * 32,
            "windows": 40,
            "window": 512,
            "stride": 512,
            "tokens": 20440,
        },
        "metrics": {name: dict(zip(("value", "low", "high"), three)) for name, three in numbers.items()},
        "noise_floor": {"kl_mean": 2.1e-5, "top1": 0.9987, "ppl_ratio": 1.0001, "how": "BF16 in batches of 1 and of 4"},
        "self_generated": True,
        "seconds": 61.2,
        "confidence": 0.95,
        **by_token(),
    }


def around(value: float, share: float = 0.06) -> dict[str, float]:
    """A metric with an interval of `share` of it to each side."""
    return {"value": value, "low": value - share * abs(value), "high": value + share * abs(value)}


def by_token() -> dict[str, Any]:
    """Where the two models differ: by position, by confidence, as a histogram, and the worst tokens."""
    ends = [0, 32, 64, 128, 256, 512]
    shares = [0.0, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0]
    edges = [0, 1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1, 3, 10]
    worst = [
        ("The treaty was signed in the city of", " Ghent", " Paris", " Vienna", 6.1),
        ("for i in range(10):\n\tprint(", "i", "i", '"', 4.4),
        ("an HTML page may begin with", "<script>", "<script>", " a", 3.9),
        ("the mass of the electron is about 9.1e-31 kilograms, " * 3, " it", " the", " a", 3.2),
    ]  # fmt: skip
    return {
        "by_position": [
            {"from": a, "to": b, "kl": around(0.19 - 0.02 * i), "top1": around(0.78 + 0.012 * i, 0.01)}
            for i, (a, b) in enumerate(pairwise(ends))
        ],
        "by_confidence": [
            {"from": a, "to": b, "tokens": 2000 + i, "kl": around(0.24 - i / 28), "top1": around(0.55 + i / 12, 0.03)}
            for i, (a, b) in enumerate(pairwise(shares))
        ],
        "kl_histogram": {"edges": edges, "counts": [310, 900, 1800, 3600, 4500, 4700, 3200, 1150, 260, 20]},
        "worst": [
            {
                "kl": kl,
                "window": 3 + i,
                "position": 41 * (i + 1),
                "context": context,
                "token": token,
                "baseline_top": base,
                "model_top": mine,
                "probabilities": {
                    "baseline_top": {"baseline": 0.61, "model": 0.02},
                    "model_top": {"baseline": 0.04, "model": 0.7},
                    "token": {"baseline": 0.2, "model": 0.001},
                },
            }
            for i, (context, token, base, mine, kl) in enumerate([*worst, *worst, *worst])
        ],
    }  # fmt: skip


def tasks() -> dict[str, Any]:
    rows = [
        ("arc_easy", "acc", 500, 0.606, 0.598, -0.008, 0.014, 0.052, None),
        ("hellaswag", "acc_norm", 500, 0.428, 0.421, -0.007, 0.011, 0.041, None),
        ("piqa", "acc", 500, 0.684, 0.69, 0.006, 0.013, 0.038, None),
        ("gsm8k", "exact_match", 200, 0.062, 0.045, -0.017, 0.021, 0.055, (182.4, 190.1)),
        ("own_questions", "f1", 120, 0.381, 0.352, -0.029, 0.024, 0.1, (41.2, 44.9)),
    ]
    return {
        "schema": 1,
        "kind": "tasks",
        "baseline": "smollm2-135m",
        "model": "model",
        "backend": "hf",
        "confidence": 0.95,
        "tasks": [
            {
                "name": name,
                "metric": metric,
                "higher_is_better": True,
                "items": items,
                "baseline": around(base),
                "model": around(mine),
                "difference": {"value": moved, "low": moved - half, "high": moved + half},
                "recovery": around(mine / base, 0.03),
                "flips": flips,
                "length": length and {**dict(zip(("baseline", "model"), length)), "ratio": around(1.06)},
            }
            for name, metric, items, base, mine, moved, half, flips, length in rows
        ],
        "average": {
            "difference": {"value": -0.011, "low": -0.019, "high": -0.003},
            "recovery": {"value": 0.966, "low": 0.938, "high": 0.991},
        },
        "seconds": 812.5,
    }  # fmt: skip


def long_context() -> dict[str, Any]:
    lengths = [4096, 8192, 16384, 32768]
    loss = {"bf16": 0.0, "4bit": 0.02, "bf16+fp8kv": 0.008, "4bit+fp8kv": 0.035}
    buckets = [(0, 1024), (1024, 4096), (4096, 16384), (16384, 32768)]

    def scores(start: float, step: int) -> dict[str, Any]:
        return {name: around(start - 0.03 * step - lost * (step + 1), 0.03) for name, lost in loss.items()}

    return {
        "schema": 1,
        "kind": "long_context",
        "baseline": "smollm2-135m",
        "model": "model",
        "lengths": lengths,
        "retrieval": [
            *(
                {"task": "needle", "length": n, "depth": depth, "scores": scores(0.99 - 0.05 * (depth == 0.5), i)}
                for i, n in enumerate(lengths)
                for depth in (0.1, 0.5, 0.9)
            ),
            *({"task": "values", "length": n, "depth": None, "scores": scores(0.8, i)} for i, n in enumerate(lengths)),
        ],
        "perplexity": [
            {
                "from": a,
                "to": b,
                "ppl": {name: around(18 - 2 * i + 10 * lost, 0.04) for name, lost in loss.items()},
                "ratio": {name: around(1 + loss[name] * (2 + i), 0.01) for name in ("4bit", "4bit+fp8kv")},
            }
            for i, (a, b) in enumerate(buckets)
        ],
        "drift": {"4bit": around(0.08, 0.4), "4bit+fp8kv": around(0.14, 0.3)},
        "ppl_drift": {"4bit": around(0.06, 0.2), "4bit+fp8kv": around(0.105, 0.2)},
        "seconds": 402.0,
        "confidence": 0.95,
    }  # fmt: skip


def bench(platform: str = "h100", hardware: str = "NVIDIA H100 80GB HBM3", best: float = 1.85) -> dict[str, Any]:
    def side(rate: float, factor: float) -> dict[str, Any]:
        wait = {"p50": 31.5 / factor, "p95": 60.2 / factor, "p99": 84.1 / factor}
        return {
            "status": "ok",
            "reason": "",
            "output_tokens_per_second": around(rate * factor, 0.015),
            "requests_per_second": around(rate * factor / 128, 0.015),
            "total_tokens_per_second": around(rate * factor * 9, 0.015),
            "ttft_ms": wait,
            "itl_ms": {name: value / 4 for name, value in wait.items()},
            "e2el_ms": {name: value * 40 for name, value in wait.items()},
            "completed": 512,
            "failed": 0,
        }

    points = []
    for i, concurrency in enumerate((1, 4, 16, 64, 256)):
        rate, gain = 140 * concurrency**0.82, best - 0.14 * i
        points.append(
            {
                "concurrency": concurrency,
                "baseline": side(rate, 1),
                "model": side(rate, gain),
                "speedup": around(gain, 0.02),
            }
        )
    points[-1]["baseline"] = {
        "status": "out of memory",
        "reason": "no room for the KV cache",
        "completed": 0,
        "failed": 512,
    }
    points[-1]["speedup"] = None
    return {
        "schema": 1,
        "kind": "bench",
        "platform": platform,
        "hardware": hardware,
        "vllm": "0.32.0",
        "input_tokens": 1024,
        "output_tokens": 128,
        "repeats": 3,
        "points": points,
        "memory": {
            "baseline": {"weight_bytes": 16_060_522_496, "kv_cache_tokens": 412_000, "peak_device_bytes": 74 * 10**9},
            "model": {"weight_bytes": 5_700_000_000, "kv_cache_tokens": 498_000, "peak_device_bytes": None},
        },
        "commands": [
            ["vllm", "serve", "model", "--dtype", "bfloat16", "--max-num-seqs", "256", "--kv-cache-dtype", "fp8"],
            ["vllm", "bench", "serve", "--model", "model", "--random-input-len", "1024", "--random-output-len", "128"],
        ],
        "seconds": 1203.0,
        "confidence": 0.95,
    }  # fmt: skip


def stability() -> dict[str, Any]:
    return {
        "schema": 1,
        "kind": "stability",
        "ok": True,
        "generations": 64,
        "repetition": {"baseline": 0.03125, "model": 0.046875},
        "empty": {"baseline": 0.0, "model": 0.0},
        "invalid": {"baseline": 0.0, "model": 0.0},
        "length_ratio": around(1.04),
        "load": {"concurrency": 64, "seconds": 120.0, "requests": 2311, "failed": 0, "status": "ok"},
        "reasons": [],
    }


def mitigation() -> dict[str, Any]:
    return {
        "schema": 1,
        "kind": "mitigation",
        "ladder": [
            {
                "rung": "group 128 to 64",
                "why": "ppl over its limit",
                "changes": {"group_size": [128, 64]},
                "cost": {"seconds": 118.2, "bytes_added": 1_990_656},
                "before": {"ppl": 0.231, "top1": 0.78},
                "after": {"ppl": 0.187, "top1": 0.812},
                "verdict": "rejected",
                "kept": True,
            },
            {
                "rung": "more calibration",
                "why": "ppl over its limit",
                "changes": {"calibration.sequences": [128, 512]},
                "cost": {"seconds": 301.0, "bytes_added": 0},
                "before": {"ppl": 0.187, "top1": 0.812},
                "after": {"ppl": 0.188, "top1": 0.811},
                "verdict": "rejected",
                "kept": False,
            },
            {
                "rung": "boundary projections in BF16",
                "why": "ppl over its limit",
                "changes": {"boundary.keep": ["nothing", "projections"]},
                "cost": {"seconds": 96.4, "bytes_added": 3_400_000},
                "before": {"ppl": 0.187, "top1": 0.812},
                "after": {"ppl": 0.1035, "top1": 0.834},
                "verdict": "accepted",
                "kept": True,
            },
        ],
        "final": "accepted",
    }


def sensitivity() -> dict[str, Any]:
    groups = {"qkv": ("self_attn", ("q_proj", "k_proj", "v_proj")), "o": ("self_attn", ("o_proj",))}
    groups |= {"gate_up": ("mlp", ("gate_proj", "up_proj")), "down": ("mlp", ("down_proj",))}
    rows, exempt = [], []
    for block in range(BLOCKS):
        for index, (kind, (part, leaves)) in enumerate(groups.items()):
            names = [f"model.layers.{block}.{part}.{leaf}" for leaf in leaves]
            if block in (0, BLOCKS - 1) and kind in ("o", "down"):
                exempt += [{"name": name, "reason": "boundary projection"} for name in names]
                continue
            kl = 0.0004 + 0.0003 * index + 0.004 / (1 + block) + 0.0001 * ((block * 5 + index) % 7)
            group = f"model.layers.{block}.{part}.{kind}"
            rows.append(
                {"group": group, "names": names, "kl": kl, "low": 0.9 * kl, "high": 1.1 * kl, "bytes_added": 900_000}
            )
    return {"schema": 1, "kind": "sensitivity", "groups": rows, "exempt": exempt}  # fmt: skip


def served() -> dict[str, Any]:
    return {
        "schema": 1,
        "kind": "served",
        "status": "served",
        "reason": "",
        "vllm": "0.32.0+cpu",
        "command": ["vllm", "serve", "runs/demo/model", "--dtype", "bfloat16"],
        "ppl_served": 28.271,
        "ppl_reference": 28.26,
        "relative_difference": 0.00039,
        "limit": 0.005,
        "weight_gib_reported": None,
        "artifact_gib": 0.1063,
        "completion": " Paris, the city of light.\nIt lies on the Seine.",
        "load_seconds": 21.3,
        "passed": True,
    }


def check() -> dict[str, Any]:
    return {
        "schema": 1,
        "kind": "check",
        "path": "runs/demo/model",
        "ok": True,
        "tensors": 1112,
        "bytes": 117_992_192,
        "findings": [],
    }


def gates() -> dict[str, Any]:
    return {
        "schema": 1,
        "kind": "gates",
        "verdict": "accepted",
        "gates": [
            {
                "name": "ppl",
                "limit": "+18%",
                "value": 0.1035,
                "low": 0.0952,
                "high": 0.1121,
                "status": "passed",
                "text": "ppl",
            },
            {
                "name": "top1",
                "limit": "75%",
                "value": 0.834,
                "low": 0.829,
                "high": 0.8391,
                "status": "passed",
                "text": "top1",
            },
            {
                "name": "kl",
                "limit": "0.1",
                "value": 0.1052,
                "low": 0.1018,
                "high": 0.1089,
                "status": "failed",
                "text": "kl",
            },
            {
                "name": "served",
                "limit": "yes",
                "value": None,
                "low": None,
                "high": None,
                "status": "passed",
                "text": "vLLM loads it",
            },
        ],
        "text": "Accepted: every gate holds even at the worse end of its confidence interval.",
    }


def calibration() -> dict[str, Any]:
    return {
        "schema": 1,
        "kind": "calibration",
        "source": "self-generated by smollm2-135m",
        "sequences": 128,
        "tokens": 60211,
        "longest": 512,
        "histogram": [{"from": 257, "to": 512, "sequences": 100, "tokens": 50000}],
        "sha256": "ef" * 32,
        "seed": 0,
    }


def sweep() -> dict[str, Any]:
    """sweep.json of six cells: two of the same bytes, one that failed, all but one benchmarked on two platforms."""
    made = [
        ("A1", "nvfp4", "modelopt", 16, 4.5, 116, 0.128, False),
        ("A2", "nvfp4", "modelopt", 16, 4.5, 116, 0.128, False),
        ("B1", "gptq", "gptq", 128, 4.16, 109, 0.131, True),
        ("B3", "gptq", "gptq", 64, 4.36, 114, 0.105, True),
        ("C1", "awq", "awq", 64, 4.42, 115, 0.118, True),
    ]
    cells = [
        {
            "name": name,
            "status": "judged",
            "rank": i + 1,
            "pareto": name in ("B1", "B3"),
            "same_as": "A1" if name == "A2" else None,
            "recipe": {
                "method": method,
                "group_size": group,
                "format": kept_as,
                "boundary": {"blocks": 1, "keep": "nothing"},
            },
            "title": f"{method}, group {group}",
            "groups": [group],
            "exemptions": [{"reason": "ignore: lm_head", "linears": 1, "bytes_added": 0}],
            "bytes": size * 1_000_000,
            "bytes_bf16": 269_000_000,
            "bits_per_linear_weight": bits,
            "portable": portable,
            "notices": [],
            "bench": [bench("h100", best=2.2 - kl * 4), bench("mi325x", best=2 - kl * 4)] if name != "C1" else None,
            "eval": {
                "metrics": {
                    "kl_mean": around(kl),
                    "ppl_ratio": around(1 + kl, 0.01),
                    "top1": around(0.85 - kl / 2, 0.01),
                }
            },
            "gates": gates() if name == "B3" else {"verdict": "rejected", "gates": []},
            "seconds": {"solving": 20.5, "shared": 0.0, "writing": 1.2, "evaluating": 35.0},
        }
        for i, (name, method, kept_as, group, bits, size, kl, portable) in enumerate(made)
    ]
    cells.append({"name": "broken", "status": "failed", "stage": "recipe", "reason": "awq holds no symmetric grid"})
    return {
        "schema": 1,
        "kind": "sweep",
        "halfbyte": "0.1.0",
        "command": "halfbyte sweep smollm2-135m --matrix portable --on h100 --on mi325x -o sweep",
        "model": {"name": "smollm2-135m", "sha256": "ab" * 32},
        "matrix": {"name": "portable", "description": "six cells", "cells": [cell["name"] for cell in cells]},
        "request": {"platforms": ["h100", "mi325x"]},
        "calibration": [calibration()],
        "text": {"source": "c4.txt", "tokens": 20440, "sha256": "cd" * 32},
        "verdict": "accepted",
        "best": {"cell": "B3", "path": "cells/B3", "accepted": True, "portable": True},
        "ranking": {"by": "kl", "method": "paired bootstrap over windows", "noise_floor": 0.0011, "order": ["A1"]},
        "cells": cells,
        "sharing": {"cells": 6, "distinct": 4, "parts": 480, "distinct_parts": 360},
        "seconds": {"calibration": 50.0, "statistics": 20.0, "solving": 82.0, "writing": 6.0, "total": 340.0},
    }  # fmt: skip


def write_run(directory: Path) -> Path:
    """A run directory with every result file."""
    files = {
        "plan.json": plan(),
        "check.json": check(),
        "served.json": served(),
        "eval.json": evaluation(),
        "gates.json": gates(),
        "mitigation.json": mitigation(),
        "tasks.json": tasks(),
        "long_context.json": long_context(),
        "bench.json": bench(),
        "stability.json": stability(),
        "calibration/manifest.json": calibration(),
        "model/halfbyte.json": manifest(),
    }
    for name, content in files.items():
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content), encoding="utf-8")
    return directory
