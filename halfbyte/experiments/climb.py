"""Climbing the ladder: step by step until the gates pass or it ends, every step written down, so that a killed climb
goes on behind the last.

What is made and measured at a step is the business of a Ground; the climb decides, and keeps mitigation.json.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.experiments.gates import Gate, shortfall
from halfbyte.experiments.mitigation import Candidate, Step, change_words, changes, next_step, take
from halfbyte.files import write_json
from halfbyte.models.checkpoint import read_json
from halfbyte.types import Progress

RESULT = "mitigation.json"
SAME = "changes nothing here"


@dataclass(frozen=True)
class Standing:
    """How a candidate did. `gates`: rows of gates.json for those that a step can mend; `bytes`: the artifact's."""

    gates: Sequence[Mapping[str, Any]]
    bytes: int

    @property
    def failed(self) -> list[str]:
        return [row["name"] for row in self.gates if row["status"] == "failed"]

    @property
    def values(self) -> dict[str, float]:
        return {row["name"]: row["value"] for row in self.gates if row["value"] is not None}

    def plain(self) -> dict[str, Any]:
        """As mitigation.json holds it."""
        return {"gates": list(self.gates), "bytes": self.bytes}


class Ground(Protocol):
    """Where a climb takes place."""

    def blocks(self, candidate: Candidate) -> frozenset[str]:
        """Names of all that would be solved for it: two candidates with the same ones have the same bytes.

        Raises UsageError where it cannot be made."""

    def linears(self, candidate: Candidate) -> Sequence[str]:
        """The most sensitive linears within the budget, to be kept in BF16."""

    def measure(self, candidate: Candidate) -> Standing:
        """Make it and measure it."""

    def keep(self) -> None:
        """What was measured last is the best so far."""

    def drop(self) -> None:
        """What was measured last is given up."""


