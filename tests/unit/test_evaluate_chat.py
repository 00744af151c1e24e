"""Questions with answers, and chat before a judge: whole, on models whose answers are planted."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import pytest

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate.chat import evaluate_chat, write_chat
from halfbyte.evaluate.chat import read_questions as read_chat
from halfbyte.evaluate.judge import KEY_VARIABLE, Judge
from halfbyte.evaluate.pair import Pair
from halfbyte.evaluate.prompting import prompt_ids
from halfbyte.evaluate.qa import compare_qa, evaluate_qa, write_answers
from tests.tiny import tiny_tokenizer
from tests.unit.stand_in import service

SECRET = "sk-do-not-show-me"


class Planted(Pair):
    """A pair whose sides say what a function makes of the prompt's text."""

    @contextmanager
    def open(self, side, context, progress, kv_cache="auto"):
        yield Sayer(getattr(self, side), self.tokenizer)

    def context(self):
        return 4096

    def stop_ids(self):
        return [2]


class Sayer:
    def __init__(self, say, tokenizer):
        self.say, self.tokenizer = say, tokenizer

    def generate(self, prompts, max_tokens, stop_ids=(), progress=None):
        assert list(stop_ids) == [2]
        return [self.say(self.tokenizer.decode(prompt)) for prompt in prompts]


def planted(baseline, model, tokenizer=None):
    return Planted(baseline, model, tokenizer or tiny_tokenizer(), ("base", "tiny"))


def lines(path: Path, *records) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    return path


def test_the_users_questions(tmp_path):
    file = lines(
        tmp_path / "qa.jsonl",
        {"question": "What is the capital of France?", "answer": "Paris"},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "And of Italy?"}],
         "answers": ["Rome", "Roma, of course"]},
    )  # fmt: skip
    seen = []

    def good(prompt):
        seen.append(prompt)
        return "Paris." if "France" in prompt else "roma of course"

    pair = planted(good, lambda prompt: "The city of Paris" if "France" in prompt else "Roma of course")
    result = evaluate_qa(pair, file)
    assert "<|im_start|>user\nWhat is the capital of France?<|im_end|>" in seen[0] and "system\nBe brief." in seen[1]
    row = result["tasks"][0]
    assert (result["kind"], row["name"], row["metric"], row["items"]) == ("tasks", "qa:qa.jsonl", "f1", 2)
    assert row["baseline"]["value"] == 1 and row["model"]["value"] == pytest.approx((0.5 + 1) / 2)
    others = {other["metric"]: other for other in row["others"]}
    assert set(others) == {"em", "rouge_l", "bleu"} and others["em"]["difference"]["value"] == -0.5
    assert row["flips"] == 0.5 and result["average"]["recovery"]["value"] == pytest.approx(0.75)
    assert row["length"]["baseline"] == (6 + 14) / 2 and row["length"]["model"] == (17 + 14) / 2
    leading, answers = compare_qa(pair, file, metric="em", limit=1)
    assert leading.row["metric"] == "em" and leading.row["items"] == 1
    assert json.loads(write_answers(tmp_path, answers).read_text())["model"]["answer"] == "The city of Paris"


def test_without_a_chat_template_an_answer_ends_before_the_next_question(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    assert tokenizer.decode(prompt_ids(tokenizer, [{"role": "user", "content": "Why?"}])) == "Question: Why?\nAnswer:"
    file = lines(tmp_path / "qa.jsonl", {"question": "Why?", "answer": "because"})
    row = evaluate_qa(planted(lambda _: " because", lambda _: " because\nQuestion: no?", tokenizer), file)["tasks"][0]
    assert row["model"]["value"] == 1 and row["length"]["ratio"]["value"] == 1


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"question": "x"}, "line 1 has no text in `answer`"),
        ({"question": " ", "answer": "y"}, "line 1 has no text in 'question'"),
        ({"messages": [{"role": "assistant", "content": "x"}], "answer": "y"}, "the last message is the assistant's"),
        ({"messages": ["x"], "answer": "y"}, "not a list of role and content"),
        ([1], "no record of fields"),
        ({"question": "x" * 9000, "answer": "y"}, "shorten it"),
    ],
)
def test_bad_questions_are_named(tmp_path, record, says):
    with pytest.raises(HalfbyteError, match=says):
        evaluate_qa(planted(str, str), lines(tmp_path / "qa.jsonl", record))


def test_no_questions(tmp_path):
    with pytest.raises(UsageError, match="is empty"):
        evaluate_qa(planted(str, str), lines(tmp_path / "qa.jsonl"))
    with pytest.raises(UsageError, match="no metric of answers"):
        evaluate_qa(planted(str, str), tmp_path / "qa.jsonl", metric="f2")
    with pytest.raises(HalfbyteError, match="`turns`"):
        read_chat(lines(tmp_path / "chat.jsonl", {"turns": "x"}))


