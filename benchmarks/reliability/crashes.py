"""Kills, full disks and two at once: what a run leaves behind, and whether it ends as if nothing had happened.

    python benchmarks/reliability/crashes.py [--model tiny] [--commands quantize run sweep] [--kills 50] [--full 20]
                                             [--calibration SET|TEXT] [--set KEY=VALUE] [--vllm PATH] [--seed 0]

SIGKILL at random moments of each command, and the same command again: the artifact must be bit for bit that of an
uninterrupted run, with the same figures, no process, port or temporary file left. A tmpfs that fills at a random size
(where mounting is allowed; else the nth write fails): one line, and the same end once there is room. A second command
on a directory at work is refused. `run` serves with a stand-in for vLLM, so that no figure here is vLLM's, or with a
real one (--vllm): then its engine's processes, its ports and its sockets count among what may be left. All on one
thread. Prints a table in Markdown; exits with 1 where anything of this does not hold.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil

from benchmarks.reliability.children import Ended, import_all, listing, start
from tests.tiny import make_tiny
from tests.unit.artifacts import random_set
from tests.unit.fake_vllm import make_fake

TIMES = {
    "seconds", "solving_seconds", "load_seconds", "resumed", "peak_rss_mib", "peak_device_mib", "command", "seal",
    "cost", "sharing", "completion",
}  # fmt: skip
"""Keys of result files that tell of the run and not of the model."""
KEPT = "torchinductor_"
"""What torch keeps in the temporary directory from one run to the next."""
WAIT_S = 30.0
"""How long what a killed run started may take to end by itself."""
UNLIKE = {"run.json", "vllm.log", "README.md", "report.html", "report.md", "sweep-report.html"}
"""Files that hold times."""
STAND_IN = {"pids", "batches", "argv", "starts", "left"}
"""What the stand-in for vLLM writes into the model's directory."""


@dataclass
class Bench:
    """One command on one model: its words, and what it leaves when nothing disturbs it."""

    name: str
    words: Callable[[Path], list[str]]
    scratch: Path
    env: dict[str, str]
    reference: dict[str, str] = field(default_factory=dict)
    status: int = 0
    seconds: float = 0.0
    bytes: int = 0
    writes: int = 0
    began: float = field(default_factory=time.time)

    def start(self, out: Path, before: Callable[[], None] | None = None) -> Any:
        return start(self.words(out), before=before, env=self.env)

    def measure(self) -> None:
        """The uninterrupted run that all others are compared with."""
        out, counter = self.scratch / "out" / f"whole-{self.name}", self.scratch / f"writes-{self.name}"
        ended = self.start(out, lambda: _count_writes(counter)).finish()
        if ended.status not in (0, 3):
            raise SystemExit(f"{self.name} fails undisturbed: {ended.stderr}")
        self.reference, self.status, self.seconds = _state(out), ended.status, ended.seconds
        self.writes = counter.stat().st_size
        self.bytes = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())


@dataclass
class Row:
    """The outcomes of one disturbance. `wrong`: what must not be."""

    what: str
    times: int = 0
    resumed: int = 0
    identical: int = 0
    clean: int = 0
    lines: int = 0
    wrong: list[str] = field(default_factory=list)


def _state(out: Path) -> dict[str, str]:
    """Every file of a finished directory by a digest of what must be the same again."""
    files = [p for p in sorted(out.rglob("*")) if p.is_file() and p.name not in STAND_IN]
    return {str(p.relative_to(out)): _digest(p) for p in files}


def _digest(path: Path) -> str:
    if path.name in UNLIKE:
        return ""
    raw = path.read_bytes()
    if path.suffix == ".json":
        raw = json.dumps(_timeless(json.loads(raw)), sort_keys=True).encode()
    return hashlib.sha256(raw).hexdigest()


def _timeless(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _timeless(value) for key, value in tree.items() if key not in TIMES}
    return [_timeless(item) for item in tree] if isinstance(tree, list) else tree


def _differences(bench: Bench, out: Path) -> list[str]:
    """Files of `out` that are not as in the uninterrupted run, the run's own name for its directory aside."""
    found = _state(out)
    names = {name for name in found.keys() | bench.reference.keys() if found.get(name) != bench.reference.get(name)}
    return sorted(names)


def kills(bench: Bench, count: int, chance: random.Random) -> Row:
    """SIGKILL after a random share of the command's own time, then the same command again."""
    row = Row(f"{bench.name}: killed")
    tries = 0
    while row.times < count and tries < 3 * count:
        tries += 1
        out = bench.scratch / "out" / bench.name
        shutil.rmtree(out, ignore_errors=True)
        moment = chance.uniform(0.0, bench.seconds)
        first = bench.start(out).finish(kill_after=moment)
        if first.status != -9:
            continue
        row.times += 1
        left = _left_behind(bench, out)
        second = bench.start(out).finish()
        _judge(row, bench, out, second, f"after {moment:.1f} s", left)
    if row.times < count:
        row.wrong.append(f"only {row.times} kills met the command at work")
    return row


