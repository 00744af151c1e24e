"""Input scales are folded into what precedes, and cancel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import halfbyte.engine.block as block_module
from halfbyte.algo import Solved, Stats, dequantize
from halfbyte.engine import BlockResult
from halfbyte.models import FAMILIES as ARCHITECTURES
from halfbyte.models import Checkpoint, Fold, family_of
from tests.tiny import DENSE
from tests.unit.engine.conftest import (
    collect,
    load,
    real_inputs,
    recipe,
    sequences,
)


@pytest.fixture
def unrounded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The engine with a solver that returns its weights as they come: scaling and folding, and no rounding."""

    def keep(weights: list[torch.Tensor], *_: object) -> tuple[list[Solved], None]:
        return [Solved(SimpleNamespace(weight=w.clone()), 0.0, None) for w in weights], None  # type: ignore[arg-type]

    monkeypatch.setattr(block_module, "solve_group", keep)
    yield


def folded_model(path: Path, blocks: dict[int, BlockResult]) -> torch.nn.Module:
    """The float32 transformers model with the folded tensors put in."""
    model = load(path, torch.float32)
    with torch.no_grad():
        for result in blocks.values():
            for name, solved in result.linears.items():
                model.get_submodule(name).weight.copy_(solved.q.weight)  # type: ignore[operator, union-attr, attr-defined]
            for name, value in result.tensors.items():
                model.get_parameter(name).copy_(value)
    return model


def without_value_bias(path: Path, target: Path) -> Path:
    """The same model with its value biases at zero."""
    target.mkdir()
    tensors = load_file(path / "model.safetensors")
    tensors |= {n: torch.zeros_like(t) for n, t in tensors.items() if n.endswith("v_proj.bias")}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((path / "config.json").read_text())
    return target


def damage(path: Path, blocks: dict[int, BlockResult]) -> float:
    """Largest change of a logit, as a share of the largest logit."""
    ids = torch.stack([s[:33] for s in sequences(7) if len(s) >= 33])
    with torch.no_grad():
        want = load(path, torch.float32)(input_ids=ids).logits
        got = folded_model(path, blocks)(input_ids=ids).logits
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("family", DENSE)
def test_awq_folding_alone_leaves_the_logits(
    family: str, model_of: Callable[[str], Path], unrounded: None, tmp_path: Path
) -> None:
    """Norms stay in BF16 and their rounding is taken up by the linears; only a folded bias is rounded again."""
    path = model_of(family)
    (blocks,) = collect(Checkpoint(path), recipe(method="awq"), data=sequences())
    originals = Checkpoint(path)
    solved = {n: s.q.weight for r in blocks.values() for n, s in r.linears.items()}  # type: ignore[attr-defined]
    moved = [n for n, weight in solved.items() if not torch.equal(weight, originals.load(f"{n}.weight").float())]
    assert len(moved) >= len(family_of(originals.config).groups), "the test must see scaling"
    assert any("norm" in n for r in blocks.values() for n in r.tensors)
    biased = any(n.endswith("bias") for r in blocks.values() for n in r.tensors)
    assert biased == (family == "qwen2")
    assert damage(path, blocks) < (5e-3 if biased else 2e-5)
    if biased:
        exact = without_value_bias(path, tmp_path / "model")
        (blocks,) = collect(Checkpoint(exact), recipe(method="awq"), data=sequences())
        assert damage(exact, blocks) < 2e-5


