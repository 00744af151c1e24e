"""The main job as a chain of stages: plan, calibrate, quantize, check, serve, evaluate, judge, report.

Each stage leaves its result in the run directory under a key made of all that it depends on. A second run finds the
results whose keys still hold and does only the rest.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import halfbyte
from halfbyte.artifact import MANIFEST, check_artifact, model_card, read_manifest, work_of
from halfbyte.calibration import CalibrationSet, build
from halfbyte.engine import ALGORITHM_VERSION, work_id
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate import Windows, compare_served, set_windows, text_windows, write_result, write_served
from halfbyte.experiments.cards import card_results
from halfbyte.experiments.evaluating import measure_fidelity
from halfbyte.experiments.gates import evaluate_gates, resolve_gates
from halfbyte.experiments.quantize import load_tokenizer, quantize, self_generated
from halfbyte.files import TEMPORARY, locked, portable, write_json, write_text
from halfbyte.models import Checkpoint, hub_id, resolve_model
from halfbyte.models.checkpoint import read_json
from halfbyte.plan import make_plan, variant_of
from halfbyte.platforms import Platform, load_platform
from halfbyte.recipe import CalibrationSpec, Recipe
from halfbyte.report import build_report
from halfbyte.serving import find_vllm, serve_command
from halfbyte.types import Progress, Quiet

OWN_TEXT = CalibrationSpec(sequences=64, max_tokens=256, seed=0)
"""How much a model writes to calibrate on where there is no text."""
HELD_OUT = CalibrationSpec(sequences=64, max_tokens=256, seed=1)
"""How much it writes to be judged on: other samples than those it was calibrated on."""
TEXT_WINDOW = 512
TEXT_WINDOWS = 40
CALIBRATION_SHARE = 0.8
"""Of the user's text: the rest is held out."""


@dataclass(frozen=True)
class RunRequest:
    """What `halfbyte run` was asked. `recipe` None: the plan chooses. `text` empty: the model writes its own."""

    model: str
    platforms: tuple[str, ...]
    output: Path
    recipe: Recipe | None = None
    text: tuple[Path, ...] = ()
    gates: tuple[str, ...] = ()
    vllm: str | None = None
    context: int | None = None
    concurrency: int | None = None
    device: str | None = None
    force: bool = False
    command: str | None = None