def _judge(row: Row, bench: Bench, out: Path, ended: Ended, when: str, left: list[str]) -> None:
    row.resumed += ended.status == bench.status
    if ended.status != bench.status:
        row.wrong.append(f"{row.what} {when}: the same command ends with {ended.status}: {ended.stderr[-300:]}")
        return
    unlike = _differences(bench, out)
    row.identical += not unlike
    left = left + _left_behind(bench, out)
    row.clean += not left
    row.wrong += [f"{row.what} {when}: {name} differs" for name in unlike]
    row.wrong += [f"{row.what} {when}: {name} is left" for name in left]


def _left_behind(bench: Bench, out: Path) -> list[str]:
    """Processes, ports and temporary files of a command that is over; what it started has WAIT_S to end."""
    until = time.monotonic() + WAIT_S
    while (alive := _processes(bench, out)) and time.monotonic() < until:
        time.sleep(0.05)
    found = [f"process {pid}" for pid in alive]
    log = out / "vllm.log"
    for port in re.findall(r"--port\s+(\d+)", log.read_text() if log.is_file() else ""):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if probe.connect_ex(("127.0.0.1", int(port))) == 0:
                found.append(f"port {port}")
    left = listing(Path(bench.env["TMPDIR"]))
    return found + [f"temporary {name}" for name in left if not name.startswith(KEPT)]


