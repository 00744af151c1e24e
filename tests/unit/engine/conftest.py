"""What the tests of the engine share: models made once, a pass that keeps its results, what a model is really fed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from halfbyte.algo import Stats
from halfbyte.engine import BlockResult, Job, quantize_blocks
from halfbyte.engine.importance import Importance
from halfbyte.models import Checkpoint
from halfbyte.plan.layers import assign, quantized
from halfbyte.recipe.schema import Recipe
from tests.tiny import VOCAB, make_tiny

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
