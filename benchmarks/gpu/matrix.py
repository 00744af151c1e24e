"""The strategy's matrix A1..C2 on one model, with quality and tokens/s measured on this GPU, as one Markdown report.

    python benchmarks/gpu/matrix.py MODEL --calibration DIR --text FILE -o DIR [--report FILE] [--gpus 0,1]
    python benchmarks/gpu/matrix.py --dry -o DIR     two cells of a tiny model on this CPU: does it work?

`halfbyte sweep` makes, judges and ranks the cells; between its two passes vLLM times BF16 and every cell that is served
differently (cells whose files have the same tensors and the same config, such as NVFP4 in groups of 16, 64 and 128,
share one measurement), several engines loading at once and each timed alone, and writes what the sweep ranks by,
results/NAME.bench.json, after each engine. The KV cache has 16 bits. What was timed is not timed again as long as
the cell's tensors and config, load, repeats, vLLM and GPU are the same. --report takes the sweep's report, headed by
the command.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.common import (
    GIB,
    card_gib,
    card_name,
    cards,
    count,
    counts,
    digest,
    loads_of,
    markdown,
    one_line,
    pair,
    parser_of,
    random_set,
    rate_words,
    say,
)
from benchmarks.gpu.engines import Engine, Work, engine_words, run_engines
from benchmarks.gpu.served import DRY_TOKENS, dry_windows
from benchmarks.gpu.shapes import random_model
from halfbyte import sweep
from halfbyte.evaluate import text_windows
from halfbyte.evaluate.speed_stats import median_interval, ratio_interval
from halfbyte.files import make_directory, write_json, write_text
from halfbyte.models import Checkpoint, resolve_model
from halfbyte.models.checkpoint import read_json
from halfbyte.models.library import load_tokenizer
from halfbyte.serving import find_vllm

BASELINE = "baseline"
ROOM_GIB = 3.0
DRY = {"defaults": {"tune": "none"}, "cells": {"B": {"method": "gptq", "group_size": 32}, "R": {"method": "rtn"}}}


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("model", nargs="?", default=None)
    parser.add_argument("--matrix", default="strategy")
    parser.add_argument("--calibration", type=Path, help="a set made by halfbyte calibrate")
    parser.add_argument("--text", type=Path, help="what the cells are judged on")
    parser.add_argument("--windows", type=int, default=100, help="of 512 tokens")
    parser.add_argument(
        "--levels", type=counts, default=[64, 1], help="sequences at once; the first counts in the ranking"
    )
    parser.add_argument("--tokens", type=pair, default=[128, 128], help="of a prompt and an answer")
    parser.add_argument("--repeats", type=count, default=5)
    parser.add_argument("--abreast", type=count, default=5)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no engine starts that could not end")
    parser.add_argument("--report", type=Path, default=None)
    args = parser.parse_args(words)
    if args.dry:
        args.on, args.levels, args.tokens, args.repeats, args.abreast = "cpu", [2, 1], [16, 8], 2, 2
    elif not (args.model and args.calibration and args.text):
        parser.error("name MODEL, --calibration DIR and --text FILE, or --dry")
    return args


def main() -> None:
    args = parse()
    with one_line("matrix.py"):
        result, speeds = run(args)
    print("\n".join(table(result, speeds)))
    timed = all(bench["tokens_per_second"] is not None for bench in speeds.values())
    sys.exit(0 if timed and all(cell["status"] == "judged" for cell in result["cells"]) else 1)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """(sweep.json, the speed of each cell)."""
    began = time.monotonic()
    place, install = make_directory(args.output), find_vllm(args.vllm)
    base = random_model(place / "tiny", "random:tiny") if args.dry else resolve_model(args.model)
    data: Any = random_set(base, *DRY_TOKENS) if args.dry else [args.calibration]
    windows = dry_windows(data) if args.dry else text_windows([args.text], load_tokenizer(base), count=args.windows)
    there = place / "sweep"

    def swept() -> dict[str, Any]:
        matrix, model = (DRY, str(base)) if args.dry else (args.matrix, args.model)
        return sweep(
            model, matrix, there, platforms=[args.on], text=windows, calibration=data, command=shlex.join(sys.argv)
        )

    result = swept()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    say(f"{len(result['cells'])} cells made and judged after {time.monotonic() - began:.0f} s")
    points, config = loads_of(args.levels, args.tokens), Checkpoint(base).config
    engines = engines_of(result["cells"], there, base, engine_words(config, "auto", points))
    lock, speeds = Lock(), dict[str, Any]()
    work = Work(points, args.repeats, min(config["vocab_size"], 100_000), timing=15)

    def write() -> None:
        facts = {"platform": args.on, "hardware": card_name(), "vllm": install.version, "concurrency": args.levels[0]}
        with lock:
            for row in result["cells"]:
                if row["path"]:
                    file = make_directory(there / "results") / f"{row['name']}.bench.json"
                    bench = bench_of(row, engines, args.levels, args.tokens[1], facts)
                    speeds[row["name"]] = better(bench, file)
                    write_json(file, speeds[row["name"]])

    run_engines(
        list(engines.values()),
        work,
        install,
        place / "runs",
        cards(args.gpus),
        gib=card_gib(),
        abreast=args.abreast,
        deadline=began + args.seconds,
        after=write,
    )
    write()
    result = swept()
    if args.report:
        write_text(args.report, report(there / "report.md", args, speeds, time.monotonic() - began))
    return result, speeds


def engines_of(
    cells: Sequence[Mapping[str, Any]], there: Path, base: Path, told: tuple[list[str], float]
) -> dict[str, Engine]:
    """BF16, and one engine for each way in which cells are served. `facts["cells"]`: whose speed it is."""
    words, space = told
    size = sum(file.stat().st_size for file in base.glob("*.safetensors")) / GIB

    def engine(name: str, directory: Path, weights: str, cells: list[str]) -> Engine:
        return Engine(name, directory, tuple(words), size + space + ROOM_GIB, {"cells": cells}, weights=weights)

    engines = {"": engine("bf16", base, served_as(base), [BASELINE])}
    for row in cells:
        if row["path"]:
            directory = there / row["path"]
            weights = served_as(directory)
            mine = engines.setdefault(weights, engine(row["name"], directory, weights, []))
            mine.facts["cells"].append(row["name"])
    return engines


def served_as(directory: Path) -> str:
    """The same for two artifacts in which vLLM finds the same tensors under the same config: as fast as each other."""
    checkpoint = Checkpoint(directory)
    tensors = {name: [str(info.dtype), list(info.shape)] for name, info in checkpoint.tensors.items()}
    return digest({"tensors": tensors, "config": checkpoint.config})


def bench_of(
    row: Mapping[str, Any], engines: Mapping[str, Engine], levels: Sequence[int], answer: int, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """results/NAME.bench.json of a cell, as `sweep --bench` writes it (halfbyte.experiments.bench_cells)."""
    base = engines[""]
    mine = next(engine for engine in engines.values() if row["name"] in engine.facts["cells"])
    points = []
    for level in levels:
        ours, theirs = (rates(engine, level, answer) for engine in (mine, base))
        gain = ratio_interval(ours, theirs) if ours and theirs else None
        sides = {"baseline": side(theirs, base), "model": side(ours, mine)}
        points.append({"concurrency": level, **sides, "speedup": gain})
    first = points[0]
    rate = first["model"]["output_tokens_per_second"]
    return {
        "schema": 1,
        "kind": "bench-cell",
        "cell": row["name"],
        **facts,
        **first["model"],
        "tokens_per_second": rate and rate["value"],
        "speedup": first["speedup"],
        "points": points,
        "measured_as": mine.name,
        "kernels": list(mine.logged().kernels),
        "work": row.get("work"),
    }


def better(bench: dict[str, Any], file: Path) -> dict[str, Any]:
    """A cell's speed, or what the file has of the same artifact where this one was not measured at the concurrency that
    counts and that one was."""
    before = read_json(file) if file.is_file() else {}
    kept = before.get("tokens_per_second") is not None and before.get("work") == bench["work"]
    return before if kept and bench["tokens_per_second"] is None and before.get("points") else bench


def rates(engine: Engine, level: int, answer: int) -> list[float]:
    """Tokens written a second, all sequences together, of each repeat."""
    return [level * answer / seconds for seconds in engine.seconds.get(f"c{level}", [])]


def side(found: Sequence[float], engine: Engine) -> dict[str, Any]:
    return {
        "status": "ok" if found else "failed",
        "reason": "" if found else engine.reason or engine.status,
        "output_tokens_per_second": median_interval(list(found)) if found else None,
    }


def report(source: Path, args: argparse.Namespace, speeds: Mapping[str, Any], seconds: float) -> str:
    """The sweep's Markdown under the command that made it."""
    machines = sorted({f"{bench['hardware']}, vLLM {bench['vllm']}" for bench in speeds.values()})
    pairs = ((name, bench.get("measured_as", name)) for name, bench in speeds.items())
    shared = sorted(f"{name} as {other}" for name, other in pairs if name != other)
    head = [
        f"# The strategy's matrix on {card_name()}",
        "",
        f"Made by this command, from a checkout, in {seconds:.0f} s; speeds are of {'; '.join(machines) or 'nothing'}:",
        "",
        "```bash",
        "python benchmarks/gpu/matrix.py " + shlex.join(sys.argv[1:]),
        "```",
        "",
        f"tokens/s: offline generation in vLLM, {args.tokens[0]} tokens in and {args.tokens[1]} out, all sequences "
        f"started at once, medians of {args.repeats} repeats, KV cache of 16 bits. Cells that vLLM serves alike share "
        f"a measurement: {', '.join(shared) or 'none of these'}.",
        "",
        *table_speeds(speeds),
        "",
    ]
    return "\n".join(head) + "\n" + source.read_text(encoding="utf-8")


