"""What the benchmarks share: the data, the calibration tokens, recipes in words, the machine, a table in Markdown."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NoReturn

import torch

from halfbyte.calibration import CalibrationSet, build
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.models.library import load_tokenizer
from halfbyte.recipe import CalibrationSpec, Recipe, load_recipe
from halfbyte.recipe.loader import recipe_from_mapping

MODEL = "smollm2-135m"
SEQUENCES, LENGTH = 128, 512
"""Calibration: so many sequences of so many tokens, cut from c4.txt at even strides."""
CALIBRATION = "calibration/c4.txt"
TEXT = "text/wikitext-2-test.txt"


class Report:
    """A Progress on stderr: a line a stage, one every tenth of it, notices as they come."""

    label, total, done = "", 1, 0

    def start(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, total, 0
        say(label)

    def advance(self, steps: int = 1, note: str = "") -> None:
        before, self.done = self.done, self.done + steps
        if self.total >= 10 and self.done * 10 // self.total > before * 10 // self.total:
            say(f"{self.label}: {self.done}/{self.total}")

    def say(self, message: str) -> None:
        say(message)


def say(message: str) -> None:
    """One line to stderr, at once."""
    print(message, file=sys.stderr, flush=True)


def data_directory(given: str | None) -> Path:
    """--data, HALFBYTE_DATA, or ../shared/data beside the checkout. Raises UsageError where the texts are not there."""
    checkout = Path(__file__).resolve().parents[1]
    place = Path(given or os.environ.get("HALFBYTE_DATA") or checkout.parent / "shared" / "data")
    for name in (CALIBRATION, TEXT):
        if not (place / name).is_file():
            raise UsageError(f"{place} has no {name}: name the data directory with --data or HALFBYTE_DATA")
    return place


def calibration_tokens(model: Path, data: Path, sequences: int = SEQUENCES) -> CalibrationSet:
    """The first-to-last even strides of c4.txt's token stream: `sequences` pieces of LENGTH tokens."""
    spec = CalibrationSpec(sequences=sequences, max_tokens=LENGTH)
    return build(load_tokenizer(model), spec, sources=[data / CALIBRATION], strategy="stream")


def read_recipe(words: str) -> tuple[str, Recipe]:
    """(label, recipe) from a preset's name, a YAML file, or inline "method=gptq,group_size=64". Raises UsageError."""
    if "=" not in words:
        return Path(words).stem if words.endswith((".yaml", ".yml")) else words, load_recipe(words)
    import yaml

    pairs = [part.partition("=") for part in words.split(",")]
    recipe = recipe_from_mapping({key.strip(): yaml.safe_load(value) for key, _, value in pairs}, words)
    return words.replace("method=", "").replace("group_size=", "g").replace(",", " "), recipe


def machine() -> dict[str, Any]:
    """The processor, cores, load and torch that a figure was taken with."""
    facts = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    names = [line.split(":", 1)[1].strip() for line in facts.splitlines() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "avx512": "avx512f" in facts,
        "threads": torch.get_num_threads(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def number(value: float | None, digits: int, unit: str = "") -> str:
    """A figure in so many digits, or a dash."""
    return "–" if value is None else f"{value:,.{digits}f}{unit}"


def run_main(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> NoReturn:
    """Parse and run; a user's mistake is one line and its exit code."""
    arguments = parser.parse_args()
    try:
        main(arguments)
    except HalfbyteError as error:
        say(f"error: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        say("stopped")
        sys.exit(130)
    sys.exit(0)
