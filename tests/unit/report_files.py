"""Made-up result files of a whole run, for the tests of the report and the model card."""

from __future__ import annotations

import json
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
    }


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


def write_run(directory: Path) -> Path:
    """A run directory with every result file."""
    files = {
        "plan.json": plan(),
        "check.json": check(),
        "served.json": served(),
        "eval.json": evaluation(),
        "gates.json": gates(),
        "calibration/manifest.json": calibration(),
        "model/halfbyte.json": manifest(),
    }
    for name, content in files.items():
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content), encoding="utf-8")
    return directory
