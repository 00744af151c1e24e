"""Fidelity: windows, scores against a naive computation, intervals, the result file."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from halfbyte.calibration import CalibrationSet, generate
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate import (
    bootstrap,
    compare,
    mixed_windows,
    score_reference,
    set_windows,
    text_windows,
    write_result,
)
from halfbyte.evaluate.scoring import logits_of
from halfbyte.evaluate.windows import Windows, batches, doubling
from tests.tiny import DENSE, make_tiny, tiny_tokenizer
from tests.unit.test_calibration import with_bos


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def get(family: str, dtype=torch.float32):
        if family not in made:
            made[family] = make_tiny(family, tmp_path_factory.mktemp(family))
        return AutoModelForCausalLM.from_pretrained(made[family], dtype=dtype).eval()

    return get


def perturbed(model, amount: float = 0.15):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.add_(amount * parameter.std() * torch.randn_like(parameter))
    return model


def random_windows(lengths, seed=0) -> Windows:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(5, 261, (n,), generator=generator) for n in lengths]
    masks = [torch.arange(n) > 0 for n in lengths]
    return Windows(ids, masks, "random", max(lengths), max(lengths))


def naive(baseline, model, windows):
    """Every window alone, float64 log-softmax over the whole vocabulary."""
    rows = {"loglik_baseline": [], "loglik": [], "kl": [], "top1": []}
    for ids, mask in zip(windows.ids, windows.scored):
        with torch.no_grad():
            p, q = (m(ids.unsqueeze(0)).logits[0].double().log_softmax(-1) for m in (baseline, model))
        for t in mask.nonzero().flatten().tolist():
            rows["loglik_baseline"].append(p[t - 1, ids[t]].item())
            rows["loglik"].append(q[t - 1, ids[t]].item())
            rows["kl"].append((p[t - 1].exp() * (p[t - 1] - q[t - 1])).sum().item())
            rows["top1"].append(p[t - 1].argmax().item() == q[t - 1].argmax().item())
    return {name: np.array(values) for name, values in rows.items()}


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("batch_tokens", [1, 100])
def test_scores_equal_the_naive_ones(models, family, batch_tokens, monkeypatch):
    monkeypatch.setattr("halfbyte.evaluate.scoring.CHUNK_ELEMENTS", {"cpu": 7 * 320})
    baseline, model = models(family), perturbed(models(family))
    windows = random_windows([30, 7, 24, 2, 30])
    found = compare(baseline, model, windows, batch_tokens=batch_tokens)
    expected = naive(baseline, model, windows)
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(found.scores, name), values, atol=2e-4, err_msg=name)
    assert found.scores.window.tolist() == [i for i, n in enumerate([30, 7, 24, 2, 30]) for _ in range(n - 1)]
    assert found.scores.position.tolist() == [t for n in [30, 7, 24, 2, 30] for t in range(1, n)]
    metric = {name: m["value"] for name, m in found.metrics.items()}
    assert metric["ppl"] == pytest.approx(math.exp(-expected["loglik"].mean()), rel=1e-4)
    assert metric["ppl_ratio"] == pytest.approx(metric["ppl"] / metric["ppl_baseline"])
    assert metric["loglik_gap"] == pytest.approx(math.log(metric["ppl_ratio"]))
    assert metric["kl_mean"] == pytest.approx(expected["kl"].mean(), rel=1e-3) and metric["kl_mean"] > 0.001
    assert all(m["low"] <= m["value"] <= m["high"] for m in found.metrics.values())


def test_a_model_equals_itself_and_the_noise_floor_is_small(models):
    model = models("llama", torch.bfloat16)
    found = compare(model, model, random_windows([40] * 6))
    value = {name: metric["value"] for name, metric in found.metrics.items()}
    assert value["kl_mean"] == value["kl_p999"] == 0 and value["top1"] == 1 and value["ppl_ratio"] == 1
    assert 0 <= found.noise_floor["kl_mean"] < 1e-2 and found.noise_floor["top1"] > 0.9


@pytest.mark.parametrize("family", DENSE)
def test_two_pieces_are_the_same_mathematics(models, family):
    ids = random_windows([50]).ids[0].unsqueeze(0)
    model = models(family)
    torch.testing.assert_close(logits_of(model, ids), logits_of(model, ids, split=20), atol=2e-4, rtol=1e-3)


def test_only_masked_tokens_count(models):
    baseline, model = models("llama"), perturbed(models("llama"))
    windows = random_windows([20, 20])
    masks = [torch.arange(20) >= 12, torch.zeros(20, dtype=torch.bool)]
    found = compare(baseline, model, Windows(windows.ids, masks, "x", 20, 20), batch_tokens=20)
    assert found.scores.position.tolist() == list(range(12, 20))
    np.testing.assert_allclose(
        found.scores.kl, naive(baseline, model, Windows(windows.ids, masks, "x", 20, 20))["kl"], atol=2e-4
    )


def test_log_likelihood_gap_estimates_the_divergence(models):
    baseline, model = models("llama"), perturbed(models("llama"), 0.3)
    own = generate(baseline, tiny_tokenizer(), [48] * 48, seed=2)
    found = compare(baseline, model, set_windows(CalibrationSet.of(own.sequences, {}, own.sampled)), batch_tokens=4096)
    scores = found.scores
    difference = (scores.loglik_baseline - scores.loglik) - scores.kl
    error = difference.std() / math.sqrt(len(difference))
    assert abs(difference.mean()) < 4 * error and found.metrics["kl_mean"]["value"] > 10 * error
    assert found.windows.self_generated and not found.windows.scored[0][:6].any()


def test_reference_scores_all_but_the_first(models):
    model, windows = models("llama"), random_windows([30, 9, 30])
    windows = Windows(windows.ids, [torch.zeros_like(i).bool() for i in windows.ids], "x", 30, 30)
    found = score_reference(model, windows, batch_tokens=64)
    everything = Windows(windows.ids, [torch.arange(len(i)) > 0 for i in windows.ids], "x", 30, 30)
    assert found["tokens"] == 66
    assert found["perplexity"] == pytest.approx(math.exp(-naive(model, model, everything)["loglik"].mean()), rel=1e-4)


def test_failures_are_one_line(models, tmp_path):
    model = models("llama")
    other = AutoModelForCausalLM.from_pretrained(
        make_tiny("llama", tmp_path / "m", vocab_size=300), dtype=torch.float32
    )
    with pytest.raises(HalfbyteError, match="320 and 300 tokens"):
        compare(model, other.eval(), random_windows([10]))
    broken = models("llama")
    with torch.no_grad():
        broken.model.norm.weight[3] = float("nan")
    with pytest.raises(HalfbyteError, match="NaN"):
        compare(model, broken, random_windows([10]))
    with pytest.raises(HalfbyteError, match="NaN"):
        score_reference(broken, random_windows([10]))


def test_text_windows_are_the_stream_s_first_tokens(tmp_path):
    (tmp_path / "a.txt").write_text("A first line\n\nand more text " * 9)
    stream = tiny_tokenizer()((tmp_path / "a.txt").read_text(), add_special_tokens=False)["input_ids"]
    windows = text_windows(tmp_path / "a.txt", tiny_tokenizer(), window=32, count=3)
    assert torch.cat(windows.ids).tolist() == stream[:96] and windows.tokens == 3 * 31
    assert len(text_windows(tmp_path / "a.txt", tiny_tokenizer(), window=32)) == len(stream) // 32
    needs = r"gives 252, 8 windows of 32 need 256"
    with pytest.raises(HalfbyteError, match=needs):
        text_windows(tmp_path / "a.txt", tiny_tokenizer(), window=32, count=8)
    with pytest.raises(UsageError):
        text_windows(tmp_path / "a.txt", tiny_tokenizer(), window=32, stride=33)


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), with_bos()])
def test_overlapping_windows_score_each_token_once(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(bytes(range(33, 123)) * 2)
    stream = tokenizer((tmp_path / "a.txt").read_text(), add_special_tokens=False)["input_ids"]
    windows = text_windows(tmp_path / "a.txt", tokenizer, window=32, stride=8, count=6)
    scored = torch.cat([ids[mask] for ids, mask in zip(windows.ids, windows.scored)]).tolist()
    first = len(windows.ids[0]) - (len(windows.ids[0]) - int(windows.scored[0].sum()))
    skipped = 0 if windows.ids[0][0] == 1 else 1
    assert scored == stream[skipped : skipped + len(scored)] and len(scored) == first + 5 * 8
    assert all(len(ids) == 32 for ids in windows.ids)


def test_batches_hold_every_window_within_the_bound():
    windows = random_windows([3, 60, 8, 60, 20, 5])
    seen = {}
    for members, ids in batches(windows, 64):
        assert ids.numel() <= 64
        seen |= {i: ids[row, : len(windows.ids[i])].tolist() for row, i in enumerate(members)}
    assert seen == {i: ids.tolist() for i, ids in enumerate(windows.ids)}


def test_bootstrap_equals_drawing_windows():
    rng = np.random.default_rng(0)
    window = np.repeat(np.arange(12), rng.integers(1, 9, 12))
    values = rng.random(len(window))
    counts = bootstrap.draw_counts(12, seed=0, replicates=20)
    drawn = [np.concatenate([np.tile(values[window == w], c[w]) for w in range(12)]) for c in counts]
    np.testing.assert_allclose(bootstrap.mean_replicates(values, window, counts), [d.mean() for d in drawn])
    found = bootstrap.quantile_replicates(values, window, counts, (0.5, 0.99, 0.999))
    expected = [[np.quantile(d, q, method="inverted_cdf") for q in (0.5, 0.99, 0.999)] for d in drawn]
    np.testing.assert_array_equal(found, expected)


def test_the_interval_has_the_width_that_theory_gives():
    values = np.random.default_rng(1).normal(size=400)
    counts = bootstrap.draw_counts(400, seed=0)
    found = bootstrap.interval(bootstrap.mean_replicates(values, np.arange(400), counts), values.mean())
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    again = bootstrap.interval(bootstrap.mean_replicates(values, np.arange(400), bootstrap.draw_counts(400, 0)), 0)
    assert again["low"] == found["low"]


def test_result_file(models, tmp_path):
    model = models("llama")
    windows = random_windows([20, 20, 12])
    path = write_result(tmp_path / "out", compare(model, perturbed(models("llama")), windows), "DIR", "MODEL")
    result = json.loads(path.read_text())
    assert path.name == "eval.json" and (result["schema"], result["kind"], result["confidence"]) == (1, "eval", 0.95)
    assert set(result) == {
        "schema", "kind", "model", "baseline", "text", "metrics", "noise_floor", "self_generated", "seconds",
        "confidence", "by_position", "by_confidence", "kl_histogram", "worst",
    }  # fmt: skip
    assert result["text"] == {
        "source": "random", "sha256": windows.sha256, "windows": 3, "window": 20, "stride": 20, "tokens": 49,
    }  # fmt: skip
    assert set(result["metrics"]) == {
        "ppl_baseline", "ppl", "ppl_ratio", "kl_mean", "kl_median", "kl_p99", "kl_p999", "top1", "flips", "loglik_gap",
    }  # fmt: skip
    assert set(result["noise_floor"]) == {"kl_mean", "top1", "ppl_ratio", "how"}


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), with_bos()])
def test_mixed_windows_follow_the_stream(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("Some text that goes on, " * 400)
    stream = tokenizer((tmp_path / "a.txt").read_text(), add_special_tokens=False)["input_ids"]
    windows = mixed_windows(tmp_path / "a.txt", tokenizer, tokens=6000, longest=1024)
    lengths = [len(ids) for ids in windows.ids]
    assert lengths == [256] * 8 + [512] * 4 + [1024] * 2 and windows.window == 1024
    head = len(windows.ids[0]) - int(windows.scored[0].sum()) if windows.ids[0][0] == 1 else 0
    kept = [ids[head:] for ids in windows.ids]
    assert torch.cat(kept).tolist() == stream[: sum(lengths) - head * len(lengths)]
    assert windows.tokens == sum(lengths) - len(lengths)
    with pytest.raises(HalfbyteError, match=r"the text gives 9,600, .* need"):
        mixed_windows(tmp_path / "a.txt", tokenizer, tokens=20000, longest=1024)


@pytest.mark.parametrize(
    ("tokens", "longest", "lengths"),
    [
        (50_000, 8192, {256: 33, 512: 16, 1024: 8, 2048: 4, 4096: 2, 8192: 1}),
        (50_000, 131_072, {256: 33, 512: 16, 1024: 8, 2048: 4, 4096: 2, 8192: 1}),
        (5000, 8192, {256: 7, 512: 3, 1024: 2}),
        (50_000, 2000, {256: 49, 512: 24, 1024: 12, 2000: 6}),
        (100, 64, {64: 2}),
        (300, 256, {256: 1}),
    ],
)
def test_lengths_double_up_to_what_fits(tokens, longest, lengths):
    found = doubling(tokens, longest)
    assert found == sorted(found) and {n: found.count(n) for n in found} == lengths
    assert abs(sum(found) - tokens) <= tokens / 3


def test_lengths_that_cannot_be_are_refused():
    for tokens, longest in ((1, 64), (64, 1)):
        with pytest.raises(UsageError, match="do not fit"):
            doubling(tokens, longest)