@dataclass
class _Stages:
    """The results so far and the keys they were made under (run.json)."""

    directory: Path
    force: bool
    keys: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)

    def load(self) -> None:
        path = self.directory / "run.json"
        if path.is_file() and not self.force:
            state = read_json(path)
            self.keys, self.seconds = dict(state.get("keys", {})), dict(state.get("seconds", {}))

    def do(self, name: str, key: dict[str, Any], product: str, make: Callable[[], Any]) -> None:
        """Run `make` unless its product is there under the same key."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        if self.keys.get(name) == digest and (self.directory / product).exists():
            return
        self.keys.pop(name, None)
        started = time.monotonic()
        make()
        self.fresh.append(name)
        self.keys[name] = digest
        self.seconds[name] = round(time.monotonic() - started, 2)
        write_json(self.directory / "run.json", {"schema": 1, "keys": self.keys, "seconds": self.seconds})


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
    for name in ("plan.json", "run.json"):
        (directory / name).unlink(missing_ok=True)


def _refuse_foreign(request: RunRequest) -> None:
    there = {p.name for p in request.output.iterdir() if p.suffix != TEMPORARY}
    if there and not there & {"run.json", "plan.json"} and not request.force:
        raise UsageError(f"{request.output} is not empty and holds no halfbyte run: choose another -o, or --force")


class _Run:
    def __init__(self, request: RunRequest, progress: Progress):
        self.request, self.progress, self.out = request, progress, request.output
        self.gates = resolve_gates(request.gates)
        self.platforms: list[Platform] = [load_platform(name) for name in request.platforms]
        self.has_vllm = _has_vllm(request.vllm, progress)
        self.path = resolve_model(request.model, progress)
        self.checkpoint = Checkpoint(self.path)
        self.stages = _Stages(self.out, request.force)
        self.stages.load()
        self.artifact = self.out / "model"
        self.fingerprint = self.checkpoint.fingerprint()
        self.base = {"model": self.fingerprint, "halfbyte": halfbyte.__version__, "v": ALGORITHM_VERSION}

    def go(self) -> dict[str, Any]:
        started = time.monotonic()
        plan = self._plan()
        recipe = Recipe.model_validate(plan["recipe"])
        data, windows = self._text(recipe)
        manifest = self._quantize(recipe, data)
        self._judge(manifest, windows)
        commands = self._commands(recipe)
        results = {name: read_json(self.out / f"{name}.json") for name in ("plan", "check", "served", "eval", "gates")}
        here = {p.name: self._command(recipe, p, ".") for p in self.platforms if p.name in commands}
        card = model_card(manifest, **card_results(self.out), commands=here)
        write_text(self.artifact / "README.md", card)
        build_report(self.out)
        return {
            **results,
            "manifest": manifest,
            "commands": commands,
            "fresh": self.stages.fresh,
            "seconds": round(time.monotonic() - started, 1),
        }

    def _plan(self) -> dict[str, Any]:
        request = self.request
        key = {**self.base, "recipe": request.recipe and request.recipe.identity(), "on": request.platforms}
        key |= {"context": request.context, "concurrency": request.concurrency, "text": bool(request.text)}

        def make() -> None:
            plan = make_plan(
                self.checkpoint,
                request.recipe,
                self.platforms,
                request.context,
                request.concurrency,
                bool(request.text),
                lambda r, p: self._command(r, p, self.artifact.name),
            )
            facts = {key: value for key, value in plan["model"].items() if key != "path"}
            plan["model"] = {"name": portable(request.model), **facts}
            write_json(self.out / "plan.json", plan)

        self.stages.do("plan", key, "plan.json", make)
        return read_json(self.out / "plan.json")

    def _command(self, recipe: Recipe, platform: Platform, place: str) -> str:
        """The serve command for a shell, with the artifact called `place`."""
        command = serve_command(
            self.artifact,
            recipe.format,
            platform,
            variant=variant_of(recipe),
            context=self.request.context,
            concurrency=self.request.concurrency,
        )
        return replace(command, argv=[*command.argv[:2], place, *command.argv[3:]]).shell()

    def _text(self, recipe: Recipe) -> tuple[CalibrationSet, Windows]:
        """The calibration set (kept in calibration/) and the held-out windows."""
        spec = recipe.calibration if self.request.text else OWN_TEXT
        files = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in self.request.text if p.is_file()]
        key = {**self.base, "spec": spec.model_dump(), "files": files}
        text = list(self.request.text)

        def make() -> None:
            if text:
                share = (0.0, CALIBRATION_SHARE)
                data = build(load_tokenizer(self.path), spec, sources=text, portion=share, progress=self.progress)
            else:
                data = self_generated(self.path, spec, self.request.device or "cpu", self.progress)
            data.save(self.out / "calibration")

        self.stages.do("calibrate", key, "calibration/manifest.json", make)
        data = CalibrationSet.load(self.out / "calibration")
        if text:
            windows = text_windows(
                text, load_tokenizer(self.path), window=TEXT_WINDOW, portion=(CALIBRATION_SHARE, 1.0)
            )
            return data, windows.first(TEXT_WINDOWS)
        held = self_generated(self.path, HELD_OUT, self.request.device or "cpu", self.progress)
        return data, set_windows(held)

    def _quantize(self, recipe: Recipe, data: CalibrationSet) -> dict[str, Any]:
        """The artifact in model/. An earlier recipe's work there, or its remains, is the run's own: it goes."""
        request = self.request
        same = work_of(self.artifact) == work_id(recipe, self.fingerprint, data.sha256)
        if request.force or not (same and (self.artifact / MANIFEST).is_file()):
            self.stages.fresh.append("quantize")
        return quantize(
            request.model,
            recipe,
            self.artifact,
            data,
            device=request.device,
            force=request.force or (self.artifact.is_dir() and not same),
            command=request.command,
            progress=self.progress,
        )

    def _judge(self, manifest: dict[str, Any], windows: Windows) -> None:
        request, out = self.request, self.out
        key = {**self.base, "work": manifest["work"], "files": manifest["files"]}
        text = {**key, "windows": windows.sha256}

        def evaluate() -> None:
            fidelity = measure_fidelity(self.artifact, self.path, windows, request.device or "cpu", self.progress)
            write_result(out, fidelity, self.artifact.name, portable(request.model), load_tokenizer(self.path))

        def serve() -> None:
            served = compare_served(
                self.artifact,
                windows,
                platform=request.platforms[0],
                vllm=request.vllm,
                log_path=out / "vllm.log",
                progress=self.progress,
            )
            write_served(out, self._placeless(served))

        self.stages.do("check", key, "check.json", self._check)
        before = _result(out / "served.json")
        if self.has_vllm and before and before.get("status") != "served":
            self.stages.keys.pop("served", None)
        self.stages.do("served", {**text, "on": request.platforms[0], "vllm": request.vllm}, "served.json", serve)
        self.stages.do("eval", text, "eval.json", evaluate)
        check, served, evaluation = (read_json(out / f"{n}.json") for n in ("check", "served", "eval"))
        write_json(out / "gates.json", evaluate_gates(self.gates, evaluation, check, served))

    def _placeless(self, served: dict[str, Any]) -> dict[str, Any]:
        """A served result that says nothing of where the run and vLLM lie on this machine."""
        names = {str(self.artifact): self.artifact.name}
        command = [names.get(word, word) for word in served["command"]]
        reason = served["reason"].replace(f"{self.out}/", "")
        return {**served, "command": [*(Path(word).name for word in command[:1]), *command[1:]], "reason": reason}

    def _check(self) -> None:
        result = {**check_artifact(self.artifact, self.progress), "path": self.artifact.name}
        write_json(self.out / "check.json", result)
        if not result["ok"]:
            first = result["findings"][0]
            raise HalfbyteError(
                f"the artifact is damaged ({first['where']}: {first['message']}): run again with --force"
            )

    def _commands(self, recipe: Recipe) -> dict[str, str]:
        """Serve commands by platform, as given in the run's directory; also into serve.sh."""
        lines = {}
        for platform in self.platforms:
            try:
                lines[platform.name] = self._command(recipe, platform, self.artifact.name)
            except HalfbyteError as error:
                self.progress.say(str(error))
        head = '# The commands that serve it, by platform; vLLM must be on the PATH.\ncd "$(dirname "$0")"\n'
        write_text(self.out / "serve.sh", head + "".join(f"# on {name}\n{line}\n" for name, line in lines.items()))
        return lines


def _has_vllm(named: str | None, progress: Progress) -> bool:
    """Whether there is a vLLM to serve with; said at the start where not. Raises UsageError for a wrong --vllm."""
    try:
        find_vllm(named)
    except UsageError:
        raise
    except HalfbyteError as error:
        progress.say(f"{error}; the report will say: not served")
        return False
    return True


def _result(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


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
