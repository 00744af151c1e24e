"""Model directories of a stranger: each must end in one line, in bounded time and memory, with nothing run or leaked.

    python benchmarks/reliability/hostile.py [--only WORD] [--seconds 30] [--mib 1500]

Prints a table in Markdown; exits with 1 where a case is not refused, is refused in more than a line, takes too long or
too much, or runs what it carries.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.reliability.children import Ended, import_all, run
from tests.tiny import make_tiny

COMMANDS = ("plan", "quantize", "calibrate")
SECRET = "TOP-SECRET-93b1"


@dataclass(frozen=True)
class Case:
    """What is done to a sound model; `commands` must refuse it (the others may, or may not look at what is wrong)."""

    spoil: Callable[[Path], Any]
    commands: tuple[str, ...] = ("plan", "quantize")


def config(**changes: Any) -> Callable[[Path], None]:
    def spoil(place: Path) -> None:
        path = place / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def text(name: str, contents: str | bytes) -> Callable[[Path], None]:
    def spoil(place: Path) -> None:
        raw = contents.encode() if isinstance(contents, str) else contents
        (place / name).write_bytes(raw)

    return spoil


def header(contents: bytes, length: int | None = None, data: bytes = b"") -> Callable[[Path], None]:
    return text("model.safetensors", struct.pack("<Q", len(contents) if length is None else length) + contents + data)


def index(places: dict[str, str]) -> Callable[[Path], None]:
    def spoil(place: Path) -> None:
        (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    return spoil


def sparse(name: str, size: int) -> Callable[[Path], None]:
    def spoil(place: Path) -> None:
        with (place / name).open("wb") as handle:
            handle.truncate(size)

    return spoil


def large_header(place: Path) -> None:
    length = 90 << 20
    with (place / "model.safetensors").open("wb") as handle:
        handle.write(struct.pack("<Q", length))
        entry = b'"%08d": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, '
        handle.write(b"{" + b"".join(entry % i for i in range(length // len(entry % 0) - 1)) + b'"__metadata__": {}}')
        handle.truncate(8 + length)


def link(name: str, target: str | None = None) -> Callable[[Path], None]:
    """A link to a file outside that holds a secret, or to `target`."""

    def spoil(place: Path) -> None:
        secret = place.parent / "secret.json"
        secret.write_text(json.dumps({"auth": SECRET}))
        (place / name).unlink(missing_ok=True)
        (place / name).symlink_to(target or secret)

    return spoil


class _Run:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


def pickled(place: Path) -> None:
    (place / "model.safetensors").unlink()
    (place / "pytorch_model.bin").write_bytes(pickle.dumps(_Run()))


def code(place: Path) -> None:
    """Code of the model's own, for a model type that is not known."""
    (place / "modeling_evil.py").write_text("import os\nos.system('touch pwned')\nclass Evil: pass\n")
    config(model_type="evil", auto_map={n: "modeling_evil.Evil" for n in ("AutoConfig", "AutoModelForCausalLM")})(place)


def tokenizer_code(place: Path) -> None:
    (place / "evil.py").write_text("import os\nos.system('touch pwned')\nclass Evil: pass\n")
    told = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (place / "tokenizer_config.json").write_text(json.dumps(told))


def template(source: str) -> Case:
    return Case(text("chat_template.jinja", source), ("calibrate",))


