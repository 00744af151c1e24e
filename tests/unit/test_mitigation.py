"""The ladder as data and the climb on made-up ground: every rung forced, what helps kept, a killed climb goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.experiments.climb import RESULT, Climb, Standing
from halfbyte.experiments.gates import resolve_gates
from halfbyte.experiments.mitigation import (
    KV_FLAG,
    Budget,
    Candidate,
    change_words,
    changes,
    ladder,
    next_step,
    parse_budget,
)
from halfbyte.recipe import CalibrationSpec, Recipe
from halfbyte.types import Quiet

WORST = "model.layers.0.mlp.down_proj"
SPEC = CalibrationSpec(sequences=128)
KL = resolve_gates(["kl=0.1"], defaults=())
MIB = 1 << 20


def candidate(**keys: Any) -> Candidate:
    return Candidate(Recipe.model_validate(keys), SPEC)


class FakeGround:
    """A gate whose figure is `value(candidate)`, without a model. `stop`: the measurement at which it is killed."""

    def __init__(self, value: Callable[[Candidate], float], row: str = "kl", limit: float = 0.1, stop: int = -1):
        self.value, self.row, self.limit, self.stop = value, row, limit, stop
        self.measured: list[Candidate] = []
        self.ends: list[str] = []

    def blocks(self, one: Candidate) -> frozenset[str]:
        if one.recipe.boundary.keep == "blocks" and "re:everything" in one.recipe.ignore:
            raise UsageError("nothing would be quantized")
        recipe = one.recipe
        inner = f"{recipe.grid} {recipe.rounding} {recipe.group_size} {one.calibration.sequences}"
        edge = f"{inner} {recipe.boundary.keep} {WORST in recipe.ignore}"
        return frozenset({f"0 {edge}", f"1 {inner}", f"2 {edge}"})

    def linears(self, one: Candidate) -> Sequence[str]:
        return [WORST]

    def stand(self, one: Candidate) -> Standing:
        value = self.value(one)
        status = "failed" if value > self.limit else "passed"
        row = {"name": self.row, "value": value, "status": status, "margin": self.limit - value}
        return Standing([row], MIB * (1 + (one.recipe.boundary.keep != "nothing") + (WORST in one.recipe.ignore)))

    def measure(self, one: Candidate) -> Standing:
        if len(self.measured) == self.stop:
            raise KeyboardInterrupt
        self.measured.append(one)
        return self.stand(one)

    def keep(self) -> None:
        self.ends.append("keep")

    def drop(self) -> None:
        self.ends.append("drop")


def climb(place: Path, start: Candidate, ground: FakeGround, gates: Any = KL, key: str = "k") -> dict[str, Any]:
    Climb(place, key, gates, Quiet()).go(start, ground.stand(start), ground)
    return json.loads((place / RESULT).read_text())


DRIFT = "long_context:retrieval@fp8"
GATES = {
    DRIFT: "long_context=5%",
    "long_context:ppl": "long_context=5%",
    "ppl": "ppl=+5%",
    "top1": "top1=90%",
    "tasks": "tasks=-2%",
    "task:arc": "task:arc=-1%",
    "kl_p99": "kl_p99=1",
    "gap": "gap=0.1",
}
"""The gate behind a row of gates.json."""
FORCED: dict[str, tuple[dict[str, Any], Callable[[Candidate], bool], str, dict[str, list[Any]]]] = {
    "fp8-kv-off": ({}, lambda c: c.kv_cache == "auto", DRIFT, {KV_FLAG: [None, "auto"]}),
    "calibration": ({}, lambda c: c.calibration.sequences == 256, "ppl", {"calibration.sequences": [128, 256]}),
    "rounding": (
        {"method": "rtn", "effort": "fast"},
        lambda c: c.recipe.rounding == "gptq",
        "top1",
        {
            "rounding": ["rtn", "gptq"],
            "scaling": ["none", "awq"],
            "effort": ["fast", "default"],
            "tune": ["none", "auto"],
        },
    ),
    "group": ({}, lambda c: c.recipe.group_size == 32, "tasks", {"group_size": [64, 32]}),
    "group-nvfp4": (
        {"method": "nvfp4", "group_size": 64},
        lambda c: c.recipe.group_size == 16,
        "task:arc",
        {"group_size": [32, 16]},
    ),
    "boundary-projections": (
        {},
        lambda c: c.recipe.boundary.keep == "projections",
        "long_context:ppl",
        {"boundary.keep": ["nothing", "projections"]},
    ),
    "boundary-blocks": (
        {},
        lambda c: c.recipe.boundary.keep == "blocks",
        "kl_p99",
        {"boundary.keep": ["projections", "blocks"]},
    ),
    "sensitive-linears": (
        {},
        lambda c: WORST in c.recipe.ignore,
        "gap",
        {"ignore": [["lm_head"], ["lm_head", WORST]]},
    ),
}


@pytest.mark.parametrize("case", FORCED)
def test_every_rung_is_reached_and_ends_the_climb(case: str, tmp_path: Path) -> None:
    """Each step before it brings the gate a little closer; the rung's own step passes it."""
    keys, passes, row, wanted = FORCED[case]
    rung = case.removesuffix("-nvfp4")
    start = candidate(**keys)
    ground = FakeGround(lambda c: 0.05 if passes(c) else 0.9 - 0.01 * len(changes(start, c)), row)
    result = climb(tmp_path, start, ground, resolve_gates([GATES[row]], defaults=()))
    last = result["ladder"][-1]
    assert (last["rung"], last["verdict"], last["kept"]) == (rung, "the gates pass", True)
    assert last["changes"] == wanted and last["after"] == {row: 0.05} and last["before"][row] > 0.8
    assert last["why"].startswith(f"{row} failed: ") and last["source"]
    assert result["complete"] and result["final"]["verdict"] == "accepted" and not result["final"]["failed"]
    assert Candidate.of(result["final"]["candidate"]) == ground.measured[-1]


