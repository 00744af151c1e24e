"""Long context: prompts by rule and to the token, curves against planted answers, the whole on a tiny model."""

from __future__ import annotations

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate.curves import Run, buckets, by_length, perplexity_rows, ppl_drift, retrieval_drift
from halfbyte.evaluate.haystack import DEEP, STORIES, Item, answer_words, make_item
from halfbyte.evaluate.long_context import _conditions, evaluate_long_context, write_long_context
from halfbyte.evaluate.pair import Pair, Serving
from halfbyte.types import Quiet
from tests.tiny import make_tiny, tiny_tokenizer
from tests.unit.stand_in import service, vllm_of


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.mark.parametrize("task", STORIES)
def test_a_prompt_has_its_length_and_holds_its_answer_once(tokenizer, task):
    words = answer_words(tokenizer)
    assert len(set(words.tokens)) == 16 and all(w[0] == chr(t + 28) for w, t in zip(words.words, words.tokens))
    for length in (1000, 1001, 2048):
        item = make_item(tokenizer, words, task, length, 0.5 if task in DEEP else None, seed=length)
        assert len(item.ids) == length - 1
        text = tokenizer.decode(item.ids)
        asked = text.rstrip().rpartition("? ")[2]
        word = words.words[words.tokens.index(item.answer)]
        assert text.endswith(" ") and item == make_item(tokenizer, words, task, length, item.depth, seed=length)
        assert follow(text, asked) == word, text
        assert item != make_item(tokenizer, words, task, length, item.depth, seed=length + 1)


def follow(text, asked):
    """The answer as a reader finds it: the sentence that is asked for, through equalities."""
    stated = [s.strip() for s in text.split("\n\n")[0].split(".") if s.strip().startswith(asked)]
    assert len(stated) == 1
    value = stated[0].removeprefix(asked).strip()
    return follow(text, f"The variable {value.split()[-1]} is") if value.startswith("equal to") else value


def test_a_needle_lies_at_its_depth(tokenizer):
    words = answer_words(tokenizer)
    for depth in (0.0, 0.25, 0.5, 1.0):
        text = tokenizer.decode(make_item(tokenizer, words, "needle", 4000, depth, 0).ids)
        assert abs(text.index(" The secret word") / len(text) - depth) < 0.06
    with pytest.raises(UsageError, match="--lengths"):
        make_item(tokenizer, words, "variables", 120, None, 0)


def planted(right):
    return [Run(key, np.array(values, dtype=float), []) for key, values in right.items()]


def test_drift_is_the_worst_length_of_planted_answers():
    items = [Item("needle", length, 0.5, [], 0) for length in (10, 20, 30) for _ in range(100)]
    base = [1] * 80 + [0] * 20
    lost = [1] * 50 + [0] * 50
    runs = planted({"bf16": base * 3, "4bit": base + lost + base, "better": [1] * 300})
    drift = retrieval_drift(items, runs, 0)
    assert drift["4bit"]["value"] == pytest.approx(0.3) and drift["better"]["value"] == 0
    assert 0.2 < drift["4bit"]["low"] < 0.3 < drift["4bit"]["high"] <= 0.41
    rows = by_length(items, runs, 0)
    assert [row["drop"]["4bit"]["value"] for row in rows] == pytest.approx([0, 0.3, 0])
    assert rows[0]["drop"]["4bit"]["low"] == rows[0]["drop"]["4bit"]["high"] == 0, "paired: no item differs"


def test_perplexity_by_position_of_planted_likelihoods():
    assert buckets(1025) == [(1, 256), (256, 512), (512, 1025)]
    assert buckets(2047) == [(1, 256), (256, 512), (512, 1024), (1024, 2047)] and buckets(50) == [(1, 50)]
    rng = np.random.default_rng(0)
    base = [np.log(rng.uniform(0.1, 0.5, 1023)) for _ in range(3)]
    worse = [w - np.where(np.arange(1, 1024) < 512, 0.01, 0.06) for w in base]
    runs = [Run("bf16", np.zeros(0), base), Run("4bit", np.zeros(0), worse)]
    rows = perplexity_rows(runs, 0)
    assert [(row["from"], row["to"], row["tokens"]) for row in rows] == [
        (1, 256, 765), (256, 512, 768), (512, 1024, 1536),
    ]  # fmt: skip
    naive = np.exp(-np.concatenate([w[511:] for w in base]).mean())
    assert rows[2]["ppl"]["bf16"]["value"] == pytest.approx(naive)
    assert [row["ratio"]["4bit"]["value"] for row in rows] == pytest.approx(np.exp([0.01, 0.01, 0.06]))
    assert rows[2]["ratio"]["4bit"]["low"] == pytest.approx(np.exp(0.06)), "paired: the texts' own spread is gone"
    assert rows[2]["ppl"]["4bit"]["low"] < rows[2]["ppl"]["4bit"]["value"] < rows[2]["ppl"]["4bit"]["high"]
    assert ppl_drift(runs, 0)["4bit"]["value"] == pytest.approx(np.exp(0.05) - 1)
    assert ppl_drift(runs[::-1], 0)["bf16"]["value"] == 0, "a ratio that falls is no drift"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = []
    for seed in (0, 1):
        place = make_tiny("llama", tmp_path_factory.mktemp("long") / "m", seed, max_position_embeddings=1024)
        made.append(AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval())
    return made


