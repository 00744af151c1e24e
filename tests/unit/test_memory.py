"""--memory: the limit holds, the bytes are the same, and what does not fit is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import halfbyte.engine.memory as memory_module
from halfbyte.engine import Job
from halfbyte.engine.memory import fit, free_bytes, need
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.experiments.mitigation import parse_bytes
from halfbyte.models import Checkpoint
from halfbyte.plan.layers import assign, quantized
from halfbyte.recipe.schema import Recipe
from tests.tiny import make_tiny
from tests.unit.artifacts import random_set
from tests.unit.sparse import LLAMA_70B, MIXTRAL, make_sparse

MIB = 1 << 20
WIDE = {"hidden_size": 512, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 1}
"""Much to hold between blocks, little to compute."""


def job(checkpoint: Checkpoint, **settings: object) -> Job:
    recipe = Recipe.model_validate(settings)
    return Job(recipe, quantized(assign(recipe, checkpoint)), lambda _: False, lambda *_: None)


def test_the_limit_holds_and_the_bytes_are_the_same(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "wide", **WIDE)
    large = random_set(tokens=98_304, longest=256).save(tmp_path / "large")
    small = random_set(tokens=2048, longest=256).save(tmp_path / "small")
    limit = 176 * MIB
    words = [sys.executable, "-m", "tests.unit.memory_worker", model, large, small, tmp_path / "out", "none", limit]
    ended = subprocess.run(
        [str(word) for word in words],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    free, limited = map(int, ended.stdout.split())
    assert free > limit, "without a limit it takes more: the test could fail"
    assert limited <= limit
    names = sorted(p.name for p in (tmp_path / "out" / "none").glob("*.safetensors"))
    assert names
    for name in names:
        one, other = (tmp_path / "out" / word / name for word in ("none", str(limit)))
        assert one.read_bytes() == other.read_bytes()
    assert not (tmp_path / "out" / str(limit) / ".partial").exists()


def test_too_little_is_refused_in_one_line_that_says_what_is_needed(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_sparse(tmp_path / "70b", LLAMA_70B))
    data, one = [torch.zeros(512, dtype=torch.int64)] * 16, job(checkpoint, method="gptq", scaling="none")
    with pytest.raises(
        HalfbyteError, match=r"--memory of 4.00 GiB is too little .* needs some \d+\.\d+ GiB"
    ) as refusal:
        fit(checkpoint, [one], data, "cpu", 4096, 4 << 30)
    assert "\n" not in str(refusal.value)
    least = need(checkpoint, [one], 8192, 512).total
    assert fit(checkpoint, [one], data, "cpu", 4096, least).room.host == 0
    with pytest.raises(HalfbyteError):
        fit(checkpoint, [one], data, "cpu", 4096, least - 1)


def test_batches_shrink_before_a_limit_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_sparse(tmp_path / "wide", {**LLAMA_70B, "vocab_size": 512, "num_hidden_layers": 2}))
    one, data = job(checkpoint, method="rtn", effort="max"), [torch.zeros(512, dtype=torch.int64)] * 16
    whole, least = (need(checkpoint, [one], 8192, tokens).total for tokens in (4096, 512))
    assert least < whole
    assert fit(checkpoint, [one], data, "cpu", 4096, whole).batch_tokens == 4096
    fitted = fit(checkpoint, [one], data, "cpu", 4096, whole - 1)
    assert fitted.batch_tokens == 2048 and "batches of 2,048 tokens, not 4,096" in fitted.notice
    assert fit(checkpoint, [one], data, "cpu", 4096, least).batch_tokens < 4096


def test_what_a_pass_needs_grows_with_what_it_holds(tmp_path: Path) -> None:
    dense, sparse = (Checkpoint(make_sparse(tmp_path / c["model_type"], c)) for c in (LLAMA_70B, MIXTRAL))
    gptq, rtn = job(dense, method="gptq", scaling="none"), job(dense, method="rtn")
    block = 2 * (8192 * (8192 * 2 + 2 * 1024) + 3 * 8192 * 28672)
    grams = 4 * (3 * 8192**2 + 28672**2)
    solved = need(dense, [gptq], 65_536, 4096)
    assert solved.statistics == grams and block <= solved.weights <= block * 1.01
    assert solved.solve > 4 * 28672**2 + 2 * 28672**2, "a factor, and the Gram matrix in 16 bits"
    assert need(dense, [gptq], 65_536, 4096, thrifty=False).solve > solved.solve + 3 * 4 * 28672**2
    assert need(dense, [rtn], 0, 4096, data=False).total < solved.total / 2
    mixture = job(sparse, method="gptq", scaling="none")
    more, less = (need(sparse, [mixture], tokens, 4096) for tokens in (131_072, 65_536))
    assert more.statistics - less.statistics == 65_536 * 4096 * 2, "the experts' inputs stay in memory"


def test_without_a_limit_batches_stay_and_hidden_states_spill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums must not depend on how much happens to be free; a model too large is told of, and tried."""
    checkpoint = Checkpoint(make_sparse(tmp_path / "70b", LLAMA_70B))
    one, data = job(checkpoint, method="gptq", scaling="none"), [torch.zeros(512, dtype=torch.int64)] * 128
    monkeypatch.setattr(memory_module, "free_bytes", lambda: 8 << 30)
    fitted = fit(checkpoint, [one], data, "cpu", 4096, None)
    assert fitted.batch_tokens == 4096 and fitted.room.host == 0 and "may be too little" in fitted.notice
    monkeypatch.setattr(memory_module, "free_bytes", lambda: 256 << 30)
    fitted = fit(checkpoint, [one], data, "cpu", 4096, None)
    assert not fitted.notice and (fitted.room.host or 0) > 65_536 * 8192 * 2
    monkeypatch.undo()
    assert 0 < free_bytes() < 1 << 50


@pytest.mark.parametrize(("text", "size"), [("12GiB", 12 << 30), ("1.5 gb", 1_500_000_000), ("64MiB", 64 << 20)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text, "--memory") == size


@pytest.mark.parametrize("text", ["12", "much", "-1GiB", "0GiB", "12 XB"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--memory .*: write bytes with their unit, such as 12GiB"):
        parse_bytes(text, "--memory")
