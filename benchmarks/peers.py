"""halfbyte against its peers, side by side: the same model, calibration tokens, evaluator and machine.

    python benchmarks/peers.py [--peers llm-compressor-gptq gptqmodel auto-round llm-compressor-awq]
                               [--iters 200] [--awq-samples 16] [--keep DIR] [--data DIR] [--json FILE]

Each peer gets an environment of its own under the cache directory (torch of the CPU first, and nothing may replace it)
and runs as a process of its own, measured from outside. `halfbyte quantize` runs before and after each one, so that a
ratio compares neighbours in time on a machine that others use too. The table comes last.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
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
from measure import Measured, measure
from quality import quantize_process, render, score_rows, yardsticks
from scoring import bits_of_artifact

from halfbyte.calibration import CalibrationSet
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.files import write_json
from halfbyte.models import cache_dir, resolve_model

TORCH = "torch==2.13.0"
SCRIPTS = Path(__file__).with_name("peer_scripts")
GROUP_SIZE = 64


@dataclass(frozen=True)
class Peer:
    """One way to run a peer: its environment, what to install, its script, which recipe of ours stands beside it."""

    label: str
    environment: str
    packages: tuple[str, ...]
    script: str
    ours: str
    options: dict[str, Any] = field(default_factory=dict)
    before: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


def peers(arguments: argparse.Namespace) -> dict[str, Peer]:
    """Every peer by the name that --peers takes."""
    symmetric, asymmetric = arguments.symmetric, arguments.asymmetric
    compressor = ("llm-compressor", ("llmcompressor==0.14.*",), "llm_compressor.py")
    samples = arguments.awq_samples
    return {
        "llm-compressor-gptq": Peer(
            "llm-compressor GPTQ sym, static act-order", *compressor, symmetric, {"method": "gptq"}
        ),
        "gptqmodel": Peer(
            "GPTQModel GPTQ sym, group-aware act-order",
            "gptqmodel",
            ("gptqmodel==7.0.*", "transformers==5.5.*", "requests"),
            "gptq_model.py",
            symmetric,
            before=("setuptools", "wheel", "ninja", "packaging", "numpy"),
            flags=("--no-build-isolation",),
        ),
        "auto-round": Peer(
            f"AutoRound sym, {arguments.iters} iterations",
            "auto-round",
            ("auto-round==0.16.*",),
            "auto_round_.py",
            symmetric,
            {"iters": arguments.iters},
        ),
        "llm-compressor-awq": Peer(
            f"llm-compressor AWQ asym, {samples} sequences",
            *compressor,
            asymmetric,
            {"method": "awq", "samples": samples},
        ),
    }


def install(peer: Peer) -> tuple[Path, dict[str, str]]:
    """The python of the peer's environment, made where it is missing, and the versions in it.

    Raises HalfbyteError, in one line, where a package does not install or another torch came with it.
    """
    root = cache_dir() / "peers"
    place = root / peer.environment
    python = place / "bin" / "python"
    done = place / "installed.json"
    wanted = [TORCH, *peer.before, *peer.packages]
    if not (done.is_file() and json.loads(done.read_text())["wanted"] == wanted):
        say(f"installing {peer.environment}")
        root.mkdir(parents=True, exist_ok=True)
        if not python.is_file():
            _run([sys.executable, "-m", "venv", str(place)], peer)
        _pip(python, [TORCH], peer)
        torch = _versions(python)["torch"]
        pin = place / "constraints.txt"
        pin.write_text(f"torch=={torch}\n")
        if peer.before:
            _pip(python, ["-c", str(pin), *peer.before], peer)
        _pip(python, ["-c", str(pin), *peer.flags, *peer.packages], peer)
        if _versions(python)["torch"] != torch:
            raise HalfbyteError(f"{peer.environment}: another torch was installed ({_versions(python)['torch']})")
        write_json(done, {"wanted": wanted})
    return python, _versions(python)


def _pip(python: Path, words: list[str], peer: Peer) -> None:
    _run([str(python), "-m", "pip", "install", "--quiet", *words], peer, {"BUILD_CUDA_EXT": "0"})


def _run(command: list[str], peer: Peer, environment: dict[str, str] | None = None) -> None:
    log = cache_dir() / "peers" / f"{peer.environment}.log"
    measured = measure(command, log, environment)
    if measured.status:
        raise HalfbyteError(f"{peer.environment} does not install: {measured.reason} (log: {log})")


def _versions(python: Path) -> dict[str, str]:
    done = subprocess.run([str(python), "-m", "pip", "list", "--format=json"], capture_output=True, text=True)
    rows = json.loads(done.stdout or "[]")
    names = ("torch", "transformers", "llmcompressor", "compressed-tensors", "gptqmodel", "auto-round")
    return {row["name"].lower(): row["version"] for row in rows if row["name"].lower() in names}


def run_peer(peer: Peer, model: Path, calibration: Path, place: Path) -> tuple[Measured, dict[str, str]]:
    """The peer's whole process: load, quantize, save into place/artifact."""
    python, versions = install(peer)
    place.mkdir(parents=True, exist_ok=True)
    options = json.dumps({"group_size": GROUP_SIZE, **peer.options})
    command = [str(python), str(SCRIPTS / peer.script), str(model), str(calibration), str(place / "artifact"), options]
    say(f"{peer.label}: running (log: {place / 'log.txt'})")
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return measure(command, place / "log.txt", offline), versions


