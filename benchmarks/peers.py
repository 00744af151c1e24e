"""halfbyte against its peers, side by side: the same model, calibration tokens, evaluator and machine.

    python benchmarks/peers.py [--peers llm-compressor-gptq gptqmodel auto-round llm-compressor-awq]
                               [--iters 200] [--awq-samples 16] [--keep DIR] [--data DIR] [--json FILE]

Each peer gets an environment of its own under the cache directory (torch of the CPU first, and nothing may replace it)
and runs as a process of its own, measured from outside. `halfbyte quantize` runs before and after each one, so that a
ratio compares neighbours in time on a machine that others use too. The table comes last.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from candidates import Candidate
from common import (
    MODEL,
    SEQUENCES,
    TEXT,
    Report,
    calibration_tokens,
    data_directory,
    machine,
    markdown,
    number,
    read_recipe,
    run_main,
    say,
)
from kept import row_key
from measure import Measured
from peer_runs import PEERS, Peer, add_options, known_peers, model_in, run_peer
from quality import quantize_process, render, score_rows, yardsticks
from scoring import bits_of_artifact

from halfbyte.calibration import CalibrationSet
from halfbyte.errors import HalfbyteError
from halfbyte.files import write_json
from halfbyte.models import resolve_model


def main(arguments: argparse.Namespace) -> None:
    """Run ours and the peers in turn, score every artifact, print the tables, write the JSON."""
    data = data_directory(arguments.data)
    known = known_peers(arguments)
    recipes = dict(read_recipe(known[name].ours) for name in arguments.peers)
    model = resolve_model(MODEL, Report())
    calibration = calibration_tokens(model, data, arguments.sequences)
    result: dict[str, Any] = {
        "schema": 1,
        "kind": "peers",
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        "calibration": {"sha256": calibration.sha256, "sequences": len(calibration.sequences)},
    }
    table: dict[str, Any] = {"model": MODEL, "rows": []}
    with tempfile.TemporaryDirectory(prefix="peers-") as scratch:
        race = Race(model, calibration, Path(arguments.keep or scratch), arguments.peer_python)
        result |= {"runs": race.runs, "tables": [table]}
        for name in arguments.peers:
            race.peer(known[name])
            _write(arguments.json, result)
        candidates = yardsticks(list(recipes.items()), model) + race.candidates
        for row in score_rows(table, model, data / TEXT, candidates, arguments.windows):
            table["rows"].append(row)
            _write(arguments.json, result)
    print(render(table, arguments.windows))
    print("\n" + race.render())


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path:
        write_json(path, result)


class Race:
    """The runs in the order in which they took place."""

    def __init__(self, model: Path, calibration: CalibrationSet, place: Path, python: Path | None = None):
        self.model, self.calibration, self.place, self.python = model, calibration, place, python
        self.tokens = calibration.save(place / "tokens")
        self.runs: list[dict[str, Any]] = []
        self.candidates: list[Candidate] = []
        self.last: tuple[str, float] | None = None

    def peer(self, peer: Peer) -> None:
        """Ours, the peer, ours again; what came just before serves as "before" where it was the same recipe."""
        before = self.last[1] if self.last and self.last[0] == peer.ours else self._ours(peer.ours)
        run: dict[str, Any] = {"name": peer.label, "ours": peer.ours, "ours_before": before}
        self.runs.append(run)
        place = self.place / f"peer-{len(self.runs)}"
        try:
            measured, versions = run_peer(peer, self.model, self.tokens, place, self.python)
        except HalfbyteError as error:
            run["error"] = str(error)
            self.candidates.append(Candidate(peer.label, "", {"error": str(error)}))
            return
        run |= {"seconds": measured.seconds, "peak_rss_mib": measured.peak_rss_mib, "versions": versions}
        if measured.status:
            run["error"] = f"failed after {measured.seconds:.0f} s: {measured.reason}"
            self.candidates.append(Candidate(peer.label, "", {"error": run["error"]}))
            return
        self._candidate(peer.label, measured, model_in(place / "artifact"))
        run["ours_after"] = self._ours(peer.ours)
        run["ratio"] = measured.seconds / ((run["ours_before"] + run["ours_after"]) / 2)
        say(f"{peer.label}: {measured.seconds:.0f} s, {run['ratio']:.2f} times ours")

    def _ours(self, words: str) -> float:
        label, recipe = read_recipe(words)
        place = self.place / f"ours-{len(list(self.place.iterdir()))}"
        measured = quantize_process(recipe, self.model, self.calibration, place)
        if measured.status:
            raise HalfbyteError(f"halfbyte quantize failed: {measured.reason}")
        say(f"halfbyte {label}: {measured.seconds:.0f} s")
        self.runs.append({"name": f"halfbyte {label}", "seconds": measured.seconds, **_usage(measured)})
        if not any(c.name == f"halfbyte {label}" for c in self.candidates):
            self._candidate(f"halfbyte {label}", measured, place / "artifact")
        self.last = (words, measured.seconds)
        return measured.seconds

    def _candidate(self, name: str, measured: Measured, directory: Path) -> None:
        facts = {"seconds": measured.seconds, **_usage(measured)}
        try:
            facts["bits_per_weight"] = bits_of_artifact(directory)
        except HalfbyteError as error:
            facts = {"error": str(error)}
        self.candidates.append(Candidate(name, row_key(name, ""), facts, directory=directory))

    def render(self) -> str:
        """Seconds of every peer beside ours, before and after."""
        head = ("side by side", "peer s", "ours before s", "ours after s", "peer / ours", "peer peak MiB")
        rows = []
        for run in self.runs:
            if "ours" not in run:
                continue
            figures = [number(run.get(k), 0) for k in ("seconds", "ours_before", "ours_after")]
            rows.append([run["name"], *figures, number(run.get("ratio"), 2), number(run.get("peak_rss_mib"), 0)])
        failed = [f"\n{run['name']}: {run['error']}" for run in self.runs if run.get("error")]
        return markdown(head, rows) + "".join(failed)


def _usage(measured: Measured) -> dict[str, Any]:
    return {"cpu_seconds": measured.cpu_seconds, "peak_rss_mib": measured.peak_rss_mib}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), metavar="PEER", help=", ".join(PEERS))
    add_options(parser)
    parser.add_argument("--windows", type=int, default=40, help="windows of the larger figure (default 40)")
    parser.add_argument("--sequences", type=int, default=SEQUENCES, help="calibration sequences (default 128)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep every artifact and log here")
    parser.add_argument("--data", metavar="DIR", help="where calibration/ and text/ are (else HALFBYTE_DATA)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    return parser


if __name__ == "__main__":
    run_main(main, build_parser())