def test_the_whole_on_tiny_models_loaded_and_served(models, tokenizer, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    options = {"text": [text], "tasks": ("needle", "needles"), "depths": (0.0, 1.0), "samples": 2, "windows": 2}
    pair = Pair(*models, tokenizer, ("base", "tiny"))
    result = evaluate_long_context(pair, [700, 600], **options)
    assert json.loads(write_long_context(tmp_path, result).read_text()) == result
    assert (result["kind"], result["baseline"], result["lengths"]) == ("long_context", "base", [600, 700])
    cells = [(r["task"], r["length"], r["depth"]) for r in result["retrieval"]]
    assert cells == [(t, n, d) for n in (600, 700) for t, d in (("needle", 0.0), ("needle", 1.0), ("needles", None))]
    assert all(set(r["scores"]) == {"bf16", "4bit"} for r in result["retrieval"])
    assert set(result["drift"]) == set(result["ppl_drift"]) == {"4bit"}
    assert set(result["not_measured"]) == {"bf16+fp8kv", "4bit+fp8kv"}
    assert result["text"]["windows"] == 2 and [r["from"] for r in result["perplexity"]] == [1, 256, 512]
    ids = torch.tensor(tokenizer(text.read_text())["input_ids"])[: 2 * 699].reshape(2, 699)
    with torch.inference_mode():
        p = models[0](ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[:, :255]
    assert result["perplexity"][0]["ppl"]["bf16"]["value"] == pytest.approx(float(torch.exp(-p.mean())), rel=1e-4)
    with service(vllm_of(models[0], tokenizer)) as first, service(vllm_of(models[1], tokenizer)) as second:
        pair = Pair(first, second, tokenizer, ("base", "tiny"), Serving(tmp_path))
        served = evaluate_long_context(pair, [600, 700], **options)
    for key in ("retrieval", "by_length", "drift"):
        assert served[key] == result[key]
    rows = zip(served["perplexity"], result["perplexity"])
    assert all(a["ratio"]["4bit"]["value"] == pytest.approx(b["ratio"]["4bit"]["value"], rel=1e-3) for a, b in rows)


def test_impossible_lengths_and_text_that_is_short(models, tokenizer, tmp_path):
    pair = Pair(*models, tokenizer, ("base", "tiny"))
    with pytest.raises(UsageError, match="1024 positions"):
        evaluate_long_context(pair, [2048])
    text = tmp_path / "text.txt"
    text.write_text("Only a little text. " * 15)
    told = Quiet()
    found = evaluate_long_context(
        pair, [280, 600], text=[text], tasks=["needle"], depths=[0.5], samples=1, windows=4, progress=told
    )
    assert found["text"]["window"] == 279 and any("too short for 600" in n for n in told.notices)
    text.write_text("Nothing.")
    with pytest.raises(HalfbyteError, match="too few tokens"):
        evaluate_long_context(pair, [280], text=[text], tasks=["needle"], depths=[0.5], samples=1)


def test_fp8_is_tried_wherever_vllm_is_started(tmp_path):
    """vLLM itself says where it has no FP8 KV cache; its CPU build has one on AVX-512."""

    def tried(side, platform):
        conditions, missing = _conditions(Pair(side, "b", None, ("a", "b"), Serving(tmp_path, platform)))
        return [c.key for c in conditions], missing

    for platform in ("h100", "mi325x", "cpu"):
        assert tried("a", platform) == (["bf16+fp8kv", "4bit+fp8kv"], {})
    assert tried("http://127.0.0.1:8000", "h100")[0] == []


def test_a_server_without_an_fp8_cache_leaves_a_reason(tmp_path, monkeypatch):
    class Fixed:
        def choose(self, prompts, candidates, progress):
            return [candidates[0]] * len(prompts)

    @contextmanager
    def opened(self, side, context, progress, kv_cache="auto"):
        if kv_cache == "fp8":
            raise HalfbyteError("vLLM did not start: FP8 KV cache on CPU requires x86 with AVX-512 or AMX.")
        yield Fixed()

    monkeypatch.setattr(Pair, "open", opened)
    monkeypatch.setattr(Pair, "context", lambda self: 1024)
    pair = Pair("a", "b", tiny_tokenizer(), ("a", "b"), Serving(tmp_path, "cpu"))
    found = evaluate_long_context(pair, [280], tasks=["needle"], depths=[0.5], samples=1)
    assert set(found["not_measured"]) == {"bf16+fp8kv", "4bit+fp8kv"}
    assert "AVX-512" in found["not_measured"]["4bit+fp8kv"] and set(found["drift"]) == {"4bit"}
