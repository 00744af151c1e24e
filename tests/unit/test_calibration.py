"""Calibration text: sources, cutting, the stored set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from halfbyte.calibration import CalibrationSet, build, leading_special, read_documents, tokenizer_sha256
from halfbyte.calibration.cut import cut_mixed, cut_stream, mixed_lengths
from halfbyte.calibration.store import histogram
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.recipe.schema import CalibrationSpec
from tests.tiny import tiny_tokenizer

PROSE = "First line\nsecond line\n\nNext paragraph\n \n\nThe last one, with an é"


def with_bos():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.fixture
def write(tmp_path: Path):
    def inner(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return inner


def test_paragraphs_join_to_the_file(write):
    documents = read_documents([write("a.txt", PROSE)])
    assert "".join(document.text for document in documents) == PROSE
    assert [document.text.strip() for document in documents][1] == "Next paragraph"
    assert [document.continues for document in documents] == [False, True, True]


def test_lines_are_documents_where_no_line_is_blank(write):
    assert [d.text for d in read_documents([write("a.txt", "one\ntwo\n")])] == ["one\n", "two\n"]


def test_jsonl_text_and_messages(write):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    lines = [json.dumps({"text": "plain\u2028text"}, ensure_ascii=False), "", json.dumps({"messages": messages})]
    documents = read_documents([write("a.jsonl", "\n".join(lines))], tiny_tokenizer())
    assert [d.text for d in documents] == [
        "plain\u2028text",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n",
    ]
    assert not any(d.continues for d in documents)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": ', "line 2 is not JSON"),
        ('{"prompt": "x"}', "line 2 has neither"),
        ("[1]", "line 2 has neither"),
        ('{"text": 3}', "line 2 has neither"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no chat template"),
    ],
)
def test_a_bad_jsonl_line_is_named(write, line, says):
    path = write("a.jsonl", '{"text": "fine"}\n' + line + "\n")
    with pytest.raises(HalfbyteError, match=says) as caught:
        read_documents([path])
    assert "\n" not in str(caught.value)


def test_missing_empty_and_binary_files(tmp_path, write):
    with pytest.raises(UsageError, match="does not exist"):
        read_documents([tmp_path / "no.txt"])
    with pytest.raises(UsageError, match="holds no text"):
        read_documents([write("empty.txt", " \n")])
    (tmp_path / "b.txt").write_bytes(b"ab\xff\xfe")
    with pytest.raises(UsageError, match=r"not UTF-8 text \(byte 2\)"):
        read_documents([tmp_path / "b.txt"])


def test_portions_are_disjoint_and_whole(write):
    path = write("a.txt", "".join(f"line {i}\n" for i in range(37)))
    low, high = (read_documents([path], portion=p) for p in ((0, 0.7), (0.7, 1)))
    assert [d.text for d in low + high] == [d.text for d in read_documents([path])]
    assert low and high and not high[0].continues


def test_stream_is_cut_at_even_strides():
    cut = cut_stream(range(1000), 5, 100)
    assert [piece[0] for piece in cut] == [0, 225, 450, 675, 900]
    assert all(piece == list(range(piece[0], piece[0] + 100)) for piece in cut)
    with pytest.raises(HalfbyteError, match=r"gives 499, 500 are asked"):
        cut_stream(range(499), 5, 100)


def test_mixed_cut_uses_every_token_once_and_starts_at_boundaries():
    pieces, start = [], 0
    for length in [70, 5, 300, 40, 40, 90, 20, 33] * 6:
        pieces.append(list(range(start, start + length)))
        start += length
    continues = [i % 8 != 0 for i in range(len(pieces))]
    lengths = mixed_lengths(20, 128, seed=0)
    cut = cut_mixed(pieces, continues, lengths, 128, seed=0)
    flat = [token for sequence in cut for token in sequence]
    assert len(flat) == len(set(flat)) >= sum(lengths)
    assert len(cut) >= 20 and max(map(len, cut)) <= 128 and min(map(len, cut)) >= 16
    for sequence in cut:
        assert sequence == list(range(sequence[0], sequence[0] + len(sequence)))
        first = sum(len(p) for p in pieces[:8])
        assert sequence[0] // first == sequence[-1] // first, "a sequence runs across documents"
    assert cut == cut_mixed(pieces, continues, lengths, 128, seed=0)
    assert cut != cut_mixed(pieces, continues, lengths, 128, seed=1)


def test_mixed_cut_takes_more_short_records_until_the_budget_is_met():
    records = [list(range(i * 20, i * 20 + 20)) for i in range(60)]
    cut = cut_mixed(records, [False] * 60, [200, 200, 200], 200, seed=0)
    assert len(cut) == 30 and all(len(sequence) == 20 for sequence in cut)
    with pytest.raises(HalfbyteError, match=r"gives 1,200, 2,000 are asked"):
        cut_mixed(records, [False] * 60, [200] * 10, 200, seed=0)


def test_mixed_lengths_are_half_long_half_spread():
    lengths = mixed_lengths(64, 512, seed=3)
    assert len(lengths) == 64 and lengths.count(512) == 32 and min(lengths) == 64
    assert lengths != sorted(lengths) and lengths == mixed_lengths(64, 512, seed=3)


def test_build_stream_from_text(write):
    text = "".join(f"line number {i}\n" for i in range(400))
    tokenizer = tiny_tokenizer()
    built = build(
        tokenizer, CalibrationSpec(sequences=8, max_tokens=64), sources=[write("a.txt", text)], strategy="stream"
    )
    stream = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [len(s) for s in built.sequences] == [64] * 8
    assert built.sequences[0].tolist() == stream[:64] and built.sequences[-1].tolist() == stream[-64:]
    assert built.manifest["tokens"] == 512 and built.manifest["source"]["tokens"] == len(stream)


def test_what_the_tokenizer_puts_first_begins_every_sequence(write):
    path = write("a.txt", "".join(f"line number {i}\n" for i in range(400)))
    assert leading_special(with_bos()) == [1] and leading_special(tiny_tokenizer()) == []
    for strategy in ("mixed", "stream"):
        spec = CalibrationSpec(sequences=8, max_tokens=64)
        built = build(with_bos(), spec, sources=[path], strategy=strategy)
        assert all(s[0] == 1 and s[1] != 1 and len(s) <= 64 for s in built.sequences)
    assert max(len(s) for s in built.sequences) == 64


def test_build_is_the_same_for_one_seed(write):
    path = write("a.txt", "".join(f"line number {i}\n" for i in range(2000)))
    one, again, other = (
        build(tiny_tokenizer(), CalibrationSpec(sequences=8, max_tokens=64, seed=seed), sources=[path])
        for seed in (0, 0, 1)
    )
    assert one.sha256 == again.sha256 != other.sha256
    assert one.manifest == again.manifest


def test_build_needs_text_or_a_model():
    with pytest.raises(UsageError, match="no calibration text"):
        build(tiny_tokenizer(), CalibrationSpec())


def test_set_round_trip(tmp_path):
    made = CalibrationSet.of(
        [torch.arange(5), torch.arange(40)], {"seed": 4}, [torch.ones(5).bool(), torch.zeros(40).bool()]
    )
    back = CalibrationSet.load(made.save(tmp_path / "set"))
    assert [s.tolist() for s in back.sequences] == [s.tolist() for s in made.sequences]
    assert back.sequences[0].dtype == torch.int64 and back.manifest == made.manifest and back.manifest["seed"] == 4
    assert back.sampled is not None and [m.tolist() for m in back.sampled] == [[True] * 5, [False] * 40]
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == ["manifest.json", "tokens.safetensors"]


def test_the_hash_sees_ids_and_borders():
    split = [
        CalibrationSet.of([torch.arange(3), torch.arange(4)], {}),
        CalibrationSet.of([torch.arange(3), torch.tensor([0, 1, 2, 4])], {}),
    ]
    border = [
        CalibrationSet.of([torch.zeros(3), torch.zeros(4)], {}),
        CalibrationSet.of([torch.zeros(4), torch.zeros(3)], {}),
    ]
    assert split[0].sha256 != split[1].sha256 and border[0].sha256 != border[1].sha256


def test_a_changed_set_is_refused(tmp_path):
    CalibrationSet.of([torch.arange(50)], {}).save(tmp_path / "a")
    CalibrationSet.of([torch.arange(50) + 1], {}).save(tmp_path / "b")
    (tmp_path / "b/tokens.safetensors").replace(tmp_path / "a/tokens.safetensors")
    with pytest.raises(HalfbyteError, match="the manifest says"):
        CalibrationSet.load(tmp_path / "a")
    (tmp_path / "a/tokens.safetensors").write_bytes(b"\x01")
    with pytest.raises(HalfbyteError, match="broken calibration set") as caught:
        CalibrationSet.load(tmp_path / "a")
    assert "\n" not in str(caught.value)
    (tmp_path / "a/manifest.json").unlink()
    with pytest.raises(UsageError, match="is no calibration set"):
        CalibrationSet.load(tmp_path / "a")


def test_histogram_classes_double():
    assert histogram([1, 2, 3, 4, 5, 64, 65, 128]) == [
        {"from": 1, "to": 1, "sequences": 1, "tokens": 1},
        {"from": 2, "to": 2, "sequences": 1, "tokens": 2},
        {"from": 3, "to": 4, "sequences": 2, "tokens": 7},
        {"from": 5, "to": 8, "sequences": 1, "tokens": 5},
        {"from": 33, "to": 64, "sequences": 1, "tokens": 64},
        {"from": 65, "to": 128, "sequences": 2, "tokens": 193},
    ]


def test_the_tokenizer_hash_sees_the_chat_template_and_not_its_use():
    tokenizer = tiny_tokenizer()
    before = tokenizer_sha256(tokenizer)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert tokenizer_sha256(tokenizer) == before == tokenizer_sha256(tiny_tokenizer())
    tokenizer.chat_template = "other"
    assert tokenizer_sha256(tokenizer) != before
