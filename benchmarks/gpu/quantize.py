"""Seconds a block to quantize a Llama-3.1-8B-shaped model on this machine's GPU, beside the floor and llm-compressor.

    python benchmarks/gpu/quantize.py -o DIR [--blocks 6] [--runs gptq,awq,nine,nvfp4,command] [--peers] [--json FILE]
    python benchmarks/gpu/quantize.py --dry -o DIR      a tiny shape and few tokens, on this CPU too: does it work?

Random weights of realistic scale, random tokens: speed does not depend on what they say. Each run is a process of its
own (`--blocks` blocks; the whole pass of halfbyte with its writer), one after the other on the first GPU:

    gptq      method gptq, group 128, symmetric (AWQ scaling, static act-order), 512 sequences of 2,048 tokens
    awq       method awq, group 128, asymmetric, 128 sequences of 2,048 tokens
    nine      nine recipes in one pass, on the tokens of `gptq`
    nvfp4     NVFP4, data-free, 16
    command   `halfbyte quantize` of the whole 32-block model, NVFP4 data-free, to the finished artifact

"a block" is the median over the blocks but the first two, from one block handed on to the next; what comes before the
first block (tokens embedded, the first token weighed) is a column of its own. The floor is what one forward and the
Gram products (their upper half) take at the rate of this GPU's own large bfloat16 product. GiB are 2^30 bytes of device
memory: the peak, and how much of it is hidden states between blocks. For the 8B shape a row has its limit, and whether
it is met. With --peers [gptq,awq] llm-compressor runs the same tokens on a model of --peer-blocks blocks of that shape;
needs its packages in this Python. Needs 24 GiB in DIR, 8 without `command`; several GPUs: --peer-gpu N (of those that
can be seen) runs the peer there, at the same time. Exit status 1 where a row failed or a limit is not met.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import itertools

from benchmarks.common import number
from benchmarks.gpu.common import (
    GIB,
    card_name,
    cards,
    count,
    environment,
    halfbyte_words,
    markdown,
    on_card,
    one_line,
    random_set,
    say,
)
from benchmarks.gpu.shapes import NAMES, SHAPES, device, place_of, random_model
from halfbyte.artifact import ArtifactWriter
from halfbyte.calibration import CalibrationSet
from halfbyte.calibration.store import MANIFEST
from halfbyte.engine import Job, quantize_blocks
from halfbyte.engine.loop import BATCH_TOKENS
from halfbyte.engine.memory import fit
from halfbyte.files import make_directory, write_json
from halfbyte.models import Checkpoint
from halfbyte.plan.layers import assign, quantized
from halfbyte.recipe.loader import recipe_from_mapping

GPTQ = {"method": "gptq", "group_size": 128}
AWQ = {"method": "awq", "group_size": 128}
NVFP4 = {"method": "nvfp4", "rounding": "rtn", "scaling": "none", "group_size": 16}
NINE = [
    *({"method": "gptq", "group_size": size} for size in (32, 64, 128)),
    *({"method": "awq", "group_size": size} for size in (32, 64, 128)),
    *({"method": "nvfp4", "group_size": size} for size in (16, 64, 128)),
]
RUNS: dict[str, tuple[list[dict[str, Any]], int]] = {
    "gptq": ([GPTQ], 512),
    "awq": ([AWQ], 128),
    "nine": (NINE, 512),
    "nvfp4": ([NVFP4], 0),
}
"""Recipes, and sequences (0: data-free)."""
OURS, PEER, PEERS = "halfbyte", "llm-compressor", ("gptq", "awq")
LENGTH = 2048
DRY_SEQUENCES, DRY_LENGTH = 4, 64
LIMITED = "random:8b"
LIMITS = {
    "gptq": {"block": 3.5},
    "awq": {"block": 4.0, "peak_gib": 12.0},
    "nine": {"times": 2.0},
    "command": {"seconds": 20.0},
}
"""What may be taken of each figure at most, for that shape with the tokens of RUNS."""
UNITS = {"block": "s a block", "peak_gib": "GiB", "times": "times gptq", "seconds": "s in all"}


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--shape", default="random:8b", choices=sorted(SHAPES))
    parser.add_argument("--blocks", type=count, default=6)
    parser.add_argument("--runs", type=names(*RUNS, "command"), default=[*RUNS, "command"])
    parser.add_argument("--peers", type=names(*PEERS), nargs="?", const=list(PEERS), default=[])
    parser.add_argument("--peer-blocks", type=count, default=3)
    parser.add_argument("--peer-gpu", default="0")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    args.sequences, args.length = {run: sequences for run, (_, sequences) in RUNS.items()}, LENGTH
    if args.dry:
        args.shape, args.blocks, args.length = "random:tiny", 2, DRY_LENGTH
        args.sequences = {run: min(sequences, DRY_SEQUENCES) for run, sequences in args.sequences.items()}
    if args.blocks < 2:
        parser.error("--blocks: it takes two to see the time between them")
    args.place = place_of(args.output, args.shape)
    return args


def names(*known: str) -> Callable[[str], list[str]]:
    """The type of an option that lists some of these."""

    def read(text: str) -> list[str]:
        found = [word for word in text.split(",") if word]
        if unknown := set(found) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: use {', '.join(known)}")
        return found

    return read


def tokens(args: argparse.Namespace, run: str, model: Path) -> Path:
    """A run's calibration set of random ids, on disk."""
    directory: Path = args.place / f"tokens-{args.sequences[run]}x{args.length}"
    if not (directory / MANIFEST).is_file():
        random_set(model, args.sequences[run], args.length).save(directory)
    return directory


