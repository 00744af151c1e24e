"""`halfbyte eval` beyond fidelity: what it writes, what it prints, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.cli.evaluations import parse_lengths
from halfbyte.errors import UsageError
from tests.tiny import make_tiny
from tests.unit.artifacts import halfbyte
from tests.unit.stand_in import service


@pytest.fixture(scope="module")
def long_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from halfbyte import Recipe, quantize

    place = tmp_path_factory.mktemp("long")
    model = make_tiny("llama", place / "tiny", max_position_embeddings=1024)
    quantize(str(model), Recipe(method="rtn", group_size=32), place / "made")
    return place / "made"


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "qa.jsonl"
    file.write_text('{"question": "Why?", "answer": "because"}\n{"question": "Who?", "answers": ["me", "I"]}\n')
    return file


def judge(path: str, body: Any, headers: Any) -> tuple[int, Any]:
    return 200, {"choices": [{"message": {"content": "[[TIE]]"}}]}


def test_questions_chat_and_long_context_in_one_go(
    long_artifact: Path, questions: Path, tmp_path: Path, capsys: Any
) -> None:
    chat, out = tmp_path / "chat.jsonl", tmp_path / "out"
    chat.write_text('{"question_id": 1, "turns": ["Hello", "And?"]}\n')
    with service(judge) as url:
        words = ["--qa", questions, "--chat", chat, "--judge", url, "--judge-model", "j", "--max-tokens", 4]
        more = ["--long-context", "--lengths", "700", "--samples", 1]
        assert halfbyte("eval", long_artifact, *words, *more, "-o", out) == 0
    shown = capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {"tasks.json", "qa.jsonl", "chat.json", "long_context.json"}
    kinds = {name: json.loads((out / f"{name}.json").read_text()) for name in ("tasks", "chat", "long_context")}
    assert {kind["work"] for kind in kinds.values()} == {
        json.loads((long_artifact / "halfbyte.json").read_text())["work"]
    }
    for kind, result in kinds.items():
        assert (result["kind"], result["baseline"], result["model"]) == (kind, "tiny", "made")
        assert str(tmp_path.parent) not in json.dumps(result)
    assert kinds["chat"]["win_rate"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert kinds["long_context"]["lengths"] == [700]
    for piece in ("qa:qa.jsonl", "rouge_l", "win rate of 4-bit 50.0%", "retrieval, tokens", "guessing: 6.2%",
                  "not measured: 4bit+fp8kv", "next: halfbyte serve"):  # fmt: skip
        assert piece in shown, shown


def test_a_model_that_rambles_fails(
    long_artifact: Path, questions: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfbyte.evaluate.subject.Loaded.generate", rambling())
    assert halfbyte("eval", long_artifact, "--qa", questions) == 3
    assert "it rambles (limit 1.25)" in capsys.readouterr().out


def rambling() -> Any:
    said = iter([["short", "short"], ["on and on " * 5] * 2])
    return lambda self, prompts, *_: next(said)


def test_both_models_end_their_answers_where_the_model_says(tmp_path: Path) -> None:
    from halfbyte import Recipe, quantize
    from halfbyte.artifact import load_fake_quantized

    model = make_tiny("llama", tmp_path / "tiny")
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 4]}')
    quantize(str(model), Recipe(method="rtn", group_size=32), tmp_path / "made")
    assert load_fake_quantized(tmp_path / "made").generation_config.eos_token_id == [2, 4]


def test_what_does_not_go_together(refused: Any, made: Path, questions: Path, tmp_path: Path, no_vllm: None) -> None:
    assert "go together" in refused(2, "eval", made, "--chat", questions)
    assert "go together" in refused(2, "eval", made, "--judge", "http://x", "--judge-model", "y")
    assert "name one of them" in refused(2, "eval", made, "--backend", "vllm")
    assert "does not exist" in refused(2, "eval", made, "--qa", tmp_path / "none")
    assert "is no length" in refused(2, "eval", made, "--long-context", "--lengths", "4k,long")
    assert "no metric" in refused(2, "eval", made, "--qa", questions, "--qa-metric", "f2")
    assert "256 positions" in refused(2, "eval", made, "--long-context", "--lengths", "8k")
    assert "no vLLM found" in refused(1, "eval", made, "--qa", questions, "--backend", "vllm")
    assert "is no URL" in refused(2, "eval", made, "--chat", questions, "--judge", "wise.example", "--judge-model", "y")


def test_lengths_in_words() -> None:
    assert parse_lengths("4k,16K, 100") == [4096, 16384, 100] and parse_lengths(None) is None
    for bad in ("", "0", "4m", "-4k", "1.5k", "4k,"):
        with pytest.raises(UsageError):
            parse_lengths(bad)
