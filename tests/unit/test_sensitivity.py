"""Lone damages against brute force, ranking, resume and cache, and recipes that keep a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import halfbyte.experiments.sensitivity as room
from halfbyte import Recipe, quantize
from halfbyte.artifact import load_fake_quantized
from halfbyte.errors import UsageError
from halfbyte.evaluate import Windows, compare, set_windows
from halfbyte.experiments.exemptions import choose_exemptions, recipe_text, write_recipe
from halfbyte.experiments.lone import LoneMeter
from halfbyte.experiments.sensitivity import sensitivity
from halfbyte.models import Checkpoint
from halfbyte.plan.inventory import footprints, totals
from halfbyte.plan.layers import assign
from halfbyte.recipe import load_recipe
from tests.tiny import make_tiny
from tests.unit.artifacts import halfbyte, random_set


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("sensitivity") / "tiny")


def held() -> Windows:
    """Windows of several lengths, so that batches are padded."""
    return set_windows(random_set(tokens=600, longest=80, seed=5), source="random")


def measure(model: Path, recipe: Recipe, **options: Any) -> dict[str, Any]:
    return sensitivity(str(model), recipe, text=held(), calibration=random_set(), **options)


CASES = {
    "llama-gptq": ("llama", Recipe(method="gptq", group_size=32)),
    "gemma2-awq": ("gemma2", Recipe(method="awq", group_size=64)),
    "qwen2-nvfp4-head": ("qwen2", Recipe(method="nvfp4", group_size=16, ignore=(), propagate=True)),
    "phi3-rtn": ("phi3", Recipe(method="rtn", group_size=32)),
    "mixtral-gptq": ("mixtral", Recipe(method="gptq", group_size=32)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_lone_group_is_what_the_recipe_makes_with_all_others_exempt(case: str, tmp_path: Path) -> None:
    family, recipe = CASES[case]
    path = make_tiny(family, tmp_path / "tiny")
    result = measure(path, recipe)
    plans = assign(recipe, Checkpoint(path))
    assert {n for g in result["groups"] for n in g["names"]} == {p.name for p in plans if p.scheme}
    assert ("lm_head" in {g["group"] for g in result["groups"]}) == case.endswith("head")
    baseline = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for group in result["groups"]:
        others = tuple(p.name for p in plans if p.name not in group["names"])
        alone = recipe.model_copy(update={"ignore": others, "propagate": False})
        out = tmp_path / group["group"]
        manifest = quantize(str(path), alone, out, random_set())
        brute = compare(baseline, load_fake_quantized(out, torch.float32), held(), noise_tokens=1)
        wanted = brute.metrics["kl_mean"]["value"]
        assert wanted > 3e-5 and group["kl"] == pytest.approx(wanted, rel=1e-3, abs=2e-6), group["group"]
        assert group["low"] <= group["kl"] <= group["high"]
        errors = [manifest["linears"][n]["error"]["relative"] for n in group["names"]]
        assert min(errors) * 0.999 <= group["relative_error"] <= max(errors) * 1.001
        assert group["output_error"] > 0


def test_the_model_is_put_back_and_blocks_before_do_not_run(model: Path) -> None:
    meter = LoneMeter(Checkpoint(model), held())
    before = {name: p.clone() for name, p in meter.model.named_parameters()}
    runs: list[int] = []
    for index, block in enumerate(meter.blocks):
        block.register_forward_hook(lambda *_, i=index: runs.append(i))
    name = "model.layers.1.mlp.down_proj.weight"
    assert float(meter.kl(1, {name: torch.zeros_like(before[name])}).mean()) > 1e-3
    assert set(runs) == {1}
    assert all(torch.equal(p, before[n]) for n, p in meter.model.named_parameters())
    assert float(meter.kl(0, {}).max()) == 0.0
    tokens = sum(len(ids) for ids in held().ids)
    assert len(meter.window) == tokens - len(held())


def test_rows_are_ranked_and_priced(model: Path) -> None:
    recipe = Recipe(method="rtn", group_size=32, ignore=("lm_head", "model.layers.0.mlp.down_proj"))
    result = measure(model, recipe)
    rows = result["groups"]
    assert [row["rank"] for row in rows] == list(range(1, 8))
    assert [row["kl"] for row in rows] == sorted((row["kl"] for row in rows), reverse=True)
    assert {e["name"] for e in result["exempt"]} == {"lm_head", "model.layers.0.mlp.down_proj"}
    sizes = {f.plan.name: f.before - f.after for f in footprints(recipe, Checkpoint(model))}
    for row in rows:
        assert row["bytes_added"] == sum(sizes[n] for n in row["names"]) > 0
        assert row["kl_per_byte"] == pytest.approx(row["kl"] / row["bytes_added"])
    assert result["noise_floor"]["kl_mean"] < 1e-6 and result["complete"] and result["kind"] == "sensitivity"
    json.dumps(result, allow_nan=False)


def test_a_second_call_runs_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(method="gptq", group_size=32)
    first = measure(model, recipe)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("it was measured already")

    monkeypatch.setattr(room, "LoneMeter", fail)
    monkeypatch.setattr(room, "quantize_blocks", fail)
    assert measure(model, recipe) == first
    for change in ({"dtype": "bfloat16"}, {}):
        with pytest.raises(AssertionError):
            measure(model, recipe if change else Recipe(method="gptq", group_size=64), **change)
    with pytest.raises(AssertionError):
        sensitivity(str(model), recipe, text=held().first(3), calibration=random_set())


def test_a_killed_run_goes_on_behind_the_last_group(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(method="awq", group_size=64)
    whole = measure(model, recipe, dtype="bfloat16")
    for file in (room.cache_dir() / "sensitivity").rglob("*.json"):
        file.unlink()
    real, calls = LoneMeter.kl, list[int]()

    def killed(self: LoneMeter, start: int, values: Any) -> Any:
        calls.append(start)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(self, start, values)

    monkeypatch.setattr(LoneMeter, "kl", killed)
    with pytest.raises(KeyboardInterrupt):
        measure(model, recipe, dtype="bfloat16")
    again = measure(model, recipe, dtype="bfloat16")
    assert len(calls) == 6 + 3
    assert again | {"seconds": 0} == whole | {"seconds": 0}


def test_a_budget_is_kept_and_no_fused_group_is_split(model: Path, tmp_path: Path) -> None:
    recipe = Recipe(method="gptq", group_size=32)
    result = measure(model, recipe)
    checkpoint, saved = Checkpoint(model), []
    for bits in (4.9, 6.0, 8.0, 12.0):
        chosen = choose_exemptions(result, bits)
        made = load_recipe(str(write_recipe(tmp_path / f"{bits}", chosen)))
        assert made.group_size == 32 and made.ignore == ("lm_head", *chosen["names"])
        prints = [f for f in footprints(made, checkpoint) if f.plan.name != "lm_head"]
        assert totals(prints, checkpoint)["bits_per_linear_weight"] == pytest.approx(chosen["bits_after"])
        assert chosen["bits_after"] <= bits
        exempt = {f.plan.fused for f in prints if f.plan.scheme is None}
        assert exempt == set(chosen["groups"])
        left = bits * sum(g["weights"] for g in result["groups"]) / 8 - sum(f.after for f in prints)
        rest = [g for g in result["groups"] if g["group"] not in exempt]
        assert all(g["bytes_added"] > left for g in rest), "the budget is spent"
        saved.append(chosen["kl_saved"])
    assert saved == sorted(saved) and saved[1] > 0 and choose_exemptions(result, 4.9)["kl_sum"] > saved[-1]
    best = max(result["groups"], key=lambda g: g["kl_per_byte"])
    assert best["group"] in choose_exemptions(result, 8.0)["groups"]
    quantize(str(model), load_recipe(str(tmp_path / "8.0" / "recipe.yaml")), tmp_path / "out", random_set())
    for bits in (2.0, 16.0):
        with pytest.raises(UsageError, match="name a figure between"):
            choose_exemptions(result, bits)


def test_the_command(model: Path, tmp_path: Path, capsys: Any) -> None:
    text, data = tmp_path / "t.txt", random_set().save(tmp_path / "set")
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    words = ["sensitivity", model, "-r", "B3", "--set", "method=rtn", "--text", text, "--calibration", data]
    assert halfbyte(*words, "--budget", "7") == 0
    shown = capsys.readouterr().out
    assert "quantized alone" in shown and "method: rtn" in shown and "a prediction" in shown
    assert halfbyte(*words, "--budget", "7", "-o", tmp_path / "out", "--format", "json") == 0
    result = json.loads(capsys.readouterr().out)
    assert halfbyte(*words, "--budget", "7", "-o", tmp_path / "out") == 0
    follow = f"next: halfbyte quantize {model} -r {tmp_path / 'out' / 'recipe.yaml'} --calibration {data} -o MODEL_DIR"
    assert capsys.readouterr().out.splitlines()[-1] == follow, "the recipe was chosen with that text"
    assert halfbyte(*words) == 0
    follow = f"next: halfbyte sensitivity {model} -r B3 --set method=rtn --calibration {data} --budget BITS -o DIR"
    assert capsys.readouterr().out.splitlines()[-1] == follow
    assert result == json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    assert (tmp_path / "out" / "recipe.yaml").read_text() == recipe_text(result["budget"])
    assert halfbyte(*words, "--budget", "3") == 2
    assert "name a figure between" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "out" / "halfbyte.json").write_text("{}")
    assert halfbyte(*words, "-o", tmp_path / "out") == 2
    assert "holds an artifact" in capsys.readouterr().err.splitlines()[-1]
    assert halfbyte(*words, "--set", "ignore=[lm_head, 're:.*layers.*']") == 2
