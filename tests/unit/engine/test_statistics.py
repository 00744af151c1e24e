"""What the pass sees is what the transformers model itself is fed, for every family."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import halfbyte.engine.loop as loop_module
from halfbyte.algo import Stats, dequantize
from halfbyte.engine import BlockResult, Skeleton
from halfbyte.engine.importance import first_token
from halfbyte.engine.loop import make_batches, sample
from halfbyte.errors import HalfbyteError
from halfbyte.models import Checkpoint, family_of
from halfbyte.recipe.schema import Recipe
from tests.tiny import DENSE, FAMILIES, make_tiny
from tests.unit.engine.conftest import (
    BLOCKS,
    by_position,
    collect,
    identical,
    load,
    real_inputs,
    recipe,
    same,
    sequences,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_give_the_models_own_hidden_states(family: str, model_of: Callable[[str], Path]) -> None:
    """Masks, windows, position embeddings and embedding scales are the model's: equal bits, no tolerance."""
    path = model_of(family)
    skeleton = Skeleton(Checkpoint(path))
    batches = [ids for ids, _ in make_batches(sequences(), 96)]
    assert len({tuple(ids.shape) for ids in batches}) > 1
    count = skeleton.family.num_blocks
    model = load(path)
    seen = real_inputs(model, [*(f"model.layers.{i}" for i in range(count)), "model.norm"], batches)
    hidden, arguments = skeleton.embed(batches)
    with torch.no_grad():
        for index in range(count):
            assert all(torch.equal(x, y) for x, y in zip(hidden, seen[f"model.layers.{index}"]))
            block = skeleton.load_block(index)
            hidden = [loop_module.call(block, x, arguments[tuple(ids.shape)][index]) for x, ids in zip(hidden, batches)]
            skeleton.drop_block(index)
            assert all(p.is_meta for p in block.parameters())
    assert all(torch.equal(x, y) for x, y in zip(hidden, seen["model.norm"]))


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_sliding_windows_matter_in_these_tests(family: str, model_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Without its window the tiny model gives other hidden states, so that the test above would see a lost mask."""
    wide = make_tiny(family, tmp_path, **BLOCKS.get(family, {}), sliding_window=200)
    ids = [sequences()[0][None]]
    name = "model.norm"
    near, far = (real_inputs(load(p), [name], ids)[name][0] for p in (model_of(family), wide))
    assert torch.equal(near[:, :16], far[:, :16]) and not torch.equal(near[:, 20:], far[:, 20:])


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_kept_token(family: str, model_of: Callable[[str], Path]) -> None:
    path = model_of(family)
    skeleton = Skeleton(Checkpoint(path), dtype=torch.float32)
    model = load(path, torch.float32)
    batches = make_batches(sequences(), 200)
    hidden, arguments = skeleton.embed(ids for ids, _ in batches)
    with torch.no_grad():
        for index in range(skeleton.family.num_blocks):
            block = skeleton.load_block(index)
            hidden = [
                loop_module.call(block, x, arguments[tuple(i.shape)][index]) for x, (i, _) in zip(hidden, batches)
            ]
    padded = 0
    for x, (ids, keep) in zip(hidden, batches):
        mask = torch.ones(ids.shape, dtype=torch.bool) if keep is None else keep.view(ids.shape)
        padded += int((~mask).sum())
        for row, tokens, kept in zip(x, ids, mask):
            alone = real_inputs(model, ["model.norm"], [tokens[kept][None]])["model.norm"][0][0]
            assert float((row[kept] - alone).abs().max()) < 1e-4 * float(alone.abs().max())
    assert padded > 0


def test_batches_hold_every_token_once_within_the_budget() -> None:
    given = sequences()
    batches = make_batches(given, 90)
    rows = []
    for ids, keep in batches:
        assert ids.numel() <= 90 and ids.dtype == torch.int64
        mask = torch.ones(ids.shape, dtype=torch.bool) if keep is None else keep.view(ids.shape)
        assert keep is None or not bool(keep.all())
        assert bool((mask[:, :-1] | ~mask[:, 1:]).all()), "padding is on the right"
        rows += [row[m].tolist() for row, m in zip(ids, mask)]
    assert sorted(rows) == sorted(s.tolist() for s in given)
    assert len(make_batches([torch.ones(500, dtype=torch.int64)], 90)) == 1


@pytest.mark.parametrize(("count", "tokens", "expected"), [(128, 16384, 32), (10, 16384, 10), (3, 5, 1), (7, 1800, 3)])
def test_a_sample_is_evenly_spread(count: int, tokens: int, expected: int) -> None:
    whole = [torch.full((512,), i) for i in range(count)]
    chosen = [int(one[0]) for one in sample(whole, tokens)]
    assert len(chosen) == expected == len(set(chosen)) and chosen[0] == 0
    gaps = {b - a for a, b in pairwise(chosen)}
    assert not gaps or max(gaps) - min(gaps) <= 1, "neighbours are not evenly far apart"


def test_the_fast_tier_looks_at_a_sample_and_takes_no_gradients(
    model_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, data = Checkpoint(model_of("llama")), sequences() * 4
    seen: list[int] = []
    monkeypatch.setattr(loop_module, "SAMPLE_TOKENS", 150)
    real = loop_module.make_batches
    monkeypatch.setattr(
        loop_module, "make_batches", lambda some, budget: seen.append(sum(map(len, some))) or real(some, budget)
    )
    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "first_token", None)
        (fast,) = collect(checkpoint, recipe(method="gptq", effort="fast"), data=data)
    assert len(seen) == 1 and 80 <= seen[0] <= 150 and set(fast) == set(range(3))
    collect(checkpoint, recipe(method="gptq"), data=data)
    collect(checkpoint, recipe(method="rtn"), data=data)
    collect(checkpoint, recipe(method="nvfp4", group_size=16, activations="fp4", effort="fast"), data=data)
    assert seen[1:] == [sum(map(len, data))] * 3, "where a sample would show, all is looked at"
    with pytest.raises(HalfbyteError, match="they share no pass"):
        collect(checkpoint, recipe(method="gptq", effort="fast"), recipe(method="gptq"), data=data)


@pytest.mark.parametrize("family", DENSE)
def test_gram_statistics_are_those_of_the_model(
    family: str, model_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model_of(family)
    checkpoint = Checkpoint(path)
    kept: dict[int, dict[str, Stats]] = {}

    def spy(_recipe: Recipe, _family: object, index: int, *rest: object) -> BlockResult:
        kept[index] = rest[2]  # type: ignore[assignment]
        return BlockResult()

    monkeypatch.setattr(loop_module, "solve_block", spy)
    data = sequences()
    collect(checkpoint, recipe(method="gptq", indivisible="smaller"), data=data, batch_tokens=100)
    batches = make_batches(data, 100)
    groups = family_of(checkpoint.config).groups
    names = [f"model.layers.{i}.{n}" for i in kept for g in groups for n in g.names]
    seen = real_inputs(load(path), names, [ids for ids, _ in batches])
    weights_of = first_token(Skeleton(checkpoint), data)
    for index, stats in kept.items():
        assert set(stats) == {"qkv", "o", "gate_up", "down"}
        for group in groups:
            for name in group.names:
                parts, weights = [], []
                for x, (ids, keep) in zip(seen[f"model.layers.{index}.{name}"], batches):
                    weight = by_position(weights_of, (index, group.kind), ids.shape)
                    rows = slice(None) if keep is None else keep
                    parts.append(x.flatten(0, -2)[rows])
                    weights.append(weight.flatten()[rows])
                same(stats[group.kind], torch.cat(parts).double(), torch.cat(weights))


def test_lm_head_sees_the_final_norms_output(model_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import halfbyte.algo as algo

    path = model_of("llama")
    heads: list[Stats] = []
    real = algo.solve_group

    def spy(weights: list[torch.Tensor], stats: Stats, *rest: object) -> object:
        heads.append(stats)
        return real(weights, stats, *rest)  # type: ignore[arg-type]

    for module in (algo, loop_module):
        monkeypatch.setattr(module, "solve_group", spy, raising=False)
    data = sequences()
    collect(Checkpoint(path), recipe(method="gptq", ignore=()), data=data, batch_tokens=100)
    batches = make_batches(data, 100)
    seen = real_inputs(load(path), ["lm_head"], [ids for ids, _ in batches])["lm_head"]
    X = torch.cat([x.flatten(0, -2)[slice(None) if k is None else k] for x, (_, k) in zip(seen, batches)])
    assert len(heads) == 1
    same(heads[0], X.double(), torch.ones(len(X), dtype=torch.float64))


def test_propagation_sees_the_quantized_blocks(
    model_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model_of("llama")
    settings = {"method": "awq", "damp": 0.01}
    kept: dict[str, dict[int, dict[str, Stats]]] = {"plain": {}, "behind": {}}
    real = loop_module.solve_block

    def spy(r: Recipe, family: object, index: int, *rest: object) -> BlockResult:
        kept["behind" if r.propagate else "plain"][index] = rest[2]  # type: ignore[assignment]
        return real(r, family, index, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(loop_module, "solve_block", spy)
    data = [sequences()[0], sequences()[1]]
    (plain,) = collect(Checkpoint(path), recipe(**settings), data=data)
    (behind,) = collect(Checkpoint(path), recipe(**settings, propagate=True), data=data)
    assert identical(plain[0], behind[0]), "nothing precedes the first block"
    assert not identical(plain[1], behind[1])
    model = load(path)
    with torch.no_grad():
        for result in (behind[0], behind[1]):
            for name, solved in result.linears.items():
                model.get_submodule(name).weight.copy_(dequantize(solved.q))  # type: ignore[operator, union-attr]
            for name, value in result.tensors.items():
                model.get_parameter(name).copy_(value)
    name = "model.layers.2.self_attn.q_proj"
    X = torch.cat(real_inputs(model, [name], [torch.stack(data)])[name]).double()
    weight = by_position(first_token(Skeleton(Checkpoint(path)), data), (2, "qkv"), X.shape[:2])
    moment = (X.square() * weight[..., None]).flatten(0, 1).sum(0) / weight.sum()
    assert torch.allclose(kept["behind"][2]["qkv"].second_moment_I.double(), moment, rtol=1e-4)
    assert not torch.allclose(kept["plain"][2]["qkv"].second_moment_I.double(), moment, rtol=1e-2)
