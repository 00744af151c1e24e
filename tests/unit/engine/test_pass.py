"""One pass: recipes together and alone, resume, what is left out, what is refused."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from halfbyte.algo import dequantize
from halfbyte.engine import BlockResult, Job, quantize_blocks, work_id
from halfbyte.engine.loop import HEAD
from halfbyte.errors import HalfbyteError
from halfbyte.models import Checkpoint, family_of
from halfbyte.plan.layers import assign, quantized
from halfbyte.types import Quiet
from tests.unit.engine.conftest import (
    collect,
    identical,
    recipe,
    sequences,
)

MANY = [
    {"method": "rtn"},
    {"method": "gptq"},
    {"method": "gptq", "group_size": 64, "act_order": False, "damp": 0.01},
    {"method": "awq"},
    {"method": "awq", "rounding": "rtn"},
    {"method": "nvfp4", "group_size": 16},
    {"method": "nvfp4", "group_size": 32, "rounding": "rtn", "activations": "fp4"},
    {"method": "gptq", "scaling": "awq", "boundary": {"blocks": 1, "keep": "projections"}},
]


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_several_recipes_in_one_pass_are_each_alone(family: str, model_of: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(model_of(family))
    recipes = [recipe(**settings) for settings in MANY]
    data = sequences()
    together = collect(checkpoint, *recipes, data=data)
    for one, wanted in zip(recipes, together):
        (alone,) = collect(checkpoint, one, data=data)
        assert set(alone) == set(wanted) == set(range(family_of(checkpoint.config).num_blocks))
        assert all(identical(alone[i], wanted[i]) for i in alone), one.method
    assert not identical(together[1][0], together[2][0])


def test_a_second_run_of_the_same_work_is_the_same_bits(model_of: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(model_of("qwen2"))
    runs = [collect(checkpoint, recipe(method="awq"), data=sequences())[0] for _ in range(2)]
    assert all(identical(runs[0][i], runs[1][i]) for i in runs[0])


def test_resume_gives_the_same_bits_and_asks_for_no_block_twice(model_of: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(model_of("llama"))
    r = recipe(method="gptq", ignore=())
    (whole,) = collect(checkpoint, r, data=sequences())
    assert set(whole) == {0, 1, 2, HEAD}
    for missing in ([1], [2], [HEAD], [0, HEAD], []):
        emitted: dict[int, BlockResult] = {}
        done = {i for i in whole if i not in missing}
        job = Job(r, quantized(assign(r, checkpoint)), lambda i, done=done: i in done, emitted.__setitem__)
        quantize_blocks(checkpoint, [job], sequences())
        assert sorted(emitted) == sorted(missing)
        assert all(identical(emitted[i], whole[i]) for i in missing)


def test_boundary_and_ignore_leave_linears_out(model_of: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(model_of("llama"))
    whole, ends, projections, named = collect(
        checkpoint,
        recipe(method="rtn"),
        recipe(method="rtn", boundary={"blocks": 1, "keep": "blocks"}),
        recipe(method="rtn", boundary={"blocks": 1, "keep": "projections"}),
        recipe(method="rtn", ignore=("lm_head", "re:.*\\.1\\.mlp\\.down_proj")),
    )
    assert all(len(whole[i].linears) == 7 for i in range(3))
    assert [len(ends[i].linears) for i in range(3)] == [0, 7, 0]
    assert [len(projections[i].linears) for i in range(3)] == [5, 7, 5]
    assert [len(named[i].linears) for i in range(3)] == [7, 6, 7]
    assert all(HEAD not in kept for kept in (whole, ends, projections, named))


@pytest.mark.parametrize("data", [True, False])
def test_lm_head_is_quantized_when_asked_and_untied(data: bool, model_of: Callable[[str], Path]) -> None:
    asked = recipe(method="gptq" if data else "rtn", ignore=())
    untied = Checkpoint(model_of("llama"))
    (blocks,) = collect(untied, asked, data=sequences() if data else None)
    solved = blocks[HEAD].linears["lm_head"]
    W = untied.load("lm_head.weight").float()
    assert solved.q.codes.shape == W.shape
    assert float((dequantize(solved.q) - W).norm() / W.norm()) < 0.2
    tied = Checkpoint(model_of("gemma2"))
    (blocks,) = collect(tied, asked, data=sequences() if data else None)
    assert HEAD not in blocks


def test_propagation_is_for_one_recipe(model_of: Callable[[str], Path]) -> None:
    two = [recipe(method="gptq", propagate=True), recipe(method="gptq")]
    with pytest.raises(HalfbyteError, match="one recipe"):
        collect(Checkpoint(model_of("llama")), *two, data=sequences())


def test_data_free_methods_need_no_data_and_others_say_so(model_of: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(model_of("phi3"))
    free = [recipe(method="rtn"), recipe(method="nvfp4", rounding="rtn", group_size=16)]
    for kept in collect(checkpoint, *free):
        for result in kept.values():
            for name, solved in result.linears.items():
                W = checkpoint.load(f"{name}.weight").float()
                assert float((dequantize(solved.q) - W).norm() / W.norm()) < 0.2
                assert solved.damp is None and solved.q.input_scale is None
    for settings in ({"method": "gptq"}, {"method": "awq"}, {"method": "nvfp4"}, {"method": "rtn", "propagate": True}):
        with pytest.raises(HalfbyteError, match="calibration"):
            collect(checkpoint, recipe(**settings))


def test_raised_damping_is_a_notice(model_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    method = importlib.import_module("halfbyte.algo.gptq")
    real = method._unit_upper
    first = iter([True])
    monkeypatch.setattr(method, "_unit_upper", lambda *given: None if next(first, False) else real(*given))
    progress = Quiet()
    (blocks,) = collect(Checkpoint(model_of("mistral")), recipe(method="gptq"), data=sequences(), progress=progress)
    assert progress.notices == ["model.layers.0.self_attn.qkv_proj: damping raised from 0.05 to 0.1"]
    assert blocks[0].linears["model.layers.0.self_attn.q_proj"].damp == 0.1
    assert blocks[0].linears["model.layers.0.self_attn.o_proj"].damp == 0.05


@pytest.mark.parametrize("change", ["lack", "reshape"])
def test_a_model_that_is_not_whole_is_named(change: str, model_of: Callable[[str], Path], tmp_path: Path) -> None:
    path = model_of("llama")
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.input_layernorm.weight"
    norm = tensors.pop(name)
    if change == "reshape":
        tensors[name] = norm[:64].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    with pytest.raises(HalfbyteError, match=name) as caught:
        collect(Checkpoint(tmp_path), recipe(method="gptq"), data=sequences())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("place", ["mlp.up_proj", "post_attention_layernorm"])
def test_a_model_with_numbers_that_are_not_finite_is_refused(
    method: str, place: str, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    path = model_of("llama")
    tensors = load_file(path / "model.safetensors")
    tensors[f"model.layers.1.{place}.weight"].view(-1)[5] = float("inf")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    wanted = "up_proj.weight" if place == "mlp.up_proj" else "gate_up_proj"
    with pytest.raises(HalfbyteError, match=rf"layers\.1\.mlp\.{wanted}.*not finite"):
        collect(Checkpoint(tmp_path), recipe(method=method), data=sequences())


def test_the_name_of_the_work_follows_what_changes_its_bits() -> None:
    base = work_id(recipe(method="gptq"), "m", "c")
    assert base == work_id(recipe(method="gptq", description="other words"), "m", "c")
    others = [
        work_id(recipe(method="gptq", damp=0.01), "m", "c"),
        work_id(recipe(method="gptq"), "n", "c"),
        work_id(recipe(method="gptq"), "m", "d"),
    ]
    assert len({base, *others}) == 4
