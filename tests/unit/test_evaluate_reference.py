"""BF16's side of the comparison: what is kept of it, how exact that is, and how it is found again."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate import TokenScores, cached_reference, compare, compare_with_reference
from halfbyte.evaluate.cache import LIMIT, evict, references_dir
from halfbyte.evaluate.reference import Reference, reference_of
from halfbyte.evaluate.scoring import Head, hidden_of, token_statistics
from halfbyte.types import Quiet
from tests.tiny import FAMILIES, make_tiny
from tests.unit.test_evaluate import perturbed, random_windows


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    made = {}

    def get(family: str = "llama"):
        if family not in made:
            made[family] = make_tiny(family, tmp_path_factory.mktemp(family))
        return AutoModelForCausalLM.from_pretrained(made[family], dtype=torch.bfloat16).eval()

    return get


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(LIMIT, raising=False)


def same(a: TokenScores, b: TokenScores) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in TokenScores.__dataclass_fields__)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_the_head_are_the_logits(bf16, family):
    """Bit for bit where the matrix product has the same shape; and so KL and the most likely tokens."""
    baseline, model, windows = bf16(family), perturbed(bf16(family)), random_windows([48])
    ids = windows.ids[0][None]
    with torch.inference_mode():
        p, q = (m(ids, use_cache=False).logits for m in (baseline, model))
        assert torch.equal(Head.of(baseline)(hidden_of(baseline, ids)), p)
    full = token_statistics(p[0, :-1], q[0, :-1], ids[0, 1:])
    kept = compare_with_reference(reference_of(baseline, windows, noise_tokens=1), model)
    error = np.abs(kept.scores.kl - full["kl"].numpy()).mean()
    assert error <= 0.05 * compare(baseline, model, windows).noise_floor["kl_mean"] + 1e-6, error
    assert (kept.scores.top1 == full["top1"].numpy()).mean() > 0.97 and kept.scores.kl.mean() > 0.001


def test_what_comes_back_from_disk_gives_the_very_figures(bf16, tmp_path):
    baseline, model, windows = bf16("gemma2"), perturbed(bf16("gemma2")), random_windows([40, 7, 40, 25])
    windows.scored[1][:] = False
    direct = compare(baseline, model, windows, batch_tokens=64)
    made = reference_of(baseline, windows, batch_tokens=64, key="k")
    made.save(tmp_path / "kept")
    kept = Reference.load(tmp_path / "kept")
    found = compare_with_reference(kept, model)
    assert same(direct.scores, found.scores) and direct.metrics == found.metrics
    assert found.noise_floor == direct.noise_floor and kept.head.cap == 30.0
    size = sum(file.stat().st_size for file in (tmp_path / "kept").iterdir())
    assert size < 1.1 * kept.facts["bytes"] + 8192
    (tmp_path / "kept" / "reference.safetensors").write_bytes(b"")
    with pytest.raises(HalfbyteError, match="no whole reference"):
        Reference.load(tmp_path / "kept")


def test_the_second_artifact_does_not_run_bf16_again(bf16):
    baseline, windows, runs, told = bf16(), random_windows([30, 30]), [], Quiet()

    def load():
        runs.append(1)
        return baseline

    first = cached_reference(load, windows, "f" * 64, "cpu", noise_tokens=30)
    again = cached_reference(load, windows, "f" * 64, "cpu", noise_tokens=30, progress=told)
    assert len(runs) == 1 and torch.equal(first.hidden, again.hidden) and "not run again" in told.notices[0]
    (kept,) = references_dir().iterdir()
    (kept / "reference.safetensors").write_bytes(b"broken")
    cached_reference(load, windows, "f" * 64, "cpu", noise_tokens=30)
    assert len(runs) == 2 and Reference.load(kept).facts == again.facts, "what is damaged is made again"
    other = random_windows([30, 30])
    other.scored[1][:20] = False
    for changed in ((windows, "e" * 64, "cpu"), (other, "f" * 64, "cpu"), (random_windows([30], 1), "f" * 64, "cpu")):
        cached_reference(load, *changed, noise_tokens=30)
    assert len(runs) == 5 and len(list(references_dir().iterdir())) == 4


def test_the_cache_keeps_its_limit(bf16, monkeypatch):
    baseline, told = bf16(), Quiet()
    texts = [random_windows([30], seed) for seed in range(3)]
    for at, windows in enumerate(texts):
        cached_reference(lambda: baseline, windows, "f" * 64, "cpu", noise_tokens=30)
        for place in references_dir().iterdir():
            file = place / "reference.json"
            if json.loads(file.read_text())["key"] and file.stat().st_mtime > 100:
                os.utime(file, (at, at))
    cached_reference(lambda: baseline, texts[0], "f" * 64, "cpu", noise_tokens=30)
    one = sum(file.stat().st_size for file in next(references_dir().iterdir()).iterdir())
    assert len(evict(2 * one + 100)) == 1 and len(evict(2 * one + 100)) == 0
    used = cached_reference(pytest.fail, texts[0], "f" * 64, "cpu", noise_tokens=30)
    assert len(used.windows) == 1, "the one that was used last stays"
    monkeypatch.setenv(LIMIT, "0")
    cached_reference(lambda: baseline, texts[1], "f" * 64, "cpu", noise_tokens=30, progress=told)
    assert len(list(references_dir().iterdir())) == 2 and not told.notices, "nothing is kept, and nothing goes wrong"
    monkeypatch.setenv(LIMIT, "much")
    with pytest.raises(UsageError, match="no number of GiB"):
        cached_reference(lambda: baseline, texts[1], "f" * 64, "cpu")


def test_a_cache_that_cannot_be_written_costs_a_notice(bf16, monkeypatch):
    def full(*_args):
        raise HalfbyteError("the disk is full")

    monkeypatch.setattr(Reference, "save", full)
    told = Quiet()
    found = cached_reference(bf16, random_windows([30]), "f" * 64, "cpu", noise_tokens=30, progress=told)
    assert found.hidden.shape == (29, 128) and "not kept: the disk is full" in told.notices[0]
    assert not list(references_dir().glob("*"))