CHAT = [
    {"question_id": 81, "category": "math", "turns": ["Say one.", "Say two."], "reference": ["one", "two"]},
    {"question_id": 82, "category": "math", "turns": ["Say three."]},
    {"category": "writing", "turns": ["Say four."]},
    {"category": "writing", "turns": ["Say five."]},
]


def said_by(name):
    def say(prompt):
        return f"{name} after {prompt.count('assistant')} answers to {prompt.split('Say ')[-1].split('.')[0]}"

    return say


def judge_of(verdicts, requests):
    """A judge: by the word asked for, "better": the model wins; "first": whatever stands first; None: no verdict."""

    def answer(path, body, headers):
        requests.append((path, headers.get("Authorization"), body))
        prompt = body["messages"][1]["content"]
        verdict = next(v for word, v in verdicts.items() if f"Say {word}" in prompt)
        model_first = prompt.index("new after") < prompt.index("old after")
        letter = {"better": "A" if model_first else "B", "first": "A", "worse": "B" if model_first else "A",
                  "equal": "TIE"}.get(verdict)  # fmt: skip
        text = f"I thought of [[A]] and [[B]]. [[{letter}]]" if letter else "I cannot say."
        return 200, {"choices": [{"message": {"content": text}}]}

    return answer


def test_a_judge_sees_both_orders(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    requests: list = []
    verdicts = {"one": "better", "three": "first", "four": "equal", "five": None}
    file = lines(tmp_path / "chat.jsonl", *CHAT)
    pair = planted(said_by("old"), said_by("new"))
    with service(judge_of(verdicts, requests)) as url, Judge(f"{url}/v1", "wise") as judge:
        result = evaluate_chat(pair, file, judge)
    text = write_chat(tmp_path, result).read_text()
    assert json.loads(text) == result and SECRET not in text
    assert {(path, key, body["model"]) for path, key, body in requests} == {
        ("/v1/chat/completions", f"Bearer {SECRET}", "wise")
    }
    assert len(requests) == 8 and result["questions"] == 4 and result["turns"] == 5
    assert (result["wins"], result["ties"], result["losses"], result["unread"]) == (1, 2, 0, 1)
    assert result["win_rate"]["value"] == pytest.approx(2 / 3) and result["inconsistent"] == pytest.approx(1 / 3)
    assert result["win_rate"]["low"] == 0.5 and result["win_rate"]["high"] == 1
    assert [row["win_rate"] for row in result["by_category"]] == [0.75, 0.5]
    first = result["answers"][0]
    assert first["model"] == ["new after 0 answers to one", "new after 1 answers to two"], "turns build on each other"
    prompt = requests[0][2]["messages"][1]["content"]
    assert prompt.count("Say two.") == 3 and "reference" in prompt and "old after 1 answers to two" in prompt
    assert result["length"]["passed"] and result["length"]["ratio"]["value"] == 1


def test_a_model_that_loses(tmp_path):
    with service(judge_of({"three": "worse"}, [])) as url, Judge(url, "wise") as judge:
        result = evaluate_chat(planted(said_by("old"), said_by("new")), lines(tmp_path / "c", CHAT[1]), judge)
    assert (result["losses"], result["win_rate"]["value"], result["inconsistent"]) == (1, 0, 0)


def test_a_judge_that_is_of_no_use(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    file, pair = lines(tmp_path / "c", CHAT[1]), planted(said_by("old"), said_by("new"))
    calls: list = []

    def refuse(path, body, headers):
        calls.append(path)
        return (503 if len(calls) < 3 else 401), {"error": f"no such key: {headers['Authorization']}"}

    with service(refuse) as url, Judge(url, "wise") as judge:
        with pytest.raises(HalfbyteError, match=r"refused \(401\).*Bearer \*\*\*") as told:
            evaluate_chat(pair, file, judge)
    assert SECRET not in str(told.value) and len(calls) == 3, "a busy judge is asked again, a refusal is final"
    with service(lambda *_: (200, {"x": 1})) as url, Judge(url, "wise") as judge:
        with pytest.raises(HalfbyteError, match="no OpenAI chat API"):
            evaluate_chat(pair, file, judge)
    with Judge(url, "wise") as judge, pytest.raises(HalfbyteError, match="does not answer"):
        evaluate_chat(pair, file, judge)
    with service(judge_of({"three": None}, [])) as url, Judge(url, "wise") as judge:
        with pytest.raises(HalfbyteError, match="never gave a verdict"):
            evaluate_chat(pair, file, judge)
    for bad in ("wise.example/v1", "https://me:pw@wise.example/v1"):
        with pytest.raises(UsageError):
            Judge(bad, "wise")
