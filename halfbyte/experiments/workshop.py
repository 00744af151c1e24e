"""What every stage of a run works with: the request, the model, the platforms, texts, plans and serve commands."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import halfbyte
from halfbyte.calibration import CalibrationSet, build
from halfbyte.engine import ALGORITHM_VERSION
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate import Windows, set_windows, text_windows
from halfbyte.experiments.gates import resolve_gates
from halfbyte.experiments.measurements import Asked, Subject
from halfbyte.experiments.mitigation import KV_FLAG, Candidate, change_words, changes
from halfbyte.experiments.quantize import device_of, self_generated
from halfbyte.files import portable, stamps
from halfbyte.models import Checkpoint, resolve_model
from halfbyte.models.library import load_tokenizer
from halfbyte.plan import make_plan, variant_of
from halfbyte.plan.forecast import Forecast
from halfbyte.plan.inventory import footprints
from halfbyte.plan.rules import RISKS
from halfbyte.platforms import Platform, load_platform
from halfbyte.recipe import CalibrationSpec, Recipe
from halfbyte.serving import find_vllm, serve_command
from halfbyte.types import Progress

OWN_TEXT = CalibrationSpec(sequences=64, max_tokens=256, seed=0)
"""How much a model writes to calibrate on where there is no text."""
HELD_OUT = CalibrationSpec(sequences=64, max_tokens=256, seed=1)
"""How much it writes to be judged on: other samples than those it was calibrated on."""
TEXT_WINDOW = 512
TEXT_WINDOWS = 40
DRIFTED = "long context drifted with an FP8 KV cache: 16 bits"
CALIBRATION_SHARE = 0.8
"""Of the user's text: the rest is held out."""


@dataclass(frozen=True)
class RunRequest:
    """What `halfbyte run` was asked.

    recipe     None: the plan chooses.  text: empty: the model writes its own
    mitigate   climb the ladder of mitigations when a gate failed; budget: `4.6` or `64MiB` for its last rung
    memory     bytes of host memory that a pass over the blocks may take; None: a share of what is free
    measure    what to measure beside what gates ask for, by the measurement's name, with what the user said to it
    data       where bundled tasks find their JSONL files; limit: items a task
    """

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
    mitigate: bool = True
    budget: str | None = None
    measure: Mapping[str, str] = field(default_factory=dict)
    memory: int | None = None
    data: Path | None = None
    limit: int | None = None


class Workshop:
    """The request made ready. Raises UsageError for a wrong gate, platform or vLLM before anything is done."""

    def __init__(self, request: RunRequest, progress: Progress):
        self.request, self.progress, self.out = request, progress, request.output
        self.gates = tuple(resolve_gates(request.gates))
        self.platforms: list[Platform] = [load_platform(name) for name in request.platforms]
        self.has_vllm = _has_vllm(request.vllm, progress)
        self.path = resolve_model(request.model, progress)
        self.checkpoint = Checkpoint(self.path)
        self.artifact = self.out / "model"
        self.fingerprint = self.checkpoint.fingerprint()
        self.device = device_of(request.device)
        self.base = {"model": self.fingerprint, "halfbyte": halfbyte.__version__, "v": ALGORITHM_VERSION}

    def start(self, recipe: Recipe) -> Candidate:
        """The recipe as it is carried out first."""
        return Candidate(recipe, recipe.calibration if self.request.text else OWN_TEXT)

    def serving(self, candidate: Candidate) -> list[Platform]:
        """The platforms with the KV cache that the candidate is served with."""
        if candidate.kv_cache is None:
            return self.platforms
        return [_with_kv_cache(platform, candidate.kv_cache) for platform in self.platforms]

    def command(self, recipe: Recipe, platform: Platform, place: str) -> str:
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

    def plan(self, start: Candidate | None = None, chosen: Candidate | None = None) -> dict[str, Any]:
        """plan.json: of the request, or (with both) of what mitigation has made of its recipe."""
        plan = self._plan(self.request.recipe, self.platforms)
        recipe = Recipe.model_validate(plan["recipe"])
        platforms = self.platforms
        if start is not None and chosen is not None and chosen != start:
            recipe, platforms = chosen.recipe, self.serving(chosen)
            told = f"a gate failed, and mitigation took these steps: {change_words(changes(start, chosen))}"
            reasons = [*plan["reasons"], {"rule": "mitigation", "text": told, "source": RISKS}]
            kept = {key: plan[key] for key in ("alternatives", "avoided")} | {"reasons": reasons}
            plan = {**self._plan(recipe, platforms), **kept, "request": plan["request"]}
            if chosen.kv_cache:
                plan["kv_cache"] = [{**row, "reason": DRIFTED, "source": RISKS} for row in plan["kv_cache"]]
        levels = sorted({int(gate.argument) for gate in self.gates if gate.family == "memory"})
        for row, platform in zip(plan["memory"], platforms if levels else ()):
            forecast = Forecast(self.checkpoint, plan["model"], self.request.context, levels, 1)
            row["asked"] = forecast.memory(platform, recipe, footprints(recipe, self.checkpoint))["levels"]
        facts = {key: value for key, value in plan["model"].items() if key != "path"}
        return {**plan, "model": {"name": portable(self.request.model), **facts}}

    def _plan(self, recipe: Recipe | None, platforms: list[Platform]) -> dict[str, Any]:
        request = self.request
        return make_plan(
            self.checkpoint,
            recipe,
            platforms,
            request.context,
            request.concurrency,
            bool(request.text),
            lambda r, p: self.command(r, p, self.artifact.name),
        )

    def files(self) -> list[tuple[str, int, int]]:
        """The user's text, as keys name it."""
        return stamps(self.request.text)

    def calibration(self, spec: CalibrationSpec) -> CalibrationSet:
        """The calibration set of that size: from the user's text, or written by the model."""
        text = list(self.request.text)
        if text:
            share = (0.0, CALIBRATION_SHARE)
            return build(load_tokenizer(self.path), spec, sources=text, portion=share, progress=self.progress)
        return self_generated(self.path, spec, self.device, self.progress)

    @functools.cached_property
    def windows(self) -> Windows:
        """The held-out windows."""
        text = list(self.request.text)
        if not text:
            return set_windows(self_generated(self.path, HELD_OUT, self.device, self.progress))
        share = (CALIBRATION_SHARE, 1.0)
        return text_windows(text, load_tokenizer(self.path), window=TEXT_WINDOW, portion=share).first(TEXT_WINDOWS)

    @property
    def asked(self) -> Asked:
        """What measurements are asked for."""
        request = self.request
        return Asked(gates=self.gates, options=request.measure, data=request.data, limit=request.limit)

    def subject(self, candidate: Candidate, artifact: Path) -> Subject:
        """What measurements of an artifact are given."""
        request = self.request
        return Subject(
            model=request.model,
            path=self.path,
            artifact=artifact,
            out=self.out,
            recipe=candidate.recipe,
            platforms=tuple(self.serving(candidate)),
            windows=self.windows,
            text=request.text,
            vllm=request.vllm,
            context=request.context,
            concurrency=request.concurrency,
            device=self.device,
            progress=self.progress,
            held_out=(CALIBRATION_SHARE, 1.0),
            **vars(self.asked),
        )


def _with_kv_cache(platform: Platform, dtype: str) -> Platform:
    """The platform's data with that --kv-cache-dtype for every format."""
    formats = {
        name: support.model_copy(update={"flags": {k: v for k, v in support.flags.items() if k != KV_FLAG}})
        for name, support in platform.formats.items()
    }
    return platform.model_copy(update={"flags": {**platform.flags, KV_FLAG: dtype}, "formats": formats})


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
