"""A run's stages: each leaves its product under a key made of all that it depends on, and is done again only when the
key or the product is not there."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.files import write_json
from halfbyte.models.checkpoint import read_json
from halfbyte.report.sources import tells_of

STATE = "run.json"


@dataclass
class Stages:
    """The results so far and the keys they were made under (run.json).

    fresh   what this start has done
    """

    directory: Path
    force: bool
    keys: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)

    def load(self) -> None:
        """Take up what an earlier start has left."""
        path = self.directory / STATE
        if path.is_file() and not self.force:
            state = read_json(path)
            self.keys, self.seconds = dict(state.get("keys", {})), dict(state.get("seconds", {}))

    def current(self, name: str, key: Mapping[str, Any], product: str) -> bool:
        """Whether that stage's product is there under that key."""
        return self.keys.get(name) == digest(key) and (self.directory / product).exists()

    def do(self, name: str, key: Mapping[str, Any], product: str, make: Callable[[], Any]) -> None:
        """Run `make` unless its product is there under the same key."""
        if self.current(name, key, product):
            return
        self.keys.pop(name, None)
        started = time.monotonic()
        make()
        self.did(name)
        self.keys[name] = digest(key)
        self.seconds[name] = round(time.monotonic() - started, 2)
        write_json(self.directory / STATE, {"schema": 1, "keys": self.keys, "seconds": self.seconds})

    def discard(self, product: str, work: str) -> None:
        """Take away a product that tells of another work, whoever made it; one that names none stays."""
        path = self.directory / product
        if path.is_file() and not tells_of(read_json(path), work):
            path.unlink()

    def did(self, name: str) -> None:
        """Note that a stage was done by this start."""
        if name not in self.fresh:
            self.fresh.append(name)


def digest(key: Mapping[str, Any]) -> str:
    """A key's hash."""
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
