"""The result files of a run directory, read as they are; a missing or broken one is noted, never an error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from halfbyte.errors import UsageError
from halfbyte.report.words import dig, listing

FILES: dict[str, tuple[str, ...]] = {
    "plan": ("plan.json",),
    "check": ("check.json",),
    "served": ("served.json",),
    "evaluation": ("eval.json",),
    "gates": ("gates.json",),
    "mitigation": ("mitigation.json",),
    "tasks": ("tasks.json",),
    "chat": ("chat.json",),
    "long_context": ("long_context.json",),
    "stability": ("stability.json",),
    "sensitivity": ("sensitivity.json",),
    "calibration": ("calibration/manifest.json",),
    "manifest": ("model/halfbyte.json", "halfbyte.json"),
}
"""Where each result stands; the manifest also directly, so that a report can be made of an artifact alone."""
COMMANDS = {
    "gates": "halfbyte run {baseline} --on {platform} -o DIR --gate ppl=+5%",
    "evaluation": "halfbyte eval {artifact} -o {results}",
    "tasks": "halfbyte eval {artifact} --task default -o {results}",
    "long_context": "halfbyte eval {artifact} --long-context -o {results}",
    "bench": "halfbyte bench {artifact} --on {platform} -o {results}",
    "stability": "halfbyte bench {artifact} --on {platform} --stability 60 -o {results}",
    "served": "halfbyte check {artifact} --serve --on {platform} -o {results}",
    "check": "halfbyte check {artifact} -o {results}",
    "plan": "halfbyte plan {baseline} --on {platform} --format json > plan.json",
    "manifest": "halfbyte quantize {baseline} -r RECIPE -o DIR",
    "calibration": "halfbyte calibrate -m {baseline} -o calibration",
}
"""What makes each result, in the run's directory."""
MEASURED = ("tasks", "chat", "long_context", "stability")
"""Results that name the work of the artifact that they tell of; benches do, too."""
MANIFEST = "halfbyte.json"
RESULTS = "-results"
"""Behind an artifact's name: the directory beside it that its page's commands write to."""
BENCHES = "bench*.json"
"""bench.json, or one for each platform."""


@dataclass(frozen=True)
class Sources:
    """What was found. An absent or unreadable result is an empty mapping; `problems` names the unreadable ones."""

    run: Path
    plan: dict[str, Any] = field(default_factory=dict)
    check: dict[str, Any] = field(default_factory=dict)
    served: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    gates: dict[str, Any] = field(default_factory=dict)
    mitigation: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, Any] = field(default_factory=dict)
    chat: dict[str, Any] = field(default_factory=dict)
    long_context: dict[str, Any] = field(default_factory=dict)
    stability: dict[str, Any] = field(default_factory=dict)
    sensitivity: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    benches: tuple[dict[str, Any], ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def alone(self) -> bool:
        """Whether this is an artifact's own directory, not that of a run."""
        return (self.run / MANIFEST).is_file()

    @property
    def artifact(self) -> str:
        """The artifact as commands name it: seen from the run's directory, or from beside it where it is alone."""
        return self.run.resolve().name if self.alone else "model"

    @property
    def results(self) -> str:
        """Where commands put what they measure, as seen from there."""
        return f"{self.artifact}{RESULTS}" if self.alone else "."

    def command(self, result: str) -> str:
        """The command that makes one of COMMANDS' results here."""
        places = {"artifact": self.artifact, "results": self.results, "platform": self.platform}
        return COMMANDS[result].format(baseline=self.baseline, **places)

    @property
    def baseline(self) -> str:
        """The BF16 model as the user named it."""
        named = (
            dig(self.manifest, "model", "name"),
            self.manifest.get("model"),
            self.evaluation.get("baseline"),
            dig(self.plan, "model", "name"),
            dig(self.plan, "model", "path"),
        )
        return next((value for value in named if isinstance(value, str) and value), "MODEL")

    @property
    def platform(self) -> str:
        """The first platform that was planned for, as commands name it."""
        return next((str(name) for name in listing(dig(self.plan, "request", "platforms"))), "PLATFORM")


def read_sources(run_dir: Path) -> Sources:
    """All result files of `run_dir`. Raises UsageError when the directory is missing or holds none of them."""
    if not run_dir.is_dir():
        raise UsageError(f"{run_dir} is no directory: name the output directory of `halfbyte run`")
    found: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    directories = [run_dir, *_measured_beside(run_dir)]
    for name, places in FILES.items():
        files = [there / place for there in directories for place in places]
        file = next((file for file in files if file.is_file()), None)
        if file is not None and (value := _noted(file, run_dir, problems)) is not None:
            found[name] = value
    benches = tuple(
        b
        for there in directories
        for file in sorted(there.glob(BENCHES), key=lambda f: (len(f.name), f.name))
        if (b := _noted(file, run_dir, problems)) is not None
    )
    if not found and not benches and not problems:
        raise UsageError(
            f"{run_dir} holds no results: name the directory that `halfbyte run`, `sweep`, `eval` or `bench` wrote "
            "into, or run one of them first"
        )
    return _of_one_work(Sources(run=run_dir, benches=benches, problems=tuple(problems), **found))


def _of_one_work(found: Sources) -> Sources:
    """Without the measurements that name another work than the artifact's own; `problems` names them."""
    work = found.manifest.get("work")
    alien = [name for name in MEASURED if not tells_of(getattr(found, name), work)]
    benches = tuple(bench for bench in found.benches if tells_of(bench, work))
    told = [*(FILES[name][0] for name in alien), *[BENCHES] * (len(benches) < len(found.benches))]
    problems = [*found.problems, *(f"{name} tells of another artifact and was left out" for name in told)]
    gone: dict[str, Any] = {name: {} for name in alien}
    return replace(found, benches=benches, problems=tuple(problems), **gone)


def tells_of(result: Mapping[str, Any], work: Any) -> bool:
    """Whether a result may be that of the artifact of this work (None: not known): it names that work, or none."""
    return work is None or result.get("work") in (None, work)


def _measured_beside(run_dir: Path) -> list[Path]:
    """Where the commands of an artifact's page leave what they measure: NAME-results beside it (`Sources.results`)."""
    beside = run_dir.resolve().parent / f"{run_dir.resolve().name}{RESULTS}"
    return [beside] if (run_dir / MANIFEST).is_file() and beside.is_dir() else []


def _noted(file: Path, run_dir: Path, problems: list[str]) -> dict[str, Any] | None:
    """One result, unless it is broken or tells of an artifact that has been made anew since."""
    inside = file.is_relative_to(run_dir)
    name = file.relative_to(run_dir if inside else file.parent.parent)
    if not inside and file.stat().st_mtime < (run_dir / MANIFEST).stat().st_mtime:
        problems.append(f"{name} is older than the artifact and was left out: measure again")
        return None
    value = read_result(file)
    if value is None:
        problems.append(f"{name} is not a JSON object and was left out")
    return value


def read_result(file: Path) -> dict[str, Any] | None:
    """One result file; None where it is missing or no JSON object."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
