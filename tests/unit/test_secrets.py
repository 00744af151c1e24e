"""Nothing secret in a manifest, a log or a report; servers on the loopback alone; pages that show text as text."""

from __future__ import annotations

import json
import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import halfbyte.serving.install as install
from halfbyte.files import redacted
from halfbyte.report import build_report
from halfbyte.serving import Server, VllmInstall, serve_command
from tests.tiny import make_tiny
from tests.unit import report_files
from tests.unit.artifacts import halfbyte
from tests.unit.fake_vllm import VERSION, make_fake

PLANTED = {
    "HF_TOKEN": "hf_PLANTEDplantedPLANTED01", "VLLM_API_KEY": "planted-vllm-key", "MY_PASSWORD": "planted-password",
    "OPENAI_API_KEY": "sk-planted0123456789", "AWS_SECRET_ACCESS_KEY": "planted/aws/secret",
}  # fmt: skip
EVIL = "<script>alert('planted')</script>\"'><img src=x onerror=planted>"


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--hf-token", "abc", "-o", "out"], ["--hf-token", "***", "-o", "out"]),
        (["--api-key=abc", "--password", "-o"], ["--api-key=***", "--password", "-o"]),
        (["https://me:pw@host/x?y=1"], ["https://***@host/x?y=1"]),
        (["HF_TOKEN=abc", "aws_secret_access_key: abc"], ["HF_TOKEN=***", "aws_secret_access_key: ***"]),
        (["sk-abcdefghijklmnop", "hf_abcdefghijklmnop", "Bearer abcdefghijk"], ["***", "***", "***"]),
        (["--max-tokens", "512", "--tokenizer", "x"], ["--max-tokens", "512", "--tokenizer", "x"]),
        (["--set", "calibration.max_tokens=512"], ["--set", "calibration.max_tokens=512"]),
        (
            ["--gate", "ppl=+5%", "https://host/x@y", "org/model"],
            ["--gate", "ppl=+5%", "https://host/x@y", "org/model"],
        ),
    ],
)
def test_what_a_command_line_shows(words: list[str], shown: list[str]) -> None:
    assert redacted(words) == shown


def test_no_secret_reaches_what_a_run_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Planted in the environment and among the words; looked for in every file, the log and what is printed."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(install, "ENVIRONMENT", "no-such-environment")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {i} says: " + f"{i * 7} words and more, " * 30 for i in range(40)))
    out, fake = tmp_path / "out", make_fake(tmp_path / "fake")
    model = make_tiny("llama", tmp_path / "model")
    words = ["run", model, "--on", "cpu", "-r", "B3", "--set", "method=rtn", "--set", "group_size=32", "--text", text]
    gates = ["--gate", "ppl=+100000%", "--gate", "top1=0%", "--vllm", fake]
    words += ["--set", "calibration.sequences=16", "--set", "calibration.max_tokens=256"]
    assert halfbyte(*words, *gates, "-o", out, "--set", "description=https://me:planted-pw@host") in (0, 3)
    shown = capsys.readouterr()
    files = [p for p in out.rglob("*") if p.is_file()]
    assert {"halfbyte.json", "vllm.log", "report.html", "served.json"} <= {p.name for p in files}
    command = json.loads((out / "model" / "halfbyte.json").read_text())["command"]
    assert "***" in command and "planted" not in command
    for secret in (*PLANTED.values(), "planted-pw"):
        assert secret not in shown.out + shown.err
        assert [p.name for p in files if secret.encode() in p.read_bytes()] == []


def test_the_log_of_a_server_shows_no_key_and_it_gets_none_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "planted-key")
    seen = tmp_path / "environment"
    script = tmp_path / "vllm"
    script.write_text(f"#!/bin/sh\nenv > {seen}\n")
    script.chmod(0o755)
    command = serve_command(tmp_path, "gptq", "cpu", variant=None, extra=["--api-key", "planted-word"])
    server = Server(command, VllmInstall(script, VERSION, script), log_path=tmp_path / "vllm.log", timeout=20)
    with pytest.raises(Exception, match="vLLM failed"), server:
        raise AssertionError("it cannot have started")
    assert "PATH=" in seen.read_text() and "planted-key" not in seen.read_text()
    log = (tmp_path / "vllm.log").read_text()
    assert "--api-key '***'" in log and "planted" not in log
    assert os.environ["VLLM_API_KEY"] == "planted-key"


@pytest.mark.parametrize("platform", ["h100", "mi325x", "cpu"])
def test_servers_listen_on_this_machine_alone(platform: str, tmp_path: Path) -> None:
    command = serve_command(tmp_path, "gptq", platform)
    assert command.value("--host") == "127.0.0.1" and not any("whoever" in note for note in command.notes)
    for words in (["--host", "0.0.0.0"], ["--host=::"], ["--host", "10.1.2.3"]):
        told = [note for note in serve_command(tmp_path, "gptq", platform, extra=words).notes if "whoever" in note]
        assert len(told) == 1 and "without a password: add --api-key" in told[0]
    guarded = serve_command(tmp_path, "gptq", platform, extra=["--host", "0.0.0.0", "--api-key", "x"]).notes
    assert any("with its --api-key" in note for note in guarded)
    for host in ("localhost", "::1", "127.0.0.2"):
        assert not any("whoever" in n for n in serve_command(tmp_path, "gptq", platform, extra=["--host", host]).notes)


def poisoned(tree: Any) -> Any:
    """Every piece of text in a result, and every name that it gives to something, with a script behind it."""
    if isinstance(tree, dict):
        return {key: poisoned(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [poisoned(value) for value in tree]
    keep = tree in ("ok", "passed", "failed", "accepted", "rejected", "served", "measured") or not isinstance(tree, str)
    return tree if keep else tree + EVIL


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.handlers: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.inside = tag == "script"
        self.handlers += [name for name, value in attributes if name.startswith("on") and "planted" in str(value)]

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts.append(data)

    def handle_endtag(self, tag: str) -> None:
        self.inside = False


def test_a_report_shows_text_as_text(tmp_path: Path) -> None:
    """Whatever templates stand: a script in the model's name, the recipe, gates, notices, findings, contexts."""
    report_files.write_run(tmp_path)
    for path in tmp_path.rglob("*.json"):
        path.write_text(json.dumps(poisoned(json.loads(path.read_text()))))
    page, plain = build_report(tmp_path)
    html = page.read_text()
    tags = _Tags()
    tags.feed(html)
    assert "planted" in html, "the page shows what was planted"
    assert tags.handlers == [] and "<script>alert" not in html and "<img src=x" not in html
    assert all("</script" not in script.lower() for script in tags.scripts)
    assert "<script>alert" not in "\n".join(_outside_fences(plain.read_text()))


def _outside_fences(text: str) -> list[str]:
    lines, inside = [], False
    for line in text.splitlines():
        inside ^= line.lstrip().startswith("```")
        lines += [] if inside else [line]
    return lines
