"""served.py, matrix.py and serving.py one after the other within a given time, with what they found in one place.

    python benchmarks/gpu/everything.py MODEL --calibration DIR --text FILE -o DIR [--seconds 570] [--gpus 0,1]
        [--steps served matrix serving] [--work DIR]

Each step has its share of the time that is left, is stopped when the time is over, and leaves what it has: result files
are whole at any moment. Run again with the same --work (models and runs; unless said, in /dev/shm where it has room,
else in /tmp), it goes on where it was. DIR gets small files only: tables.txt, served.json, sweep.json, h100-smollm2.md,
serving.json, evidence.json and logs.txt (the ends of vLLM's logs).
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.common import ROOT, environment, say
from halfbyte.files import make_directory

STEPS = {"served": 1.5, "matrix": 1.0, "serving": 2.0}
"""What may be done, and its share of the time that is left, against the steps behind it."""
LEAST_S, END_S = 60.0, 10.0
ROOM = 45 << 30


def default_work() -> Path:
    """Memory where it holds an 8B shape in every format, else the disk."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).total > ROOM
    return (memory if roomy else Path("/tmp")) / "halfbyte-gpu"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=default_work())
    parser.add_argument("--seconds", type=float, default=570)
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--gpus", default=None)
    parser.add_argument("--shape", default="random:8b", help="what serving.py times")
    parser.add_argument("--vllm", default=None)
    return parser.parse_args(words)


def main() -> None:
    args = parse()
    end = time.monotonic() + args.seconds - END_S
    output = make_directory(args.output)
    codes = {}
    for index, step in enumerate(args.steps):
        left = end - time.monotonic()
        if left < LEAST_S:
            say(f"{step}: no time is left")
            continue
        own = share(left, args.steps[index:])
        say(f"{step}: {own:.0f} s")
        codes[step], told = run_step(step, words_of(step, args, own), make_directory(args.work), left)
        collect(args, output)
        with (output / "tables.txt").open("a", encoding="utf-8") as tables:
            tables.write(told + "\n")
        print(told, flush=True)
    print(", ".join(f"{step}: exit {code}" for step, code in codes.items()))


def share(left: float, steps: Sequence[str]) -> float:
    """Seconds for the first of the steps that are left."""
    return left * STEPS[steps[0]] / sum(STEPS[step] for step in steps)


def words_of(step: str, args: argparse.Namespace, seconds: float) -> list[str]:
    """The command line of a step."""
    data = [args.model, "--calibration", str(args.calibration), "--text", str(args.text)]
    own = {
        "served": [*data, "--json", str(args.output / "served.json")],
        "matrix": [*data, "--report", str(args.output / "h100-smollm2.md")],
        "serving": [args.shape, "--json", str(args.output / "serving.json")],
    }
    more = ["--gpus", args.gpus] if args.gpus else []
    more += ["--vllm", args.vllm] if args.vllm else []
    script = str(Path(__file__).with_name(f"{step}.py"))
    return [script, *own[step], "-o", str(args.work / step), "--seconds", f"{seconds:.0f}", *more]


def run_step(step: str, words: Sequence[str], work: Path, limit: float) -> tuple[int, str]:
    """Its exit status and what it printed. Where the time is over it is interrupted, then killed; vLLM ends with it."""
    with (work / f"{step}.txt").open("w+b") as table:
        child = subprocess.Popen([sys.executable, *words], stdout=table, env=environment(), cwd=ROOT)
        try:
            child.wait(limit)
        except subprocess.TimeoutExpired:
            say(f"{step}: the time is over")
            child.send_signal(signal.SIGINT)
            try:
                child.wait(END_S / 2)
            except subprocess.TimeoutExpired:
                child.kill()
        code = child.wait()
        table.seek(0)
        return code, table.read().decode(errors="replace")


def collect(args: argparse.Namespace, output: Path) -> None:
    """Small files that lie in the work directory, and the ends of vLLM's logs in one."""
    found = {"evidence.json": args.work / "serving" / "evidence.json"}
    found["sweep.json"] = args.work / "matrix" / "sweep" / "sweep.json"
    for name, file in found.items():
        if file.is_file():
            shutil.copy(file, output / name)
    logs = sorted(args.work.glob("*/logs/*.log")) + sorted(args.work.glob("*/runs/*/vllm.log"))
    with (output / "logs.txt").open("w", encoding="utf-8") as kept:
        for log in logs:
            text = log.read_text(encoding="utf-8", errors="replace")
            kept.write(f"==== {os.path.relpath(log, args.work)}\n{text[:1500]}\n…\n{text[-6000:]}\n")


if __name__ == "__main__":
    main()