DEEP = 200_000
ENTRY = b'"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}'
CASES: dict[str, Case] = {
    "pickled weights": Case(pickled),
    "code for an unknown model type": Case(code),
    "code for the tokenizer": Case(tokenizer_code, ("calibrate",)),
    "attention that is fetched from the hub": Case(config(attn_implementation="evil/kernel")),
    "an adapter of another model": Case(text("adapter_config.json", '{"base_model_name_or_path": "/etc"}')),
    "index: a shard above the directory": Case(index({"x": "../secret.safetensors"})),
    "index: an absolute shard": Case(index({"x": "/etc/passwd"})),
    "index: a shard below": Case(index({"x": "sub/model.safetensors"})),
    "index: `..`": Case(index({"x": ".."})),
    "index: a name with a line end": Case(index({"x": "a\nhalfbyte: accepted"})),
    "index: no names": Case(text("model.safetensors.index.json", '{"weight_map": {"a": 3}}')),
    "header: longer than the file": Case(header(b"{}", 1 << 62)),
    "header: of 90 MiB": Case(large_header),
    "header: a gigabyte claimed, sparse": Case(sparse("model.safetensors", 1 << 30)),
    "header: nested deeply": Case(header(b'{"a":' * DEEP)),
    "header: two tensors of one name": Case(header(b"{" + ENTRY + b", " + ENTRY + b"}")),
    "header: overlapping tensors": Case(
        header(
            json.dumps({n: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for n in "ab"}).encode(), data=b"1234"
        )
    ),
    "header: a shape that overflows": Case(
        header(
            json.dumps({"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}}).encode(),
            data=b"1234",
        )
    ),
    "header: no object": Case(header(b"[1]")),
    "header: not UTF-8": Case(header(b"\xff\xfe\xfd")),
    "config.json: nested deeply": Case(text("config.json", "[" * DEEP)),
    "config.json: a number of 100,000 digits": Case(text("config.json", '{"hidden_size": ' + "9" * 100_000 + "}")),
    "config.json: of 4 GiB, sparse": Case(sparse("config.json", 4 << 30)),
    "config.json: not UTF-8": Case(text("config.json", b"\xff\xff")),
    "config.json: a list": Case(text("config.json", "[]")),
    "a billion layers": Case(config(num_hidden_layers=10**9)),
    "layers without tensors": Case(config(num_hidden_layers=1500)),
    "a hidden size of 10^12": Case(config(hidden_size=10**12)),
    "a vocabulary of 10^15": Case(config(vocab_size=10**15)),
    "a hidden size that is no number": Case(config(hidden_size=[1, 2])),
    "no heads": Case(config(num_attention_heads=0)),
    "infinite layers": Case(text("config.json", '{"model_type": "llama", "num_hidden_layers": 1e999}')),
    "a negative size": Case(config(hidden_size=-128)),
    "tokenizer.json: nested deeply": Case(text("tokenizer.json", "[" * DEEP), ("calibrate",)),
    "tokenizer.json: of 4 GiB, sparse": Case(sparse("tokenizer.json", 4 << 30), ("calibrate", "quantize")),
    "tokenizer.json: no tokenizer": Case(text("tokenizer.json", '{"model": {"type": "BPE"}}'), ("calibrate",)),
    "tokenizer.json: a link to a secret": Case(link("tokenizer.json"), ("calibrate", "quantize")),
    "config.json: a link to a secret": Case(link("config.json")),
    "config.json: a link to itself": Case(link("config.json", "config.json")),
    "config.json: a device": Case(link("config.json", "/dev/zero")),
    "generation_config.json: a link to a secret": Case(link("generation_config.json"), ("quantize",)),
    "LICENSE: a link to a secret": Case(link("LICENSE"), ("quantize",)),
    "weights: a link to a device": Case(link("model.safetensors", "/dev/zero")),
    "weights: a link to a secret": Case(link("model.safetensors")),
    "template: Python's internals": template("{{ cycler.__init__.__globals__.os.system('touch pwned') }}"),
    "template: subclasses": template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "template: for ever": template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
    "template: ten gigabytes": template("{{ 'a' * 10**10 }}"),
    "template: doubling": template(
        "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
    ),
    "template: not closed": template("{% if x %}"),
    "template: another file": template("{% include '/etc/passwd' %}"),
}


def words(command: str, model: Path, scratch: Path) -> list[str]:
    out = str(scratch / "out")
    if command == "plan":
        return ["plan", str(model), "--on", "h100"]
    if command == "quantize":
        return ["quantize", str(model), "-r", "B3", "--set", "method=rtn", "--set", "group_size=32", "-o", out]
    return [
        "calibrate",
        str(scratch / "chat.jsonl"),
        "-m",
        str(model),
        "--sequences",
        "4",
        "--max-tokens",
        "32",
        "-o",
        out,
    ]


def prepare(scratch: Path) -> Path:
    """A sound model, and conversations to calibrate on."""
    turns = [{"role": "user", "content": "How far is it? " * 9}, {"role": "assistant", "content": "Nine miles. " * 20}]
    (scratch / "chat.jsonl").write_text("".join(json.dumps({"messages": turns, "n": i}) + "\n" for i in range(50)))
    return make_tiny("llama", scratch / "sound")


def attempt(case: Case, sound: Path, scratch: Path, commands: tuple[str, ...] = COMMANDS) -> dict[str, Ended]:
    """The spoilt copy given to each of the commands."""
    model = scratch / "model"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(sound, model)
    case.spoil(model)
    ended = {}
    for command in commands:
        shutil.rmtree(scratch / "out", ignore_errors=True)
        ended[command] = run(words(command, model, scratch), before=lambda: os.chdir(scratch))
        if (scratch / "pwned").exists():
            raise SystemExit(f"{command} ran what the model carries")
    return ended


def faults(case: Case, ended: dict[str, Ended], seconds: float, mib: int, scratch: Path) -> list[str]:
    """What must not be."""
    wrong = []
    for command, end in ended.items():
        if command in case.commands and end.status not in (1, 2):
            wrong.append(f"{command} ends with {end.status}")
        if end.status and (not end.error or "unexpected" in end.error or len(end.error) > 1000):
            wrong.append(f"{command} does not end in one line: {end.stderr[-300:]!r}")
        if end.seconds > seconds or end.mib > mib:
            wrong.append(f"{command} took {end.seconds:.0f} s and {end.mib} MiB")
        if SECRET in end.stdout + end.stderr:
            wrong.append(f"{command} shows the secret")
    leaked = [p.name for p in (scratch / "out").rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]
    return wrong + [f"the secret stands in {name}" for name in leaked]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name has this word")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--mib", type=int, default=1500)
    asked = parser.parse_args()
    import_all()
    print("| a model directory with | refused by | seconds | MiB | what it says |\n|---|---|---|---|---|")
    bad = 0
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        sound = prepare(scratch)
        for command in COMMANDS:
            end = run(words(command, sound, scratch))
            if end.status:
                raise SystemExit(f"{command} refuses the sound model: {end.stderr}")
            shutil.rmtree(scratch / "out", ignore_errors=True)
        for name, case in CASES.items():
            if asked.only not in name:
                continue
            ended = attempt(case, sound, scratch)
            wrong = faults(case, ended, asked.seconds, asked.mib, scratch)
            by = ", ".join(command for command, end in ended.items() if end.status in (1, 2))
            line = ended[case.commands[0]].error.replace(str(scratch), "").removeprefix("halfbyte: ")[:110]
            worst = max(end.seconds for end in ended.values()), max(end.mib for end in ended.values())
            print(f"| {name} | {by} | {worst[0]:.1f} | {worst[1]} | {line.replace('|', '/')} |", flush=True)
            for told in wrong:
                print(f"{name}: {told}", file=sys.stderr, flush=True)
            bad += bool(wrong)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
