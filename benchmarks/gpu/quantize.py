"""Seconds a block to quantize a Llama-3.1-8B-shaped model on this machine's GPU, beside the floor and llm-compressor.

    python benchmarks/gpu/quantize.py -o DIR [--blocks 6] [--runs gptq,awq,nine,nvfp4,command] [--peers] [--json FILE]

Random weights of realistic scale, random tokens: speed does not depend on what they say. Each run is a process of its
own (`--blocks` blocks; the whole pass of halfbyte with its writer):

    gptq      method gptq, group 128, symmetric (AWQ scaling, static act-order), 512 sequences of 2,048 tokens
    awq       method awq, group 128, asymmetric, 128 sequences of 2,048 tokens
    nine      nine recipes in one pass, on the tokens of `gptq`
    nvfp4     NVFP4, data-free, 16
    command   `halfbyte quantize` of the whole 32-block model, NVFP4 data-free, to the finished artifact

"a block" is the median over the blocks but the first two, from one block handed on to the next; what comes before the
first block (tokens embedded, the first token weighed) is a column of its own. The floor is what one forward and the
Gram products (their upper half) take at the rate of this GPU's own large bfloat16 product. With --peers llm-compressor
runs the same tokens on a model of --peer-blocks blocks of that shape; needs its packages in this Python. Needs 20 GiB
in DIR for `command`, else 4; several GPUs: --peer-gpu N runs the peer there, at the same time.
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
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import itertools

from benchmarks.gpu.common import environment, markdown, random_set, say
from benchmarks.gpu.shapes import SHAPES, random_model
from halfbyte.artifact import ArtifactWriter
from halfbyte.calibration import CalibrationSet
from halfbyte.engine import Job, quantize_blocks
from halfbyte.files import write_json
from halfbyte.models import Checkpoint
from halfbyte.plan.layers import assign, quantized
from halfbyte.recipe.loader import recipe_from_mapping

LENGTH = 2048
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
PEERS = ("gptq", "awq")


def tokens(place: Path, model: Path, sequences: int) -> Path:
    """A calibration set of random ids, on disk."""
    directory = place / f"tokens-{sequences}"
    return directory if directory.is_dir() else Path(random_set(model, sequences, LENGTH).save(directory))


class Clock:
    """A Progress that notes when stages begin."""

    def __init__(self) -> None:
        self.starts: dict[str, float] = {}

    def start(self, label: str, total: int) -> None:
        torch.cuda.synchronize()
        self.starts[label] = time.perf_counter()

    def advance(self, steps: int = 1, note: str = "") -> None:
        pass

    def say(self, message: str) -> None:
        say(message)


def one(run: str, model: Path, place: Path) -> dict[str, Any]:
    """The pass in this process: seconds from block to block, before the first, in all; peak device memory."""
    recipes = [recipe_from_mapping(dict(words), run) for words in RUNS[run][0]]
    checkpoint = Checkpoint(model)
    data = CalibrationSet.load(tokens(place, model, RUNS[run][1])) if RUNS[run][1] else None
    taken: list[float] = []
    clock = Clock()
    jobs = []
    for number, recipe in enumerate(recipes):
        plans = assign(recipe, checkpoint)
        writer = ArtifactWriter(place / f"{run}-{number}", checkpoint, recipe, plans, "benchmark")
        writer.open(force=True)
        jobs.append(_job(recipe, writer, quantized(plans), taken if number == len(recipes) - 1 else []))
    torch.zeros(1, device="cuda")
    started = time.perf_counter()
    sequences = [s.long() for s in data.sequences] if data else None
    quantize_blocks(checkpoint, jobs, sequences, "cuda", progress=clock)
    ended = time.perf_counter()
    steps = [b - a for a, b in itertools.pairwise(taken)]
    first = clock.starts["quantizing"]
    return {
        "block": statistics.median(steps[1:] or steps),
        "blocks": steps,
        "before": first - started,
        "after": ended - taken[-1],
        "seconds": ended - started,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def _job(recipe: Any, writer: ArtifactWriter, schemes: Any, taken: list[float]) -> Job:
    def emit(block: int, result: Any) -> None:
        taken.append(time.perf_counter())
        writer.emit(block, result.linears, result.tensors, result.seconds, result.notices, result.experts)

    return Job(recipe, schemes, lambda block: block < 0 or writer.done(block), emit)


def command(model: Path, place: Path) -> dict[str, Any]:
    """`halfbyte quantize`, whole: the process's seconds."""
    recipe = place / "nvfp4.yaml"
    write_json(recipe, NVFP4)
    words = ["quantize", str(model), "-r", str(recipe), "-o", str(place / "artifact")]
    shutil.rmtree(place / "artifact", ignore_errors=True)
    started = time.perf_counter()
    run = [sys.executable, "-m", "halfbyte.cli.app", *words]
    child = subprocess.Popen(run, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in child.stdout or ():
        print(f"{time.perf_counter() - started:6.1f} s  {line.rstrip()}", file=sys.stderr, flush=True)
    if child.wait():
        raise subprocess.CalledProcessError(child.returncode, run)
    seconds = time.perf_counter() - started
    manifest = json.loads((place / "artifact" / "halfbyte.json").read_text(encoding="utf-8"))
    blocks = manifest["seconds"] / Checkpoint(model).config["num_hidden_layers"]
    peak = (manifest["peak_device_mib"] or 0) / 1024
    return {"block": blocks, "seconds": seconds, "solving": manifest["seconds"], "peak_gib": peak}


def rate() -> float:
    """This GPU's bfloat16 floating-point operations a second, from a product of a block's size."""
    a, b = (torch.randn(n, device="cuda", dtype=torch.bfloat16) for n in ((16384, 4096), (4096, 14336)))
    best = float("inf")
    for _ in range(6):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(10):
            a @ b
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - started) / 10)
    return 2 * 16384 * 4096 * 14336 / best


