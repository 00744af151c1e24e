"""What the tests of the command line share: a model, an artifact, commands that must fail, commands that give JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_tiny
from tests.unit.artifacts import halfbyte, random_set, without_vllm


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_set().save(tmp_path_factory.mktemp("cli") / "set")


@pytest.fixture(scope="session")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact, not to be changed."""
    from halfbyte import Recipe, quantize

    out = tmp_path_factory.mktemp("cli") / "made"
    quantize(str(model), Recipe(method="rtn", group_size=32), out)
    return out


@pytest.fixture()
def artifact(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "artifact"))


@pytest.fixture()
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    without_vllm(monkeypatch)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture()
def refused(capsys: Any) -> Callable[..., str]:
    """Run a command that must fail; returns its one line. Nothing may stand on stdout."""

    def run(code: int, *words: object) -> str:
        capsys.readouterr()
        assert halfbyte(*words) == code
        shown = capsys.readouterr()
        assert shown.out == "" and "Traceback" not in shown.err
        lines = shown.err.splitlines()
        assert [line for line in lines if line.startswith("halfbyte: ")] == lines[-1:], shown.err
        return lines[-1]

    return run


@pytest.fixture()
def as_json(capsys: Any) -> Callable[..., Any]:
    """Run a command with --format json; returns what stands on stdout, which must be JSON and nothing else."""

    def run(*words: object, code: int = 0) -> Any:
        capsys.readouterr()
        *before, last = words if "--" not in words else words[: words.index("--")]
        after = words[words.index("--") :] if "--" in words else ()
        assert halfbyte(*before, last, "--format", "json", *after) == code
        return json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    return run
