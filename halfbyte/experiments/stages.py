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

STATE = "run.json"


@dataclass
class Stages:
    """The results so far and the keys they were made under (run.json).

    works   the work that a measurement's product tells of
    fresh   what this start has done
    """

    directory: Path
    force: bool
    keys: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    works: dict[str, str] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)

    def load(self) -> None:
        """Take up what an earlier start has left."""
        path = self.directory / STATE
        if path.is_file() and not self.force:
            state = read_json(path)
            self.keys, self.seconds = dict(state.get("keys", {})), dict(state.get("seconds", {}))
            self.works = dict(state.get("works", {}))

    def current(self, name: str, key: Mapping[str, Any], product: str) -> bool:
        """Whether that stage's product is there under that key."""
        return self.keys.get(name) == digest(key) and (self.directory / product).exists()

    def do(self, name: str, key: Mapping[str, Any], product: str, make: Callable[[], Any], work: str = "") -> None:
        """Run `make` unless its product is there under the same key; `work`: what the product tells of."""
        if self.current(name, key, product):
            return
        self.keys.pop(name, None)
        started = time.monotonic()
        make()
        self.did(name)
        self.keys[name] = digest(key)
        self.seconds[name] = round(time.monotonic() - started, 2)
        self.works |= {name: work} if work else {}
        state = {"schema": 1, "keys": self.keys, "seconds": self.seconds}
        write_json(self.directory / STATE, {**state, "works": self.works} if self.works else state)

    def discard(self, name: str, product: str, work: str) -> None:
        """Take away a product that tells of another work; one that no stage has made stays."""
        if self.works.get(name, work) != work:
            (self.directory / product).unlink(missing_ok=True)

    def did(self, name: str) -> None:
        """Note that a stage was done by this start."""
        if name not in self.fresh:
            self.fresh.append(name)


def digest(key: Mapping[str, Any]) -> str:
    """A key's hash."""
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
