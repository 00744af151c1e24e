"""What transformers says of a model directory: whether config.json and the weights belong together, and the hash of
what the tokenizer does. Its imports take 3 to 10 seconds: where nothing else needs them and a GPU does the work, a
process of its own asks meanwhile."""

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
from halfbyte.models.library import Misfit, load_tokenizer, refuse_unlike

IMPORTED = "transformers.models.auto.modeling_auto"
_ASK = (
    "import sys; root, model = sys.argv[1:]; root in sys.path or sys.path.insert(0, root); "
    "from halfbyte.experiments.described import main; main(model)"
)


class Described:
    """One model directory. `begin` asks; `take` waits and returns the tokenizer's hash (None: there is none), or raises
    HalfbyteError. What the process of its own refuses, this one looks at again, and so does it where that one failed:
    transformers then changes torch's default dtype for a moment, so `take` belongs where no other thread computes.
    """

    def __init__(self, path: Path):
        self.path = path
        self._child: subprocess.Popen[bytes] | None = None
        self._told: dict[str, Any] | None = None

    def __enter__(self) -> Described:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child and self._child.poll() is None:
            self._child.kill()
            self._child.communicate()

    def begin(self, apart: bool) -> None:
        """apart: let a process of its own ask, unless this one has transformers imported already."""
        if not apart or IMPORTED in sys.modules:
            self.take()
            return
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        # -P: without it Python would import what lies in the working directory
        words = [sys.executable, "-P", "-c", _ASK, str(Path(__file__).resolve().parents[2]), str(self.path)]
        with suppress(OSError):  # as where the child fails: this process asks
            self._child = subprocess.Popen(
                words, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )

    def misfit(self, wait: bool) -> HalfbyteError | None:
        """The refusal, where config.json and weights do not belong together: what is made of them is worth nothing.
        wait: until that is known, where a process of its own was asked."""
        if wait and self._child:
            with suppress(HalfbyteError):
                self.take()
        return HalfbyteError(self._told["refused"]) if self._told and self._told["misfit"] else None

    def take_if_ready(self) -> None:
        """`take`, where that takes no waiting."""
        if self._told or (self._child and self._child.poll() is not None):
            self.take()

    def take(self) -> str | None:
        if self._told is None:
            told = self._of_child()
            self._told = describe(self.path) if told is None or told["refused"] else told
        if self._told["refused"]:
            raise HalfbyteError(self._told["refused"])
        digest: str | None = self._told["tokenizer_sha256"]
        return digest

    def _of_child(self) -> dict[str, Any] | None:
        """What the process of its own said in its last line; None where it said nothing."""
        if self._child is None:
            return None
        lines = self._child.communicate()[0].splitlines()
        with suppress(ValueError, IndexError):
            told = json.loads(lines[-1])
            return told if isinstance(told, dict) and told.keys() == _answer().keys() else None
        return None


def describe(path: Path) -> dict[str, Any]:
    """What `Described` asks: {"refused": why, in a line, or None; "misfit": whether that is why;
    "tokenizer_sha256"}."""
    try:
        refuse_unlike(Checkpoint(path))
        return _answer(tokenizer_sha256=tokenizer_hash(path))
    except HalfbyteError as error:
        return _answer(refused=str(error), misfit=isinstance(error, Misfit))


def _answer(refused: str | None = None, misfit: bool = False, tokenizer_sha256: str | None = None) -> dict[str, Any]:
    return {"refused": refused, "misfit": misfit, "tokenizer_sha256": tokenizer_sha256}


def tokenizer_hash(path: Path) -> str | None:
    """Of what the tokenizer of a model directory does; None where it has none."""
    return tokenizer_sha256(load_tokenizer(path)) if Checkpoint(path).tokenizer_files() else None


def main(path: str) -> None:
    """What a process of its own does: the answer is its last line."""
    print(f"\n{json.dumps(describe(Path(path)))}", flush=True)
