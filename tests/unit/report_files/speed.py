"""How fast it is, and whether it stays sane."""

from __future__ import annotations

from typing import Any

from tests.unit.report_files.quality import around


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
