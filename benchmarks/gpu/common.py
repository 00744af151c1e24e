"""What the GPU scripts share: options, this machine's cards, tables."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from halfbyte.calibration import CalibrationSet
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate.speed_result import RATE
from halfbyte.models import Checkpoint
from halfbyte.serving.cards import on_cards, visible

ROOT = Path(__file__).resolve().parents[2]
QUIETLY = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
GIB = 1 << 30
GRACE_S, POLL_S = 5.0, 0.2


def say(text: str) -> None:
    """One line to stderr, at once, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """The options that all scripts have which start vLLM."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--on", default="h100")
    parser.add_argument("--gpus", default=None, help="which of the visible ones, by number: 0,1; none: all")
    parser.add_argument("--vllm", default=None)
    parser.add_argument("--dry", action="store_true")
    return parser


def counts(text: str) -> list[int]:
    """An option's whole numbers above zero: "1,4,16"."""
    numbers = [int(word) if word.strip().isdecimal() else 0 for word in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 1,4,16: whole numbers above zero")
    return numbers


def count(text: str) -> int:
    """An option's one whole number above zero."""
    numbers = counts(text)
    if len(numbers) > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not one whole number")
    return numbers[0]


def pair(text: str) -> list[int]:
    """An option's tokens of a prompt and of an answer: "128,128"."""
    numbers = counts(text)
    if len(numbers) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 128,128: tokens of a prompt, then of an answer")
    return numbers


def loads_of(levels: Sequence[int], tokens: Sequence[int]) -> list[dict[str, Any]]:
    """Points (`Work.points`) of so many sequences at once, with so many tokens of a prompt and of an answer."""
    prompt, answer = tokens
    return [{"name": f"c{n}", "prompts": n, "input": prompt, "output": answer} for n in dict.fromkeys(levels)]


@contextmanager
def one_line(script: str) -> Iterator[None]:
    """A user's mistake, and a stop, is one line and its exit status."""
    try:
        yield
    except HalfbyteError as error:
        print(f"{script}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(f"{script}: stopped", file=sys.stderr)
        sys.exit(130)


def digest(facts: Mapping[str, Any]) -> str:
    """A short name of plain facts, for the file or directory of what was measured under them."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def random_set(model: Path, sequences: int, length: int) -> CalibrationSet:
    """A calibration set of random ids of the model's vocabulary."""
    generator = torch.Generator().manual_seed(0)
    vocab = min(Checkpoint(model).config["vocab_size"], 100_000)
    ids = torch.randint(5, vocab, (sequences, length), generator=generator)
    return CalibrationSet.of(list(ids), {"source": {"kind": "random", "seed": 0}})


def cards(asked: str | None = None) -> list[str]:
    """The GPUs to use, in CUDA_VISIBLE_DEVICES' words: of those that this process may see all, or those asked for by
    their places among them ("0,1"); [""] on a machine without one. Raises UsageError for one that is not there."""
    seen = visible()
    if not asked:
        return seen or [""]
    places = [word.strip() for word in asked.split(",")]
    for place in places:
        if not place.isdecimal() or int(place) >= len(seen):
            raise UsageError(f"there is no GPU {place!r}: {len(seen)} can be seen here, numbered from 0")
    return [seen[int(place)] for place in places]


def on_card(card: str) -> dict[str, str]:
    """The environment of a program that sees that one GPU ("": what this one sees)."""
    return {**QUIETLY, **on_cards([card] if card else [])}


def card_name() -> str:
    """One of the GPUs as its driver calls it."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def card_gib() -> float:
    """What may be filled of a card."""
    if not torch.cuda.is_available():
        return 8.0
    return torch.cuda.get_device_properties(0).total_memory / GIB - 2.0


def middle(seconds: Sequence[float]) -> float:
    """The median of a point's repeats."""
    return statistics.median(seconds)


def environment() -> dict[str, str]:
    """This process's environment with the checkout first on PYTHONPATH (vLLM may lie behind it)."""
    rest = os.environ.get("PYTHONPATH", "")
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{rest}" if rest else str(ROOT)}


def halfbyte_words(*words: str) -> list[str]:
    """This checkout's `halfbyte WORDS`, whatever lies where it is called (with `environment`)."""
    return [sys.executable, "-P", "-m", "halfbyte", *words]


def rate_words(entry: Mapping[str, Any], gain: Mapping[str, float] | None, key: str = RATE) -> str:
    """tokens/s of a side of a point, and times BF16; why there is none where it failed."""
    rate = entry[key]
    if rate is None:
        return f"{entry['status']}: {entry['reason'][:60]}" if entry["reason"] else entry["status"]
    return f"{rate['value']:,.0f}" + (f" ({gain['value']:.2f}x)" if gain else "")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]
