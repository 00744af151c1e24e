"""The other scripts one after the other within a given time, with what they found in one place.

    python benchmarks/gpu/everything.py MODEL --calibration DIR --text FILE -o DIR [--seconds 3600] [--gpus 0,1]
        [--steps quantize kernels served matrix serving bench] [--skip bench …] [--work DIR]
    python benchmarks/gpu/everything.py --dry -o DIR      each with a tiny model on this CPU, but kernels: do they work?

Each step has its share of the time that is left, is stopped when the time is over, and leaves what it has: result files
are whole at any moment. Run again with the same --work (models and runs; unless said, in /dev/shm where it has room,
else in /tmp), served, matrix, serving and bench go on where they were. DIR gets small files only: tables.txt,
quantize.json, kernels.json, served.json, sweep.json, matrix.md, serving.json, evidence.json, bench.json and logs.txt
(the ends of vLLM's logs). The exit status is the worst of the steps', and 1 at least where one was not begun.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.common import environment, one_line, say
from benchmarks.gpu.shapes import SHAPES
from halfbyte.files import make_directory, write_text

STEPS = {"quantize": 1.5, "kernels": 0.5, "served": 1.5, "matrix": 1.5, "serving": 2.0, "bench": 4.0}
"""What may be done, and its share of the time that is left, against the steps behind it."""
UNTIMED = ("quantize", "kernels")
"""What knows no --seconds: it is stopped when its share is over."""
LEAST_S, END_S = 60.0, 10.0
MARGIN_S = 30.0
"""What a step takes to begin, and to end what it runs, beside the time that it is told."""
ROOM = 64 << 30


def default_work() -> Path:
    """Memory where it holds an 8B shape in every format, twice in BF16, else the disk."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).total > ROOM
    return (memory if roomy else Path("/tmp")) / "halfbyte-gpu"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=None)
    parser.add_argument("--calibration", type=Path, help="a set made by halfbyte calibrate")
    parser.add_argument("--text", type=Path, help="what served.py and matrix.py score")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=default_work())
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--skip", nargs="+", choices=list(STEPS), default=[])
    parser.add_argument("--gpus", default=None, help="which of the visible ones, by number: 0,1; none: all")
    parser.add_argument("--shape", default="random:8b", choices=sorted(SHAPES), help="of quantize, serving and bench")
    parser.add_argument("--vllm", default=None)
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args(words)
    skipped = {*args.skip, *(("kernels",) if args.dry else ())}
    args.steps = [step for step in args.steps if step not in skipped]
    given = args.model and args.calibration and args.text
    if not args.dry and not given and {"served", "matrix"} & {*args.steps}:
        parser.error("name MODEL, --calibration DIR and --text FILE for served and matrix, or --dry")
    return args


def main() -> None:
    args = parse()
    end = time.monotonic() + args.seconds - END_S
    output = make_directory(args.output)
    codes: dict[str, int | None] = {}
    tables: list[str] = []
    for index, step in enumerate(args.steps):
        left = end - time.monotonic()
        if left < LEAST_S:
            say(f"{step}: no time is left")
            codes[step] = None
            continue
        own = share(left, args.steps[index:])
        say(f"{step}: {own:.0f} s")
        limit = own if step in UNTIMED else left
        codes[step], told = run_step(step, words_of(step, args, own - MARGIN_S), make_directory(args.work), limit)
        collect(args, output, step)
        tables.append(told)
        write_text(output / "tables.txt", "\n".join(tables))
        print(told, flush=True)
    print(", ".join(f"{step}: {'not begun' if code is None else f'exit {code}'}" for step, code in codes.items()))
    sys.exit(worst(codes.values()))


def worst(codes: Iterable[int | None]) -> int:
    """The largest exit status; None, what was not begun, counts as 1, and what a signal ended as a shell has it."""
    return max((1 if code is None else 128 - code if code < 0 else code for code in codes), default=0)


def share(left: float, steps: Sequence[str]) -> float:
    """Seconds for the first of the steps that are left."""
    return left * STEPS[steps[0]] / sum(STEPS[step] for step in steps)


def words_of(step: str, args: argparse.Namespace, seconds: float) -> list[str]:
    """The command line of a step. serving and bench share their models."""
    data = [] if args.dry else [args.model, "--calibration", str(args.calibration), "--text", str(args.text)]
    kept = ["--json", str(args.output / f"{step}.json")]
    own = {
        "quantize": [*kept, "--shape", args.shape],
        "kernels": kept,
        "served": [*data, *kept],
        "matrix": [*data, "--report", str(args.output / "matrix.md")],
        "serving": [args.shape, *kept],
        "bench": [args.shape, *kept],
    }
    words = [str(Path(__file__).with_name(f"{step}.py")), *own[step]]
    if step != "kernels":
        words += ["-o", str(args.work / ("serving" if step == "bench" else step))]
    if step not in UNTIMED:
        words += ["--seconds", f"{seconds:.0f}"]
        words += ["--gpus", args.gpus] if args.gpus else []
        words += ["--vllm", args.vllm] if args.vllm else []
    return [*words, "--dry"] if args.dry else words


def run_step(step: str, words: Sequence[str], work: Path, limit: float) -> tuple[int, str]:
    """Its exit status and what it printed. Where the time is over, or this script is stopped, it is interrupted with
    all that it started, then killed; vLLM ends with it."""
    with (work / f"{step}.txt").open("w+b") as table:
        child = subprocess.Popen([sys.executable, *words], stdout=table, env=environment(), start_new_session=True)
        try:
            child.wait(limit)
        except subprocess.TimeoutExpired:
            say(f"{step}: the time is over")
        finally:
            code = end(child)
        table.seek(0)
        return code, table.read().decode(errors="replace")


def end(child: subprocess.Popen[bytes]) -> int:
    """The exit status of a child that leads its session; one that still runs is ended."""
    for asked in (signal.SIGINT, signal.SIGKILL):
        if child.poll() is None:
            os.killpg(child.pid, asked)
            with suppress(subprocess.TimeoutExpired):
                child.wait(END_S / 2)
    return child.wait()


def collect(args: argparse.Namespace, output: Path, step: str) -> None:
    """What a step left in the work directory: the sweep's result, and the ends of vLLM's logs in one file."""
    swept = args.work / "matrix" / "sweep" / "sweep.json"
    if step == "matrix" and swept.is_file():
        shutil.copy(swept, output / swept.name)
    places = ("*/logs/*.log", "*/runs/*/vllm.log", "*/*/runs/*/vllm.log", "*/*/bench/**/*.log")
    logs = [log for place in places for log in sorted(args.work.glob(place))]
    with (output / "logs.txt").open("w", encoding="utf-8") as kept:
        for log in logs:
            text = log.read_text(encoding="utf-8", errors="replace")
            kept.write(f"==== {os.path.relpath(log, args.work)}\n{text[:1500]}\n…\n{text[-6000:]}\n")


if __name__ == "__main__":
    with one_line("everything.py"):
        main()
