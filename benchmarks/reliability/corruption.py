"""Random faults in sound artifacts of every format: `halfbyte check` must name every one, and no sound artifact.

    python benchmarks/reliability/corruption.py [--faults 500] [--sound 50] [--seed 0]

Every fault is checked twice: as it is, and with the manifest's file hashes and seal brought up to date afterwards, so
that only structure and values can tell. Prints a table in Markdown; exits with 1 where a fault passes as it is, where
no finding names what was damaged, where structure misses a kind that it should find, or on a false alarm.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.reliability.faults import KINDS, Kind
from benchmarks.reliability.samples import Sample, draw
from benchmarks.reliability.scene import MANIFEST, NotHere, Scene, reseal
from halfbyte.artifact import check_artifact


@dataclass
class Row:
    """What became of the faults of one kind. `wrong`: what must not be."""

    kind: str
    faults: int = 0
    found: int = 0
    named: int = 0
    by_hash: int = 0
    by_structure: int = 0
    codes: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)


def false_alarms(samples: Iterable[Sample]) -> list[str]:
    """Findings in artifacts that nobody touched."""
    return [
        f"{sample.sort}, {sample.family}: {finding['code']} {finding['where']}: {finding['message']}"
        for sample in samples
        for finding in check_artifact(sample.place)["findings"]
    ]


def run_faults(samples: list[Sample], count: int, chance: random.Random, scratch: Path) -> list[Row]:
    """`count` faults, the kinds in turn, each in a copy of an artifact drawn at random."""
    rows = {name: Row(name) for name in KINDS}
    names = list(KINDS)
    for number in range(count):
        name = names[number % len(names)]
        _one(rows[name], KINDS[name], samples, chance, scratch / "copy")
    return [row for row in rows.values() if row.faults]


def _one(row: Row, kind: Kind, samples: list[Sample], chance: random.Random, copy: Path) -> None:
    for sample in chance.sample(samples, len(samples)):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(sample.place, copy)
        try:
            words = kind.make(Scene(copy, sample.other, chance))
            break
        except NotHere:
            continue
    else:
        raise SystemExit(f"no sample has what {row.kind!r} damages: draw more")
    row.faults += 1
    told = check_artifact(copy)["findings"]
    row.found += bool(told)
    row.by_hash += any(f["code"] == "hash" or f["where"] == MANIFEST for f in told)
    row.codes |= {f["code"] for f in told}
    named = any(word in f"{f['where']} {f['message']}" for f in told for word in words)
    row.named += named
    if not named:
        row.wrong.append(f"{sample.sort}, {sample.family}: {words} {'is not named' if told else 'passes'}")
    if _seal_anew(copy):
        left = check_artifact(copy)["findings"]
        row.by_structure += bool(left)
        if kind.structure and not left:
            row.wrong.append(f"{sample.sort}, {sample.family}: {words} passes once the hashes are redone")


def _seal_anew(copy: Path) -> bool:
    """Redo hashes and seal; False where the manifest itself can no longer be read."""
    try:
        reseal(copy)
    except (OSError, ValueError, AttributeError, TypeError):
        return False
    return True


def table(rows: list[Row]) -> str:
    """The result in Markdown."""
    lines = ["| fault | faults | found | named | by hash or seal | by structure alone | codes |", "|" + "---|" * 7]
    for r in rows:
        codes = ", ".join(sorted(r.codes))
        lines.append(f"| {r.kind} | {r.faults} | {r.found} | {r.named} | {r.by_hash} | {r.by_structure} | {codes} |")
    total = [sum(getattr(r, key) for r in rows) for key in ("faults", "found", "named", "by_hash", "by_structure")]
    return "\n".join([*lines, f"| all | {' | '.join(map(str, total))} | |"])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--sound", type=int, default=50, help="sound artifacts, of which the faults are made")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    chance, began = random.Random(asked.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        samples = draw(Path(scratch), asked.sound, chance)
        alarms = false_alarms(samples)
        rows = run_faults(samples, asked.faults, chance, Path(scratch))
    print(table(rows))
    print(f"\nfalse alarms: {len(alarms)} findings in {len(samples)} sound artifacts; {time.monotonic() - began:.0f} s")
    wrong = alarms + [f"{row.kind}: {line}" for row in rows for line in row.wrong]
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
