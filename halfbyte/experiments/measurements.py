"""What `run` can measure of an artifact beyond check, served and eval: a registry that gates and options draw on.

A measurement is one row: the stage's name, the file it leaves, what its result depends on beside the artifact, and the
function that makes the file's content. It runs where a gate that the user states is judged on its file, or its option
asks for it. A gate on a file that no row makes is told to be not measurable here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.evaluate import Windows
from halfbyte.experiments import quality_measurements as quality
from halfbyte.experiments import served_measurements
from halfbyte.experiments.gate_kinds import Gate
from halfbyte.platforms import Platform
from halfbyte.recipe import Recipe
from halfbyte.types import Progress


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the user wants measured, known before anything is made.

    gates              all of them: their arguments say which concurrencies (speed@C, memory@C) and tasks are wanted
    options            what the user said to --tasks, --long-context, --bench, by the measurement's name
    data, limit        --data and --limit of the tasks
    """

    gates: tuple[Gate, ...]
    options: Mapping[str, str] = field(default_factory=dict)
    data: Path | None = None
    limit: int | None = None

    def arguments(self, family: str) -> list[str]:
        """What stands behind : or @ in the names of the gates of that family."""
        return [gate.argument for gate in self.gates if gate.family == family]


@dataclass(frozen=True, kw_only=True)
class Subject(Asked):
    """What a measurement is given.

    model, path        the BF16 model as the user named it, and its directory
    artifact, out      the artifact's directory (results call it `model`), and the run's
    platforms          where it is to be served, with the KV cache that the run decided for
    text, held_out     the user's files, and the part of them that was not calibrated on, as shares from and to
    """

    model: str
    path: Path
    artifact: Path
    out: Path
    recipe: Recipe
    platforms: tuple[Platform, ...]
    windows: Windows
    text: tuple[Path, ...]
    vllm: str | None
    context: int | None
    concurrency: int | None
    device: str
    progress: Progress
    held_out: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True)
class Measurement:
    """One row of the registry.

    key       what the result depends on beside the artifact, its text and its platforms; plain data
    make      the file's content; a HalfbyteError is a reason for `not measured`, not the end of the run
    climbs    whether a rung of the mitigation ladder can mend what it shows, so that it is measured at every step
    refuse    raises a HalfbyteError for what cannot be measured as it is asked; called before anything is made
    """

    name: str
    product: str
    key: Callable[[Subject], Mapping[str, Any]]
    make: Callable[[Subject], Mapping[str, Any]]
    climbs: bool = False
    refuse: Callable[[Asked], None] = lambda _: None


MEASUREMENTS: list[Measurement] = [
    Measurement("tasks", "tasks.json", quality.tasks_key, quality.tasks, True, quality.refuse_task_names),
    Measurement("long-context", "long_context.json", quality.long_context_key, quality.long_context, True),
    Measurement("bench", "bench.json", served_measurements.key, served_measurements.bench),
    Measurement("stability", "stability.json", served_measurements.key, served_measurements.stability),
]
"""A name is its option's (--bench), without dashes before it."""


def available() -> dict[str, Measurement]:
    """The measurements by the file that they make."""
    return {row.product: row for row in MEASUREMENTS}


def unavailable(product: str) -> str:
    """Why a gate on that file stays open."""
    return f"it cannot be measured here: this halfbyte makes no {product}"