@pytest.mark.parametrize("family", DENSE)
def test_every_fold_of_a_family_cancels(
    family: str, model_of: Callable[[str], Path], unrounded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With large scales forced on every input, one per kv head and channel where heads are repeated."""
    checkpoint = Checkpoint(model_of(family))
    kinds = []

    def forced(
        weights: list[torch.Tensor], _stats: Stats, _grid: object, _size: int, _effort: str, repeat: tuple | None
    ) -> torch.Tensor:
        kinds.append(repeat is not None)
        g = torch.Generator().manual_seed(len(kinds))
        if repeat is None:
            return 2 ** (4 * torch.rand(weights[0].shape[1], generator=g) - 2)
        kv, queries, dim = repeat
        return 2 ** (4 * torch.rand(kv, 1, dim, generator=g) - 2).expand(kv, queries, dim).reshape(-1)

    monkeypatch.setattr(block_module, "find_scale", forced)
    (blocks,) = collect(checkpoint, recipe(method="awq", indivisible="keep"), data=sequences())
    assert kinds == [False, True, False, False] * len(blocks)
    for result in blocks.values():
        for name, solved in result.linears.items():
            assert not torch.equal(solved.q.weight, checkpoint.load(f"{name}.weight").float())  # type: ignore[attr-defined]
    assert damage(checkpoint.path, blocks) < (1e-2 if family == "qwen2" else 2e-5)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_weight_that_would_round_to_nothing_is_left_alone(offset: float) -> None:
    """offset + weight in BF16 can vanish when it is divided; the channel must live on."""
    name = "gemma2" if offset else "llama"
    family = SimpleNamespace(architecture=ARCHITECTURES[name])
    old = torch.tensor([1.0, 0.3, 0.0, -0.5]).sub(offset).bfloat16()
    s = torch.tensor([2.0, 250.0, 4.0, 3.0])
    result = BlockResult()
    fold = Fold("qkv", norm="n")
    used = block_module._absorb(fold, family, "b.", s, {"n.weight": old}, {}, result)  # type: ignore[arg-type]
    new = result.tensors["b.n.weight"]
    assert new.dtype == torch.bfloat16
    assert torch.allclose((new.float() + offset) * used, old.float() + offset, rtol=1e-6)
    assert float(used[0]) == 2.0 and (float(used[1]) == 1.0) == bool(offset)


def test_unscaled_linears_keep_what_precedes_them(model_of: Callable[[str], Path]) -> None:
    """A group that stays in BF16 is not scaled, so neither its norm nor its v rows may change."""
    checkpoint = Checkpoint(model_of("llama"))
    ignored = ("lm_head", "re:.*self_attn.*", "model.layers.1")
    (blocks,) = collect(checkpoint, recipe(method="awq", ignore=ignored), data=sequences())
    assert blocks[1].linears == {} and blocks[1].tensors == {}
    assert all(".mlp." in n for n in blocks[0].linears)
    assert set(blocks[0].tensors) <= {"model.layers.0.post_attention_layernorm.weight"}


def test_input_scales_follow_the_scaled_inputs(model_of: Callable[[str], Path]) -> None:
    path = model_of("qwen3")
    r = recipe(method="nvfp4", scaling="awq", activations="fp4", group_size=16)
    data = sequences()[:2]
    (blocks,) = collect(Checkpoint(path), r, data=data)
    model = load(path)
    names = list(blocks[0].linears)
    plain = real_inputs(model, names, [torch.stack(data)])
    with torch.no_grad():
        for name, value in blocks[0].tensors.items():
            model.get_parameter(name).copy_(value)
        for name, solved in blocks[0].linears.items():
            model.get_submodule(name).weight.copy_(dequantize(solved.q))  # type: ignore[operator, union-attr]
    scaled = real_inputs(model, names, [torch.stack(data)])
    for name in names:
        scale = blocks[0].linears[name].q.input_scale
        assert scale is not None and scale > 0
        seen = float(scaled[name][0].abs().max()) / (6 * 448)
        assert scale > 0.9 * seen, "calibrated inputs must not saturate"
        if (
            name.endswith(("q_proj", "k_proj", "v_proj"))
            and "model.layers.0.input_layernorm.weight" not in blocks[0].tensors
        ):
            assert scale == pytest.approx(float(plain[name][0].abs().max()) / (6 * 448), rel=1e-3)
