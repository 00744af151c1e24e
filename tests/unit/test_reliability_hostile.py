"""A stranger's files: a small version of benchmarks/reliability/hostile.py and fuzz.py, and each defence alone."""

from __future__ import annotations

import gc
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reliability import fuzz, hostile
from benchmarks.reliability.children import Ended
from halfbyte.calibration import render
from halfbyte.calibration.render import render_chat
from halfbyte.errors import HalfbyteError
from halfbyte.formats import read_config
from halfbyte.models import Checkpoint, checkpoint
from halfbyte.models.checkpoint import read_header, read_json
from tests.tiny import make_tiny, tiny_tokenizer
from tests.unit.artifacts import halfbyte

CHAT = [{"role": "user", "content": "hi"}]
SLOW = {"template: for ever", "template: doubling", "header: of 90 MiB"}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def sound(scratch: Path) -> Path:
    return hostile.prepare(scratch)


@pytest.fixture()
def in_process(monkeypatch: pytest.MonkeyPatch, capsys: Any, scratch: Path) -> None:
    """Commands in this process instead of a fork."""

    def run(words: list[str], before: Any = None) -> Ended:
        capsys.readouterr()
        monkeypatch.chdir(scratch)
        began, status = time.monotonic(), halfbyte(*words)
        shown = capsys.readouterr()
        return Ended(status, shown.out, shown.err, time.monotonic() - began, 0)

    monkeypatch.setattr(hostile, "run", run)


@pytest.mark.parametrize("name", [name for name in hostile.CASES if name not in SLOW])
def test_a_strangers_model_is_refused_in_a_line(name: str, sound: Path, scratch: Path, in_process: None) -> None:
    case = hostile.CASES[name]
    ended = hostile.attempt(case, sound, scratch, case.commands)
    assert hostile.faults(case, ended, 20.0, 1500, scratch) == []


def test_the_sound_model_is_not_refused(sound: Path, scratch: Path, in_process: None) -> None:
    ended = hostile.attempt(hostile.Case(lambda place: None, ("plan",)), sound, scratch, ("plan",))
    assert ended["plan"].status == 0
    assert hostile.faults(hostile.Case(lambda place: None, ("plan",)), ended, 20.0, 1500, scratch) == [
        "plan ends with 0"
    ]


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_mangled_input_is_read_or_refused(name: str, tmp_path: Path) -> None:
    assert sum(fuzz.fuzz(name, 12, tmp_path, start=3).values()) >= 12


def test_fuzzing_can_fail(tmp_path: Path) -> None:
    def raises(error: Exception) -> Any:
        def act(*_: object) -> None:
            raise error

        return act

    assert fuzz.try_one(raises(HalfbyteError("no")), tmp_path, 0) == "refused"
    with pytest.raises(KeyError):
        fuzz.try_one(raises(KeyError("x")), tmp_path, 0)
    with pytest.raises(AssertionError):
        fuzz.try_one(raises(HalfbyteError("")), tmp_path, 0)


def test_what_fuzzing_found_stays_mended(tmp_path: Path) -> None:
    with pytest.raises(HalfbyteError, match="cannot be read: AttributeError"):
        read_config({"quant_method": "compressed-tensors", "config_groups": 3}, fuzz.NAMES)
    listed = b'{"conversations": [{"from": [], "value": "Hello"}]}'
    assert fuzz.try_one(fuzz.TARGETS["calibration files"][1], tmp_path, listed) in ("read", "refused")
    with pytest.raises(HalfbyteError):
        fuzz.TARGETS["platforms"][1](tmp_path, b"{like: h100, name: x, formats: {gptq: {loads: true, kernels: null}}}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ 'a' * 10**10 }}",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_reaches_nothing(source: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = source
    with pytest.raises(HalfbyteError) as caught:
        render_chat(tokenizer, CHAT)
    assert "\n" not in str(caught.value)


def test_a_template_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "SECONDS", 1)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].content == 'hi' %}{% for a in range(99999) %}{% for b in range(99999) %}"
    )
    tokenizer.chat_template += "{% endfor %}{% endfor %}{% endif %}ok"
    began = time.monotonic()
    with pytest.raises(HalfbyteError, match="takes more than"):
        render_chat(tokenizer, CHAT)
    assert time.monotonic() - began < 10
    assert render_chat(tokenizer, [{"role": "user", "content": "well"}]) == "ok", (
        "the next one has a process of its own"
    )


def test_a_sound_template_says_what_transformers_says_and_leaves_no_process() -> None:
    tokenizer = tiny_tokenizer()
    assert render_chat(tokenizer, CHAT) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant:{% endif %}"
    assert render_chat(tokenizer, CHAT, answer=True) == render_chat(tokenizer, CHAT) + "assistant:"
    pid = render._CHILDREN[tokenizer].pid
    tokenizer.chat_template = "another: {{ messages[0].content }}"
    assert render_chat(tokenizer, CHAT) == "another: hi"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    last = render._CHILDREN[tokenizer].pid
    del tokenizer
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)


def test_large_files_are_refused_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_HEADER", 1000)
    hostile.header(b"{" + b" " * 2000 + b"}")(tmp_path)
    with pytest.raises(HalfbyteError, match="more than any model needs"):
        read_header(tmp_path / "model.safetensors")
    hostile.sparse("config.json", 1 << 40)(tmp_path)
    with pytest.raises(HalfbyteError, match="more than 128 are not read"):
        read_json(tmp_path / "config.json")


def test_links_within_the_model_and_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    make_tiny("llama", repository / "blobs")
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in (repository / "blobs").iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    model = Checkpoint(snapshot)
    assert len(model.tokenizer_files()) >= 2 and model.tensors
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.json").symlink_to(snapshot / "config.json")
    with pytest.raises(HalfbyteError, match="leads out"):
        Checkpoint(elsewhere)


def test_an_error_nobody_foresaw_is_a_line_too(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fail() -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.delenv("HALFBYTE_DEBUG", raising=False)
    monkeypatch.setattr("halfbyte.recipe.list_presets", fail)
    assert halfbyte("ls", "recipes") == 1
    told = capsys.readouterr().err
    assert told.startswith("halfbyte: unexpected ZeroDivisionError: division by zero") and "HALFBYTE_DEBUG=1" in told
    monkeypatch.setenv("HALFBYTE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        halfbyte("ls", "recipes")


def test_every_kind_of_input_is_fuzzed_near_what_is_valid() -> None:
    """Most cases should get beyond the first check, or fuzzing shows little."""
    chance = random.Random(0)
    tree = chance.choice(fuzz.RECIPES)
    assert fuzz._replaced(tree, [0], "x", False) != tree
    assert len(fuzz._replaced(tree, [0], None, True)) == len(tree) - 1
