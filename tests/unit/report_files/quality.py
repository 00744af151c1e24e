"""How well it keeps to BF16: fidelity, tasks, long context, sensitivity."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from tests.unit.report_files.artifact import BLOCKS


def around(value: float, share: float = 0.06) -> dict[str, float]:
    """A metric with an interval of `share` of it to each side."""
    return {"value": value, "low": value - share * abs(value), "high": value + share * abs(value)}


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
