"""What transformers says of a model directory, where nothing else of a command needs it: whether config.json and the
weights belong together, and the hash of what the tokenizer does. Its imports take 3 to 10 seconds: where a GPU does the
work, a process of its own asks meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from halfbyte.calibration import tokenizer_sha256
from halfbyte.errors import HalfbyteError
from halfbyte.models import Checkpoint
from halfbyte.models.library import load_tokenizer, refuse_unlike

IMPORTED = "transformers.models.auto.modeling_auto"


class Described:
    """One model directory. `begin` asks, `look` raises HalfbyteError as soon as something is known to be wrong, `take`
    waits: it raises the same, or returns the tokenizer's hash (None: there is none).

    apart   let a process of its own ask, unless this one has transformers imported already
    """

    def __init__(self, path: Path, apart: bool):
        self.path, self.apart = path, apart and IMPORTED not in sys.modules
        self._child: subprocess.Popen[bytes] | None = None
        self._told: dict[str, Any] | None = None

    def __enter__(self) -> Described:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child and self._child.poll() is None:
            self._child.kill()
            self._child.communicate()

    def begin(self) -> None:
        if not self.apart:
            self.take()
        if self._child or self._told:
            return
        places = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-m", __name__, str(self.path)]
        with suppress(OSError):  # as where the child fails: this process asks
            self._child = subprocess.Popen(
                words, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )

    @property
    def refused(self) -> bool:
        """Whether an answer came, and it was no."""
        return bool(self._told and self._told["refused"])

    def look(self) -> None:
        if self._child and self._child.poll() is not None:
            self.take()

    def take(self) -> str | None:
        if self._told is None:
            self._told = self._answer()
        if self._told["refused"]:
            raise HalfbyteError(self._told["refused"])
        digest: str | None = self._told["tokenizer_sha256"]
        return digest

    def _answer(self) -> dict[str, Any]:
        if self._child:
            with suppress(ValueError):
                told: dict[str, Any] = json.loads(self._child.communicate()[0])
                return told
        return describe(self.path)


def describe(path: Path) -> dict[str, Any]:
    """What `Described` asks: {"refused": why, in a line, or None; "tokenizer_sha256"}."""
    try:
        checkpoint = Checkpoint(path)
        refuse_unlike(checkpoint)
        return {"refused": None, "tokenizer_sha256": tokenizer_hash(path)}
    except HalfbyteError as error:
        return {"refused": str(error), "tokenizer_sha256": None}


def tokenizer_hash(path: Path) -> str | None:
    """Of what the tokenizer of a model directory does; None where it has none."""
    return tokenizer_sha256(load_tokenizer(path)) if Checkpoint(path).tokenizer_files() else None


if __name__ == "__main__":
    print(json.dumps(describe(Path(sys.argv[1]))))