def _processes(bench: Bench, out: Path) -> list[int]:
    """Living processes that a command on `out` began: they have the directory in their command line, or the bench's own
    TMPDIR in what they were started with, or are vLLM's (which give themselves names) and younger than the bench. The
    commands themselves are forks of this process, and none of that."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status", "environ", "create_time"]):
        told = process.info
        words, env = told["cmdline"] or [], told["environ"] or {}
        ours = any(str(out) in word for word in words) or env.get("TMPDIR") == bench.env["TMPDIR"]
        engine = any(word.startswith("VLLM::") for word in words) and told["create_time"] > bench.began
        if told["status"] != psutil.STATUS_ZOMBIE and (ours or engine):
            found.append(told["pid"])
    return found


def full_disks(bench: Bench, count: int, chance: random.Random) -> Row:
    """No room at a random point; one line; the same command again once there is room."""
    mountable = _can_mount(bench.scratch)
    row = Row(f"{bench.name}: disk full ({'tmpfs' if mountable else 'the nth write fails'})")
    for number in range(count):
        share = chance.uniform(0.05, 0.95)
        place = bench.scratch / f"disk-{bench.name}-{number}"
        with _disk(place, int(bench.bytes * share)) if mountable else _directory(place) as grow:
            out = place / bench.name
            before = None if mountable else (lambda at=int(bench.writes * share): _fail_writes(at))
            first = bench.start(out, before).finish()
            if first.status == bench.status:
                continue
            row.times += 1
            when = f"at {share:.0%}"
            told = [first.error, *first.stdout.splitlines()]  # a sweep tells of a cell that failed in its result
            line = first.status == 1 and any("is full" in words or "No space left" in words for words in told)
            row.lines += line
            if not line:
                row.wrong.append(f"{row.what} {when}: {first.status}, {first.stderr[-300:]!r}")
            grow()
            _judge(row, bench, out, bench.start(out).finish(), when, [])
    return row


@contextmanager
def _disk(place: Path, size: int) -> Iterator[Callable[[], Any]]:
    """A tmpfs of `size` bytes at `place`; what is yielded makes room on it."""
    place.mkdir(exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={max(size, 4096)}", "none", str(place))
    try:
        yield lambda: _mount("-o", "remount,size=90%", str(place))
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@contextmanager
def _directory(place: Path) -> Iterator[Callable[[], Any]]:
    place.mkdir()
    yield lambda: None


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


def _can_mount(scratch: Path) -> bool:
    try:
        with _disk(scratch / "probe", 1 << 20):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def _count_writes(counter: Path) -> None:
    replace = os.replace

    def counted(source: Any, target: Any) -> None:
        with counter.open("a") as handle:
            handle.write(".")
        replace(source, target)

    os.replace = counted


def _fail_writes(at: int) -> None:
    replace, done = os.replace, [0]

    def failing(source: Any, target: Any) -> None:
        done[0] += 1
        if done[0] > at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    os.replace = failing


def two_at_once(bench: Bench) -> Row:
    """A second command on the directory that the first is at work in."""
    row = Row(f"{bench.name}: two at once", times=1)
    out = bench.scratch / "out" / f"two-{bench.name}"
    first = bench.start(out)
    while not any(out.glob("**/*")) and time.monotonic() < first.began + WAIT_S:
        time.sleep(0.005)
    second = bench.start(out).finish()
    row.lines += second.status == 1 and "is in use by another halfbyte" in second.error
    if not row.lines:
        row.wrong.append(f"{row.what}: the second ends with {second.status}: {second.stderr[-200:]}")
    _judge(row, bench, out, first.finish(), "", [])
    return row


def benches(
    model: str,
    names: list[str],
    calibration: str | None,
    scratch: Path,
    overrides: Sequence[str] = (),
    vllm: str | None = None,
) -> list[Bench]:
    """The commands, on a tiny model made here or on the one that is named; `overrides` are of the recipe B3's keys;
    vllm: a real one, else a stand-in. What vLLM caches goes to a place of its own, so TMPDIR holds what must not be
    left."""
    env = {"TMPDIR": str(scratch / "tmp"), "PATH": os.environ["PATH"]}
    (scratch / "tmp").mkdir()
    (scratch / "out").mkdir()
    text = scratch / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {i} says: " + f"{i * 7} words and more, " * 30 for i in range(40)))
    given = calibration or str(text)
    if model == "tiny":
        model = str(make_tiny("llama", scratch / "model", num_hidden_layers=3, tie_word_embeddings=False))
        env["HALFBYTE_CACHE"] = str(scratch / "cache")
        given = calibration or str(random_set(tokens=2400, longest=128).save(scratch / "set"))
    keys = ["group_size=32", "calibration.sequences=16", "calibration.max_tokens=256", *overrides]
    size = [word for key in keys for word in ("--set", key)]
    fake = vllm or str(make_fake(scratch / "fake-vllm"))
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"), "VLLM_CACHE_ROOT": str(scratch / "vllm")}
    matrix = scratch / "two.yaml"
    matrix.write_text("cells: [B1, C1]\ndefaults: {group_size: 32, calibration: {sequences: 16, max_tokens: 256}}\n")
    gates = ["--gate", "ppl=+100000%", "--gate", "top1=0%"]
    all_words: dict[str, Callable[[Path], list[str]]] = {
        "quantize": lambda out: ["quantize", model, "-r", "B3", *size, "--calibration", given, "-o", str(out)],
        "run": lambda out: [
            "run", model, "--on", "cpu", "-r", "B3", *size, "--text", str(text), "--vllm", fake, *gates, "-o", str(out)
        ],
        "sweep": lambda out: [
            "sweep", model, "--matrix", str(matrix), "--on", "cpu", "--text", str(text), *gates, "-o", str(out)
        ],
    }  # fmt: skip
    return [Bench(name, all_words[name], scratch, env) for name in names]


def table(rows: list[Row]) -> str:
    head = (
        "| what | times | one line | ended as it should | bit-identical, same figures | nothing left |\n"
        + "|---" * 6
        + "|"
    )
    lines = [
        f"| {r.what} | {r.times} | {'' if 'killed' in r.what else r.lines} | {r.resumed} | {r.identical} | {r.clean} |"
        for r in rows
    ]
    return "\n".join([head, *lines])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny", help="tiny, or what halfbyte takes")
    parser.add_argument("--commands", nargs="+", default=["quantize", "run", "sweep"])
    parser.add_argument("--kills", type=int, default=50, help="in all, spread evenly over the commands")
    parser.add_argument("--full", type=int, default=20, help="full disks in all")
    parser.add_argument("--calibration", help="a calibration set or text for `quantize`")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe; repeatable")
    parser.add_argument("--vllm", metavar="PATH", help="a real vLLM for `run`; none: a stand-in")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    chance = random.Random(asked.seed)
    import_all()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        made = benches(asked.model, asked.commands, asked.calibration, Path(scratch), asked.set, asked.vllm)
        for number, bench in enumerate(made):
            bench.measure()
            print(
                f"{bench.name}: {bench.seconds:.1f} s undisturbed, {bench.writes} writes", file=sys.stderr, flush=True
            )
            share = [total // len(made) + (number < total % len(made)) for total in (asked.kills, asked.full)]
            for row in (kills(bench, share[0], chance), full_disks(bench, share[1], chance), two_at_once(bench)):
                rows.append(row)
                print("\n".join(row.wrong) or f"{row.what}: {row.times} good", file=sys.stderr, flush=True)
    print(table(rows))
    return 1 if any(row.wrong for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