def test_no_rung_is_left_out() -> None:
    assert {rung.rung for rung in ladder()} == {case.removesuffix("-nvfp4") for case in FORCED}
    for rung in ladder():
        assert rung.source.startswith("strategy, ") and rung.why and rung.cost and rung.title


def test_what_does_not_help_is_given_up(tmp_path: Path) -> None:
    """Smaller groups make it worse here: the boundary is tried from the larger ones."""
    worse = {64: 0.6, 32: 0.7}
    start = candidate()

    def value(c: Candidate) -> float:
        return 0.05 if c.recipe.boundary.keep == "blocks" else worse.get(c.recipe.group_size, 0.5)

    ground = FakeGround(value)
    result = climb(tmp_path, start, ground)
    assert result["final"]["kept"] == ["boundary-blocks"]
    assert result["final"]["changes"] == {"boundary.keep": ["nothing", "blocks"]}
    given_up = [row for row in result["ladder"] if not row["kept"]]
    assert [row["rung"] for row in given_up] == ["calibration", "group", "group", "boundary-projections"]
    assert {row["verdict"] for row in given_up} == {"no closer: given up"}
    assert ground.ends == ["drop"] * 4 + ["keep"]


def test_the_ladder_ends_with_the_best(tmp_path: Path) -> None:
    start = candidate()
    ground = FakeGround(lambda c: 0.5 if c.recipe.boundary.keep == "projections" else 0.6)
    result = climb(tmp_path, start, ground)
    final = result["final"]
    assert final["verdict"] == "rejected" and final["failed"] == ["kl"] and final["values"] == {"kl": 0.5}
    assert final["changes"] == {"boundary.keep": ["nothing", "projections"]}
    assert final["cost"]["bytes_added"] == MIB and "+1.0 MiB" in final["text"]
    assert "the ladder of mitigations ended after 6 steps" in final["text"]
    assert next_step(Candidate.of(final["candidate"]), ["kl"], [row["step"] for row in result["ladder"]]) is None


def test_only_what_changed_counts_as_solved(tmp_path: Path) -> None:
    ground = FakeGround(lambda c: 0.5)
    rows = {row["step"]: row["cost"] for row in climb(tmp_path, candidate(), ground)["ladder"]}
    solved = {step: (cost["blocks_solved"], cost["blocks_reused"]) for step, cost in rows.items()}
    assert solved["calibration:sequences=256"] == solved["group:group_size=32"] == (3, 0)
    assert solved["boundary-projections:boundary.keep=projections"] == (2, 1)
    assert solved["sensitive-linears:"] == (2, 1)


