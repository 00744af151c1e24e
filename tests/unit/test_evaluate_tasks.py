"""Tasks through lm-eval: local ones, loaded and served, against a computation of our own."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate.metrics import bleu_statistics
from halfbyte.evaluate.pair import Pair, Serving
from halfbyte.evaluate.tasks import evaluate_tasks, local_tasks, write_tasks
from tests.tiny import make_tiny, tiny_tokenizer
from tests.unit.stand_in import service, vllm_of

PASSAGES = ["He went to the bank to get money", "The dog chased the cat", "She sang a song", "It rained all day"]
CHOICES = [("What barks?", ["dog", "tree", "stone"], "A"), ("What is wet?", ["fire", "water", "sand"], "B")]
SUMS = [("What is 1+1?", "It is 2. #### 2"), ("2+2?", "It is 4. #### 4"), ("3+3?", "Six. #### 6"),
        ("4+4?", "8. #### 8"), ("5+5?", "10. #### 10")]  # fmt: skip


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The layouts that the bundled tasks read."""
    place = tmp_path_factory.mktemp("data")
    (place / "tasks").mkdir()
    lines(place / "lambada-4.jsonl", [{"text": passage} for passage in PASSAGES])
    choices = [[{"label": "ABC"[i], "text": text} for i, text in enumerate(row)] for _, row, _ in CHOICES]
    lines(place / "tasks" / "commonsenseqa-dev.jsonl", [
        {"answerKey": key, "id": str(i), "question": {"stem": stem, "choices": choices[i]}}
        for i, (stem, _, key) in enumerate(CHOICES)
    ])  # fmt: skip
    lines(place / "tasks" / "gsm8k-5.jsonl", [{"question": q, "answer": a} for q, a in SUMS])
    return place


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    places = [make_tiny("llama", tmp_path_factory.mktemp("t") / "m", s, max_position_embeddings=600) for s in (0, 1)]
    return places, [AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval() for p in places]


@pytest.fixture(scope="module")
def tokenizer(models):
    tokenizer = tiny_tokenizer()
    tokenizer.name_or_path = str(models[0][0])
    return tokenizer


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setenv("OPENAI_API_KEY", "sk-not-for-you")
        yield


@torch.inference_mode()
def loglik(model, tokenizer, context, target):
    ids = tokenizer(context + target)["input_ids"]
    cut = len(tokenizer(context)["input_ids"])
    p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(p[t - 1, ids[t]]) for t in range(cut, len(ids)))


def test_bundled_tasks_loaded_and_served(models, tokenizer, data, tmp_path, capfd):
    pair = Pair(*models[1], tokenizer, ("base", "tiny"))
    result = evaluate_tasks(pair, data=data)
    assert json.loads(write_tasks(tmp_path, result).read_text()) == result
    assert (result["kind"], result["backend"], result["baseline"]) == ("tasks", "hf", "base")
    rows = {row["name"]: row for row in result["tasks"]}
    assert list(rows) == ["commonsenseqa-jsonl", "gsm8k-jsonl", "lambada-jsonl"] == list(local_tasks())
    assert [rows[name]["items"] for name in rows] == [2, 5, 4]

    right = {}
    for side, model in zip(("baseline", "model"), models[1]):
        found = []
        for stem, choices, key in CHOICES:
            scores = [loglik(model, tokenizer, f"Question: {stem}\nAnswer:", f" {choice}") for choice in choices]
            found.append(scores.index(max(scores)) == "ABC".index(key))
        right[side] = found
        assert rows["commonsenseqa-jsonl"][side]["value"] == sum(found) / 2
    assert rows["commonsenseqa-jsonl"]["flips"] == sum(a != b for a, b in zip(*right.values())) / 2
    (perplexity,) = rows["lambada-jsonl"]["others"]
    words = [passage.rpartition(" ") for passage in PASSAGES]
    total = sum(loglik(models[1][1], tokenizer, head, f" {last}") for head, _, last in words)
    assert perplexity["metric"] == "perplexity" and not perplexity["higher_is_better"]
    assert perplexity["model"]["value"] == pytest.approx(math.exp(-total / 4), rel=1e-3)
    assert rows["lambada-jsonl"]["length"] is None and rows["gsm8k-jsonl"]["length"]["model"] > 0
    shown = capfd.readouterr()
    assert shown.out == "" and "%|" not in shown.err and "lm_eval" not in shown.err, "lm-eval keeps quiet"

    with service(vllm_of(models[1][0], tokenizer)) as first, service(vllm_of(models[1][1], tokenizer)) as second:
        pair = Pair(first, second, tokenizer, ("base", "tiny"), Serving(tmp_path))
        served = evaluate_tasks(pair, ["lambada-jsonl", "commonsenseqa-jsonl"], data=data)
    assert served["backend"] == "vllm"
    for row in served["tasks"]:
        same = rows[row["name"]]
        assert [row["baseline"], row["model"], row["flips"]] == [same["baseline"], same["model"], same["flips"]]


def test_a_directory_of_tasks(models, tokenizer, tmp_path):
    """A YAML file with its data beside it, whatever the current directory is; one model against itself."""
    lines(tmp_path / "own.jsonl", [{"q": passage, "a": "x"} for passage in PASSAGES])
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\ndataset_kwargs: {data_files: {test: own.jsonl}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        "generation_kwargs: {max_gen_toks: 5, until: []}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    pair = Pair(models[1][0], models[1][0], tokenizer, ("base", "base"))
    result = evaluate_tasks(pair, [tmp_path], limit=3, chat=True)
    (row,) = result["tasks"]
    assert (row["name"], row["metric"], row["items"], row["flips"]) == ("own", "exact_match", 3, 0)
    assert row["length"]["ratio"] == {"value": 1, "low": 1, "high": 1} and row["length"]["passed"]
    (tmp_path / "own.jsonl").unlink()
    with pytest.raises(HalfbyteError, match="the task own cannot be loaded"):
        evaluate_tasks(pair, [tmp_path])
    (tmp_path / "own.yaml").write_text("task: [")
    with pytest.raises(UsageError, match=r"own\.yaml is no task"):
        evaluate_tasks(pair, [tmp_path / "own.yaml"])


def test_tasks_that_are_not_there(models, tokenizer, data, tmp_path):
    pair = Pair(*models[1], tokenizer, ("base", "tiny"))
    for tasks, place, says in (
        (["lambada_openia"], None, "did you mean 'lambada_openai'"),
        (["gsm8k-jsonl"], None, "--data"),
        (["default"], tmp_path, "no data of a bundled task"),
        (["gsm8k-jsonl"], tmp_path, "has no gsm8k"),
        ([tmp_path], None, "holds no task"),
    ):
        with pytest.raises(UsageError, match=says):
            evaluate_tasks(pair, tasks, data=place)


def test_a_missing_extra_is_one_line(models, tokenizer, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(HalfbyteError, match=r"tasks need lm-eval: pip install 'lm-eval\[api,hf\]'"):
        evaluate_tasks(Pair(*models[1], tokenizer, ("base", "tiny")), data=data)
    with pytest.raises(HalfbyteError, match="BLEU needs sacrebleu: pip install sacrebleu"):
        bleu_statistics("a", ["a"])
