"""Learned rounding: it begins with the codes as they are, brings blocks nearer to the BF16 model, stays on the grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte.engine.block as block_module
import halfbyte.engine.rounding as rounding
from halfbyte.algo import dequantize, get_grid
from halfbyte.engine import Block, Job, Rounder, Skeleton, quantize_blocks
from halfbyte.engine.rounding import Learning, folded, spacing
from halfbyte.models import Checkpoint
from halfbyte.models.library import load_model
from halfbyte.plan.layers import assign, quantized
from halfbyte.recipe.schema import Recipe
from halfbyte.types import GRIDS, QuantizedLinear
from tests.tiny import DENSE, VOCAB, make_tiny

RECIPES: dict[str, dict[str, Any]] = {
    "int4_sym": {"method": "gptq", "group_size": 64},
    "int4_asym": {"method": "awq", "group_size": 64},
    "nvfp4": {"method": "nvfp4", "group_size": 16},
}


def sequences(count: int = 12, length: int = 48) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return list(torch.randint(5, VOCAB, (count, length), generator=generator))


def solved(path: Path, **settings: Any) -> dict[int, Block]:
    """What the pass makes of every block."""
    checkpoint, recipe = Checkpoint(path), Recipe.model_validate(settings)
    blocks: dict[int, Block] = {}

    def emit(index: int, result: Any) -> None:
        blocks[index] = {n: s.q for n, s in result.linears.items()}, result.tensors

    job = Job(recipe, quantized(assign(recipe, checkpoint)), lambda i: i < 0 or i in blocks, emit)
    quantize_blocks(checkpoint, [job], sequences())
    return blocks


def outputs(path: Path, blocks: dict[int, Block], ids: torch.Tensor, index: int) -> torch.Tensor:
    """Block `index`'s output in the whole model with these weights, by transformers."""
    model = load_model(path)
    values = {name: t for _, tensors in blocks.values() for name, t in tensors.items()}
    values |= {f"{n}.weight": dequantize(q).bfloat16() for linears, _ in blocks.values() for n, q in linears.items()}
    model.load_state_dict(values, strict=False)
    kept: list[torch.Tensor] = []
    model.model.layers[index].register_forward_hook(lambda _m, _a, out: kept.append(out))
    with torch.no_grad():
        model(ids, use_cache=False)
    return (kept[0][0] if isinstance(kept[0], tuple) else kept[0]).float()


@pytest.mark.parametrize("grid", GRIDS)
def test_blocks_come_nearer_to_the_bf16_models(grid: str, tmp_path: Path) -> None:
    path = make_tiny("llama", tmp_path / "model")
    blocks = solved(path, **RECIPES[grid])
    learned = Rounder(Skeleton(Checkpoint(path)), blocks.__getitem__, True, Learning(60, 4)).run(sequences())
    assert all(0.005 < share < 0.6 for share in learned.changed)
    ids = torch.stack(sorted(sequences(), key=len))
    for index, (before, after) in enumerate(learned.errors):
        assert after < 0.97 * before
        want = outputs(path, {}, ids, index)
        after_too = {i: learned.blocks[i] for i in range(index + 1)}
        before_too = {**after_too, index: blocks[index]}
        for told, weights in ((before, before_too), (after, after_too)):
            assert told == pytest.approx(float((outputs(path, weights, ids, index) - want).square().mean()), rel=0.03)
    for index, (linears, _) in blocks.items():
        for name, q in linears.items():
            new = learned.blocks[index][0][name]
            assert torch.equal(new.scales, q.scales) and new.grid == q.grid and new.global_scale == q.global_scale
            assert steps_apart(q, new) <= 1


