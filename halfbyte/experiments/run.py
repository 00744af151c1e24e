"""The main job as a chain of stages: plan, calibrate, quantize, check, evaluate, mitigate, serve, judge, report.

Each stage leaves its result in the run directory under a key made of all that it depends on. A second run finds the
results whose keys still hold and does only the rest. Where a gate on quality fails, the ladder of mitigations is
climbed (climb.py) before vLLM is asked, and the stages are gone through again with the best that was found.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfbyte.artifact import MANIFEST, check_artifact, model_card, read_manifest, work_of
from halfbyte.calibration import CalibrationSet, build
from halfbyte.engine import work_id
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate import Windows, compare_served, set_windows, text_windows, write_result, write_served
from halfbyte.evaluate.served import format_of
from halfbyte.evaluate.tasks import TASKS
from halfbyte.experiments.cards import card_results
from halfbyte.experiments.climb import Climb
from halfbyte.experiments.evaluating import measure_fidelity
from halfbyte.experiments.gates import ALWAYS, evaluate_gates
from halfbyte.experiments.ground import RunGround
from halfbyte.experiments.measurements import Measurement, available, unavailable
from halfbyte.experiments.mitigation import Candidate, next_step, parse_budget
from halfbyte.experiments.quantize import quantize
from halfbyte.experiments.stages import STATE, Stages, digest
from halfbyte.experiments.workshop import (
    CALIBRATION_SHARE,
    HELD_OUT,
    OWN_TEXT,
    TEXT_WINDOW,
    TEXT_WINDOWS,
    RunRequest,
    Workshop,
)
from halfbyte.files import TEMPORARY, locked, portable, write_json, write_text
from halfbyte.models import hub_id, resolve_model
from halfbyte.models.checkpoint import read_json
from halfbyte.models.library import load_tokenizer
from halfbyte.recipe import CalibrationSpec, Recipe
from halfbyte.report import build_report
from halfbyte.types import Progress, Quiet

__all__ = [
    "CALIBRATION_SHARE",
    "HELD_OUT",
    "OWN_TEXT",
    "TEXT_WINDOW",
    "TEXT_WINDOWS",
    "RunRequest",
    "artifact_baseline",
    "own_windows",
    "run",
    "windows_of",
]

PLAN, CHECK, SERVED, EVAL, GATES = (f"{name}.json" for name in ("plan", "check", "served", "eval", "gates"))
OWN_RESULTS = (PLAN, CHECK, SERVED, EVAL)
"""Files that every run has; gates on others need a measurement."""


def run(request: RunRequest, progress: Progress | None = None) -> dict[str, Any]:
    """Do the main job in `request.output`; returns {"gates", "manifest", "eval", "served", "check", "plan", …}.

    Raises UsageError where the directory holds something that is not a run, HalfbyteError when a stage fails.
    """
    progress = progress or Quiet()
    with locked(request.output):
        _refuse_foreign(request)
        before = any(request.output.iterdir())
        chain = _Run(request, progress)
        try:
            return chain.go()
        except HalfbyteError:
            if not before and chain.stages.fresh in ([], ["plan"]):
                _take_back(request.output)
            raise


def _take_back(directory: Path) -> None:
    """Remove a plan that nothing came of, so that a refused run leaves no directory."""
    for name in (PLAN, STATE):
        (directory / name).unlink(missing_ok=True)


def _refuse_foreign(request: RunRequest) -> None:
    there = {p.name for p in request.output.iterdir() if p.suffix != TEMPORARY}
    if there and not there & {STATE, PLAN} and not request.force:
        raise UsageError(f"{request.output} is not empty and holds no halfbyte run: choose another -o, or --force")


class _Run:
    def __init__(self, request: RunRequest, progress: Progress):
        self.budget = parse_budget(request.budget) if request.budget else None
        self.shop = Workshop(request, progress)
        self.request, self.progress, self.out = request, progress, request.output
        self.artifact = self.shop.artifact
        self.stages = Stages(self.out, request.force)
        self.stages.load()
        self.why: dict[str, str] = {}
        self.results: dict[str, dict[str, Any]] = {}
        self.asked = self._asked()
        self.climb = Climb(self.out, digest(self._course()), self.shop.gates, progress)
        if request.force or not request.mitigate:
            self.climb.forget()

    def _asked(self) -> set[str]:
        """The result files that gates and options ask for; what cannot be measured here is told.

        Raises a HalfbyteError for what is not there yet and cannot be measured as it is asked.
        """
        stated = {gate.kind.file: gate.spelled for gate in self.shop.gates if gate.stated}
        named = {row.name: row.product for row in available().values()}
        options = {named.get(name, f"{name.replace('-', '_')}.json"): f"--{name}" for name in self.request.measure}
        for product, word in {**stated, **options}.items():
            if product not in (*OWN_RESULTS, *available()):
                self.why[product] = unavailable(product)
                self.progress.say(f"{word}: {self.why[product]}")
        asked = {*ALWAYS, *stated, *options}
        if (self.request.data or self.request.limit) and TASKS not in asked:
            raise UsageError("--data and --limit are for tasks: ask for them with --tasks")
        for product in sorted(asked & available().keys()):
            if self.request.force or not (self.out / product).exists():
                available()[product].refuse(self.shop.asked)
        return asked

    def _plan_key(self) -> dict[str, Any]:
        request = self.request
        key = {**self.shop.base, "recipe": request.recipe and request.recipe.identity(), "on": request.platforms}
        key |= {"context": request.context, "concurrency": request.concurrency, "text": bool(request.text)}
        memory = sorted(gate.argument for gate in self.shop.gates if gate.family == "memory")
        return {**key, "memory": memory} if memory else key

    def _course(self) -> dict[str, Any]:
        """All that a climb depends on."""
        request = self.request
        gates = [(gate.name, gate.spell(), gate.stated) for gate in self.shop.gates]
        key = {**self._plan_key(), "files": self.shop.files(), "gates": gates, "budget": request.budget}
        key |= {"measure": request.measure, "device": request.device}
        return key | ({"tasks": [str(request.data), request.limit]} if request.data or request.limit else {})

    def go(self) -> dict[str, Any]:
        started = time.monotonic()
        start = self.climb.start if self.climb.begun else self._first()
        self.ground = RunGround(self.shop, start, self.budget)
        if self.request.force:
            self.ground.clear()
        chosen, manifest = self._mitigated(start)
        self._serve(manifest)
        for row in available().values():
            if not row.climbs:
                self._extra(row, chosen, manifest)
        self._judge()
        commands = self._commands(chosen)
        results = {name: read_json(self.out / f"{name}.json") for name in ("plan", "check", "served", "eval", "gates")}
        here = {
            p.name: self.shop.command(chosen.recipe, p, ".") for p in self.shop.serving(chosen) if p.name in commands
        }
        card = model_card(manifest, **card_results(self.out, manifest["work"]), commands=here)
        write_text(self.artifact / "README.md", card)
        self.ground.clear()
        build_report(self.out)
        return {
            **results,
            "mitigation": self.climb.state or None,
            "manifest": manifest,
            "commands": commands,
            "fresh": self.stages.fresh,
            "seconds": round(time.monotonic() - started, 1),
        }

    def _climbing(self) -> list[Measurement]:
        """The measurements that a step of the ladder can mend."""
        return [row for row in available().values() if row.climbs]

    def _first(self) -> Candidate:
        """What the request asks for, or the plan chooses."""
        return self.shop.start(Recipe.model_validate(self._plan(None, None)["recipe"]))

    def _mitigated(self, start: Candidate) -> tuple[Candidate, dict[str, Any]]:
        """The candidate that the run ends with, in model/ and measured, and its manifest: the first one, or what the
        ladder made of it."""
        chosen = self.climb.best if self.climb.complete else start
        manifest = self._make(start, chosen)
        if self.climb.complete or not self.request.mitigate:
            return chosen, manifest
        self.ground.climbing = list(self.results)
        measured = {EVAL: read_json(self.out / EVAL), **self.results}
        standing = self.ground.judge(start, measured, manifest["bytes"])
        if next_step(start, standing.failed, ()) is None:
            self.climb.forget()
            return start, manifest
        if self.request.recipe is not None:
            named = "the recipe that you named does not hold the gates"
            self.progress.say(f"{named}: it is changed step by step (--no-mitigate leaves it as it is)")
        chosen = self.climb.go(start, standing, self.ground)
        self.stages.did("mitigate")
        return chosen, manifest if chosen == start else self._make(start, chosen)

    def _make(self, start: Candidate, chosen: Candidate) -> dict[str, Any]:
        """A candidate in model/, with its plan, and what tells its quality; returns the manifest."""
        self._plan(start, chosen)
        manifest = self._quantize(chosen, self._calibrate(chosen))
        self.stages.do("check", self._key(manifest), CHECK, self._check)
        key = {**self._key(manifest), "windows": self.shop.windows.sha256}
        self.stages.do("eval", key, EVAL, lambda: self._evaluate(manifest["work"]))
        self.results.clear()
        for row in self._climbing():
            self._extra(row, chosen, manifest)
        return manifest

    def _plan(self, start: Candidate | None, chosen: Candidate | None) -> dict[str, Any]:
        key = self._plan_key()
        if chosen is not None and chosen != start:
            key |= {"mitigated": chosen.plain()}
        self.stages.do("plan", key, PLAN, lambda: write_json(self.out / PLAN, self.shop.plan(start, chosen)))
        return read_json(self.out / PLAN)

    def _calibrate(self, chosen: Candidate) -> CalibrationSet:
        """The calibration set, kept in calibration/."""
        key = {**self.shop.base, "spec": chosen.calibration.model_dump(), "files": self.shop.files()}
        place = self.out / "calibration"
        self.stages.do(
            "calibrate", key, "calibration/manifest.json", lambda: self.ground.new_data(chosen.calibration).save(place)
        )
        return CalibrationSet.load(place)

    def _quantize(self, chosen: Candidate, data: CalibrationSet) -> dict[str, Any]:
        """The artifact in model/. An earlier recipe's work there, or its remains, is the run's own: it goes."""
        request, work = self.request, work_id(chosen.recipe, self.shop.fingerprint, data.sha256)
        self.ground.promote(work)
        same = work_of(self.artifact) == work
        again = request.force and "quantize" not in self.stages.fresh
        if again or not (same and (self.artifact / MANIFEST).is_file()):
            self.stages.did("quantize")
        return quantize(
            request.model,
            chosen.recipe,
            self.artifact,
            data,
            device=request.device,
            force=again or (self.artifact.is_dir() and not same),
            command=request.command,
            blocks=self.ground.store if request.mitigate and not self.climb.complete else None,
            progress=self.progress,
            memory=request.memory,
        )

    def _key(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """What a result depends on that judges the artifact."""
        return {**self.shop.base, "work": manifest["work"], "files": manifest["files"]}

    def _check(self) -> None:
        result = {**check_artifact(self.artifact, self.progress), "path": self.artifact.name}
        write_json(self.out / CHECK, result)
        if not result["ok"]:
            first = result["findings"][0]
            raise HalfbyteError(
                f"the artifact is damaged ({first['where']}: {first['message']}): run again with --force"
            )

    def _evaluate(self, work: str) -> None:
        """eval.json: what the climb measured of that work, or a new comparison."""
        found, device = self.ground.found(work, EVAL), self.shop.device
        if found.is_file():
            write_json(self.out / EVAL, read_json(found))
            return
        fidelity = measure_fidelity(self.artifact, self.shop.path, self.shop.windows, device, self.progress)
        tokenizer = load_tokenizer(self.shop.path)
        write_result(self.out, fidelity, self.artifact.name, portable(self.request.model), tokenizer)

    def _extra(self, row: Measurement, chosen: Candidate, manifest: dict[str, Any]) -> None:
        """One measurement of the registry, where it is asked for; what is there under its key counts in any case."""
        subject = self.shop.subject(chosen, self.artifact)
        serving = [platform.model_dump(mode="json") for platform in subject.platforms]
        key = {**self._key(manifest), "windows": self.shop.windows.sha256, "on": serving, **row.key(subject)}

        def make() -> None:
            found = self.ground.found(manifest["work"], row.product)
            result = read_json(found) if found.is_file() else dict(row.make(subject))
            write_json(self.out / row.product, {**result, "work": manifest["work"]})

        self.stages.discard(row.product, manifest["work"])
        try:
            if row.product in self.asked:
                self.stages.do(row.name, key, row.product, make)
        except HalfbyteError as error:
            self.why[row.product] = str(error)
            self.progress.say(f"{row.product} was not measured: {error}")
        if self.stages.current(row.name, key, row.product):
            self.results[row.product] = read_json(self.out / row.product)

    def _serve(self, manifest: dict[str, Any]) -> None:
        """served.json. A run that was not served for want of a vLLM tries again once there is one."""
        request, out = self.request, self.out

        def serve() -> None:
            served = compare_served(
                self.artifact,
                self.shop.windows,
                platform=request.platforms[0],
                vllm=request.vllm,
                log_path=out / "vllm.log",
                device=self.shop.device,
                progress=self.progress,
            )
            write_served(out, served)

        before = read_json(out / SERVED) if (out / SERVED).is_file() else None
        if self.shop.has_vllm and before and before.get("status") != "served":
            self.stages.keys.pop("served", None)
        key = {**self._key(manifest), "windows": self.shop.windows.sha256}
        self.stages.do("served", {**key, "on": request.platforms[0], "vllm": request.vllm}, SERVED, serve)

    def _judge(self) -> None:
        evaluation, check, served, plan = (read_json(self.out / name) for name in (EVAL, CHECK, SERVED, PLAN))
        known = {**self.results, PLAN: plan}
        gates = self.shop.gates
        verdict = evaluate_gates(
            gates, evaluation, check, served, results=known, asked=self.asked, why=self.why, tried=self.climb.text
        )
        write_json(self.out / GATES, verdict)

    def _commands(self, chosen: Candidate) -> dict[str, str]:
        """Serve commands by platform, as given in the run's directory; also into serve.sh."""
        lines = {}
        for platform in self.shop.serving(chosen):
            try:
                lines[platform.name] = self.shop.command(chosen.recipe, platform, self.artifact.name)
            except HalfbyteError as error:
                self.progress.say(str(error))
        head = '# The commands that serve it, by platform; vLLM must be on the PATH.\ncd "$(dirname "$0")"\n'
        write_text(self.out / "serve.sh", head + "".join(f"# on {name}\n{line}\n" for name, line in lines.items()))
        return lines


