"""A climb in a run's directory: candidates are made beside model/, judged against one BF16 reference, and the best is
kept; blocks that an earlier candidate has are not solved again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from halfbyte.artifact import MANIFEST, read_manifest, work_of
from halfbyte.calibration import CalibrationSet
from halfbyte.engine import work_id
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate import set_windows
from halfbyte.experiments.blocks import BlockStore
from halfbyte.experiments.climb import Standing
from halfbyte.experiments.evaluating import measure_fidelity
from halfbyte.experiments.exemptions import bits_of, choose_exemptions
from halfbyte.experiments.gates import evaluate_gates
from halfbyte.experiments.measurements import available
from halfbyte.experiments.mitigation import Budget, Candidate
from halfbyte.experiments.quantize import quantize
from halfbyte.experiments.workshop import Workshop
from halfbyte.files import make_directory, portable, write_json
from halfbyte.models.checkpoint import read_json
from halfbyte.models.library import load_tokenizer
from halfbyte.plan.layers import assign, quantized
from halfbyte.plan.rules import guide
from halfbyte.recipe import CalibrationSpec

EVAL = "eval.json"
SENSITIVITY_TOKENS = 2048


class RunGround:
    """A Ground (climb.py) in the workshop's directory.

    mitigation/     what only the climb needs: solved blocks, calibration sets, results by work
    model-next/     the candidate at hand;  model-best/: the best so far, where that is not model/ itself
    climbing        files of the measurements that are made at every step, eval.json aside
    """

    def __init__(self, shop: Workshop, start: Candidate, budget: Budget | None):
        self.shop, self.start, self.budget = shop, start, budget
        self.climbing: Collection[str] = ()
        self.place = shop.out / "mitigation"
        self.next, self.best = shop.out / "model-next", shop.out / "model-best"
        self.store = BlockStore(self.place / "blocks", shop.checkpoint, shop.device)
        self.last: Path | None = None

    def clear(self) -> None:
        """Take away all that only the climb needed."""
        for directory in (self.place, self.next, self.best):
            shutil.rmtree(directory, ignore_errors=True)

    def data(self, candidate: Candidate) -> CalibrationSet:
        """The calibration set of a candidate: the run's own, or a larger one."""
        spec = candidate.calibration
        if spec == self.start.calibration:
            return CalibrationSet.load(self.shop.out / "calibration")
        place = self._place(spec)
        if not (place / "manifest.json").is_file():
            self._build(spec).save(place)
        return CalibrationSet.load(place)

    def _build(self, spec: CalibrationSpec) -> CalibrationSet:
        """A larger set. Text that does not give so much is a step that cannot be taken."""
        try:
            return self.shop.calibration(spec)
        except HalfbyteError as error:
            if not self.shop.request.text:
                raise
            raise UsageError(str(error)) from error

    def new_data(self, spec: CalibrationSpec) -> CalibrationSet:
        """A calibration set of that size: the climb's, or a new one."""
        place = self._place(spec)
        return CalibrationSet.load(place) if (place / "manifest.json").is_file() else self.shop.calibration(spec)

    def _place(self, spec: CalibrationSpec) -> Path:
        name = json.dumps([spec.model_dump(), self.shop.files()])
        return self.place / f"calibration-{hashlib.sha256(name.encode()).hexdigest()[:12]}"

    def blocks(self, candidate: Candidate) -> frozenset[str]:
        recipe = candidate.recipe
        plans = assign(recipe, self.shop.checkpoint)
        if not quantized(plans):
            raise UsageError("it leaves every linear in BF16: nothing would be quantized")
        if recipe.propagate:
            return frozenset([self.work(candidate)])
        return frozenset(self.store.names(recipe, plans, self.data(candidate).sha256).values())

    def linears(self, candidate: Candidate) -> Sequence[str]:
        """Measured on the calibration text: the held-out text judges."""
        from halfbyte.experiments.sensitivity import sensitivity

        data, shop = self.data(candidate), self.shop
        windows = set_windows(data, source="calibration")
        found = sensitivity(
            str(shop.path),
            candidate.recipe,
            text=windows.first(max(1, SENSITIVITY_TOKENS * len(windows) // max(1, data.tokens))),
            calibration=data,
            device=shop.device,
            progress=shop.progress,
        )
        return choose_exemptions(found, self._bits(found["groups"]))["names"]

    def _bits(self, groups: Sequence[dict[str, Any]]) -> float:
        """The budget in bits a weight; where the user named none, the share at which the strategy warns of bloat."""
        if self.budget is not None and self.budget.bits is not None:
            return self.budget.bits
        stored, weights = sum(g["bytes"] for g in groups), max(1, sum(g["weights"] for g in groups))
        extra = self.budget.bytes if self.budget else guide().over_exemption.share * stored
        return bits_of(groups, set()) + 8 * (extra or 0) / weights

    def work(self, candidate: Candidate) -> str:
        return work_id(candidate.recipe, self.shop.fingerprint, self.data(candidate).sha256)

    def measure(self, candidate: Candidate) -> Standing:
        work = self.work(candidate)
        artifact = self._artifact(candidate, work)
        results = {EVAL: self._result(work, EVAL, lambda: self._evaluate(artifact))}
        subject = self.shop.subject(candidate, artifact)
        for product, measurement in available().items():
            if product in self.climbing:
                results[product] = self._result(work, product, lambda m=measurement: dict(m.make(subject)))
        return self.judge(candidate, results, int(read_manifest(artifact)["bytes"]))

    def judge(self, candidate: Candidate, results: dict[str, Any], size: int) -> Standing:
        """How a candidate stands by the gates that a step can mend."""
        gates = [g for g in self.shop.gates if g.kind.file in (EVAL, *self.climbing)]
        known = {**results, "plan.json": self.shop.plan(self.start, candidate)}
        return Standing(evaluate_gates(gates, results[EVAL], results=known)["gates"], size)

    def _artifact(self, candidate: Candidate, work: str) -> Path:
        """The candidate's artifact: there already (a killed climb's), or made in model-next/."""
        places = (self.next, self.best, self.shop.artifact)
        there = [p for p in places if work_of(p) == work and (p / MANIFEST).is_file()]
        self.last = there[0] if there else self.next
        if not there:
            quantize(
                self.shop.request.model,
                candidate.recipe,
                self.next,
                self.data(candidate),
                device=self.shop.request.device,
                force=self.next.is_dir() and work_of(self.next) != work,
                command=self.shop.request.command,
                blocks=self.store,
                progress=self.shop.progress,
                memory=self.shop.request.memory,
            )
        return self.last

    def _evaluate(self, artifact: Path) -> dict[str, Any]:
        shop = self.shop
        fidelity = measure_fidelity(artifact, shop.path, shop.windows, shop.device, shop.progress)
        return fidelity.result(shop.artifact.name, portable(shop.request.model), load_tokenizer(shop.path))

    def _result(self, work: str, product: str, make: Any) -> dict[str, Any]:
        """A measurement's result for a candidate: the one that is kept, or a new one."""
        file = self.found(work, product)
        if not file.is_file():
            result = make()
            make_directory(file.parent)
            write_json(file, result)
        return read_json(file)

    def found(self, work: str, product: str) -> Path:
        """Where the result of a measurement of that work is kept."""
        return self.place / "results" / f"{work[:32]}-{self.shop.windows.sha256[:12]}" / product

    def keep(self) -> None:
        if self.last == self.next:
            shutil.rmtree(self.best, ignore_errors=True)
            self.next.rename(self.best)

    def drop(self) -> None:
        if self.last == self.next:
            shutil.rmtree(self.next, ignore_errors=True)

    def promote(self, work: str) -> None:
        """The best becomes model/, where it is that work and model/ is not."""
        model = self.shop.artifact
        if work_of(model) != work and work_of(self.best) == work:
            shutil.rmtree(model, ignore_errors=True)
            self.best.rename(model)
