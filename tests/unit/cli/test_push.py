"""`push` against a stand-in for the Hub: what goes, what stays, who may see it, and that the token shows nowhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tests.unit import report_files
from tests.unit.artifacts import halfbyte
from tests.unit.hub_stand_in import COMMIT, TOKEN, StandIn, hub


@pytest.fixture()
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    with hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-login"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # the stand-in speaks LFS alone
        yield running


@pytest.fixture()
def littered(artifact: Path) -> Path:
    """An artifact among what must not be published."""
    (artifact / ".partial").mkdir()
    for name in ("vllm.log", "model.safetensors.tmp", "notes.txt", ".partial/work.json", ".env"):
        (artifact / name).write_text("private")
    return artifact


def test_an_artifact_goes_whole_and_private(littered: Path, server: StandIn, capsys: Any) -> None:
    assert halfbyte("push", littered, "me/model", "--format", "json") == 0
    shown = capsys.readouterr()
    result, manifest = json.loads(shown.out), json.loads((littered / "halfbyte.json").read_text())
    assert server.repos == {"me/model": True} and result["private"] and result["created"]
    assert set(server.files) == {*manifest["files"], "halfbyte.json", "README.md"}
    for name in set(server.files) - {"README.md"}:
        assert server.files[name] == (littered / name).read_bytes(), name
    assert [row["file"] for row in result["files"]] == sorted(server.files)
    assert result["left_out"] == [".env", ".partial/", "model.safetensors.tmp", "notes.txt", "vllm.log"]
    assert (result["url"], result["commit"]) == (f"{server.url}/me/model", COMMIT)
    assert {who for _, path, who in server.requests if path.startswith("/api/")} == {f"Bearer {TOKEN}"}
    card = ModelCard(server.files["README.md"].decode()).data
    assert card.base_model_relation == "quantized" and "4-bit" in card.tags and card.pipeline_tag == "text-generation"
    written = b"".join(file.read_bytes() for file in littered.rglob("*") if file.is_file())
    for place in (shown.out, shown.err, *(body.decode("latin-1") for body in server.files.values())):
        assert TOKEN not in place
    assert TOKEN.encode() not in written


def test_a_dry_run_asks_the_hub_nothing(littered: Path, server: StandIn, capsys: Any) -> None:
    (littered / "README.md").write_text("---\nlicense: mit\n---\nMy own card.")
    assert halfbyte("push", littered, "me/model", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert server.requests == [] and "README.md" in shown and "left out: vllm.log" in shown
    assert "(private)" in shown and shown.splitlines()[-1] == f"next: halfbyte push {littered} me/model"
    assert halfbyte("push", littered, "me/model", "--dry-run", "--public", "--format", "json") == 0
    assert json.loads(capsys.readouterr().out)["private"] is False
    assert halfbyte("push", littered, "me/model") == 0
    assert server.files["README.md"] == (littered / "README.md").read_bytes(), "the user's own card goes"


def test_nothing_becomes_public_unasked(artifact: Path, server: StandIn, refused: Any, capsys: Any) -> None:
    server.repos["me/open"] = False
    assert "me/open is public: give --public" in refused(2, "push", artifact, "me/open")
    assert server.files == {}
    assert halfbyte("push", artifact, "me/open", "--public") == 0 and server.files
    assert halfbyte("push", artifact, "me/new", "--public") == 0 and server.repos["me/new"] is False
    server.repos["me/closed"] = True
    capsys.readouterr()
    assert halfbyte("push", artifact, "me/closed", "--public") == 0
    assert "was private before and stays so" in capsys.readouterr().err and server.repos["me/closed"]


def test_what_is_broken_is_refused(artifact: Path, server: StandIn, refused: Any, tmp_path: Path) -> None:
    with (artifact / "model.safetensors").open("r+b") as handle:
        handle.seek(-1, 2)
        last = handle.read(1)
        handle.seek(-1, 2)
        handle.write(bytes([last[0] ^ 1]))
    assert "is not sound (model.safetensors" in refused(1, "push", artifact, "me/model")
    assert "holds no halfbyte.json" in refused(2, "push", tmp_path, "me/model")
    assert "write owner/name" in refused(2, "push", artifact, "model")
    assert server.requests == []


def test_refusals_are_one_line(artifact: Path, server: StandIn, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server.refuse = 403
    line = refused(1, "push", artifact, "me/model")
    assert "403" in line and "may the token write there?" in line and TOKEN not in line
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "was not uploaded" in refused(1, "push", artifact, "me/model")
    monkeypatch.delenv("HF_TOKEN")
    assert "run `hf auth login`" in refused(2, "push", artifact, "me/model")


def test_the_card_is_filled_from_results(artifact: Path, server: StandIn, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "eval.json").write_text(json.dumps(report_files.evaluation()))
    assert halfbyte("push", artifact, "me/model", "--results", tmp_path / "results") == 0
    card = server.files["README.md"].decode()
    assert "| Perplexity, change | +10.3% |" in card and "On h100:" in card and "On cpu:" in card
    assert not (artifact / "README.md").exists(), "the artifact stays as it is"