def baseline_model(directory: Path, named: str | None, progress: Progress) -> tuple[str, Path]:
    """(name, directory) of the BF16 model that an artifact is held against: the one that is named, or that it was made
    of. Raises UsageError where that is not known, or is a quantized one."""
    try:
        name = named or artifact_baseline(directory)
    except HalfbyteError as error:
        raise UsageError(f"{error}; name the BF16 model with --baseline") from None
    path = resolve_model(name, progress)
    if (form := format_of(path)) is not None:
        raise UsageError(f"{name} is quantized itself ({form}): name the BF16 model with --baseline")
    return name, path


def artifact_baseline(directory: Path) -> str:
    """The model that an artifact was made of: its directory, or its public name.

    Raises UsageError where the manifest does not lead to it.
    """
    model = read_manifest(directory).get("model") or {}
    place = directory.resolve() / str(model.get("path") or "none")  # an older manifest's absolute path stays one
    if model.get("path") and place.is_dir():
        return str(place.resolve())
    name = str(model.get("name"))
    if hub_id(name) is None:
        raise UsageError(f"where the BF16 model {name} lies is not known: name it with --baseline DIR")
    return name


def own_windows(model: Any, tokenizer: Any, seed: int, progress: Progress) -> Windows:
    """Windows that a model writes itself, for a check that needs no text."""
    spec = CalibrationSpec(sequences=32, max_tokens=256, seed=seed)
    return set_windows(build(tokenizer, spec, model=model, progress=progress))


def windows_of(paths: Sequence[Path], tokenizer: Any, window: int, stride: int | None, count: int | None) -> Windows:
    """Windows of the user's text files; all whole ones, at most `count`."""
    windows = text_windows(list(paths), tokenizer, window=window, stride=stride)
    return windows if count is None else windows.first(count)