def steps_apart(old: QuantizedLinear, new: QuantizedLinear) -> int:
    """By how many values of the grid any weight moved."""
    values = get_grid(old.grid).decode(torch.arange(16.0), torch.zeros(16)).sort().values
    ladder = values.unique()
    zeros = None if old.zeros is None else old.zeros.float().repeat_interleave(old.group_size, 1)
    a, b = (get_grid(old.grid).decode(q.codes.float(), zeros) for q in (old, new))
    if old.grid != "nvfp4":
        return int((a - b).abs().max())
    places = [torch.searchsorted(ladder, v.contiguous()) for v in (a, b)]
    return int((places[0] - places[1]).abs().max())


@pytest.mark.parametrize("family", (*DENSE, "qwen3_moe"))
def test_folded_weights_are_those_that_were_rounded(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tiny(family, tmp_path / "model")
    real, seen = block_module.solve_group, {}

    def solve_group(weights: Any, *rest: Any) -> Any:
        found = real(weights, *rest)
        seen.update({one.q.codes.data_ptr(): (one.q.codes, w.float()) for w, one in zip(weights, found[0])})
        return found

    monkeypatch.setattr(block_module, "solve_group", solve_group)
    blocks = solved(path, method="gptq", group_size=64)
    checkpoint = Checkpoint(path)
    skeleton = Skeleton(checkpoint)
    changed = 0
    for index, (linears, tensors) in blocks.items():
        prefix = skeleton.family.block(index) + "."
        originals = {n: p.detach() for n, p in skeleton.load_block(index).named_parameters()}
        found = folded(skeleton.family, index, originals, linears, tensors)
        for name, q in linears.items():
            own = f"{name.removeprefix(prefix)}.weight"
            want = seen[q.codes.data_ptr()][1]
            assert float((found[own] - want).norm() / want.norm()) < 0.04
            changed += float((originals[own].float() - want).norm() / want.norm()) > 0.1
    assert changed > 0


@pytest.mark.parametrize("grid", GRIDS)
def test_the_rounding_begins_as_it_is_and_stays_on_the_grid(grid: str) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.arange(16, dtype=torch.uint8).repeat(8, 4)
    scales = (torch.rand(8, 4, generator=generator) + 0.5).to(torch.float8_e4m3fn).float()
    zeros = torch.randint(0, 16, (8, 4), dtype=torch.uint8, generator=generator) if grid == "int4_asym" else None
    q = QuantizedLinear(codes, scales, 16, grid, zeros, 0.25 if grid == "nvfp4" else None)
    target = dequantize(q) + torch.randn(8, 64, generator=generator)
    weight = rounding._Weight(q, target)
    assert torch.equal(weight.value(), dequantize(q)) and torch.equal(dequantize(weight.result()), dequantize(q))
    for _ in range(300):
        weight.descend(torch.randn(8, 64, generator=generator) + 0.4, 0.02)
    new = weight.result()
    assert torch.equal(weight.value(), dequantize(new)) and int(new.codes.max()) <= 15
    assert not torch.equal(new.codes, q.codes) and steps_apart(q, new) == 1


def test_the_grids_spacing() -> None:
    values = torch.tensor([0.0, -0.5, 1.5, 2.0, 3.0, -4.0, 6.0])
    assert spacing("nvfp4", values).tolist() == [0.5, 0.5, 0.5, 0.5, 1.0, 1.0, 2.0]
    assert float(spacing("int4_sym", values)) == 1.0


def test_a_block_that_comes_out_worse_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_tiny("llama", tmp_path / "model")
    blocks = solved(path, **RECIPES["int4_sym"])
    climb = rounding._Weight.descend
    monkeypatch.setattr(rounding._Weight, "descend", lambda self, g, rate: climb(self, -g, 20 * rate))
    learned = Rounder(Skeleton(Checkpoint(path)), blocks.__getitem__, True, Learning(20, 4)).run(sequences())
    assert learned.changed == [0.0] * len(blocks) and all(a == b for a, b in learned.errors)
    assert all(learned.linears[n] is q for linears, _ in blocks.values() for n, q in linears.items())
    assert learned.note == {"blocks": 0, "codes_changed": 0.0, "error_ratio": 1.0}
