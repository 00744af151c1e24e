"""`halfbyte bench` and `halfbyte tune` of GPTQ, AWQ and NVFP4 artifacts of one model, in every kernel and KV cache.

    python benchmarks/gpu/bench.py [MODEL] -o DIR [--models gptq awq nvfp4] [--levels 1,4,16,64,128,256] [--tune 64]
    python benchmarks/gpu/bench.py --dry -o DIR        the same on this CPU with a tiny model: does it work?

MODEL, what is made of it and where that lies are as for serving.py: with the same DIR nothing is made twice. Each
artifact is served beside BF16 as `halfbyte serve` would, then with each kernel (as serving.py names them) and KV cache
that this is not; then `tune` looks for the fastest flags at --tune sequences (0: it does not). Several GPUs take an
artifact each. Runs are kept as `halfbyte bench` keeps them: the same command goes on where it was. In DIR: bench.json,
after each step. Exit status 1 where a step failed or was not done.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from threading import Event, Lock
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.common import (
    GRACE_S,
    POLL_S,
    card_name,
    cards,
    count,
    counts,
    digest,
    environment,
    halfbyte_words,
    markdown,
    on_card,
    one_line,
    pair,
    parser_of,
    rate_words,
    say,
)
from benchmarks.gpu.serving import PACKINGS, chosen, configs_of, loads, made
from benchmarks.gpu.shapes import is_random, place_of
from halfbyte.evaluate.speed import MODEL, BenchRequest, Variant, command_for
from halfbyte.files import make_directory, write_json
from halfbyte.models import resolve_model
from halfbyte.models.checkpoint import read_json
from halfbyte.platforms import Platform, load_platform
from halfbyte.serving import VllmInstall, find_vllm
from halfbyte.serving.child import Child
from halfbyte.serving.log import read_log


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("model", nargs="?", default="random:8b")
    parser.add_argument("--models", nargs="+", choices=list(PACKINGS), default=None)
    parser.add_argument("--kv", nargs="+", choices=["auto", "fp8"], default=["auto", "fp8"])
    parser.add_argument("--levels", type=counts, default=[1, 4, 16, 64, 128, 256])
    parser.add_argument("--tokens", type=pair, default=[128, 128], help="of a prompt and an answer")
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--tune", type=int, default=64, help="sequences at once that flags are sought for; 0: none are")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="what runs then is ended, and kept")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(words)
    if args.dry:
        args.model, args.on, args.levels, args.tokens = "random:tiny", "cpu", [1, 2], [16, 8]
        args.kv, args.repeats, args.tune = ["auto"], 2, 2
    return args


def main() -> None:
    args = parse()
    with one_line("bench.py"):
        result = run(args)
    print("\n".join(table(result)), flush=True)
    sys.exit(0 if all(step["status"] == "ok" for row in result["rows"] for step in row["steps"].values()) else 1)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Make the models, then bench and tune each artifact; bench.json is whole after every step."""
    deadline = time.monotonic() + args.seconds
    platform, install = load_platform(args.on), find_vllm(args.vllm)
    output, gpus = make_directory(args.output).absolute(), cards(args.gpus)
    base = None if is_random(args.model) else resolve_model(args.model)
    place = place_of(output, args.model, base)
    names = chosen({name: name for name in PACKINGS if loads(name, platform)}, args.models)
    baseline, *artifacts = [made(name, args.model, base, place) for name in ("bf16", *names)]
    facts = {"vllm": install.version, "hardware": card_name(), "platform": platform.name}
    results = make_directory(place / "bench" / digest(facts))
    rows: list[dict[str, Any]] = []
    for name, directory in zip(names, artifacts):
        there, given = results / name, words_of(args, directory)
        own = ["--baseline", str(baseline), "--concurrency", ",".join(map(str, args.levels))]
        own += [word for text in configs(name, directory, args, platform, install) for word in ("--config", text)]
        steps = {"bench": halfbyte_words("bench", *given, *own, "--into", str(there))}
        if args.tune:
            tuned = ["--concurrency", str(args.tune), "--into", str(there)]
            steps["tune"] = halfbyte_words("tune", *given, *tuned)
        rows.append({"name": name, "steps": {step: planned(words, step, there) for step, words in steps.items()}})
    result = {"schema": 1, "kind": "gpu-bench", **facts, "model": args.model, "levels": args.levels, "rows": rows}
    lock, seats, over = Lock(), Queue[str](), Event()
    for card in gpus:
        seats.put(card)

    def take(row: Mapping[str, Any]) -> None:
        card = seats.get()
        try:
            for step, entry in row["steps"].items():
                do(entry, step, results / row["name"], card, deadline, over)
                with lock:
                    write_json(args.json or output / "bench.json", result)
        finally:
            seats.put(card)

    with ThreadPoolExecutor(len(gpus)) as pool:
        try:
            list(pool.map(take, rows))
        finally:
            over.set()
    return result


