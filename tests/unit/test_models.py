"""Model directories: whole ones are read, broken and hostile ones get one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import halfbyte.hashing as hashing
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.hashing import hash_file
from halfbyte.models import Checkpoint, family_of, resolve_model
from tests.tiny import FAMILIES, SPARSE, make_tiny

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}


def directory(path: Path, config: object = CONFIG) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def raw(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file as bytes, its length field as it is or as given."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def headed(entries: object, data: bytes = bytes(8)) -> bytes:
    return raw(json.dumps(entries).encode(), data)


def entry(**changes: object) -> dict:
    return {"a": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8], **changes}}


def one_line(error: Exception) -> str:
    text = str(error)
    assert text and "\n" not in text and len(text) < 600, text
    return text


BROKEN: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": bytes(7),
    "no header": bytes(8),
    "header cut": raw(b'{"a":', length=500),
    "length beyond everything": raw(b"{}", length=2**64 - 1),
    "length of half a gigabyte": raw(b"{}", length=1 << 29),
    "not JSON": raw(b"abcdef"),
    "not UTF-8": raw(b'{"\xff\xfe": 1}'),
    "deeply nested": raw(b"[" * 200_000),
    "number of many digits": raw(b'{"a": ' + b"9" * 5000 + b"}"),
    "a list": headed([1, 2]),
    "entry is a number": headed({"a": 5}),
    "entry is null": headed({"a": None}),
    "no shape": headed({"a": {"dtype": "BF16", "data_offsets": [0, 8]}}),
    "shape is a number": headed(entry(shape=4)),
    "shape of strings": headed(entry(shape=["2", "2"])),
    "negative shape": headed(entry(shape=[-2, -2])),
    "shape of booleans": headed(entry(shape=[True, 4])),
    "shape of floats": headed(entry(shape=[2.0, 2])),
    "dtype unknown": headed(entry(dtype="BF17")),
    "dtype is a list": headed(entry(dtype=["BF16"])),
    "offsets reversed": headed(entry(data_offsets=[8, 0])),
    "offsets negative": headed(entry(data_offsets=[-8, 0])),
    "offsets of three": headed(entry(data_offsets=[0, 4, 8])),
    "offsets as floats": headed(entry(data_offsets=[0.0, 8.0])),
    "offsets as NaN": raw(b'{"a":{"dtype":"BF16","shape":[2,2],"data_offsets":[NaN,NaN]}}', bytes(8)),
    "offsets do not fit the shape": headed(entry(data_offsets=[0, 6])),
    "tensor of exabytes": headed(entry(shape=[1 << 30, 1 << 30], data_offsets=[0, 1 << 61])),
    "data cut": headed(entry(), bytes(6)),
    "data too long": headed(entry(), bytes(9)),
    "overlap": headed({**entry(), "b": {"dtype": "BF16", "shape": [2], "data_offsets": [4, 8]}}),
    "the same place twice": headed({**entry(), "b": entry()["a"]}),
    "a hole": headed({**entry(), "b": {"dtype": "BF16", "shape": [2], "data_offsets": [12, 16]}}, bytes(16)),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_one_line_that_names_it(kind: str, tmp_path: Path) -> None:
    (directory(tmp_path) / "model.safetensors").write_bytes(BROKEN[kind])
    with pytest.raises(HalfbyteError) as caught:
        _ = Checkpoint(tmp_path).tensors
    assert "model.safetensors" in one_line(caught.value)


def test_the_unbroken_file_of_that_kind_is_read(tmp_path: Path) -> None:
    data = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).bfloat16()
    path = directory(tmp_path) / "model.safetensors"
    path.write_bytes(headed({"__metadata__": {"format": "pt"}, **entry()}, data.view(torch.uint8).numpy().tobytes()))
    checkpoint = Checkpoint(tmp_path)
    info = checkpoint.tensors["a"]
    assert (info.dtype, info.shape, info.nbytes) == ("BF16", (2, 2), 8)
    assert torch.equal(checkpoint.load("a"), data) and checkpoint.total_bytes == 8
    with pytest.raises(HalfbyteError, match="lacks the tensor b"):
        checkpoint.load("b")


def test_a_file_that_vanishes_or_breaks_between_header_and_load(tmp_path: Path) -> None:
    path = directory(tmp_path) / "model.safetensors"
    path.write_bytes(headed(entry()))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.has("a")
    path.write_bytes(b"changed meanwhile")
    for attempt in (lambda: checkpoint.load("a"), lambda: checkpoint.load_all("")):
        with pytest.raises(HalfbyteError) as caught:
            attempt()
        assert "model.safetensors" in one_line(caught.value)
    path.unlink()
    with pytest.raises(HalfbyteError) as caught:
        checkpoint.load("a")
    one_line(caught.value)


@pytest.mark.parametrize(
    "place", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", "", "./model.safetensors"]
)
def test_an_index_that_names_a_file_elsewhere_is_refused(place: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "secret.safetensors")
    inside = directory(tmp_path / "model")
    (inside / "sub").mkdir()
    save_file({"a": torch.ones(2)}, inside / "sub" / "model.safetensors")
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": place}}))
    with pytest.raises(HalfbyteError) as caught:
        _ = Checkpoint(inside).tensors
    assert "index" in one_line(caught.value)


@pytest.mark.parametrize(
    "index", [[], "text", {}, {"weight_map": []}, {"weight_map": {"a": 5, "b": "x"}}, {"weight_map": {"a": ["x"]}}]
)
def test_an_index_of_the_wrong_shape_is_one_line(index: object, tmp_path: Path) -> None:
    (directory(tmp_path) / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(HalfbyteError) as caught:
        _ = Checkpoint(tmp_path).tensors
    assert "index.json" in one_line(caught.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    weights = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    save_file({"a": torch.ones(2)}, directory(tmp_path) / "model-1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(HalfbyteError, match=r"model-2\.safetensors") as caught:
        _ = Checkpoint(tmp_path).tensors
    one_line(caught.value)
    save_file({"b": torch.ones(3)}, tmp_path / "model-2.safetensors")
    whole = Checkpoint(tmp_path)
    assert set(whole.tensors) == {"a", "b"} and whole.load("b").shape == (3,)
    save_file({"b": torch.ones(3), "a": torch.ones(2)}, tmp_path / "model-2.safetensors")
    with pytest.raises(HalfbyteError, match="again in"):
        _ = Checkpoint(tmp_path).tensors


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.pth"])
def test_pickled_weights_are_not_read(name: str, tmp_path: Path) -> None:
    (directory(tmp_path) / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UsageError, match="pickled") as caught:
        _ = Checkpoint(tmp_path).tensors
    assert name in one_line(caught.value)


def test_a_directory_without_weights_or_config(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"config\.json"):
        Checkpoint(tmp_path)
    with pytest.raises(UsageError, match=r"no model\.safetensors"):
        _ = Checkpoint(directory(tmp_path)).tensors


@pytest.mark.parametrize("text", ["", "{", "[1]", "\ufeff{}", "[" * 200_000])
def test_a_broken_config_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(HalfbyteError) as caught:
        Checkpoint(tmp_path)
    assert "config.json" in one_line(caught.value)


@pytest.mark.parametrize("kind", ["mamba", "jamba", None, 5, ["llama"], ""])
def test_an_unknown_architecture_names_the_known_ones(kind: object) -> None:
    with pytest.raises(HalfbyteError, match="llama, mistral") as caught:
        family_of({**CONFIG, "model_type": kind})
    assert repr(kind) in one_line(caught.value)


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "num_attention_heads"])
@pytest.mark.parametrize("value", [None, "12", 0, -3, 2.5, True])
def test_a_config_without_its_counts_is_one_line(key: str, value: object) -> None:
    with pytest.raises(HalfbyteError, match=key) as caught:
        family_of({**CONFIG, key: value})
    one_line(caught.value)


def test_head_counts_follow_the_config() -> None:
    family = family_of(CONFIG)
    assert (family.num_kv_heads, family.head_dim, family.tied) == (4, 16, False)
    other = family_of({**CONFIG, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True})
    assert (other.num_kv_heads, other.head_dim, other.tied) == (2, 8, True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_names_are_those_of_its_checkpoint(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_tiny(family, tmp_path))
    known = family_of(checkpoint.config)
    named = {f"{n}.weight" for i in range(known.num_blocks) for n in known.linears(i)}
    matrices = {n for n, t in checkpoint.tensors.items() if len(t.shape) == 2} - {"lm_head.weight"}
    routers = {f"{n}.weight" for i in range(known.num_blocks) for n in known.routers(i)}
    assert named | routers == matrices - {f"{known.embedding}.weight"} and not named & routers
    assert bool(routers) == (family in SPARSE)
    assert known.tied != checkpoint.has("lm_head.weight")
    for index in range(known.num_blocks):
        assert {fold.kind for fold in known.folds_of(index)} <= {group.key for group in known.groups_of(index)}
        for fold in known.folds_of(index):
            assert checkpoint.has(f"{known.block(index)}.{fold.norm or fold.linear}.weight")
    width = known.num_heads * known.head_dim
    assert checkpoint.tensors[f"{known.block(0)}.self_attn.o_proj.weight"].shape == (known.hidden_size, width)


def test_a_fingerprint_follows_the_contents(tmp_path: Path) -> None:
    path = directory(tmp_path)
    save_file({"a": torch.zeros(4)}, path / "model.safetensors")
    first = Checkpoint(path).fingerprint()
    assert first == Checkpoint(path).fingerprint() and len(first) == 64
    save_file({"a": torch.ones(4)}, path / "model.safetensors")
    second = Checkpoint(path).fingerprint()
    directory(path, {**CONFIG, "vocab_size": 7})
    assert len({first, second, Checkpoint(path).fingerprint()}) == 3


def test_a_file_that_rests_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, hashed = directory(tmp_path), list[str]()
    save_file({"a": torch.zeros(4)}, path / "model.safetensors")
    monkeypatch.setattr(hashing, "hash_file", lambda file: (hashed.append(file.name), hash_file(file))[1])
    first = [Checkpoint(path).fingerprint() for _ in range(2)]
    assert len(hashed) == 4, "it was touched a moment ago, and may change again under the same time stamp"
    monkeypatch.setattr(hashing, "_SETTLED_S", -1.0)
    again = [Checkpoint(path).fingerprint() for _ in range(3)]
    assert len(hashed) == 6 and set(first + again) == {first[0]}
    save_file({"a": torch.zeros(5)}, path / "model.safetensors")
    assert Checkpoint(path).fingerprint() != first[0]


def test_load_all_takes_a_prefix_off(tmp_path: Path) -> None:
    path = make_tiny("llama", tmp_path)
    tensors = load_file(path / "model.safetensors")
    got = Checkpoint(path).load_all("model.layers.1.")
    assert torch.equal(got["mlp.down_proj.weight"], tensors["model.layers.1.mlp.down_proj.weight"])
    assert len(got) == sum(n.startswith("model.layers.1.") for n in tensors)


NOT_MODELS: dict[str, Callable[[Path], str]] = {
    "a file": lambda p: str(p / "file"),
    "nothing there": lambda p: str(p / "missing"),
    "a word": lambda _p: "no-such-model",
    "many slashes": lambda _p: "a/b/c",
    "empty": lambda _p: "",
}


@pytest.mark.parametrize("kind", NOT_MODELS)
def test_a_name_that_is_no_model_is_a_usage_error(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError) as caught:
        resolve_model(NOT_MODELS[kind](tmp_path))
    one_line(caught.value)
    assert resolve_model(str(tmp_path)) == tmp_path
