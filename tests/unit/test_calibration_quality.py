"""What a set's manifest says of it: contamination, coverage, diversity, warnings; the command that shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from halfbyte.calibration import CalibrationSet, make_set, spec_from_mapping
from halfbyte.calibration.heldout import find_hits, read_held_out
from halfbyte.calibration.quality import coverage, diversity, warnings
from halfbyte.calibration.spec import SetSpec, Source
from halfbyte.errors import HalfbyteError, UsageError
from tests.tiny import make_tiny, tiny_tokenizer
from tests.unit.test_calibration_curate import jsonl, prose


def made_of(files: list[Path], strategy: Any = "curated", on_held_out: Any = "refuse", **options: Any) -> Any:
    places = [{"path": str(source)} for source in files]
    spec = spec_from_mapping(
        {**({"sources": places} if places else {}), "sequences": 16, "max_tokens": 128, **options}, "test"
    )
    return make_set(tiny_tokenizer(), spec, strategy=strategy, on_held_out=on_held_out)


def test_thirteen_words_in_a_row_are_a_hit(tmp_path: Path) -> None:
    held = prose(1, 100).split()
    (tmp_path / "held.txt").write_text(" ".join(held))
    found = read_held_out([str(tmp_path / "held.txt")], tiny_tokenizer())

    def ngrams(start: int, stop: int) -> int:
        text = f"{prose(2, 30)} here {', '.join(held[start:stop]).upper()}! There {prose(3, 30)}"
        return sum(hit.ngrams for hit in find_hits(found, [text]))

    assert [ngrams(10, 22), ngrams(10, 23), ngrams(10, 25), ngrams(0, 13), ngrams(87, 100)] == [0, 1, 3, 1, 1]
    assert find_hits(found, [prose(2, 30), " ".join(held[5:20])])[0].words == " ".join(held[5:18])
    assert len(found.grams[13]) == 88 and found.tokens.sum() == len(" ".join(held))


def test_short_held_out_texts_count_whole_from_eight_words_on(tmp_path: Path) -> None:
    texts = [prose(1, 9), prose(2, 7), prose(3, 40)]
    rows = [{"question": text, "answer": {"text": "yes"}} for text in texts]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_held_out([str(tmp_path / "task.jsonl")], tiny_tokenizer())
    assert {n: len(grams) for n, grams in found.grams.items()} == {8: 1, 10: 1, 13: 29} and found.unchecked == 0
    pad = prose(9, 20)
    hits = find_hits(found, [f"{pad} {text} yes {pad}" for text in texts])
    assert [hit.index for hit in hits] == [0, 1, 2]
    (tmp_path / "task.jsonl").write_text(json.dumps({"question": "seven words are not enough to tell"}) + "\n")
    assert read_held_out([str(tmp_path / "task.jsonl")], tiny_tokenizer()).unchecked == 1


@pytest.mark.parametrize("strategy", ["curated", "mixed", "stream"])
def test_contamination_is_refused_unless_allowed(tmp_path: Path, strategy: str) -> None:
    texts = [prose(i, 60) for i in range(60)]
    source = jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "held.txt").write_text(" ".join(texts))
    held = {"held_out": [str(tmp_path / "held.txt")]}
    with pytest.raises(
        HalfbyteError, match=r"1\d of \d\d sequences .* held.txt.*--drop-contaminated.*--allow-contam"
    ) as e:
        made_of([source], strategy, **held)
    assert "\n" not in str(e.value)
    told = made_of([source], strategy, "allow", **held).manifest["contamination"]
    assert (told["allowed"], told["ngram"]) == (True, 13) and 0.5 < told["share"] <= 1
    short = told["sequences_too_short_to_look_in"]
    assert told["sequences"] + short >= round(told["sequences"] / told["share"]) - 2, (
        "all but those (and a word cut in two)"
    )
    assert told["held_out"][0]["sha256"] and len(told["hits"]) == 8 and len(told["hits"][0]["words"].split()) == 13
    clean = made_of([source], strategy, held_out=[str(jsonl(tmp_path / "other.jsonl", [prose(999, 60)]))])
    assert clean.manifest["contamination"]["sequences"] == 0
    assert made_of([source], strategy).manifest["contamination"] is None


def test_contaminated_documents_are_dropped_on_request(tmp_path: Path) -> None:
    texts = [prose(i, 60) for i in range(60)]
    source = jsonl(tmp_path / "a.jsonl", texts)
    held = str(jsonl(tmp_path / "held.jsonl", [prose(500, 20) + " " + text for text in texts[:20]]))
    made = made_of([source], "curated", "drop", held_out=[held])
    told = made.manifest["contamination"]
    assert (told["sequences"], told["documents_dropped"]) == (0, 20)
    text = " ".join(tiny_tokenizer().decode(sequence.tolist()) for sequence in made.sequences)
    assert not any(" ".join(one.split()[:13]) in text for one in texts[:20])
    assert made.manifest["sources"][0]["steps"][-1] == {"step": "held-out text", "documents": 40}


def test_what_fits_no_strategy_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere.txt"
    for strategy, on_held_out, options, says in [
        ("curated", "drop", {}, "name the evaluation text with --held-out"),
        ("mixed", "refuse", {"languages": ["en"]}, "--strategy mixed filters nothing, and --language is given"),
        ("stream", "drop", {"held_out": ["x"]}, "and --drop-contaminated is given"),
        ("mixed", "refuse", {"sources": [{"path": "a.txt", "weight": 1}]}, "a.txt comes with weight"),
        ("mixed", "refuse", {"sources": [{"path": "a.parquet"}]}, "a.parquet comes with Parquet"),
        ("stream", "refuse", {"sources": [{"dataset": "a/b"}]}, "a/b comes with dataset"),
        ("curated", "refuse", {"sources": [], "min_chars": 9}, "min_chars is for text that is given"),
        ("stream", "refuse", {"sources": []}, "--strategy stream is for text that is given"),
    ]:
        sources = {"sources": [{"path": str(nowhere)}]}
        with pytest.raises(UsageError, match=says):
            made_of([], strategy, on_held_out, **{**sources, **options})


def test_coverage_is_the_share_of_tokens_that_occur() -> None:
    sequences = [torch.tensor([1, 1, 2]), torch.tensor([5])]
    counts = np.array([0, 6, 0, 2, 0, 0, 0, 0])
    assert coverage(sequences, 8, {"held_out": counts, "in_domain": None, "candidates": counts * 0}) == {
        "vocabulary": 0.375, "distinct_tokens": 3, "held_out": 0.75, "in_domain": None, "candidates": None,
    }  # fmt: skip


def test_diversity_falls_with_repetition() -> None:
    same = diversity([torch.arange(100)] * 10, [prose(1, 100)] * 10)
    other = diversity([torch.randint(0, 999, (100,)) for _ in range(10)], [prose(i, 100) for i in range(10)])
    assert same["distinct_4grams"] == 0.1 and other["distinct_4grams"] > 0.99
    assert same["compression"] > 2 * other["compression"] > 2
    assert diversity([torch.tensor([1, 2])], ["a"])["distinct_4grams"] == 0.0


def row(name: str, weight: float, share: float, documents: int = 99) -> dict[str, Any]:
    return {"name": name, "weight": weight, "share": share, "used_documents": documents}


FINE: dict[str, Any] = {
    "sequences": 256,
    "tokens": 100_000,
    "longest": 512,
    "kinds": {"text": 50, "instruction": 40, "chat": 10},
    "sources": [row("a", 0.5, 0.5), row("b", 0.5, 0.5)],
    "diversity": {"distinct_4grams": 0.9, "compression": 2.6},
}


@pytest.mark.parametrize(
    ("changed", "methods", "codes"),
    [
        ({}, [], []),
        ({"sequences": 100}, [], ["sequences"]),
        ({"sequences": 513}, ["gptq"], ["sequences"]),
        ({"sequences": 100}, ["nvfp4"], []),
        ({"tokens": 19_999}, [], ["tokens"]),
        ({"tokens": 200_001}, ["nvfp4"], ["tokens"]),
        ({"tokens": 200_001}, ["awq"], []),
        ({"longest": 256}, [], ["short"]),
        ({"longest": 1024}, [], ["positions"]),
        ({"kinds": {"text": 10, "instruction": 90, "chat": 0}}, [], ["instruction-only"]),
        ({"kinds": {"text": 10, "instruction": 10, "chat": 80}}, [], []),
        ({"sources": [row("a", 1.0, 1.0)]}, [], []),
        ({"sources": [row("a", 1.0, 1.0, 31)]}, [], ["few-documents"]),
        ({"sources": [row("a", 0.95, 0.95), row("b", 0.05, 0.05)]}, [], ["one-source"]),
        ({"sources": [row("a", 0.5, 0.6), row("b", 0.5, 0.4)]}, [], ["share"]),
        ({"diversity": {"distinct_4grams": 0.49, "compression": 2}}, [], ["repetitive"]),
        ({"diversity": {"distinct_4grams": 0.9, "compression": 6.1}}, [], ["compressible"]),
    ],
)
def test_warnings_at_their_thresholds(changed: dict[str, Any], methods: Any, codes: list[str]) -> None:
    found = warnings({**FINE, **changed}, SetSpec(), methods, chat=True, longest_possible=1000)
    assert [one["code"] for one in found] == codes
    assert all("\n" not in one["message"] for one in found)


def test_weights_that_do_not_sum_to_one_are_told() -> None:
    spec = SetSpec(sources=(Source(path="a.txt", weight=3), Source(path="b.txt", weight=1)))
    told = warnings(FINE, spec, [], chat=False, longest_possible=None)
    assert [one["message"] for one in told] == ["the weights sum to 4, taken as shares: a.txt 75.0%, b.txt 25.0%"]


def test_instructions_alone_are_noticed_for_a_chat_model(tmp_path: Path) -> None:
    turns = [{"role": "user"}, {"role": "assistant"}] * 2

    def chat(count: int) -> list[dict]:
        return [
            {"messages": [{**turn, "content": prose(100 * i + j, 15)} for j, turn in enumerate(turns[:count])]}
            for i in range(60)
        ]

    for count, kind in ((2, "instruction"), (4, "chat")):
        path = tmp_path / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in chat(count)))
        manifest = made_of([path]).manifest
        assert manifest["kinds"][kind] == manifest["tokens"]
        assert ("instruction-only" in [w["code"] for w in manifest["warnings"]]) == (count == 2)


def test_a_set_that_the_model_writes_is_judged_too(tmp_path: Path) -> None:
    path = make_tiny("llama", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    (tmp_path / "held.txt").write_text(prose(1, 60))
    spec = SetSpec(sequences=6, max_tokens=48, held_out=(str(tmp_path / "held.txt"),))
    made = make_set(tiny_tokenizer(), spec, writer=lambda: model)
    assert made.manifest["source"]["kind"] == "self-generated" and made.sampled is not None
    assert made.manifest["contamination"]["sequences"] == 0 and made.manifest["coverage"]["vocabulary"] > 0
    assert [warning["code"] for warning in made.manifest["warnings"]][:2] == ["sequences", "tokens"]


def test_the_manifest_goes_to_the_disk_and_back(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [prose(i, 60) for i in range(60)])
    made = made_of([source])
    back = CalibrationSet.load(made.save(tmp_path / "set"))
    assert back.manifest == made.manifest == made_of([source]).manifest
    assert set(made.manifest["versions"]) >= {"halfbyte", "tokenizers", "datasketch"}
    assert made.manifest["sources"][0]["sha256"] and str(tmp_path) not in json.dumps(made.manifest)
