"""Tasks and long context in a run: each leaves its file, and its gates are judged on it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from halfbyte.evaluate import text_windows
from halfbyte.experiments import quality_measurements as quality
from halfbyte.experiments.workshop import CALIBRATION_SHARE
from halfbyte.models.library import load_tokenizer
from tests.tiny import make_tiny
from tests.unit.artifacts import halfbyte, without_vllm

GENEROUS = ["--gate", "ppl=+100000%", "--gate", "top1=0%"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("producers")
    make_tiny("llama", root / "m", max_position_embeddings=4096)
    paragraphs = (f"Paragraph {i} says: " + f"{i * 7} words and more, " * 20 for i in range(40))
    (root / "own.txt").write_text("\n\n".join(paragraphs))
    rows = [{"question": f"{i} and {i} is", "choices": [str(i), str(2 * i)], "answer": 1} for i in range(12)]
    (root / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "sums", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(root / "sums.jsonl")}}, "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (root / "sums.yaml").write_text(yaml.safe_dump(task))
    return root


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    without_vllm(monkeypatch, tmp_path_factory.getbasetemp() / "producers-cache")


def rows_of(place: Path, out: Path, *more: str) -> dict[str, Any]:
    recipe = ["-r", "B3", "--set", "calibration={sequences: 40, max_tokens: 64}"]
    request = ["run", place / "m", "--on", "cpu", *recipe, "--text", place / "own.txt", "-o", out, *GENEROUS, *more]
    assert halfbyte(*request, "--no-mitigate") in (0, 3)
    return {row["name"]: row for row in json.loads((out / "gates.json").read_text())["gates"]}


def test_tasks_and_long_context(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    more = ["--context", "1024", "--tasks", str(place / "sums.yaml"), "--gate", "task:sums=-100%"]
    rows = rows_of(place, out, *more, "--gate", "long_context=100%", "--gate", "tasks=-100%")
    names = ["tasks", "task:sums", "long_context:retrieval", "long_context:ppl"]
    assert [rows[name]["status"] for name in names] == ["passed"] * 4, [rows[name]["text"] for name in names]
    tasks = json.loads((out / "tasks.json").read_text())
    assert rows["task:sums"]["value"] == pytest.approx(tasks["tasks"][0]["difference"]["value"])
    long = json.loads((out / "long_context.json").read_text())
    assert long["lengths"] == [1024]
    tokenizer, held = load_tokenizer(place / "m"), (CALIBRATION_SHARE, 1.0)
    unseen = text_windows([place / "own.txt"], tokenizer, window=1023, portion=held).first(4)
    assert long["text"]["sha256"] == unseen.sha256, "perplexity on text that was not calibrated on"


def test_a_task_that_only_a_gate_names_is_measured_too(place: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "run", tmp_path / "data"
    data.mkdir()
    words = [f"The word number {i} of this text is once more the word number {i}" for i in range(6)]
    (data / "lambada_test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    more = ["--tasks", str(place / "sums.yaml"), "--gate", "task:lambada-jsonl=-100%", "--data", data, "--limit", "4"]
    rows = rows_of(place, out, *more, "--gate", "task:sums=-100%")
    assert [rows[name]["status"] for name in ("task:sums", "task:lambada-jsonl")] == ["passed"] * 2
    tasks = json.loads((out / "tasks.json").read_text())["tasks"]
    assert [(row["name"], row["items"]) for row in tasks] == [("sums", 4), ("lambada-jsonl", 4)]
    rows_of(place, out, *more[:-1], "3")
    assert {row["items"] for row in json.loads((out / "tasks.json").read_text())["tasks"]} == {3}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--tasks", "sums.yaml", "--gate", "task:arc_easi=-1%"], "knows no task 'arc_easi': did you mean 'arc_easy'?"),
        (["--gate", "task:mmlu=-1%"], "'mmlu' stands for several tasks of lm-eval's: name one of them"),
        (["--gate", "task:lambada-jsonl=-1%"], "name its directory with --data"),
        (["--limit", "3"], "--data and --limit are for tasks: ask for them with --tasks"),
    ],
)
def test_tasks_that_cannot_be_measured_are_refused_at_once(
    place: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, more: list[str], words: str
) -> None:
    monkeypatch.chdir(place)
    assert halfbyte("run", place / "m", "--on", "cpu", "-o", tmp_path / "run", *more) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("held", "kept"), [((0.8, 1.0), True), ((0.99, 1.0), False)])
def test_text_that_is_short_leaves_retrieval(
    place: Path, held: tuple[float, float], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    pair = SimpleNamespace(tokenizer=load_tokenizer(place / "m"))
    monkeypatch.setattr(quality, "_pair", lambda *_: pair)
    monkeypatch.setattr(quality, "evaluate_long_context", lambda *_, **more: asked.update(more))
    told = SimpleNamespace(notices=[], say=lambda words: told.notices.append(words))
    text = (place / "own.txt",)
    quality.long_context(SimpleNamespace(platforms=(), context=1024, text=text, held_out=held, progress=told))  # type: ignore[arg-type]
    assert asked["portion"] == held and asked["text"] == (text if kept else ())
    assert kept != any(words.startswith("no perplexity on long context: ") for words in told.notices)
