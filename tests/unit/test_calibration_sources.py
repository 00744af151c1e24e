"""Sources of a calibration set: words and YAML, files read as streams, data sets of the hub."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from halfbyte.calibration import hub, parse_source, readers, spec_from_words
from halfbyte.calibration.hub import open_hub, read_hub, refusal
from halfbyte.calibration.readers import read_file
from halfbyte.calibration.records import Document, all_strings, record_document
from halfbyte.calibration.spec import SetSpec, Source
from halfbyte.errors import HalfbyteError, UsageError
from tests.tiny import tiny_tokenizer

QUESTION = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yes"}


def texts(documents: Any) -> list[str]:
    return [document.text for document in documents]


def jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_source_in_one_word(tmp_path: Path) -> None:
    assert parse_source("c4.jsonl") == Source(path="c4.jsonl")
    assert parse_source("a/c4.jsonl:0.7") == Source(path="a/c4.jsonl", weight=0.7)
    assert parse_source("m.jsonl:in-domain:0.3:field=body:limit=10") == Source(
        path="m.jsonl", weight=0.3, in_domain=True, field="body", limit=10
    )
    assert parse_source("hub:org/name:2:config=en:split=test:revision=abc") == Source(
        dataset="org/name", weight=2, config="en", split="test", revision="abc"
    )
    odd = tmp_path / "a:0.5"
    odd.write_text("x")
    assert parse_source(str(odd)) == Source(path=str(odd))
    assert parse_source(f"{odd}:0.5") == Source(path=str(odd), weight=0.5)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["a.txt:0"], "weight 0 of a.txt"),
        (["a.txt:-1"], "weight -1 of a.txt"),
        (["a.txt:nan"], "weight nan of a.txt"),
        (["a.txt:inf"], "weight inf of a.txt"),
        (["a.txt:in_domain"], "did you mean 'in-domain'"),
        (["a.txt:fild=x"], "did you mean 'field'"),
        (["a.txt:0.5:0.5"], "weight is given twice"),
        (["a.txt:limit=0"], "limit"),
        (["a.txt:limit=many"], "limit"),
        (["a.txt:config=en"], "belong to a dataset"),
        (["a.txt:0.5", "b.txt"], "b.txt has no weight and others have"),
        (["a.yaml", "b.txt"], "a.yaml is a list of sources itself"),
        (["no-such.yaml"], "does not exist"),
    ],
)
def test_a_wrong_word_is_one_line(words: list[str], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        spec_from_words(words)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_weights_become_shares() -> None:
    assert spec_from_words(["a.txt:3", "b.txt:1"]).shares() == [0.75, 0.25]
    assert spec_from_words(["a.txt", "b.txt"]).shares() == [0.5, 0.5]


def test_a_yaml_file_of_sources(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    path = tmp_path / "deep" / "set.yaml"
    path.write_text(
        "sources:\n  - {path: mine.jsonl, weight: 1, in_domain: true}\n  - {dataset: org/c4, config: en, weight: 3}\n"
        "languages: [en]\nmax_tokens: 64\nnear_duplicates: false\nheld_out: test.txt\n"
    )
    spec = spec_from_words([str(path)], {"sequences": 7, "max_tokens": 99}, seed=3, sequences=None)
    assert spec.sources == (
        Source(path=str(tmp_path / "deep" / "mine.jsonl"), weight=1, in_domain=True),
        Source(dataset="org/c4", config="en", weight=3),
    )
    assert (spec.max_tokens, spec.sequences, spec.seed) == (64, 7, 3) and spec.near_duplicates is None
    assert spec.held_out == (str(tmp_path / "deep" / "test.txt"),)
    assert spec_from_words([str(path)], max_tokens=32, near_duplicates=0.5).max_tokens == 32


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sources: [", "not valid YAML"),
        ("a: 1", "give a list `sources`"),
        ("sources: []", "give a list `sources`"),
        ("sources: [{path: a, wait: 1}]", "unknown key 'sources.0.wait': did you mean 'weight'"),
        ("sources: [a.txt]\nlangs: [en]", "unknown key 'langs': did you mean 'languages'"),
        ("sources: [a.txt]\nlanguages: [xx]", "'xx' cannot be told apart"),
        ("sources: [a.txt]\nnear_duplicates: 2", "from 0.3"),
        ("sources: [{weight: 1}]", "a path or a dataset"),
        ("sources: [{path: a, dataset: b}]", "a path or a dataset"),
        ("sources: [a.txt]\nmin_chars: 9\nmax_chars: 3", "max_chars 3 is below"),
    ],
)
def test_a_wrong_yaml_file_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        spec_from_words([str(tmp_path / "s.yaml")])
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_plain_text_in_pieces_gives_back_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"Paragraph {i} é漢.\nline two\n\n" for i in range(200)) + "last"
    path = tmp_path / "a.txt"
    path.write_bytes(text.replace("\n", "\r\n").encode())
    for chunk in (7, 64, 1 << 20):
        monkeypatch.setattr(readers, "_CHUNK", chunk)
        found = list(read_file(path))
        assert "".join(texts(found)) == text, chunk
        assert [d.continues for d in found] == [False] + [True] * (len(found) - 1)
    assert len(found) == 201
    path.write_text("one\ntwo\nthree")
    assert texts(read_file(path)) == ["one\n", "two\n", "three"]
    path.write_text("w" * 100)
    monkeypatch.setattr(readers, "_CHUNK", 30)
    assert all(len(text) <= 60 for text in texts(read_file(path)))


def test_jsonl_and_gzip(tmp_path: Path) -> None:
    records = [{"text": "one"}, {"messages": [QUESTION, ANSWER]}, {"conversations": [{"from": "human", "value": "q"}]}]
    path = jsonl(tmp_path / "a.jsonl", records)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + path.read_bytes()))
    chat = "<|im_start|>user\nhi<|im_end|>\n"
    expected = [
        Document("one", "a.jsonl"),
        Document(f"{chat}<|im_start|>assistant\nyes<|im_end|>\n", "a.jsonl", kind="instruction"),
        Document("<|im_start|>user\nq<|im_end|>\n", "a.jsonl", kind="instruction"),
    ]  # fmt: skip
    assert list(read_file(path, tiny_tokenizer())) == expected
    assert texts(read_file(tmp_path / "b.json.gz", tiny_tokenizer())) == [document.text for document in expected]
    assert texts(read_file(path, whole_records=True)) == ["one", "user\nhi\nassistant\nyes", "human\nq"]


def test_what_a_record_is() -> None:
    def kind(record: dict, field: str | None = None) -> str:
        return record_document(record, "x", "x", tiny_tokenizer(), field).kind

    assert kind({"messages": [QUESTION, ANSWER]}) == "instruction"
    assert kind({"messages": [QUESTION, ANSWER, QUESTION, ANSWER]}) == "chat"
    assert kind({"text": "### Instruction:\nsing"}) == kind({"prompt": "sing"}, "prompt") == "instruction"
    assert kind({"text": "Instructions are long."}) == "text"
    assert record_document({"turns": ["a", "b"]}, "x", "x", None, "turns").text == "a\n\nb"
    assert record_document({"text": "half \ud800 pair"}, "x", "x", None).text == "half ? pair"
    assert all_strings({"a": "x", "b": [1, {"c": "y"}], "d": None}) == "x\ny"


@pytest.mark.parametrize(
    ("line", "field", "says"),
    [
        ('{"text": ', None, "line 2 is not JSON"),
        ('{"body": "x", "id": 1}', None, r"line 2 has neither .* \(it has body, id\)"),
        ('{"body": "x"}', "bdy", "line 2 has no field 'bdy': did you mean 'body'"),
        ('{"id": "x"}', "text", "line 2 has no field 'text': it has id"),
        ("3", "text", "line 2 has no field 'text'"),
        ('{"text": 3}', "text", "line 2: field 'text' is int"),
        ('{"messages": [3]}', None, "line 2: its messages are not a list of role and content"),
        ('{"messages": [{"role": "user"}, "x"]}', None, "line 2: its messages"),
        ("\udcff", None, "line 2 is not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, field: str | None, says: str) -> None:
    good = json.dumps({"text": "fine", "bdy": "fine"})
    (tmp_path / "a.jsonl").write_text(f"{good}\n{line}\n", errors="surrogateescape")
    with pytest.raises(HalfbyteError, match=says) as caught:
        list(read_file(tmp_path / "a.jsonl", tiny_tokenizer(), field=field))
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str, data: bytes | None, **options: Any) -> str:
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(HalfbyteError) as caught:
            list(read_file(tmp_path / name, **options))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "does not exist" in refused("no.txt", None)
    (tmp_path / "dir").mkdir()
    assert "Is a directory" in refused("dir", None)
    for name in ("e.txt", "e.jsonl"):
        assert "holds no text" in refused(name, b" \n")
    assert "not UTF-8 text (byte 3)" in refused("b.txt", b"abc\xff\xfe")
    assert "NUL bytes" in refused("n.txt", b"abc\0def")
    assert "line 1 is not UTF-8" in refused("b.jsonl", bytes(range(128, 256)))
    assert "broken gzip" in refused("b.jsonl.gz", b"abc")
    assert "broken gzip" in refused("c.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 999)[:-20])
    assert "no field 'x'" in refused("t.txt", b"abc", field="x")
    assert "no Parquet file" in refused("b.parquet", b"garbage" * 9)
    monkeypatch.setattr(readers, "LINE_LIMIT", 1 << 20)
    assert "line 2 is longer than 1 MiB" in refused(
        "h.jsonl", b'{"text": "x"}\n{"text": "' + b"x" * (2 << 20) + b'"}\n'
    )


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as writer

    path = tmp_path / "a.parquet"
    table = {"id": list(range(600)), "text": [f"text {i}" for i in range(600)], "chat": [[QUESTION, ANSWER]] * 600}
    writer.write_table(pyarrow.table(table), path, row_group_size=100)
    assert texts(read_file(path)) == table["text"]
    assert next(iter(texts(read_file(path, tiny_tokenizer(), field="chat")))).startswith("<|im_start|>user\nhi")
    assert texts(read_file(path, whole_records=True))[7].startswith("text 7\n")
    with pytest.raises(UsageError, match="no column 'txt': did you mean 'text'"):
        list(read_file(path, field="txt"))
    writer.write_table(pyarrow.table({"id": [1], "body": ["x"]}), path)
    with pytest.raises(UsageError, match="no column `text` or `messages`: name one of id, body with field="):
        list(read_file(path))


@pytest.mark.parametrize("name", ["pyarrow", "datasets", "datasketch"])
def test_a_missing_extra_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from halfbyte.calibration.near import near_duplicates

    monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.parquet").write_bytes(b"x")
    with pytest.raises(HalfbyteError, match=rf"needs? {name}: pip install {name}"):
        if name == "pyarrow":
            list(read_file(tmp_path / "a.parquet"))
        elif name == "datasets":
            open_hub(Source(dataset="org/name"))
        else:
            near_duplicates(["a"], 0.8)


def test_a_hub_data_set_is_streamed_up_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load(*words: Any, **options: Any) -> Any:
        asked.append((words, options))
        return ({"body": f"document {i}"} for i in range(10**9))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hub, "_commit", lambda name, revision: "abc123")
    source = Source(dataset="org/name", config="en", field="body", limit=3)
    stream, revision = open_hub(source)
    assert texts(read_hub(stream, source, None)) == ["document 0", "document 1", "document 2"] and revision == "abc123"
    assert asked == [(("org/name", "en"), {"split": "train", "revision": "abc123", "streaming": True})]
    with pytest.raises(UsageError, match="hub:org/name record 1 has no field 'bdy': did you mean 'body'"):
        list(read_hub(stream, source.model_copy(update={"field": "bdy"}), None))
    with pytest.raises(UsageError, match="holds no record"):
        list(read_hub(iter([]), source, None))


def test_the_hub_s_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(dataset="org/name")
    DatasetNotFoundError = type("DatasetNotFoundError", (FileNotFoundError,), {})
    assert "check the name" in str(refusal(source, DatasetNotFoundError("a\nb")))
    wrapped = RuntimeError("outer\nlines")
    wrapped.__cause__ = ConnectionError("inner")
    assert "cannot be reached (outer): go online" in str(refusal(source, wrapped))
    assert str(refusal(source, ValueError("Config name is missing.\nPick one"))) == (
        "hub:org/name cannot be read: Config name is missing."
    )
    pytest.importorskip("datasets")
    monkeypatch.setattr(hub, "_commit", lambda *_: (_ for _ in ()).throw(ConnectionError("no network")))
    with pytest.raises(HalfbyteError, match="cannot be reached"):
        open_hub(source)


def test_the_spec_states_its_bounds() -> None:
    with pytest.raises(ValueError):
        SetSpec(max_tokens=8)
    assert SetSpec(languages=("fr", "en", "en")).languages == ("en", "fr")
