"""The engine against the transformers model itself, for every family."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import halfbyte.engine.block as block_module
import halfbyte.engine.loop as loop_module
from halfbyte.algo import Solved, Stats, dequantize
from halfbyte.engine import BlockResult, Job, Skeleton, quantize_blocks, work_id
from halfbyte.engine.importance import Importance, first_token
from halfbyte.engine.loop import HEAD, make_batches, sample
from halfbyte.errors import HalfbyteError
from halfbyte.models import FAMILIES as ARCHITECTURES
from halfbyte.models import Checkpoint, Fold, family_of
from halfbyte.plan.layers import assign, quantized
from halfbyte.recipe.schema import Recipe
from halfbyte.types import Quiet
from tests.tiny import DENSE, FAMILIES, VOCAB, make_tiny

LENGTHS = (40, 40, 33, 20, 7)
"""Longer and shorter than the tiny models' sliding window of 16."""
BLOCKS = {"gemma3": {}, "llama": {"num_hidden_layers": 3, "tie_word_embeddings": False}}


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each family's tiny model, made once."""
    root, made = tmp_path_factory.mktemp("models"), dict[str, Path]()

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_tiny(family, root / family, **BLOCKS.get(family, {}))
        return made[family]

    return get


def sequences(seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (n,), generator=g) for n in LENGTHS]


def recipe(**settings: object) -> Recipe:
    return Recipe.model_validate({"group_size": 32, **settings})


def collect(
    checkpoint: Checkpoint, *recipes: Recipe, data: list[torch.Tensor] | None = None, **more: object
) -> list[dict]:
    """Run the pass; each recipe's results by block."""
    kept: list[dict[int, BlockResult]] = [{} for _ in recipes]
    jobs = [
        Job(r, quantized(assign(r, checkpoint)), lambda index, k=k: index in k, k.__setitem__)
        for r, k in zip(recipes, kept)
    ]
    quantize_blocks(checkpoint, jobs, data, **more)  # type: ignore[arg-type]
    return kept


def real_inputs(model: torch.nn.Module, names: list[str], batches: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """What each named module of the transformers model is fed, batch by batch, by hooks."""
    seen: dict[str, list[torch.Tensor]] = {n: [] for n in names}
    hooks = [
        model.get_submodule(n).register_forward_pre_hook(lambda _m, a, n=n: seen[n].append(a[0].detach().clone()))
        for n in names
    ]
    with torch.no_grad():
        for ids in batches:
            model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def load(path: Path, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation="eager").eval()


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


def by_position(importance: Importance, key: tuple[int, str], shape: tuple[int, ...]) -> torch.Tensor:
    """How often every token of a batch [B, T] counts, float64."""
    assert importance.first[key] not in (1.0, 0.0)
    out = torch.ones(shape, dtype=torch.float64)
    out[:, 0] = importance.first[key]
    return out


def same(stats: Stats, X: torch.Tensor, weights: torch.Tensor) -> None:
    """Statistics against X^T diag(w) X in float64; the off-diagonal to bfloat16's product, the diagonal to float32."""
    assert stats.tokens == len(X) == sum(LENGTHS)
    assert stats.gram_II is not None
    H = (X * weights[:, None]).T @ X / weights.sum()
    assert torch.allclose(stats.second_moment_I.double(), H.diagonal(), rtol=1e-5)
    assert torch.equal(stats.gram_II.diagonal(), stats.second_moment_I)
    assert torch.equal(stats.gram_II, stats.gram_II.T)
    magnitude = H.diagonal().clamp_min(1e-30).sqrt()
    assert float(((stats.gram_II - H) / magnitude / magnitude[:, None]).abs().max()) < 1e-2
    assert float((stats.gram_II - H).norm() / H.norm()) < 3e-3
    assert stats.absmax == pytest.approx(float(X.abs().max()))


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


def identical(one: BlockResult, other: BlockResult) -> bool:
    if set(one.linears) != set(other.linears) or set(one.tensors) != set(other.tensors):
        return False
    for name, a in one.linears.items():
        p, q = a.q, other.linears[name].q
        zeros = (p.zeros is None and q.zeros is None) or torch.equal(p.zeros, q.zeros)  # type: ignore[arg-type]
        rest = (p.global_scale, p.input_scale, p.group_size) == (q.global_scale, q.input_scale, q.group_size)
        if not (torch.equal(p.codes, q.codes) and torch.equal(p.scales, q.scales) and zeros and rest):
            return False
    return all(torch.equal(t, other.tensors[name]) for name, t in one.tensors.items())


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


def test_raised_damping_is_a_notice(model_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    method = importlib.import_module("halfbyte.algo.gptq")
    real = method._inverse_factor
    first = iter([True])
    monkeypatch.setattr(method, "_inverse_factor", lambda H: None if next(first, False) else real(H))
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
        collect(Checkpoint(tmp_path), recipe(method="rtn"))
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
