"""A small version of benchmarks/reliability/corruption.py: one fault of each kind, three formats; and what must not
pass unseen by the benchmark itself."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from benchmarks.reliability import corruption
from benchmarks.reliability.faults import KINDS, Kind
from benchmarks.reliability.samples import SORTS, Sample, make_sample
from benchmarks.reliability.scene import Scene, reseal
from halfbyte.artifact import check_artifact


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    root = tmp_path_factory.mktemp("samples")
    families = ("qwen2", "llama", "gemma3")
    sorts = ("gptq", "modelopt", "compressed-tensors, nvfp4")
    return [
        make_sample(root, sort, family, size, keep, twice=not keep)
        for sort, family, size, keep in zip(sorts, families, (150_000, 60_000, 1 << 30), (0, 0, 1))
    ]


def test_sound_artifacts_raise_no_alarm(samples: list[Sample]) -> None:
    assert set(SORTS) > {sample.sort for sample in samples}
    assert corruption.false_alarms(samples) == []


def test_one_fault_of_each_kind_is_found_and_named(samples: list[Sample], tmp_path: Path) -> None:
    rows = corruption.run_faults(samples, len(KINDS), random.Random(1), tmp_path)
    assert [row.kind for row in rows] == list(KINDS)
    assert [line for row in rows for line in row.wrong] == []
    assert all((row.faults, row.found, row.named) == (1, 1, 1) for row in rows)
    assert all(row.by_structure for row in rows if KINDS[row.kind].structure)
    assert corruption.table(rows).count("\n") == len(KINDS) + 2


def test_a_fault_that_passes_is_told(samples: list[Sample], tmp_path: Path) -> None:
    """The benchmark can fail: a fault that changes nothing is one that the check lets pass."""
    row = corruption.Row("nothing")
    corruption._one(row, Kind(lambda scene: ["nothing"]), samples, random.Random(0), tmp_path / "copy")
    assert (row.faults, row.found, row.named) == (1, 0, 0)
    assert "passes" in row.wrong[0] and "once the hashes are redone" in row.wrong[1]


def test_a_manifest_that_was_edited_is_told_by_its_seal(samples: list[Sample], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(samples[0].place, tmp_path / "copy"))
    scene = Scene(copy, None, random.Random(0))
    scene.edit("halfbyte.json", lambda m: m.update(bits_per_weight=2.0))
    (finding,) = check_artifact(copy)["findings"]
    assert (finding["code"], finding["where"]) == ("manifest", "halfbyte.json")
    reseal(copy)
    assert check_artifact(copy)["ok"]
    scene.edit("halfbyte.json", lambda m: m.pop("tensors"))
    reseal(copy)
    assert "lists no tensors" in check_artifact(copy)["findings"][0]["message"]


def test_what_a_loader_could_read_must_belong_to_the_artifact(samples: list[Sample], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(samples[0].place, tmp_path / "copy"))
    for name in ("README.md", "notes.txt", "check.json", "vllm.log", "report.html"):
        (copy / name).write_text("x")
    assert check_artifact(copy)["ok"]
    for name in ("modeling_evil.py", "pytorch_model.bin", "adapter_config.json", "added_tokens.json"):
        (copy / name).write_text("{}")
        (finding,) = check_artifact(copy)["findings"]
        assert (finding["code"], finding["where"]) == ("foreign", name)
        (copy / name).unlink()


def test_the_recipe_says_what_the_manifest_says(samples: list[Sample], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(samples[0].place, tmp_path / "copy"))
    recipe = copy / "recipe.yaml"
    for text in (recipe.read_text().replace("group_size: 32", "group_size: 64"), "a: [", "\x00"):
        recipe.write_text(text)
        reseal(copy)
        assert [f["where"] for f in check_artifact(copy)["findings"]] == ["recipe.yaml"]
    manifest = json.loads((copy / "halfbyte.json").read_text())
    assert len(manifest["tensors"]) == check_artifact(copy)["tensors"]