def words_of(args: argparse.Namespace, directory: Path) -> list[str]:
    """What `bench` and `tune` are both told."""
    words = [str(directory), "--on", args.on, "--repeats", str(args.repeats), "--format", "json"]
    words += ["--input", str(args.tokens[0]), "--output", str(args.tokens[1])]
    return words + (["--vllm", args.vllm] if args.vllm else [])


def configs(
    name: str, directory: Path, args: argparse.Namespace, platform: Platform, install: VllmInstall
) -> list[str]:
    """--config for each kernel and KV cache, but for what `serve` says by itself."""
    request = BenchRequest((), platform, tuple(args.levels), *args.tokens)
    seen, found = {served_by(request, Variant(MODEL, directory), install)}, []
    for config, (model, kernel) in configs_of(platform, install.version).items():
        for kv in args.kv if model == name else ():
            words = (*kernel, "--kv-cache-dtype", kv)
            command = served_by(request, Variant(config, directory, words), install)
            if command not in seen:
                seen.add(command)
                found.append(f"{config}-{kv}: {shlex.join(words)}")
    return found


def served_by(request: BenchRequest, variant: Variant, install: VllmInstall) -> frozenset[str]:
    return frozenset(command_for(request, variant, install).argv)


def planned(words: Sequence[str], step: str, there: Path) -> dict[str, Any]:
    """A step that is not done, with what the same command found before."""
    before = there / f"{step}.whole.json"
    kept = read_json(before) if before.is_file() else {}
    same = kept.get("words") == list(words)
    blank = {"status": "not run", "reason": "the time was over before it began", "result": None}
    return {**(kept["entry"] if same else blank), "words": list(words)}


def do(entry: dict[str, Any], step: str, there: Path, card: str, deadline: float, over: Event) -> None:
    """Run a step's command on a card until the deadline, or until it is `over`, and take its result file."""
    if time.monotonic() >= deadline or over.is_set():
        return
    say(f"{there.name}: {step}")
    log = make_directory(there) / f"{step}.log"
    with log.open("wb") as told:
        child = Child(entry["words"], {**environment(), **on_card(card)}, told, GRACE_S)
        try:
            while child.poll() is None and time.monotonic() < deadline and not over.wait(POLL_S):
                pass
            code = child.poll()
        finally:
            child.stop()
    if code == 0:
        entry |= {"status": "ok", "reason": "", "result": read_json(there / f"{step}.json")}
        kept = {key: entry[key] for key in ("status", "reason", "result")}
        write_json(there / f"{step}.whole.json", {"words": entry["words"], "entry": kept})
    elif entry["result"] is None:
        last = read_log(log).strip().splitlines()[-1:]
        entry |= {"status": "failed", "reason": "the time was over" if code is None else " ".join(last)}


def table(result: Mapping[str, Any]) -> list[str]:
    """tokens/s and times BF16 of every configuration at each concurrency, and what `tune` found."""
    title = f"{result['hardware']}, vLLM {result['vllm']}, {result['model']}: tokens/s (times BF16)"
    rows: list[list[str]] = []
    tuned: list[str] = []
    for row in result["rows"]:
        for step, entry in row["steps"].items():
            if entry["status"] != "ok":
                tuned.append(f"{row['name']}, {step}: {entry['status']}: {entry['reason']}")
        bench, tune = (row["steps"].get(step, {}).get("result") for step in ("bench", "tune"))
        if bench:
            rows += rows_of(row["name"], bench["points"])
        if tune:
            tuned.append(f"{row['name']}, tune: {tune['text']}")
    return [title, *markdown(["", *map(str, result["levels"])], rows), *tuned]


def rows_of(name: str, points: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """BF16, the artifact as `serve` serves it, and its other configurations."""
    sides = [(f"{name}: BF16", [(point["baseline"], None) for point in points])]
    sides += [(name, [(point["model"], point["speedup"]) for point in points])]
    for other in points[0].get("configs", ()):
        mine = [point["configs"][other] for point in points]
        sides.append((f"{name}: {other}", [(entry, entry["speedup"]) for entry in mine]))
    return [[title, *(rate_words(entry, gain) for entry, gain in cells)] for title, cells in sides]


if __name__ == "__main__":
    main()
