"""The experiment matrix: what YAML becomes which cells, and how a mistake in it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from halfbyte.errors import UsageError
from halfbyte.experiments.axes import expand_axes, label
from halfbyte.experiments.matrix import Matrix, list_matrices, load_matrix
from halfbyte.recipe import list_presets, load_recipe
from tests.unit.artifacts import halfbyte


def matrix(text: str) -> Matrix:
    return load_matrix(yaml.safe_load(text))


def recipes(text: str) -> dict[str, Any]:
    return {cell.name: cell.recipe for cell in matrix(text).cells}


def names(text: str) -> list[str]:
    return [cell.name for cell in matrix(text).cells]


def line(text: str) -> str:
    with pytest.raises(UsageError) as caught:
        matrix(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_strategys_matrix_is_its_presets() -> None:
    cells = load_matrix("strategy").cells
    assert [c.name for c in cells] == [
        "A1", "A2", "A3", "A4", "A1-G128", "A2-G128", "A3-G128", "A4-G128", "A1-G16", "A2-G16", "A3-G16", "A4-G16",
        "B1", "B2", "B3", "C1", "C2",
    ]  # fmt: skip
    presets = {name: recipe for name, _, recipe in list_presets()}
    assert not any(cell.error for cell in cells)
    for cell in cells:
        assert cell.recipe is not None
        assert cell.recipe.identity() == {**presets[cell.name].identity(), "tune": "none"}, cell.name


@pytest.mark.parametrize("name", list_matrices())
def test_every_ready_matrix_loads(name: str) -> None:
    found = load_matrix(name)
    assert found.cells and found.description == list_matrices()[name]
    assert all(cell.recipe is not None for cell in found.cells)


def test_ready_ones() -> None:
    assert [c.name for c in load_matrix("Portable").cells] == ["B1", "B2", "B3", "C1", "C2"]
    grid = load_matrix("grid").cells
    assert len(grid) == 18 and grid[0].name == "gptq-g32-open" and grid[-1].name == "awq-g128-blocks"
    last = grid[-1].recipe
    assert last and (last.method, last.group_size, last.boundary.keep) == ("awq", 128, "blocks")


def test_cells_refer_to_presets_each_other_and_recipe_keys() -> None:
    found = recipes("""
        cells:
          B1:
          mine: B3
          fine: {extends: mine, group_size: 32, boundary: {keep: blocks}}
          own: {method: awq, group_size: 64}
    """)
    assert found["B1"] == load_recipe("B1") and found["mine"] == load_recipe("B3")
    assert found["fine"] == load_recipe("B3", ["group_size=32", "boundary.keep=blocks"]).model_copy(
        update={"description": ""}
    )
    assert found["own"].grid == "int4_asym" and found["own"].format == "awq"


def test_a_method_in_place_of_anothers_moves_grid_and_format() -> None:
    assert recipes("cells: {x: {extends: B1, method: awq}}")["x"].format == "awq"


def test_a_cell_of_its_presets_name_extends_the_preset() -> None:
    assert recipes("cells: {B1: {extends: B1, group_size: 64}}")["B1"].group_size == 64


def test_defaults_lie_between_the_preset_and_the_cell() -> None:
    found = recipes("""
        defaults: {group_size: 32, calibration: {sequences: 16}}
        cells: {a: B1, b: {extends: B1, group_size: 64}, c: {extends: b, calibration: {seed: 3}}}
    """)
    assert [found[n].group_size for n in "abc"] == [32, 64, 64]
    assert found["c"].calibration.sequences == 16 and found["c"].calibration.seed == 3


def test_a_matrix_extends_another_and_replaces_cells(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("cells: {x: B1, y: B3}")
    (tmp_path / "more.yaml").write_text(
        "extends: base.yaml\ndefaults: {effort: max}\ncells: {y: C1, z: x}\nexclude: [x]"
    )
    found = load_matrix(tmp_path / "more.yaml")
    assert found.name == "more" and [c.name for c in found.cells] == ["y", "z"]
    y, z = (cell.recipe for cell in found.cells)
    assert y and z and y.method == "awq" and z.method == "gptq" and {y.effort, z.effort} == {"max"}


def test_axes_multiply() -> None:
    found = recipes("""
        defaults: {indivisible: smaller}
        axes:
          method: [gptq, awq]
          group_size: [64, -1]
          boundary.keep: [nothing, blocks]
    """)
    assert list(found) == [
        f"{m}-{g}-{k}" for m in ("gptq", "awq") for g in ("g64", "row") for k in ("nothing", "blocks")
    ]
    one = found["awq-row-blocks"]
    assert (one.method, one.group_size, one.boundary.keep, one.indivisible) == ("awq", -1, "blocks", "smaller")


def test_axes_of_presets_labels_and_bundles() -> None:
    found = recipes("""
        cells:
          base: {method: gptq, group_size: 128}
          grid:
            extends: base
            axes: {group_size: {fine: 32, coarse: 128}, act_order: [true, false]}
        axes:
          extends: [B1, C1]
          care: {little: {effort: fast}, much: {effort: max, boundary: {keep: projections}}}
    """)
    assert list(found) == [
        "base", "grid-fine-act_order", "grid-fine-no-act_order", "grid-coarse-act_order", "grid-coarse-no-act_order",
        "B1-little", "B1-much", "C1-little", "C1-much",
    ]  # fmt: skip
    assert found["grid-fine-no-act_order"].group_size == 32 and not found["grid-fine-no-act_order"].act_order
    assert found["C1-much"].method == "awq" and found["C1-much"].boundary.keep == "projections"


def test_axes_within_one_mapping_join() -> None:
    (keys, labels), *_ = expand_axes({"boundary.blocks": [2], "boundary.keep": ["blocks"]}, "here")
    assert keys == {"boundary": {"blocks": 2, "keep": "blocks"}}
    assert labels == {"boundary.blocks": "blocks2", "boundary.keep": "blocks"}
    assert label("ignore", ["lm_head", "re:.*down"]) == "lm_head+re:.*down" and label("damp", 0.01) == "damp0.01"


def test_exclude_by_name_pattern_key_and_label() -> None:
    text = "axes: {method: [gptq, awq], group_size: [64, 128], boundary: {open: {}, shut: {keep: blocks}}}\nexclude: "
    assert names(text + "['awq-*']") == ["gptq-g64-open", "gptq-g64-shut", "gptq-g128-open", "gptq-g128-shut"]
    assert len(names(text + "[{method: awq, group_size: 64}]")) == 6
    assert len(names(text + "[{method: awq}, {group_size: [64, 128], boundary: shut}]")) == 2
    assert len(names(text + "[{boundary: {keep: blocks}}]")) == 4
    assert len(names(text + "[{boundary.keep: blocks, format: awq}]")) == 6
    assert names("extends: strategy\nexclude: [{method: nvfp4}, C*]") == ["B1", "B2", "B3"]


def test_an_impossible_combination_is_kept_with_its_reason() -> None:
    cells = {c.name: c for c in matrix("axes: {method: [gptq, nvfp4], group_size: [16, 64]}").cells}
    assert cells["gptq-g16"].recipe is None and "none that vLLM accepts" in cells["gptq-g16"].error
    assert cells["nvfp4-g16"].recipe is not None and cells["gptq-g64"].recipe is not None
    assert "cannot hold the grid" in matrix("cells: {x: {extends: B1, format: awq}}").cells[0].error


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cell: [A1]", "unknown matrix key 'cell': did you mean 'cells'?"),
        ("cells: {x: {method: gptq, group_sise: 64}}", "cell x: unknown recipe key 'group_sise': did you mean 'group_"),
        ("cells: {x: {extends: B1, boundary: {kep: blocks}}}", "'boundary.kep': did you mean 'keep'?"),
        ("cells: {x: {extend: B1}}", "unknown key 'extend': did you mean 'extends'?"),
        ("cells: {x: {extends: B7}}", "there is no recipe 'B7'"),
        ("cells: {mine: B1, x: {extends: mime}}", "extends 'mime', which is nothing here: did you mean 'mine'?"),
        ("cells: {x: {extends: y}, y: {extends: x}}", "in a circle: x -> y -> x"),
        ("defaults: {grp: 1}\ncells: [A1]", "defaults: unknown recipe key 'grp'"),
        ("axes: {group_sise: [64]}", "did you mean 'group_size'?"),
        ("axes: {boundary.kep: [blocks]}", "did you mean 'keep'?"),
        ("axes: {group_size: 64}", "group_size needs a list of values"),
        ("axes: {group_size: []}", "group_size needs a list of values"),
        ("axes: {group_size: [64, 64]}", "has a value twice"),
        ("axes: {care: {much: fast}}", "care: much needs recipe keys"),
        ("cells: [A1]\nexclude: [A2]", "exclude: 'A2' matches no cell: did you mean 'A1'?"),
        ("cells: [A1]\nexclude: [{group_sise: 64}]", "did you mean 'group_size'?"),
        ("cells: [A1]\nexclude: A1", "exclude is a list"),
        ("cells: [A1]\nexclude: ['*']", "no cell is left"),
        ("{}", "no cell is left"),
        ("cells: {../x: B1}", "'../x' is no name for a cell"),
        ("cells: {x: 3}", "cell x: a mapping of recipe keys"),
        ("cells: A1", "cells is a list of presets or a mapping"),
        ("extends: strateg\ncells: [A1]", "there is no matrix 'strateg': did you mean 'strategy'?"),
    ],
)
def test_a_mistake_is_one_line_that_says_where(text: str, says: str) -> None:
    assert says in line(text)


def test_names_files_and_circles_of_matrices(tmp_path: Path) -> None:
    for source, says in (
        ("strategie", "did you mean 'strategy'?"),
        ("zzz", "use strategy, portable, grid, or a YAML file"),
        (tmp_path / "none.yaml", "does not exist"),
    ):
        with pytest.raises(UsageError, match=says.replace("?", r"\?")):
            load_matrix(source)
    path = tmp_path / "m.yaml"
    path.write_text("cells: [A1\n")
    with pytest.raises(UsageError, match="line 2: not valid YAML"):
        load_matrix(path)
    path.write_text("extends: m.yaml\ncells: [A1]")
    with pytest.raises(UsageError, match=r"extends m\.yaml, which extends this one"):
        load_matrix(path)


def test_a_selection_of_cells() -> None:
    chosen = load_matrix("strategy").only(["B*", "C1"])
    assert [c.name for c in chosen.cells] == ["B1", "B2", "B3", "C1"]
    with pytest.raises(UsageError, match="has no cell 'B9': did you mean 'B3'"):
        load_matrix("strategy").only(["B9"])


def test_ls_matrices(capsys: pytest.CaptureFixture[str]) -> None:
    assert halfbyte("ls", "matrices") == 0
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()] == list(list_matrices())


def test_the_matrix_of_the_documents_is_one() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "matrix.md"
    body = page.read_text(encoding="utf-8").partition("```yaml\n")[2].partition("```")[0]
    found = recipes(body)
    assert list(found)[:3] == ["B1", "B2", "B3"] and "grid-fast-none" in found and "gptq-g32" in found
    assert "awq-g32" not in found and not any(name.startswith("A") for name in found)
    assert all(recipe.calibration.sequences == 256 for recipe in found.values())