def floor(shape: str, sequences: int, speed: float) -> float:
    """Seconds of one block's forward and Gram products at `speed`."""
    hidden, inner, _, heads, kv_heads, _ = SHAPES[shape]
    head = hidden // heads
    count = sequences * LENGTH
    linears = hidden * (hidden + 2 * kv_heads * head) + hidden * hidden + 3 * hidden * inner
    attention = 2 * LENGTH * hidden
    gram = (3 * hidden**2 + inner**2) / 2
    return 2 * count * (linears + attention + gram) / speed


def peer(run: str, model: Path, place: Path, card: str) -> dict[str, Any]:
    """llm-compressor on the same tokens, in a process of its own: seconds from one block's end to the next's."""
    script, log = Path(__file__).with_name("llm_compressor_blocks.py"), place / f"peer-{run}.json"
    log.unlink(missing_ok=True)
    given = tokens(place, model, RUNS[run][1])
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": card}
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--shape", default="random:8b", choices=sorted(SHAPES))
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--runs", default="gptq,awq,nine,nvfp4")
    parser.add_argument("--peers", default="", help="of gptq,awq: what llm-compressor does too")
    parser.add_argument("--peer-blocks", type=int, default=3)
    parser.add_argument("--peer-gpu", default="0")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available():
        sys.exit("quantize.py: no GPU here")
    if args.one:
        print(json.dumps(peer_rows(args) if args.one == "peers" else one(args.one, base_of(args), args.output)))
        return
    base = base_of(args)
    for run in PEERS if args.peers else ():
        tokens(args.output, base, RUNS[run][1])  # before two processes want them
    result: dict[str, Any] = {"schema": 1, "kind": "gpu-quantize", "shape": args.shape, "rows": []}
    running = apart("peers") if args.peers and args.peer_gpu != "0" else None
    speed = rate()
    result |= {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "bf16_tflops": speed / 1e12}
    torch.cuda.empty_cache()
    for run in [r for r in args.runs.split(",") if r]:
        say(f"halfbyte: {run}")
        if run == "command":
            found = command(random_model(args.output / "bf16", args.shape), args.output)
        else:
            found = told(apart(run)) or {"reason": "failed"}
        sequences = RUNS[run][1] if run in RUNS else 0
        result["rows"].append({"run": run, "who": "halfbyte", **found, "floor": floor(args.shape, sequences, speed)})
        _save(args, result)
    result["rows"] += (told(running) or []) if running else peer_rows(args)
    _save(args, result)
    print("\n".join(table(result)))


def base_of(args: argparse.Namespace) -> Path:
    """The model of some blocks that the runs quantize."""
    return random_model(args.output / f"bf16-{args.blocks}", args.shape, args.blocks)


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
    for run in [p for p in args.peers.split(",") if p]:
        model = random_model(args.output / f"peer-{args.peer_blocks}", args.shape, args.peer_blocks)
        say(f"llm-compressor: {run}")
        rows.append({"run": run, "who": "llm-compressor", **peer(run, model, args.output, args.peer_gpu)})
    return rows


def _save(args: argparse.Namespace, result: dict[str, Any]) -> None:
    write_json(args.json or args.output / "quantize.json", result)


def table(result: dict[str, Any]) -> list[str]:
    """Rows as Markdown."""
    lines = [f"{result['gpu']}, torch {result['torch']}, {result['bf16_tflops']:.0f} TFLOP/s of bfloat16"]
    rows = []
    for row in result["rows"]:
        cells = [row.get(key) for key in ("block", "floor", "before", "seconds", "peak_gib")]
        rows.append([row["run"], row["who"], *("–" if c is None else f"{c:.2f}" for c in cells)])
    lines += markdown(["run", "who", "s a block", "floor", "before s", "all s", "peak GiB"], rows)
    lines += [f"{row['run']}, {row['who']}: {row['reason']}" for row in result["rows"] if row.get("reason")]
    for run in PEERS:
        found = {row["who"]: row["block"] for row in result["rows"] if row["run"] == run and row.get("block")}
        if len(found) == 2:
            lines.append(f"{run}: llm-compressor takes {found['llm-compressor'] / found['halfbyte']:.1f} times as long")
    return lines


if __name__ == "__main__":
    main()
