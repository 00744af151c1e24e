"""What stands above the single results: gates, mitigation, a sweep, a run's directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.unit.report_files.artifact import calibration, check, manifest, plan, served
from tests.unit.report_files.quality import around, evaluation, long_context, tasks
from tests.unit.report_files.speed import bench, stability


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
