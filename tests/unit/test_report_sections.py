"""The report's sections: margins, mitigation, charts, fronts; what is missing, partial or of the wrong kind."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from halfbyte.report import build_report
from halfbyte.report.axes import Axis, axis, nice_ticks
from halfbyte.report.blocks import Charts, Missing, Page, Section
from halfbyte.report.chart import Series, trend
from halfbyte.report.front import pareto
from halfbyte.report.judged import binding, binding_words, margin_words
from halfbyte.report.long_context import over_depths
from halfbyte.report.plane import Point, scatter, spread_labels
from halfbyte.report.plots import is_least, limit_number, sensitivity_by_linear
from halfbyte.report.run_page import run_page
from halfbyte.report.sources import COMMANDS, Sources, read_sources
from halfbyte.report.sweep import build_sweep_report, sweep_page, with_benches
from halfbyte.report.words import visible
from tests.unit import report_files as files

KINDS = {
    "plan": files.plan,
    "check": files.check,
    "served": files.served,
    "evaluation": files.evaluation,
    "gates": files.gates,
    "mitigation": files.mitigation,
    "tasks": files.tasks,
    "long_context": files.long_context,
    "stability": files.stability,
    "sensitivity": files.sensitivity,
    "manifest": lambda: {**files.manifest(), "linears": dict(list(files.manifest()["linears"].items())[:2])},
}
ODD = (None, "x", -1.5, [], {}, [None, "y", {}], {"value": "z"})


def gate(name: str, limit: str, low: float, high: float, status: str, text: str = "") -> dict[str, Any]:
    return {
        "name": name,
        "limit": limit,
        "value": (low + high) / 2,
        "low": low,
        "high": high,
        "status": status,
        "text": text,
    }


def section(page: Page, name: str) -> Section:
    return next(one for one in page.sections if one.id == name)


def charts(one: Section) -> list[dict[str, Any]]:
    return [chart for block in one.blocks if isinstance(block, Charts) for chart in block.charts]


def test_the_margin_is_from_the_unfavourable_end() -> None:
    assert margin_words(gate("ppl", "+5%", 0.031, 0.045, "passed")) == "0.5 points"
    assert margin_words(gate("ppl", "+5%", 0.041, 0.055, "failed")) == "-0.5 points"
    assert margin_words(gate("top1", "90%", 0.91, 0.93, "passed")) == "1 points"
    assert margin_words(gate("speed@1", "+60%", 0.7, 0.9, "passed")) == "10 points"
    assert margin_words(gate("speed@1", "+60%", 0.5, 0.7, "failed", "the limit is at least +60%")) == "-10 points"
    assert margin_words(gate("tasks", "-2%", -0.015, 0.002, "passed")) == "0.5 points"
    assert margin_words(gate("memory@8", "40GiB", 31.5, 32, "passed")) == "8 GiB"
    assert margin_words({"name": "served", "limit": "yes", "status": "passed"}) == "–"
    assert limit_number("40GiB") == 40 and limit_number("fits") is None


def test_which_side_of_a_limit_is_good_is_read_from_the_judgement() -> None:
    assert is_least(gate("x", "60%", 0.7, 0.8, "passed"), 0.6) and not is_least(
        gate("x", "60%", 0.4, 0.5, "passed"), 0.6
    )
    assert is_least(gate("x", "60%", 0.4, 0.5, "failed"), 0.6) and not is_least(
        gate("x", "60%", 0.7, 0.8, "failed"), 0.6
    )
    assert is_least(gate("x", "60%", 0.5, 0.7, "failed", "the limit is at least 60%"), 0.6)


def test_the_gate_that_bound() -> None:
    wide, near = gate("ppl", "+18%", 0.09, 0.11, "passed"), gate("top1", "75%", 0.76, 0.79, "passed")
    assert binding([wide, near]) is near
    over = gate("kl", "0.1", 0.101, 0.11, "failed")
    assert binding([wide, near, over]) is over
    broken = {"name": "check", "limit": "yes", "status": "failed", "text": "no, 3 findings"}
    assert binding([wide, broken]) is broken and binding([]) is None
    assert binding_words({"gates": [wide, near]}) == (
        "top1: 76.0% at worst, the limit is at least 75%; 1 points to spare, 4% of the budget."
    )
    assert "over the limit by 0.01" in binding_words({"gates": [over]})


def test_what_was_done_is_told_first_and_as_a_table(tmp_path: Path) -> None:
    page, plain = build_report(files.write_run(tmp_path))
    text, words = page.read_text(), plain.read_text()
    told = "3 rungs tried in 8 min 36 s, kept: group 128 to 64, boundary projections in BF16; +5.14 MiB."
    assert told in text.split("<nav", 1)[0] and told in words.replace("&#47;", "/")
    for row in ("boundary.keep: nothing → projections", "+23.1% → +18.7%", "+3.24 MiB", "5 min 1 s"):
        assert row in text and row in words, row
    mitigation = {
        "ladder": [{"rung": "x", "changes": {"ignore": [["lm_head"], ["lm_head", "a.b"]]}}],
        "final": {"text": "kept x"},
    }
    (tmp_path / "mitigation.json").write_text(json.dumps(mitigation))
    text = build_report(tmp_path)[0].read_text()
    assert "ignore: +a.b" in text and "In the end: kept x" in text
    mitigation["ladder"][0]["changes"]["ignore"][1] += [f"layer.{i}" for i in range(16)]  # type: ignore[index]
    (tmp_path / "mitigation.json").write_text(json.dumps(mitigation))
    text = build_report(tmp_path)[0].read_text()
    assert "ignore: +17 linears" in text and "layer.3" not in text


def test_the_ladder_is_drawn_towards_the_limits(tmp_path: Path) -> None:
    """A curve of what was kept, marks of what was given up, the limit; while a climb goes on its own rows say which."""
    run = files.write_run(tmp_path)
    drawn = charts(section(run_page(read_sources(run)), "mitigation"))
    assert [chart["title"] for chart in drawn] == ["ppl by rung", "top1 by rung"]
    ppl = drawn[0]
    assert [column["label"] for column in ppl["columns"]] == ["start", "1", "2", "3"]
    assert [mark["title"] for mark in ppl["marks"]] == [
        "kept, start: +23.1%",
        "kept, 1: +18.7%",
        "kept, 3: +10.3%",
        "given up, 2: +18.8%",
    ]
    assert ppl["rules"][0]["label"].startswith("the limit: +")
    (run / "gates.json").unlink()
    row = {"name": "ppl", "limit": "+5%", "value": 0.231, "low": 0.2, "high": 0.26}
    begun = {**files.mitigation(), "start": {"gates": [row]}, "final": None}
    (run / "mitigation.json").write_text(json.dumps(begun))
    ppl = charts(section(run_page(read_sources(run)), "mitigation"))[0]
    assert ppl["rules"][0]["label"] == "the limit: +5%" and ppl["marks"][0]["title"].endswith("(+20.0% to +26.0%)")


def test_every_result_that_is_missing_has_its_command(tmp_path: Path) -> None:
    run = files.write_run(tmp_path)
    for file in [*run.glob("*.json"), *run.rglob("manifest.json")]:
        if file.name != "plan.json":
            file.unlink()
    (run / "model" / "halfbyte.json").unlink()
    page = run_page(read_sources(run))
    told = {one.command for one in page.missing}
    ready = {"artifact": "model", "results": ".", "platform": "cpu", "baseline": "/models/smollm2-135m"}
    assert told == {line.format(**ready) for name, line in COMMANDS.items() if name != "plan"}
    assert dict(page.facts)["Not measured"].startswith("gates; fidelity to BF16; tasks; long context; speed")
    for written in (path.read_text() for path in build_report(run)):
        assert "halfbyte bench model --on cpu -o ." in written


def test_an_artifact_alone_shows_what_was_measured_beside_it(tmp_path: Path) -> None:
    """Its page says `-o NAME-results`: what that left is on the next page, unless the artifact was made anew since."""
    artifact, results = tmp_path / "out", tmp_path / "out-results"
    for place, name, content in (
        (artifact, "halfbyte.json", files.manifest()),
        (results, "eval.json", files.evaluation()),
        (results, "bench.json", files.bench()),
    ):
        place.mkdir(exist_ok=True)
        (place / name).write_text(json.dumps(content))
    page = read_sources(artifact)
    assert page.evaluation == files.evaluation() and len(page.benches) == 1 and not page.problems
    os.utime(results / "eval.json", (1, 1))
    page = read_sources(artifact)
    assert not page.evaluation and len(page.benches) == 1
    assert page.problems == ("out-results/eval.json is older than the artifact and was left out: measure again",)
    (artifact / "halfbyte.json").unlink()
    (artifact / "plan.json").write_text("{}")
    assert not read_sources(artifact).benches, "a run's directory holds its results itself"


def test_an_artifact_alone_names_itself(tmp_path: Path) -> None:
    artifact = tmp_path / "mine"
    artifact.mkdir()
    (artifact / "halfbyte.json").write_text(json.dumps(files.manifest()))
    commands = [one.command for one in run_page(read_sources(artifact)).missing]
    assert (
        "halfbyte eval mine -o mine-results" in commands
        and "halfbyte check mine --serve --on PLATFORM -o mine-results" in commands
    )


def test_measured_speed_is_drawn_with_its_goal(tmp_path: Path) -> None:
    run = files.write_run(tmp_path)
    (run / "bench-mi325x.json").write_text(json.dumps(files.bench("mi325x", "MI325X", 1.5)))
    page = run_page(read_sources(run))
    gains = charts(section(page, "speed"))[0]
    places = {row["label"]: row["y"] for row in gains["rows"]}
    assert [rule["label"] for rule in gains["rules"]] == ["the goal: +60%", ""]
    assert gains["rules"][0]["y"] == places["+60%"] and gains["rules"][1]["y"] == places["0%"]
    assert len(gains["marks"]) == 4, "no gain where BF16 ran out of memory"
    assert [chart["title"] for chart in charts(section(page, "front"))] == [
        f"{platform}, {level} at once" for platform in ("h100", "mi325x") for level in (1, 4, 16, 64, 256)
    ]
    judged = {**files.gates(), "gates": [gate("speed@4", "+30%", 0.4, 0.5, "passed")]}
    (run / "gates.json").write_text(json.dumps(judged))
    assert charts(section(run_page(read_sources(run)), "speed"))[0]["rules"][0]["label"] == "the gate: +30%"
    text = build_report(run)[0].read_text()
    assert "out of memory" in text and "no room for the KV cache" in text and "--random-input-len" in text


def test_further_configurations_are_drawn_beside() -> None:
    bench = files.bench()
    for point in bench["points"]:
        point["configs"] = {"eager": {**point["model"], "speedup": files.around(1.2)}}
    bench |= {
        "commands": {"model": "vllm serve model", "eager": "vllm serve model --enforce-eager"},
        "text": ["it holds at 1"],
    }
    page = run_page(Sources(run=Path(), benches=(bench,)))
    gains = charts(section(page, "speed"))[0]
    assert [entry["name"] for entry in gains["legend"]] == ["4-bit", "eager"]
    assert "it holds at 1" in str(section(page, "speed")) and "--enforce-eager" in str(section(page, "provenance"))


def test_token_text_is_shown_and_never_markup(tmp_path: Path) -> None:
    page, plain = build_report(files.write_run(tmp_path))
    text = page.read_text()
    assert "<code>&lt;script&gt;</code>" in text and "<script>" not in text and "<script>" not in plain.read_text()
    assert "<code>␣Ghent</code>" in text and "for i in range(10):⏎⇥print(" in text
    assert visible("a\u202eb\x00\ud800") == "a\\u202eb\\u0000\\ud800" and visible(None) == "–"


def test_markdown_has_the_numbers_without_the_pictures(tmp_path: Path) -> None:
    page, plain = build_report(files.write_run(tmp_path))
    text = plain.read_text()
    assert "Interval against the limit" in page.read_text() and "Interval against the limit" not in text
    assert "What is lost against" not in text and "<svg" not in text
    for row in (
        "| 0–32 | 0.19 | 0.1786 to 0.2014 | 78.0% | 77.2% to 78.8% |",
        "| 4k | 0.80% | 2.00% | 3.50% |",
        "| arc_easy (acc) | 500 | 60.6% | **59.8%** | -0.80 | -2.20 to +0.60 | 98.7% | 5.20% | – |",
        "| 0.1 to 0.3 | 3,200 | 15.7% |",
        "| 16 | BF16 | 31.5 / 60.2 / 84.1 | 7.88 / 15.1 / 21 | 1,260 / 2,408 / 3,364 |",
    ):
        assert row in text, row


def test_depths_are_averaged_where_no_row_spans_them() -> None:
    rows = [{"length": 4096, "depth": d, "scores": {"4bit": {"value": v}}} for d, v in ((0.1, 0.9), (0.9, 0.7))]
    assert over_depths(rows, "4bit", 4096) == (pytest.approx(0.8), None, None)
    whole = {"length": 4096, "depth": None, "scores": {"4bit": {"value": 0.75, "low": 0.7, "high": 0.8}}}
    assert over_depths([*rows, whole], "4bit", 4096) == (0.75, 0.7, 0.8)
    assert over_depths(rows, "bf16", 4096) == (None, None, None)


def test_the_drift_is_drawn_as_measured_else_from_the_scores() -> None:
    def drift(result: dict[str, Any]) -> dict[str, Any]:
        found = charts(section(run_page(Sources(run=Path(), long_context=result)), "long-context"))
        return next(chart for chart in found if chart["title"] == "Drift by length")

    result = files.long_context()
    titles = [mark["title"] for mark in drift(result)["marks"]]
    assert "4-bit, 4k: 2.00%" in titles and "4-bit, FP8 KV cache, 32k: 14.0%" in titles
    result["by_length"] = [{"length": 4096, "drop": {"4bit": {"value": 0.03, "low": 0.01, "high": 0.05}}}]
    assert "4-bit, 4k: 3.00% (1.00% to 5.00%)" in [mark["title"] for mark in drift(result)["marks"]]


def test_the_sweep_has_a_panel_for_each_platform_and_concurrency() -> None:
    page = sweep_page(files.sweep())
    drawn = charts(section(page, "front"))
    assert len(drawn) == 11 and drawn[-1]["title"] == "Against bytes"
    names = [mark["label"] for mark in drawn[0]["marks"]]
    assert names == ["A1, A2", "B1", "B3", "BF16"], "A1 and A2 are one point, C1 was not measured"
    assert [rule["label"] for rule in drawn[0]["rules"]] == ["noise floor"]
    assert any("B3" in str(row) and "kl: 0.1089 at worst" not in str(row) for row in section(page, "matrix").blocks)
    assert page.missing == []
    keys = section(page, "recipes").blocks[0].columns  # type: ignore[attr-defined]
    assert [column.label for column in keys] == ["Cell", "method", "group_size", "format"]


def test_a_sweep_without_speed_says_how_to_measure_it(tmp_path: Path) -> None:
    result = files.sweep()
    for cell in result["cells"]:
        cell.pop("bench", None)
    page = sweep_page(result)
    assert [one.command for one in page.missing] == ["halfbyte bench cells/B3 --on h100 -o results/B3"]
    assert [chart["title"] for chart in charts(section(page, "front"))] == ["Against bytes"]
    (tmp_path / "results" / "B3").mkdir(parents=True)
    (tmp_path / "results" / "B1.bench.json").write_text(json.dumps(files.bench()))
    (tmp_path / "results" / "B3" / "bench.json").write_text(json.dumps(files.bench("mi325x")))
    page = sweep_page(with_benches(result, tmp_path))
    assert len(charts(section(page, "front"))) == 11 and page.missing == []


def test_a_sweep_says_what_each_device_judged(tmp_path: Path) -> None:
    result = files.sweep()
    assert all(one.id != "platforms" for one in sweep_page(result).sections), "no platform was named to judge on"
    cell = result["cells"][2]
    metrics = {"kl_mean": files.around(0.2), "ppl_ratio": files.around(1.3), "top1": files.around(0.7)}
    other = {"eval": {"metrics": metrics}, "gates": {"verdict": "rejected"}, "hardware": "AMD Instinct MI325X"}
    here = {"eval": cell["eval"], "gates": cell["gates"], "hardware": "NVIDIA H100 80GB HBM3"}
    cell["judged_on"] = {"h100": {**here, "gates": {"verdict": "accepted"}}, "mi325x": other}
    (tmp_path / "sweep.json").write_text(json.dumps(result))
    page, plain = build_sweep_report(tmp_path)
    rows = [line for line in plain.read_text().splitlines() if "NVIDIA H100 80GB HBM3 |" in line or "MI325X |" in line]
    assert [row.split(" | ")[:3] for row in rows] == [
        ["| B1", "h100", "NVIDIA H100 80GB HBM3"],
        ["| B1", "mi325x", "AMD Instinct MI325X"],
    ]
    assert "0.131" in rows[0] and "accepted" in rows[0] and "0.2 (0.188 to 0.212)" in rows[1] and "rejected" in rows[1]
    assert "Where the cells were judged" in page.read_text() and "AMD Instinct MI325X" in page.read_text()


def test_a_front_holds_what_nothing_beats() -> None:
    places = [(0.1, 5.0), (0.2, 4.0), (0.2, 4.5), (0.3, 4.0), (None, 1.0), (0.1, 5.0)]
    assert pareto(places) == [True, True, False, False, False, True]


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(-0.03, 0.11) == [0, 0.05, 0.1]
    assert nice_ticks(141, 262, 4) == [150, 200, 250]
    rng = random.Random(1)
    for _ in range(300):
        low = rng.uniform(-5, 5) * 10 ** rng.randint(-6, 6)
        high = low + rng.uniform(0.1, 9) * 10 ** rng.randint(-3, 6) + abs(low) * 1e-3
        ticks = nice_ticks(low, high)
        assert 2 <= len(ticks) <= 6 and all(low - 1e-6 * (high - low) <= t <= high + 1e-6 * (high - low) for t in ticks)


def test_axes_hold_their_values() -> None:
    assert axis([0.2, 0.4]).low == 0 and axis([-1, -2]).high == 0
    assert axis([0.97, 1.0], zero=False, cap=1.0).high == 1.0
    assert axis([0.0, 0.0]).place(0.0) == 0 and axis([0.0], cap=0.5).high == 0.5
    log = Axis(0.001, 10, log=True)
    assert [log.place(x) for x in (0.001, 0.1, 10)] == [0, 50, 100] and log.ticks() == [0.001, 0.01, 0.1, 1, 10]
    assert Axis(0, 2).place(0.5) == 25


def test_a_curve_breaks_where_nothing_was_measured() -> None:
    values = [(1.0, 0.9, 1.1), (2.0, 1.9, 2.1), (None, None, None), (3.0, None, None), (4.0, None, None)]
    drawn = trend("t", list("abcde"), [Series("s", "four", values)], str)
    assert drawn is not None
    assert [len(curve["points"].split()) for curve in drawn["curves"]] == [2, 2]
    assert len(drawn["bands"]) == 1 and len(drawn["marks"]) == 4 and drawn["legend"] == []
    assert drawn["marks"][0]["title"] == "s, a: 1.0 (0.9 to 1.1)"
    assert trend("t", ["a"], [Series("s", "four", [(None, None, None)])], str) is None


def test_labels_do_not_lie_on_one_another() -> None:
    rng = random.Random(2)
    for _ in range(20):
        marks = [{"x": rng.uniform(0, 100), "y": rng.uniform(0, 100), "label": f"cell {i}"} for i in range(12)]
        spread_labels(marks, 300, 430)
        boxes = []
        for mark in marks:
            x, y = 4.3 * mark["x"] + (10 if mark["side"] == "start" else -10 - 40), 3 * mark["y"] + mark["dy"] - 4
            boxes.append((x, y, x + 40, y))
        for i, a in enumerate(boxes):
            assert 0 <= a[1] <= 300
            assert not any(a[0] < b[2] and b[0] < a[2] and abs(a[1] - b[1]) < 12 for b in boxes[i + 1 :])


def test_a_plane_is_logarithmic_where_losses_differ_by_powers() -> None:
    points = [Point(str(y), (1.0, None, None), (y, None, None), "four") for y in (0.001, 0.1, 1.0)]
    drawn = scatter("t", points, (str, str), names=("", ""))
    assert drawn is not None
    heights = [mark["y"] for mark in drawn["marks"]]
    assert heights[0] - heights[1] == pytest.approx(2 * (heights[1] - heights[2]), abs=0.1)
    assert scatter("t", [], (str, str), names=("", "")) is None


def test_sensitivity_is_that_of_the_group() -> None:
    found = sensitivity_by_linear({"groups": [{"names": ["a", "b"], "kl": 0.1}, 3], "exempt": [{"name": "c"}, None]})
    assert found == {"a": 0.1, "b": 0.1, "c": None}


def mutations(tree: Any) -> list[Any]:
    """The tree with one place at a time left out, or of another kind; of a list's rows only the first is changed."""
    found: list[Any] = []
    if isinstance(tree, dict):
        for key in list(tree)[:24]:
            found.append({k: v for k, v in tree.items() if k != key})
            found += [{**tree, key: other} for other in ODD]
            found += [{**tree, key: inner} for inner in mutations(tree[key])]
    elif isinstance(tree, list) and tree:
        found += [[inner, *tree[1:]] for inner in mutations(tree[0])]
    return found


@pytest.mark.parametrize("name", KINDS)
def test_a_result_of_any_shape_gives_a_page(name: str) -> None:
    for changed in mutations(KINDS[name]()):
        page = run_page(Sources(run=Path("run"), **{name: changed}))
        assert page.sections or page.missing


def test_a_bench_or_a_sweep_of_any_shape_gives_a_page() -> None:
    bench = files.bench()
    bench["points"] = bench["points"][:1]
    for changed in mutations(bench):
        assert run_page(Sources(run=Path("run"), benches=(changed,))).title
    result = copy.deepcopy(files.sweep())
    for cell in result["cells"]:
        cell.pop("bench", None)
    for changed in mutations(result):
        assert sweep_page(changed).title


def test_every_section_is_something_or_missing() -> None:
    page = run_page(Sources(run=Path("run")))
    assert [one.id for one in page.sections] == ["provenance"]
    assert len(page.missing) == len({one.what for one in page.missing}) == 11
    assert all(isinstance(one, Missing) and dataclasses.astuple(one)[2].startswith("halfbyte ") for one in page.missing)