class Climb:
    """A climb from `start`. `key`: all that its course depends on, the ground aside."""

    def __init__(self, directory: Path, key: str, gates: Sequence[Gate], progress: Progress):
        self.file, self.key, self.gates, self.progress = directory / RESULT, key, gates, progress
        self.state: dict[str, Any] = {}
        try:
            there = read_json(self.file)
        except HalfbyteError:
            there = {}
        if there.get("key") == key:
            self.state = there

    @property
    def begun(self) -> bool:
        return bool(self.state)

    @property
    def complete(self) -> bool:
        return bool(self.state.get("complete"))

    @property
    def start(self) -> Candidate:
        return Candidate.of(self.state["start"]["candidate"])

    @property
    def best(self) -> Candidate:
        """The best so far: the last that was kept."""
        kept = [row for row in self.state["ladder"] if row["kept"]]
        return Candidate.of((kept[-1] if kept else self.state["start"])["candidate"])

    def forget(self) -> None:
        """Take away what an earlier climb has written."""
        self.state = {}
        self.file.unlink(missing_ok=True)

    def go(self, start: Candidate, standing: Standing, ground: Ground) -> Candidate:
        """Climb until no gate fails or no step is left; returns the best candidate. Writes mitigation.json."""
        if not self.begun:
            self.state = {"schema": 1, "kind": "mitigation", "key": self.key, "complete": False}
            self.state |= {"start": {"candidate": start.plain(), **standing.plain()}, "ladder": [], "final": None}
            self._write()
        best, seen = self.best, set(ground.blocks(start))
        for row in self.state["ladder"]:
            if row["gates"]:
                seen |= ground.blocks(Candidate.of(row["candidate"]))
            standing = Standing(row["gates"], row["bytes"]) if row["kept"] else standing
        while standing.failed:
            step = next_step(best, standing.failed, [row["step"] for row in self.state["ladder"]])
            if step is None:
                break
            row = self._row(step, best, standing, ground, seen)
            if row["kept"]:
                best, standing = Candidate.of(row["candidate"]), Standing(row["gates"], row["bytes"])
            self.state["ladder"].append(row)
            self._write()
        self._finish(start, best, standing)
        return best

    def _row(self, step: Step, best: Candidate, before: Standing, ground: Ground, seen: set[str]) -> dict[str, Any]:
        """One step made: a row of mitigation.json."""
        began = time.monotonic()
        row: dict[str, Any] = {"rung": step.rung.rung, "step": step.name, "title": step.rung.title}
        row |= {"why": f"{', '.join(step.answers)} failed: {step.rung.why}", "source": step.rung.source}
        row |= {"changes": {}, "cost": {"seconds": 0.0, "bytes_added": 0, "blocks_solved": 0, "blocks_reused": 0}}
        row |= {"before": before.values, "after": {}, "candidate": None, "gates": [], "bytes": None, "kept": False}
        self.progress.say(f"{', '.join(step.answers)} failed; mitigation: {step.rung.title} ({step.rung.cost})")
        try:
            after = take(step, best, ground.linears)
            blocks = ground.blocks(after)
        except UsageError as error:
            return {**row, "verdict": f"cannot be taken: {error}"}
        row |= {"changes": changes(best, after), "candidate": after.plain()}
        if blocks == ground.blocks(best) and after.kv_cache == best.kv_cache:
            return {**row, "verdict": SAME}
        standing = ground.measure(after)
        far, was = shortfall(self.gates, standing.gates), shortfall(self.gates, before.gates)
        better = far < was
        (ground.keep if better else ground.drop)()
        cost: dict[str, Any] = {
            "seconds": round(time.monotonic() - began, 1),
            "bytes_added": standing.bytes - before.bytes,
        }
        cost |= {"blocks_solved": len(blocks - seen), "blocks_reused": len(blocks & seen)}
        seen |= blocks
        verdict = "the gates pass" if not standing.failed else "closer, not enough" if better else "no closer: given up"
        self.progress.say(f"mitigation: {change_words(row['changes'])}: {verdict}")
        return {**row, "cost": cost, "after": standing.values, **standing.plain(), "verdict": verdict, "kept": better}

    def _finish(self, start: Candidate, best: Candidate, standing: Standing) -> None:
        done = changes(start, best)
        rows = self.state["ladder"]
        final: dict[str, Any] = {"verdict": "rejected" if standing.failed else "accepted", "failed": standing.failed}
        final |= {"kept": [row["rung"] for row in rows if row["kept"]], "changes": done, "candidate": best.plain()}
        bytes_added = standing.bytes - self.state["start"]["bytes"]
        seconds = round(sum(row["cost"]["seconds"] for row in rows), 1)
        final |= {"values": standing.values, "cost": {"seconds": seconds, "bytes_added": bytes_added}}
        self.state |= {"complete": True, "final": {**final, "text": self._text(final)}}
        self._write()

    def _text(self, final: Mapping[str, Any]) -> str:
        """What was done, for the verdict."""
        rows = self.state["ladder"]
        if not rows:
            return "No mitigation is known for it; a larger budget is stated with --gate."
        did = change_words(final["changes"])
        extra = final["cost"]["bytes_added"] / (1 << 20)
        kept = f"Mitigation changed {did} ({extra:+,.1f} MiB)" if did else "Mitigation found nothing better"
        if final["verdict"] == "accepted":
            return f"{kept}; without it a gate failed (mitigation.json; --no-mitigate leaves the recipe as it is)."
        made = sum(bool(row["gates"]) for row in rows)
        steps = f"{made} step{'s' * (made != 1)}"
        end = f"the ladder of mitigations ended after {steps} (mitigation.json)"
        return f"{kept}, and {end}: this is the best that was found. A larger budget is stated with --gate."

    @property
    def text(self) -> str:
        """What the climb did, as a sentence; empty where there was none."""
        return self.state["final"]["text"] if self.complete else ""

    def _write(self) -> None:
        write_json(self.file, self.state)