def main(arguments: argparse.Namespace) -> None:
    """Run ours and the peers in turn, score every artifact, print the tables, write the JSON."""
    data = data_directory(arguments.data)
    known = peers(arguments)
    unknown = [name for name in arguments.peers if name not in known]
    if unknown:
        raise UsageError(f"there is no peer {unknown[0]!r}: use {', '.join(known)}")
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
        race = Race(model, calibration, Path(arguments.keep or scratch))
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

    def __init__(self, model: Path, calibration: CalibrationSet, place: Path):
        self.model, self.calibration, self.place = model, calibration, place
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
            measured, versions = run_peer(peer, self.model, self.tokens, place)
        except HalfbyteError as error:
            run["error"] = str(error)
            self.candidates.append(Candidate(peer.label, "", {"error": str(error)}))
            return
        run |= {"seconds": measured.seconds, "peak_rss_mib": measured.peak_rss_mib, "versions": versions}
        if measured.status:
            run["error"] = f"failed after {measured.seconds:.0f} s: {measured.reason}"
            self.candidates.append(Candidate(peer.label, "", {"error": run["error"]}))
            return
        self._candidate(peer.label, measured, _model_in(place / "artifact"))
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


def _model_in(directory: Path) -> Path:
    """The directory with config.json: some peers write one below the one they were given."""
    found = [directory, *sorted(p for p in directory.rglob("*") if p.is_dir())]
    return next((p for p in found if (p / "config.json").is_file()), directory)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["llm-compressor-gptq", "gptqmodel", "auto-round", "llm-compressor-awq"]
    parser.add_argument("--peers", nargs="+", default=names, metavar="PEER", help=", ".join(names))
    parser.add_argument("--iters", type=int, default=200, help="AutoRound's iterations (its default: 200)")
    parser.add_argument("--awq-samples", type=int, default=16, help="sequences that llm-compressor's AWQ takes")
    parser.add_argument("--symmetric", default="method=gptq,group_size=64", metavar="RECIPE", help="ours, symmetric")
    parser.add_argument("--asymmetric", default="method=awq,group_size=64", metavar="RECIPE", help="ours, asymmetric")
    parser.add_argument("--windows", type=int, default=40, help="windows of the larger figure (default 40)")
    parser.add_argument("--sequences", type=int, default=SEQUENCES, help="calibration sequences (default 128)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep every artifact and log here")
    parser.add_argument("--data", metavar="DIR", help="where calibration/ and text/ are (else HALFBYTE_DATA)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    return parser


if __name__ == "__main__":
    run_main(main, build_parser())