def wait() -> None:
    """Until the GPU has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Clock:
    """A Progress that notes when stages begin."""

    def __init__(self) -> None:
        self.starts: dict[str, float] = {}

    def start(self, label: str, total: int) -> None:
        wait()
        self.starts[label] = time.perf_counter()

    def advance(self, steps: int = 1, note: str = "") -> None:
        pass

    def say(self, message: str) -> None:
        say(message)


def one(args: argparse.Namespace, run: str) -> dict[str, Any]:
    """The pass in this process: seconds from block to block, before the first, in all; peak device memory."""
    model = model_of(args, args.blocks)
    recipes = [recipe_from_mapping(dict(words), run) for words in RUNS[run][0]]
    checkpoint = Checkpoint(model)
    data = CalibrationSet.load(tokens(args, run, model)) if args.sequences[run] else None
    taken: list[float] = []
    clock = Clock()
    jobs = []
    for index, recipe in enumerate(recipes):
        plans = assign(recipe, checkpoint)
        writer = ArtifactWriter(args.place / f"{run}-{index}", checkpoint, recipe, plans, "benchmark")
        writer.open(force=True)
        jobs.append(_job(recipe, writer, quantized(plans), taken if index == len(recipes) - 1 else []))
    torch.zeros(1, device=device())
    sequences = [s.long() for s in data.sequences] if data else None
    room = fit(checkpoint, jobs, sequences, device(), BATCH_TOKENS[device()], None).room.device
    started = time.perf_counter()
    quantize_blocks(checkpoint, jobs, sequences, device(), progress=clock)
    ended = time.perf_counter()
    steps = [b - a for a, b in itertools.pairwise(taken)]
    first = clock.starts["quantizing"]
    return {
        "block": statistics.median(steps[1:] or steps),
        "blocks": steps,
        "before": first - started,
        "after": ended - taken[-1],
        "seconds": ended - started,
        **memory(2 * checkpoint.config["hidden_size"] * sum(map(len, sequences or ())), room),
    }


def memory(hidden: int, room: int | None) -> dict[str, float]:
    """GiB of device memory at the peak, and what of it hidden states took that have `room` there; none on a CPU."""
    if not torch.cuda.is_available():
        return {}
    held = hidden if room is None else min(hidden, room)
    return {"peak_gib": torch.cuda.max_memory_allocated() / GIB, "hidden_gib": held / GIB}


def _job(recipe: Any, writer: ArtifactWriter, schemes: Any, taken: list[float]) -> Job:
    def emit(block: int, result: Any) -> None:
        taken.append(time.perf_counter())
        writer.emit(block, result.linears, result.tensors, result.seconds, result.notices, result.experts)

    return Job(recipe, schemes, lambda block: block < 0 or writer.done(block), emit)


def command(args: argparse.Namespace) -> dict[str, Any]:
    """`halfbyte quantize`, whole: the process's seconds."""
    place, model = args.place, model_of(args)
    recipe = place / "nvfp4.yaml"
    write_json(recipe, NVFP4)
    words = ["quantize", str(model), "-r", str(recipe), "-o", str(place / "artifact")]
    shutil.rmtree(place / "artifact", ignore_errors=True)
    started = time.perf_counter()
    run = halfbyte_words(*words)
    child = subprocess.Popen(run, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in child.stdout or ():
        print(f"{time.perf_counter() - started:6.1f} s  {line.rstrip()}", file=sys.stderr, flush=True)
    if child.wait():
        return {"reason": f"halfbyte quantize ended with {child.returncode}"}
    seconds = time.perf_counter() - started
    manifest = json.loads((place / "artifact" / "halfbyte.json").read_text(encoding="utf-8"))
    blocks = manifest["seconds"] / Checkpoint(model).config["num_hidden_layers"]
    peak = manifest["peak_device_mib"]
    found = {"block": blocks, "seconds": seconds, "solving": manifest["seconds"]}
    return found if peak is None else {**found, "peak_gib": peak / 1024, "hidden_gib": 0.0}


def rate(shape: str) -> float:
    """This GPU's bfloat16 floating-point operations a second, from a product of a block's size."""
    rows, (hidden, inner, *_) = BATCH_TOKENS[device()], SHAPES[shape]
    a, b = (torch.randn(n, device=device(), dtype=torch.bfloat16) for n in ((rows, hidden), (hidden, inner)))
    best = float("inf")
    for _ in range(6):
        wait()
        started = time.perf_counter()
        for _ in range(10):
            a @ b
        wait()
        best = min(best, (time.perf_counter() - started) / 10)
    return 2 * rows * hidden * inner / best


def floor(shape: str, sequences: int, length: int, speed: float) -> float | None:
    """Seconds of one block's forward and Gram products at `speed`; None without data."""
    if not sequences:
        return None
    hidden, inner, _, heads, kv_heads, _ = SHAPES[shape]
    head = hidden // heads
    linears = hidden * (hidden + 2 * kv_heads * head) + hidden * hidden + 3 * hidden * inner
    attention = 2 * length * hidden
    gram = (3 * hidden**2 + inner**2) / 2
    return 2 * sequences * length * (linears + attention + gram) / speed


def peer(args: argparse.Namespace, run: str) -> dict[str, Any]:
    """llm-compressor on the same tokens, in a process of its own: seconds from one block's end to the next's."""
    place, model = args.place, model_of(args, args.peer_blocks)
    card = cards(args.peer_gpu if torch.cuda.is_available() else None)[0]
    script, log = Path(__file__).with_name("llm_compressor_blocks.py"), place / f"peer-{run}.json"
    log.unlink(missing_ok=True)
    given = tokens(args, run, model)
    env = {**os.environ, **on_card(card)}
    out = (place / f"peer-{run}.log").open("wb")
    options = json.dumps({"method": run, "group_size": GPTQ["group_size"]})
    words = [str(script), str(model), str(given), str(log), options]
    subprocess.run([sys.executable, *words], env=env, stdout=out, stderr=out, check=False)
    if not log.is_file():
        tail = (place / f"peer-{run}.log").read_text(errors="replace").splitlines()[-3:]
        return {"reason": " ".join(tail)[-300:]}
    facts: dict[str, Any] = json.loads(log.read_text(encoding="utf-8"))
    return {**facts, "block": statistics.median(facts["blocks"])}


def main() -> None:
    args = parse()
    make_directory(args.place)
    if not torch.cuda.is_available() and not args.dry:
        sys.exit("quantize.py: no GPU here; --dry shows on a CPU whether it works")
    with one_line("quantize.py"):
        if args.one:
            print(json.dumps(peer_rows(args) if args.one == "peers" else one(args, args.one)))
            return
        result: dict[str, Any] = {"schema": 1, "kind": "gpu-quantize", "shape": args.shape, "rows": []}
        try:
            run_all(args, result)
        finally:
            if result["rows"]:
                print("\n".join(table(result)), flush=True)
    sys.exit(1 if any("reason" in row or row["met"] is False for row in result["rows"]) else 0)


def run_all(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Fill the result with a row for every run; quantize.json is written after each."""
    cards(args.peer_gpu if args.peers and torch.cuda.is_available() else None)  # a wrong one is told before all else
    base = model_of(args, args.blocks)
    for run in args.peers:
        tokens(args, run, base)  # before two processes want them
    running = apart("peers") if args.peers and args.peer_gpu != "0" else None
    speed = rate(args.shape)
    result |= {"gpu": card_name(), "torch": torch.__version__, "bf16_tflops": speed / 1e12}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

    def keep(rows: Sequence[dict[str, Any]]) -> None:
        result["rows"] += rows
        result["rows"] = [judged(row, result["rows"], args.shape) for row in result["rows"]]
        write_json(args.json or args.output / "quantize.json", result)

    for run in args.runs:
        say(f"halfbyte: {run}")
        found = command(args) if run == "command" else told(apart(run)) or {"reason": "it failed"}
        least = floor(args.shape, args.sequences.get(run, 0), args.length, speed)
        keep([{"run": run, "who": OURS, **found, "floor": least}])
    failed = [{"run": run, "who": PEER, "reason": "it failed"} for run in args.peers]
    keep((told(running) or failed) if running else peer_rows(args))


def judged(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], shape: str) -> dict[str, Any]:
    """A row with its limit in words, and whether it is met; None where there is none, or nothing to hold against it."""
    limits = LIMITS.get(row["run"], {}) if shape == LIMITED and row["who"] == OURS else {}
    one = next((other.get("block") for other in rows if (other["run"], other["who"]) == ("gptq", OURS)), None)
    found = {**row, "times": row["block"] / one if one and row.get("block") else None}
    words = ", ".join(f"{most:g} {UNITS[key]}" for key, most in limits.items())
    known = limits and all(found.get(key) is not None for key in limits)
    met = all(found[key] <= most for key, most in limits.items()) if known else None
    return {**found, "limit": words or None, "met": met}


def model_of(args: argparse.Namespace, blocks: int | None = None) -> Path:
    """The shape's model of so many blocks, or whole."""
    return random_model(args.place / (f"bf16-{blocks}" if blocks else "bf16"), args.shape, blocks)


def apart(what: str) -> subprocess.Popen[bytes]:
    """This very command for one run, or for the peers, in a process of its own."""
    return subprocess.Popen([sys.executable, *sys.argv, "--one", what], stdout=subprocess.PIPE)


def told(running: subprocess.Popen[bytes]) -> Any:
    """What it printed last, or None where it failed."""
    lines = running.communicate()[0].splitlines()
    return json.loads(lines[-1]) if running.returncode == 0 else None


def peer_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What llm-compressor takes for each of --peers."""
    rows = []
    for run in args.peers:
        say(f"llm-compressor: {run}")
        rows.append({"run": run, "who": PEER, **peer(args, run)})
    return rows


def table(result: dict[str, Any]) -> list[str]:
    """Rows as Markdown."""
    machine = f"{result['gpu']}, torch {result['torch']}, {result['bf16_tflops']:.3g} TFLOP/s of bfloat16"
    head = ["run", "who", "s a block", "floor", "before s", "all s", "peak GiB", "hidden states", "the rest"]
    rows = []
    for row in result["rows"]:
        figures = [row.get(key) for key in ("block", "floor", "before", "seconds", "peak_gib", "hidden_gib")]
        rest = None if row.get("hidden_gib") is None else row["peak_gib"] - row["hidden_gib"]
        met = {True: "yes", False: "NO", None: "–" if row["limit"] else ""}[row["met"]]
        cells = (number(figure, 2) for figure in [*figures, rest])
        rows.append([row["run"], row["who"], *cells, row["limit"] or "", met])
    lines = [f"{NAMES[result['shape']]} shape, {machine}", *markdown([*head, "limit", "met"], rows)]
    lines += [f"{row['run']}, {row['who']}: {row['reason']}" for row in result["rows"] if row.get("reason")]
    for run in PEERS:
        found = {row["who"]: row["block"] for row in result["rows"] if row["run"] == run and row.get("block")}
        if len(found) == 2:
            lines.append(f"{run}: {PEER} takes {found[PEER] / found[OURS]:.1f} times as long")
    return lines


if __name__ == "__main__":
    main()
