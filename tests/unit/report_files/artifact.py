"""Of the artifact itself: how it was made, what is planned for it, whether it is sound."""

from __future__ import annotations

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
