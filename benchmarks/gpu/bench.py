"""`halfbyte bench` and `halfbyte tune` of GPTQ, AWQ and NVFP4 artifacts of one model, in every kernel and KV cache.

    python benchmarks/gpu/bench.py [MODEL] -o DIR [--models nvfp4 gptq awq] [--levels 1,4,16,64,128,256] [--tune 64]
    python benchmarks/gpu/bench.py --dry -o DIR        the same on this CPU with a tiny model: does it work?

MODEL, what is made of it and where that lies are as for serving.py: with the same DIR nothing is made twice. One bench
measures BF16 and every artifact as `halfbyte serve` would serve them, then the first artifact with its other kernels
(as serving.py names them), all with the other KV caches, and the others with their kernels: commands, each the one
before with more --config, so that a run that is cut short is still of use. --together servers load at once, and each
is measured alone. Then `tune` looks for each artifact's fastest flags at --tune sequences (0: it does not). Of several
GPUs one takes the bench, the others `tune`. Runs are kept as `halfbyte bench` keeps them: the same command goes on
where it was. In DIR: bench.json, after each step, and bench-evidence.json beside it (halfbyte plan, serve:
--evidence). Exit status 1 where a step failed or was not done.
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
from benchmarks.gpu.serving import chosen, configs_of, loads, made
from benchmarks.gpu.shapes import is_random, place_of
from halfbyte.evaluate.speed import BenchRequest, Variant, command_for
from halfbyte.evaluate.speed_result import RATE
from halfbyte.files import make_directory, write_json
from halfbyte.models import resolve_model
from halfbyte.models.checkpoint import read_json
from halfbyte.platforms import Platform, load_platform
from halfbyte.platforms.base import KV_FLAG
from halfbyte.serving import VllmInstall, find_vllm
from halfbyte.serving.child import Child
from halfbyte.serving.log import read_log

ORDER = ["nvfp4", "gptq", "awq"]
LINEAR = "--linear-backend"
SERVED, CACHES, KERNELS = "served", "caches", "kernels"
TUNE = "tune"
LAST_S = 60.0
"""Before the deadline no run of a bench begins: the last one ends then, and the result is written."""


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("model", nargs="?", default="random:8b")
    parser.add_argument("--models", nargs="+", choices=ORDER, default=None)
    parser.add_argument("--kv", nargs="+", choices=["auto", "fp8"], default=["auto", "fp8"])
    parser.add_argument("--levels", type=counts, default=[1, 4, 16, 64, 128, 256])
    parser.add_argument("--tokens", type=pair, default=[128, 128], help="of a prompt and an answer")
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--together", type=count, default=4, help="servers that share a card while they load")
    parser.add_argument("--tune", type=int, default=64, help="sequences at once that flags are sought for; 0: none are")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="what runs then is ended, and kept")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(words)
    if args.dry:
        args.model, args.on, args.levels, args.tokens = "random:tiny", "cpu", [1, 2], [16, 8]
        args.kv, args.repeats, args.tune, args.together = ["auto"], 2, 2, 2
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
    known = {name: name for name in ORDER if loads(name, platform)}
    names = list(chosen(known, args.models))
    models = {name: made(name, args.model, base, place) for name in ("bf16", *names)}
    facts = {"vllm": install.version, "hardware": card_name(), "platform": platform.name}
    results = make_directory(place / "bench" / digest(facts))
    first, configs = models[names[0]], configs_by_step(models, args, platform, install)
    told, steps = words_of(args), {}
    file = result_file(args)
    there = ["--into", str(results), "--evidence", str(file.with_name(f"{file.stem}-evidence.json"))]
    shared = [*told, "--baseline", str(models["bf16"]), "--concurrency", ",".join(map(str, args.levels)), *there]
    for step, texts in configs.items():
        shared += [word for text in texts for word in ("--config", text)]
        steps[step] = halfbyte_words("bench", str(first), *shared)
    plans = [("bench", steps, results)]
    for name in names if args.tune else ():
        own = ["--concurrency", str(args.tune), "--into", str(results / name)]
        plans.append((name, {TUNE: halfbyte_words("tune", str(models[name]), *told, *own)}, results / name))
    rows = [
        {"name": name, "place": str(at), "steps": {step: planned(words, step, at) for step, words in all_.items()}}
        for name, all_, at in plans
    ]
    result = {"schema": 1, "kind": "gpu-bench", **facts, "model": args.model, "levels": args.levels, "rows": rows}
    result["artifact"] = names[0]
    lock, seats, over = Lock(), Queue[str](), Event()
    for card in gpus:
        seats.put(card)

    def take(row: Mapping[str, Any]) -> None:
        card = seats.get()
        try:
            for step, entry in row["steps"].items():
                do(entry, step, Path(row["place"]), card, deadline, over)
                with lock:
                    write_json(result_file(args), result)
        finally:
            seats.put(card)

    with ThreadPoolExecutor(len(gpus)) as pool:
        try:
            list(pool.map(take, rows))
        finally:
            over.set()
    return result


def result_file(args: argparse.Namespace) -> Path:
    """Where the results go; FILE-evidence.json lies beside FILE.json."""
    return (args.json or args.output / "bench.json").absolute()


def words_of(args: argparse.Namespace) -> list[str]:
    """What `bench` and `tune` are both told."""
    words = ["--on", args.on, "--repeats", str(args.repeats), "--format", "json", "--together", str(args.together)]
    words += ["--input", str(args.tokens[0]), "--output", str(args.tokens[1])]
    return words + (["--vllm", args.vllm] if args.vllm else [])


def configs_by_step(
    models: Mapping[str, Path], args: argparse.Namespace, platform: Platform, install: VllmInstall
) -> dict[str, list[str]]:
    """--config of each step of the bench, for what no step before has measured. The first of the models beside BF16 is
    the bench's own artifact; the others are configurations of it."""
    request = BenchRequest((), platform, tuple(args.levels), *args.tokens)
    bf16, first, *others = models
    seen = {served_by(request, Variant(name, models[name]), install) for name in (bf16, first)}
    found: dict[str, list[str]] = {SERVED: []}

    def add(step: str, name: str, model: str, words: Sequence[str] = ()) -> None:
        command = served_by(request, Variant(name, models[model], tuple(words)), install)
        if command not in seen:
            seen.add(command)
            found.setdefault(step, []).append(f"{name}: {shlex.join([str(models[model].absolute()), *words])}")

    def kernels(of: Sequence[str]) -> None:
        for config, (model, words) in configs_of(platform, install.version).items():
            for kv in args.kv if model in of else ():
                add(f"{KERNELS}-{model}", f"{config}-{kv}", model, (*(words or (LINEAR, "auto")), KV_FLAG, kv))

    for model in others:
        add(SERVED, model, model)
    kernels([first])
    for kv in args.kv:
        for model in models:
            add(CACHES, f"{model}-{kv}", model, (KV_FLAG, kv))
    kernels(others)
    return found