def test_a_step_that_cannot_be_or_changes_nothing(tmp_path: Path) -> None:
    start = candidate(ignore=["lm_head", "re:everything", WORST])
    ground = FakeGround(lambda c: 0.5)
    ground.linears = lambda one: []  # type: ignore[method-assign]
    rows = {row["rung"]: row for row in climb(tmp_path, start, ground)["ladder"]}
    assert rows["boundary-blocks"]["verdict"] == "cannot be taken: nothing would be quantized"
    assert rows["sensitive-linears"]["verdict"] == "changes nothing here" and not rows["sensitive-linears"]["after"]
    assert len(ground.measured) == 4


def test_fp8_goes_only_when_the_weights_are_not_to_blame() -> None:
    both = [DRIFT, "long_context:retrieval"]
    first, other = (next_step(candidate(), failed, ()) for failed in ([DRIFT], both))
    assert first and other and (first.rung.rung, other.rung.rung) == ("fp8-kv-off", "calibration")


@pytest.mark.parametrize("failed", [[], ["served"], ["check"], ["speed@1"], ["memory@64"], ["stability"]])
def test_what_no_rung_mends(failed: list[str], tmp_path: Path) -> None:
    assert next_step(candidate(), failed, ()) is None


@pytest.mark.parametrize("stop", range(6))
def test_killed_it_goes_on_behind_the_last_step(stop: int, tmp_path: Path) -> None:
    def plain(result: dict[str, Any]) -> Any:
        return [{**row, "cost": None} for row in result["ladder"]], {**result["final"], "cost": None}

    def value(c: Candidate) -> float:
        return 0.9 - 0.1 * len(changes(candidate(), c))

    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = FakeGround(value)
    expected = climb(tmp_path / "whole", candidate(), whole)
    first, second = FakeGround(value, stop=stop), FakeGround(value)
    with pytest.raises(KeyboardInterrupt):
        climb(tmp_path / "cut", candidate(), first)
    assert plain(climb(tmp_path / "cut", candidate(), second)) == plain(expected)
    assert first.measured + second.measured == whole.measured
    third = FakeGround(value)
    assert climb(tmp_path / "cut", candidate(), third)["complete"] and not third.measured


def test_another_request_climbs_anew(tmp_path: Path) -> None:
    ground = FakeGround(lambda c: 0.5)
    climb(tmp_path, candidate(), ground)
    again = FakeGround(lambda c: 0.5)
    climb(tmp_path, candidate(), again, key="other")
    assert again.measured == ground.measured
    one = Climb(tmp_path, "other", KL, Quiet())
    assert one.complete and one.start == candidate() and one.text
    one.forget()
    assert not one.begun and not (tmp_path / RESULT).exists()


def test_a_fault_is_no_step(tmp_path: Path) -> None:
    """A full disk while a candidate is made ends the run, and the step is made again by the next start."""
    ground = FakeGround(lambda c: 0.5)

    def full(one: Candidate) -> Standing:
        raise HalfbyteError("the disk is full")

    ground.measure = full  # type: ignore[method-assign]
    with pytest.raises(HalfbyteError, match="disk is full"):
        climb(tmp_path, candidate(), ground)
    state = json.loads((tmp_path / RESULT).read_text())
    assert state["ladder"] == [] and not state["complete"]


def test_candidates_survive_the_file() -> None:
    one = Candidate(Recipe(method="awq", group_size=64), CalibrationSpec(sequences=7), "auto")
    assert Candidate.of(json.loads(json.dumps(one.plain()))) == one
    assert change_words(changes(candidate(), candidate(group_size=64))) == "group_size 128 -> 64"


@pytest.mark.parametrize(
    "text, budget",
    [
        ("4.6", Budget(bits=4.6)),
        ("64MiB", Budget(bytes=64 * MIB)),
        ("1.5 GB", Budget(bytes=1_500_000_000)),
        ("2000b", Budget(bytes=2000)),
    ],
)
def test_a_budget(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["", "much", "-4", "0", "4.6 bits", "1e3"])
def test_a_wrong_budget_is_one_line(text: str) -> None:
    with pytest.raises(UsageError, match="--budget"):
        parse_budget(text)