def table_speeds(speeds: Mapping[str, Any]) -> list[str]:
    """tokens/s and times BF16 at each concurrency."""
    first = next(iter(speeds.values()), None)
    if first is None:
        return []
    levels = [point["concurrency"] for point in first["points"]]
    rows = [["BF16", "", *(rate_words(point["baseline"], None) for point in first["points"])]]
    for name, bench in speeds.items():
        cells = [rate_words(point["model"], point["speedup"]) for point in bench["points"]]
        rows.append([name, ", ".join(bench.get("kernels") or ()) or "not named", *cells])
    return markdown(["cell", "kernel", *(f"tokens/s at {level}" for level in levels)], rows)


def table(result: Mapping[str, Any], speeds: Mapping[str, Any]) -> list[str]:
    """Quality and speed of every cell."""
    rows = []
    for row in result["cells"]:
        if row["status"] != "judged":
            rows.append([row["name"], row["status"], row["reason"], "", "", ""])
            continue
        metrics, bench = row["eval"]["metrics"], speeds.get(row["name"])
        cells = [rate_words(p["model"], p["speedup"]) for p in bench["points"]] if bench else []
        gain = f"{metrics['ppl_ratio']['value'] - 1:+.1%}"
        rows.append([row["name"], str(row["rank"]), f"{metrics['kl_mean']['value']:.4f}", gain, "; ".join(cells)])
    return markdown(["cell", "rank", "KL", "perplexity", "tokens/s (times BF16)"], rows)


if __name__ == "__main__":
    main()
