"""A sweep on a tiny model: the bytes that each cell has alone, shared work, kills survived, faults kept to a cell."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte as package
import halfbyte.engine.loop as loop
import halfbyte.experiments.judging as judging
import halfbyte.experiments.passes as passes
import halfbyte.experiments.sweep as module
from halfbyte.artifact import check_artifact, load_fake_quantized
from halfbyte.calibration import CalibrationSet
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate import Windows, compare
from halfbyte.experiments.cells import parts_of
from halfbyte.experiments.judging import CellTask, evaluate_cell
from halfbyte.experiments.matrix import load_matrix
from halfbyte.experiments.quantize import quantize
from halfbyte.experiments.sweep import sweep
from halfbyte.models import Checkpoint, family_of
from halfbyte.models.library import load_model
from halfbyte.recipe import load_recipe
from halfbyte.report import build_report
from tests.tiny import VOCAB, make_tiny
from tests.unit.artifacts import digests, halfbyte, random_set, without_vllm
from tests.unit.forked import run_forked
from tests.unit.test_report import Page

BLOCKS = 3
GENEROUS = ("ppl=+100000%", "top1=0%")
PORTABLE = {"extends": "portable"}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No vLLM anywhere; one cache for this file."""
    without_vllm(monkeypatch, tmp_path_factory.getbasetemp() / "sweep-cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs of 128 and of 192, which 128 does not divide."""
    place = tmp_path_factory.mktemp("sweep") / "tiny"
    return make_tiny("llama", place, num_hidden_layers=BLOCKS, intermediate_size=192)


@pytest.fixture(scope="module")
def data() -> CalibrationSet:
    return random_set(tokens=2100, longest=64)


@pytest.fixture(scope="module")
def windows() -> Windows:
    ids = [torch.randint(5, VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in (40, 36, 30, 24, 33, 21)]
    return Windows(ids, [torch.arange(len(i)) > 0 for i in ids], "random", 40, 40)


@pytest.fixture(scope="module")
def go(model: Path, data: CalibrationSet, windows: Windows) -> Any:
    def run(output: Path, matrix: Any, **more: Any) -> dict[str, Any]:
        given: dict[str, Any] = {"text": windows, "calibration": data, "gates": GENEROUS, "device": "cpu"}
        return sweep(str(model), matrix, output, **{**given, **more})

    return run


@pytest.fixture(scope="module")
def done(go: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The strategy's matrix, whole. Not to be changed."""
    out = tmp_path_factory.mktemp("strategy") / "out"
    with pytest.MonkeyPatch.context() as patch:
        without_vllm(patch)
        return out, go(out, "strategy", platforms=["h100", "mi325x"])


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in result["cells"]}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def count(monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> list[tuple[Any, ...]]:
    """Calls of a function, as they come in."""
    calls: list[tuple[Any, ...]] = []
    real = getattr(place, name)

    def counted(*words: Any, **more: Any) -> Any:
        calls.append(words)
        return real(*words, **more)

    monkeypatch.setattr(place, name, counted)
    return calls


@pytest.mark.parametrize("name", ["A1-G128", "A2", "A4-G16", "B1", "B2", "C1"])
def test_a_cell_has_the_bytes_that_it_has_alone(
    done: tuple[Path, Any], name: str, model: Path, data: CalibrationSet, tmp_path: Path
) -> None:
    (recipe,) = (cell.recipe for cell in load_matrix("strategy").cells if cell.name == name)
    assert recipe is not None
    quantize(str(model), recipe, tmp_path / name, data, device="cpu")
    assert digests(done[0] / "cells" / name) == digests(tmp_path / name)
    ours, theirs = (read(place / "halfbyte.json") for place in (done[0] / "cells" / name, tmp_path / name))
    assert {k: ours[k] for k in ("work", "recipe", "bytes", "linears")} == {
        k: theirs[k] for k in ("work", "recipe", "bytes", "linears")
    }


def test_the_strategys_matrix(done: tuple[Path, dict[str, Any]]) -> None:
    out, result = done
    cells = by_name(result)
    assert result == read(out / "sweep.json") and result["complete"] and result["verdict"] == "accepted"
    assert len(cells) == 17 and {row["status"] for row in cells.values()} == {"judged"}
    assert {n: row["same_as"] for n, row in cells.items() if row["same_as"]} == {
        "A2": "A1", "A2-G128": "A1-G128", "A2-G16": "A1-G16",
    }  # fmt: skip
    assert result["sharing"]["cells"] == 17 and result["sharing"]["distinct"] == 14
    assert [row["order"] for row in result["cells"]] == list(range(1, 18))
    assert result["ranking"]["order"] == [row["name"] for row in result["cells"]]
    assert cells["A2"]["rank"] == cells["A1"]["rank"]
    kl = [row["eval"]["metrics"]["kl_mean"]["value"] for row in result["cells"] if row["equal_to"] is None]
    assert kl == sorted(kl)
    assert any(row["pareto"] for row in cells.values()) and not (out / "reference").exists()
    assert not result["cells"][0]["tokens_per_second"]


def test_notices_a_cell(done: tuple[Path, dict[str, Any]]) -> None:
    cells = by_name(done[1])
    assert "group 128 does not divide 192 inputs: groups of 64 there" in cells["B1"]["notices"]
    assert cells["B1"]["groups"] == [128, 64] and cells["C1"]["groups"] == [64] and cells["B3"]["notices"] == []
    assert any("one group size for all" in notice for notice in cells["C1"]["notices"])
    for name, row in cells.items():
        saved = [notice for notice in row["notices"] if "no bytes are saved" in notice]
        assert bool(saved) == (name[0] == "A" and not name.endswith("G16")), name
    assert cells["A1"]["bytes"] == cells["A1-G16"]["bytes"]


def test_cells_that_a_platform_cannot_run_are_marked(done: tuple[Path, dict[str, Any]]) -> None:
    out, result = done
    for name, row in by_name(result).items():
        assert row["portable"] == (name[0] != "A"), name
        assert bool(row["platforms"]["mi325x"]) == (name[0] == "A") and not row["platforms"]["h100"]
        assert any(notice.startswith("not portable: mi325x") for notice in row["notices"]) == (name[0] == "A")
    best = result["best"]
    assert best["portable"] and best["cell"] == next(r["name"] for r in result["cells"] if r["portable"])
    card = (out / "cells" / "A1" / "README.md").read_text()
    assert "On h100" in card and "On mi325x" not in card and "vllm serve ." in card


def test_equal_cells_are_one_file_under_two_manifests(done: tuple[Path, dict[str, Any]]) -> None:
    a1, a2 = (done[0] / "cells" / name for name in ("A1", "A2"))
    assert os.path.samefile(a1 / "model.safetensors", a2 / "model.safetensors")
    first, second = read(a1 / "halfbyte.json"), read(a2 / "halfbyte.json")
    assert second["same_bytes_as"] == "A1" and first["work"] != second["work"]
    assert second["recipe"]["ignore"] == ["lm_head", "model.embed_tokens"]
    for place in (a1, a2):
        checked = check_artifact(place)
        assert checked["ok"], checked["findings"]
    assert (a2 / "README.md").is_file() and not (done[0] / "results" / "A2.json").exists()


def test_the_evaluation_is_that_of_compare(done: tuple[Path, dict[str, Any]], model: Path, windows: Windows) -> None:
    for name in ("A3", "C1"):
        ours = by_name(done[1])[name]["eval"]
        theirs = compare(load_model(model), load_fake_quantized(done[0] / "cells" / name), windows)
        assert ours["metrics"] == theirs.metrics and ours["noise_floor"] == theirs.noise_floor
        assert ours["text"] == windows.describe()


def test_evaluating_a_cell_needs_places_alone(done: tuple[Path, dict[str, Any]]) -> None:
    task = CellTask("A1", done[0] / "cells" / "A1", done[0] / "reference", "m", "cpu", "k")
    assert pickle.loads(pickle.dumps((evaluate_cell, task))) == (evaluate_cell, task)


def test_work_is_shared(go: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass, one reference; a cell that differs in two blocks costs two blocks, one without down_proj the MLP."""
    solved = count(monkeypatch, loop, "solve_block")
    passed = count(monkeypatch, passes, "quantize_blocks")
    loaded = count(monkeypatch, judging, "load_model")
    judged = count(monkeypatch, judging, "evaluate_cell")
    less = {"extends": "B3", "ignore": ["lm_head", "re:.*down_proj"]}
    cells = {name: None for name in ("A1-G16", "A2-G16", "A3-G16", "A4-G16", "B1", "B2", "B3")}
    result = go(tmp_path / "out", {"cells": {**cells, "less": less}})
    family = family_of(Checkpoint(model).config)
    assert parts_of(family, load_recipe("B1")) == [("qkv", "o"), ("gate_up", "down")]
    assert len(passed) == 1 and len(loaded) == 1 and len(judged) == 7
    parts = {"A1": 2 * BLOCKS, "A3": 0, "A4": 2 * 2, "B1": 2 * BLOCKS, "B2": 0, "B3": 2 * BLOCKS, "less": BLOCKS}
    assert len(solved) == sum(parts.values())
    assert result["sharing"] == {
        "cells": 8, "distinct": 7, "parts": 2 * (5 * BLOCKS + 2 * (BLOCKS - 2)),
        "distinct_parts": len(solved), "solved": len(solved),
    }  # fmt: skip
    spent = {name: row["seconds"] for name, row in by_name(result).items()}
    assert spent["B2"]["shared"] > 0 and "solving" not in spent["B2"] and spent["B1"]["solving"] > 0
    cost = result["cost"]
    ratio = cost["matrix_seconds"] / cost["one_run_seconds"]
    assert cost["one_run"] == "B1" and cost["ratio"] == pytest.approx(ratio, rel=0.01)
    assert set(result["seconds"]) == {*module.STAGES, "total"}


def test_other_statistics_get_a_pass_of_their_own(
    go: Any, model: Path, data: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round to nearest, propagation and the fast tier have the bytes that they have alone, among other cells too."""
    passed = count(monkeypatch, passes, "quantize_blocks")
    cells = {
        "B3": None,
        "rtn": {"method": "rtn", "group_size": 32},
        "on": {"extends": "B3", "propagate": True},
        "less": {"extends": "B3", "ignore": ["lm_head", "re:.*down_proj"]},
        "fast": {"extends": "B3", "effort": "fast"},
    }
    monkeypatch.setattr(loop, "SAMPLE_TOKENS", 1000)
    result = go(tmp_path / "out", {"cells": cells})
    assert {row["status"] for row in result["cells"]} == {"judged"} and len(passed) == 3
    alone = {
        "rtn": {"method": "rtn", "group_size": 32},
        "on": {**B3, "propagate": True},
        "fast": {**B3, "effort": "fast"},
    }
    for name, words in alone.items():
        quantize(str(model), load_recipe("B3").model_validate(words), tmp_path / name, data, device="cpu")
        assert digests(tmp_path / "out" / "cells" / name) == digests(tmp_path / name), name


B3 = {"method": "gptq", "group_size": 64, "indivisible": "smaller"}


def test_a_quantized_head_and_formats_share_codes(go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One solution in two formats; an lm_head of its own is solved once."""
    solved = count(monkeypatch, loop, "solve_block")
    untied = make_tiny("llama", tmp_path / "m", num_hidden_layers=2, tie_word_embeddings=False)
    whole = {"method": "gptq", "group_size": 64, "ignore": []}
    cells = {"a": whole, "b": {**whole, "format": "compressed-tensors"}, "c": {**whole, "ignore": ["lm_head"]}}
    result = sweep(
        str(untied), {"cells": cells}, tmp_path / "out", calibration=random_set(), gates=GENEROUS,
        text=Windows([torch.arange(5, 40)], [torch.arange(35) > 0], "few", 35, 35),
    )  # fmt: skip
    assert {row["status"] for row in result["cells"]} == {"judged"} and len(solved) == 4
    rows = by_name(result)
    assert rows["a"]["eval"]["metrics"] == rows["b"]["eval"]["metrics"] and rows["a"]["rank"] == rows["b"]["rank"]
    assert rows["c"]["bytes"] > rows["a"]["bytes"]
    for name in cells:
        assert check_artifact(tmp_path / "out" / "cells" / name)["ok"]


def test_a_second_start_does_nothing_again(
    done: tuple[Path, dict[str, Any]], go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(done[0], tmp_path / "out"))
    calls = [count(monkeypatch, *at) for at in ((passes, "quantize_blocks"), (judging, "evaluate_cell"))]
    calls.append(count(monkeypatch, judging, "load_model"))
    before = {p: p.stat().st_mtime_ns for p in out.glob("cells/*/model.safetensors")}
    again = go(out, "strategy", platforms=["h100", "mi325x"])
    assert calls == [[], [], []] and before == {p: p.stat().st_mtime_ns for p in before}
    times = ("seconds", "sharing", "cells")
    assert {k: v for k, v in again.items() if k not in times} == {k: v for k, v in done[1].items() if k not in times}
    assert again["cost"] == done[1]["cost"]
    assert by_name(again) == {n: {**row} for n, row in by_name(done[1]).items()}


def test_more_cells_and_other_gates_cost_what_is_new(go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert go(tmp_path / "out", "strategy", only=["B3"])["verdict"] == "accepted"
    judged = count(monkeypatch, judging, "evaluate_cell")
    solved = count(monkeypatch, loop, "solve_block")
    strict = go(tmp_path / "out", "strategy", only=["B3"], gates=["kl=0"])
    assert strict["verdict"] == "rejected" and not strict["best"]["accepted"] and judged == solved == []
    result = go(tmp_path / "out", "strategy", only=["B?"])
    assert len(judged) == 2 and by_name(result)["B3"]["status"] == "judged"
    changed = go(tmp_path / "out", {"cells": {"B3": {"extends": "B3", "group_size": 32}}})
    assert by_name(changed)["B3"]["groups"] == [32] and len(judged) == 3, "another recipe under the name: made anew"


def test_one_failing_cell_does_not_stop_the_rest(go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An impossible recipe, one that does not fit, a fault in solving, in writing and in evaluating; then put right."""
    matrix = {
        "cells": {
            "B3": None,
            "impossible": {"extends": "B1", "format": "awq"},
            "unfit": {"method": "gptq", "group_size": 128},
            "awq": "C1",
            "torn": {"extends": "B3", "group_size": 32},
            "like-torn": {"extends": "torn", "ignore": ["lm_head", "model.embed_tokens"]},
            "lost": "A1-G16",
        }
    }
    with monkeypatch.context() as patch:
        patch.setattr(loop, "solve_block", _failing(loop.solve_block, lambda recipe, *_: recipe.grid == "int4_asym"))
        patch.setattr(
            passes.ArtifactWriter,
            "emit",
            _failing(passes.ArtifactWriter.emit, lambda w, *_: w.directory.name == "torn"),
        )
        patch.setattr(judging, "evaluate_cell", _failing(evaluate_cell, lambda task, *_: task.cell == "lost"))
        result = go(tmp_path / "out", matrix)
    rows = by_name(result)
    assert {n: (row["status"], row["stage"]) for n, row in rows.items()} == {
        "B3": ("judged", None), "impossible": ("failed", "recipe"), "unfit": ("failed", "recipe"),
        "awq": ("failed", "solving"), "torn": ("failed", "writing"), "like-torn": ("failed", "writing"),
        "lost": ("failed", "evaluating"),
    }  # fmt: skip
    assert result["verdict"] == "accepted" and result["best"]["cell"] == "B3" and result["cells"][0]["name"] == "B3"
    assert "cannot hold the grid" in rows["impossible"]["reason"] and "does not divide" in rows["unfit"]["reason"]
    assert (
        rows["awq"]["reason"] == "RuntimeError: a fault in two lines"
        and "the same as torn" in rows["like-torn"]["reason"]
    )
    page = (tmp_path / "out" / "report.md").read_text()
    assert "a fault in two lines" in page
    judged = count(monkeypatch, judging, "evaluate_cell")
    again = by_name(go(tmp_path / "out", matrix))
    assert sorted(task.cell for task, *_ in judged) == ["awq", "lost", "torn"]
    assert {n for n, row in again.items() if row["status"] == "failed"} == {"impossible", "unfit"}


def _failing(real: Any, when: Any) -> Any:
    def call(*words: Any, **more: Any) -> Any:
        if when(*words):
            raise RuntimeError("a fault\nin two lines")
        return real(*words, **more)

    return call


def test_no_cell_at_all(go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HalfbyteError, match="no cell can be made: x: format awq cannot hold"):
        go(tmp_path / "out", {"cells": {"x": {"extends": "B1", "format": "awq"}}})
    monkeypatch.setattr(loop, "solve_block", _failing(loop.solve_block, lambda *_: True))
    result = go(tmp_path / "out", {"cells": ["B1", "B3"]})
    assert result["verdict"] == "failed" and result["best"] is None
    build_report(tmp_path / "out")


def test_calibration_that_a_cell_asks_for(model: Path, windows: Windows, tmp_path: Path) -> None:
    """Cells that ask for other text get another pass; one that asks for too much fails alone."""
    text = tmp_path / "own.txt"
    text.write_text("\n\n".join(f"Paragraph {i} says: " + f"{i * 7} words and more, " * 30 for i in range(12)))
    cells = {
        "few": {"extends": "B3", "calibration": {"sequences": 40, "max_tokens": 64}},
        "more": {"extends": "B3", "calibration": {"sequences": 60, "max_tokens": 64}},
        "greedy": {"extends": "B3", "calibration": {"sequences": 512, "max_tokens": 2048}},
    }
    matrix = {"cells": cells}
    result = sweep(str(model), matrix, tmp_path / "out", text=[text], calibration=[text], gates=GENEROUS)
    rows = by_name(result)
    assert [m["sequences"] for m in result["calibration"]] == [40, 60]
    assert rows["few"]["work"] != rows["more"]["work"] and rows["few"]["same_as"] is None
    assert rows["greedy"]["stage"] == "calibration" and "too few calibration tokens" in rows["greedy"]["reason"]
    assert result["text"]["source"] == "own.txt" and result["text"]["window"] == 512


def test_ranked_by_perplexity_and_speed(done: tuple[Path, dict[str, Any]], go: Any, tmp_path: Path) -> None:
    out = Path(shutil.copytree(done[0], tmp_path / "out"))
    for name, speed in (("A1", 10.0), ("A2", 90.0)):
        (out / "results" / f"{name}.bench.json").write_text(json.dumps({"tokens_per_second": speed}))
    result = go(out, "strategy", by="ppl")
    ratios = [r["eval"]["metrics"]["ppl_ratio"]["value"] for r in result["cells"] if r["equal_to"] is None]
    assert result["ranking"]["by"] == "ppl" and ratios == sorted(ratios)
    rows = by_name(result)
    assert rows["A2"]["tokens_per_second"] == 90.0 and rows["A2"]["order"] < rows["A1"]["order"]
    (out / "results" / "A1.bench.json").write_text(json.dumps({"tokens_per_second": 99.0, "work": "of another"}))
    assert by_name(go(out, "strategy"))["A1"]["tokens_per_second"] is None, "it tells of bytes that are no more"
    with pytest.raises(UsageError, match="ranking by 'speed' is not known"):
        go(out, "strategy", by="speed")


def test_a_stated_gate_on_speed_reads_what_was_benchmarked(
    done: tuple[Path, dict[str, Any]], go: Any, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(done[0], tmp_path / "out"))
    for name, gain in (("A1", 1.5), ("A3", 1.1)):
        sides = {"baseline": {"status": "ok"}, "model": {"status": "ok"}}
        point = {"concurrency": 2, **sides, "speedup": {"value": gain, "low": gain - 0.1, "high": gain + 0.1}}
        told = {"tokens_per_second": 10.0, "platform": "cpu", "points": [point]}
        (out / "results" / f"{name}.bench.json").write_text(json.dumps(told))
    rows = by_name(go(out, "strategy", gates=[*GENEROUS, "speed@2=+20%"]))
    assert [rows[name]["gates"]["verdict"] for name in ("A1", "A3", "B1")] == ["accepted", "rejected", "incomplete"]
    card = (out / "cells" / "A1" / "README.md").read_text()
    assert "| 2 | – | – | 1.50" in card and "Not measured: tasks." in card
    rows = by_name(go(out, "strategy", gates=GENEROUS))
    assert rows["A3"]["gates"]["verdict"] == "accepted", "a default gate on speed is not asked for by a sweep"


def test_the_check_is_a_gate(go: Any, tmp_path: Path) -> None:
    row = go(tmp_path / "out", PORTABLE, only=["B3"], gates=[*GENEROUS, "check"])["cells"][0]
    assert row["gates"]["verdict"] == "accepted" and row["check"]["ok"]


@pytest.mark.parametrize(
    ("gate", "bench", "how"),
    [
        ("tasks=-2%", None, "halfbyte run -r RECIPE --gate tasks=-2% does"),
        ("long_context=5%", None, "halfbyte run -r RECIPE"),
        ("memory@4=fits", 4, "halfbyte run -r RECIPE"),
        ("stability", None, "halfbyte run -r RECIPE"),
        ("served", None, "halfbyte run -r RECIPE"),
        ("speed@4=+20%", None, "--bench 4 does"),
        ("speed@4=+20%", 8, "--bench 4 does"),
    ],
)
def test_a_gate_that_is_not_measured_is_refused_at_once(
    go: Any, tmp_path: Path, gate: str, bench: int | None, how: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(f"--gate {gate}: this sweep does not measure that; {how}")):
        go(tmp_path / "out", PORTABLE, only=["B3"], gates=[gate], bench=bench)
    assert not (tmp_path / "out").exists()


def test_a_gate_on_the_speed_that_will_be_measured_is_taken(go: Any, tmp_path: Path) -> None:
    result = go(tmp_path / "out", PORTABLE, only=["B3"], gates=[*GENEROUS, "speed@4=+20%"], bench=4)
    assert [row["gates"]["verdict"] for row in result["cells"]] == ["incomplete"]


def test_force_begins_anew_and_foreign_directories_are_refused(go: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(UsageError, match="holds no sweep"):
        go(out, PORTABLE, only=["B3"])
    go(out, PORTABLE, only=["B3"], force=True)
    stamp = (out / "cells" / "B3" / "halfbyte.json").stat().st_mtime_ns
    go(out, PORTABLE, only=["B3"], force=True)
    assert (out / "cells" / "B3" / "halfbyte.json").stat().st_mtime_ns > stamp and (out / "mine.txt").exists()


def test_the_report(done: tuple[Path, dict[str, Any]]) -> None:
    page, plain = build_report(done[0])
    shown, text = Page(page.read_text()), plain.read_text()
    for words in ("matrix strategy", "Accepted", "not portable", "same bytes as A1", "Tokens/s", "not measured"):
        assert words in shown.text, words
    assert "script" not in shown.tags and "polyline" in shown.tags
    assert all(f"| {name} " in text for name in done[1]["ranking"]["order"])
    assert "times what B1 alone takes" in text


def test_the_face_in_python() -> None:
    assert package.sweep is sweep and "sweep" in package.__all__


@pytest.fixture()
def words(model: Path, data: CalibrationSet, tmp_path: Path) -> Any:
    """words(output, *more): a sweep of B1, B3 and a twin on the command line."""
    text, matrix = tmp_path / "own.txt", tmp_path / "matrix.yaml"
    text.write_text("some words and more, " * 26)
    matrix.write_text("cells: {B1: , B3: , twin: {extends: B3, ignore: [lm_head, model.embed_tokens]}}")
    data.save(tmp_path / "set")

    def spell(output: Path, *more: str) -> list[str]:
        start = ["sweep", str(model), "--matrix", str(matrix), "--on", "cpu", "--text", str(text), "-o", str(output)]
        return [*start, "--calibration", str(tmp_path / "set"), "--device", "cpu", *more]

    return spell


def test_killed_it_goes_on(words: Any, tmp_path: Path) -> None:
    """SIGKILL at writes through the whole of it: the second start gives the same bytes and keeps what was finished."""
    points = [5, 30, 49]
    jobs: list[dict[str, Any]] = [{"words": words(tmp_path / "whole")}]
    jobs += [{"words": words(tmp_path / f"at-{at}"), "act": "kill", "at": at} for at in points]
    reference, *killed = run_forked(tmp_path, jobs)
    assert reference["status"] == 3, reference["stderr"]
    assert reference["writes"] - 8 < points[-1] < reference["writes"] - 5, "not between the two evaluations"
    assert [run["status"] for run in killed] == [-signal.SIGKILL] * len(points)
    whole = digests(tmp_path / "whole" / "cells")
    kept = {}
    for at in points:
        finished = [*tmp_path.glob(f"at-{at}/cells/*/halfbyte.json"), *tmp_path.glob(f"at-{at}/results/*.json")]
        kept |= {path: path.stat().st_mtime_ns for path in finished}
    assert any("results" in path.parts for path in kept) and any(path.name == "halfbyte.json" for path in kept)
    again = run_forked(tmp_path, [{"words": job["words"]} for job in jobs[1:]])
    for at, run in zip(points, again):
        assert run["status"] == 3, (at, run["stderr"])
        assert digests(tmp_path / f"at-{at}" / "cells") == whole, at
        ours, theirs = (read(tmp_path / name / "sweep.json") for name in (f"at-{at}", "whole"))
        assert [r["name"] for r in ours["cells"]] == [r["name"] for r in theirs["cells"]]
        assert [r["eval"]["metrics"] for r in ours["cells"]] == [r["eval"]["metrics"] for r in theirs["cells"]]
    assert kept == {path: path.stat().st_mtime_ns for path in kept}, "what was finished was done again"


def test_the_command_line(words: Any, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert halfbyte(*words(out)) == 3
    shown = capsys.readouterr()
    last = shown.out.splitlines()[-1]
    assert last.startswith("best: B") and "(no cell passes the gates)" in last
    assert f"next: halfbyte check {out / 'cells'}" in last and "--serve" in last
    assert "same bytes as B3" in shown.out and "tokens/s: not measured" in shown.out
    assert "times what B1 alone takes" in shown.out and "statistics" in shown.out
    assert "B1: group 128 does not divide 192 inputs" in shown.err
    passing = [word for gate in GENEROUS for word in ("--gate", gate)]
    assert halfbyte(*words(out, *passing, "--format", "json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["verdict"] == "accepted" and result == read(out / "sweep.json")
    assert halfbyte("report", out) == 0
    capsys.readouterr()
    (tmp_path / "matrix.yaml").write_text("cells: {x: {extends: B1, format: awq}}")
    assert halfbyte(*words(tmp_path / "none")) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("halfbyte: no cell can be made: x: ")
    (tmp_path / "matrix.yaml").write_text("cels: [B1]")
    assert halfbyte(*words(tmp_path / "none")) == 2
    assert "did you mean 'cells'" in capsys.readouterr().err
