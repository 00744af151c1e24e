"""What the peers need: an environment each, a process each, and where their files then lie."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import say
from measure import Measured, measure

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.files import write_json
from halfbyte.models import cache_dir

TORCH = "torch==2.13.0"
SCRIPTS = Path(__file__).with_name("peer_scripts")
GROUP_SIZE = 64
PEERS = ("llm-compressor-gptq", "gptqmodel", "auto-round", "llm-compressor-awq")
"""By the names that --peers takes."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `known_peers` reads."""
    parser.add_argument("--iters", type=int, default=200, help="AutoRound's iterations (its default: 200)")
    parser.add_argument("--awq-samples", type=int, default=16, help="sequences that llm-compressor's AWQ takes")
    parser.add_argument("--symmetric", default="method=gptq,group_size=64", metavar="RECIPE", help="ours, symmetric")
    parser.add_argument("--asymmetric", default="method=awq,group_size=64", metavar="RECIPE", help="ours, asymmetric")
    parser.add_argument(
        "--peer-python", type=Path, metavar="PYTHON", help="a Python that has the peers' packages: no environments"
    )


def known_peers(arguments: argparse.Namespace) -> dict[str, Peer]:
    """Those that --peers names. Raises UsageError for one that there is not."""
    known = peers(arguments)
    for name in arguments.peers:
        if name not in known:
            raise UsageError(f"there is no peer {name!r}: use {', '.join(known)}")
    return {name: known[name] for name in arguments.peers}


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


def run_peer(
    peer: Peer, model: Path, calibration: Path, place: Path, python: Path | None = None
) -> tuple[Measured, dict[str, str]]:
    """The peer's whole process: load, quantize, save into place/artifact. python: one that has its packages; None: that
    of an environment of its own."""
    python, versions = (python, _versions(python)) if python else install(peer)
    place.mkdir(parents=True, exist_ok=True)
    options = json.dumps({"group_size": GROUP_SIZE, **peer.options})
    command = [str(python), str(SCRIPTS / peer.script), str(model), str(calibration), str(place / "artifact"), options]
    say(f"{peer.label}: running (log: {place / 'log.txt'})")
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return measure(command, place / "log.txt", offline), versions


def model_in(directory: Path) -> Path:
    """The directory with config.json: some peers write one below the one they were given."""
    found = [directory, *sorted(p for p in directory.rglob("*") if p.is_dir())]
    return next((p for p in found if (p / "config.json").is_file()), directory)