def served_by(request: BenchRequest, variant: Variant, install: VllmInstall) -> frozenset[tuple[str, str | None]]:
    """What tells a server from others: the model and the flags, but for a kernel that is left to vLLM."""
    command = command_for(request, variant, install)
    told = {("", str(variant.directory)), *command.flags().items()}
    return frozenset(told - {(LINEAR, "auto")})


def planned(words: Sequence[str], step: str, there: Path) -> dict[str, Any]:
    """A step that is not done, with what the same command found before."""
    before = there / f"{step}.whole.json"
    kept = read_json(before) if before.is_file() else {}
    same = kept.get("words") == list(words)
    blank = {"status": "not run", "reason": "the time was over before it began", "result": None}
    return {**(kept["entry"] if same else blank), "words": list(words)}


def do(entry: dict[str, Any], step: str, there: Path, card: str, deadline: float, over: Event) -> None:
    """Run a step's command on a card until the deadline, or until it is `over`, and take its result file. A bench ends
    itself before the deadline, and tells what it measured."""
    left = deadline - time.monotonic()
    limited = step != TUNE and left < float("inf")
    if left <= (LAST_S if limited else 0.0) or over.is_set():
        return
    say(f"{there.name}: {step}")
    words = [*entry["words"], *(["--seconds", f"{left - LAST_S:.0f}"] if limited else [])]
    log = make_directory(there) / f"{step}.log"
    with log.open("wb") as told:
        child = Child(words, {**environment(), **on_card(card)}, told, GRACE_S)
        try:
            while child.poll() is None and time.monotonic() < deadline and not over.wait(POLL_S):
                pass
            code = child.poll()
        finally:
            child.stop()
    if code == 0:
        result = read_json(there / ("tune.json" if step == TUNE else "bench.json"))
        stopped = result.get("stopped", "")
        entry |= {"status": "cut" if stopped else "ok", "reason": stopped, "result": result}
        if not stopped:
            kept = {key: entry[key] for key in ("status", "reason", "result")}
            write_json(there / f"{step}.whole.json", {"words": entry["words"], "entry": kept})
    elif entry["result"] is None:
        last = read_log(log).strip().splitlines()[-1:]
        entry |= {"status": "failed", "reason": "the time was over" if code is None else " ".join(last)}


def table(result: Mapping[str, Any]) -> list[str]:
    """tokens/s and times BF16 of every configuration at each concurrency, and what `tune` found."""
    title = f"{result['hardware']}, vLLM {result['vllm']}, {result['model']}: tokens/s (times BF16)"
    rows: list[list[str]] = []
    lines: list[str] = []
    for row in result["rows"]:
        for step, entry in row["steps"].items():
            if entry["status"] != "ok":
                lines.append(f"{row['name']}, {step}: {entry['status']}: {entry['reason']}")
            if step == TUNE and entry["result"]:
                lines.append(f"{row['name']}, tune: {entry['result']['text']}")
            elif entry["result"]:
                rows = rows_of(result["artifact"], entry["result"])
    return [title, *markdown(["", *map(str, result["levels"]), "prefill"], rows), *lines]


def rows_of(name: str, bench: Mapping[str, Any]) -> list[list[str]]:
    """BF16, the artifacts as `serve` serves them, other configurations; at each concurrency, and of long prompts."""
    points = [(RATE, point) for point in bench["points"]]
    points += [("total_tokens_per_second", bench["prefill"])] if bench["prefill"] else []
    sides: dict[str, list[str]] = {}

    def side(title: str, entry: Mapping[str, Any], gain: Any, rate: str) -> None:
        sides.setdefault(title, []).append(rate_words(entry, gain, rate))

    for rate, point in points:
        side("BF16", point["baseline"], None, rate)
        side(name, point["model"], point["speedup"], rate)
        for other, entry in point.get("configs", {}).items():
            side(other, entry, entry["speedup"], rate)
    return [[title, *cells] for title, cells in sides.items()]


if __name__ == "__main__":
    main()
