"""Speed and stability in a run: on the platform that the machine is, with prompts that the model has room for."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import halfbyte.evaluate.speed_machine as speed_machine
import halfbyte.experiments.served_measurements as served_measurements
from halfbyte.errors import HalfbyteError
from halfbyte.platforms import load_platform
from tests.tiny import make_tiny
from tests.unit.artifacts import halfbyte
from tests.unit.fake_vllm import make_fake


@pytest.mark.parametrize(
    ("device", "names", "expected", "told"),
    [
        ("NVIDIA H100 80GB HBM3", ("mi325x", "h100"), "h100", False),
        ("AMD Instinct MI325X", ("h100", "mi325x"), "mi325x", False),
        ("NVIDIA H200", ("mi325x", "h100"), "h100", True),
        ("NVIDIA H200", ("h100", "cpu"), "cpu", False),
        ("NVIDIA H200", ("mi325x",), None, False),
    ],
)
def test_which_of_the_platforms_is_here(
    monkeypatch: Any, device: str, names: tuple[str, ...], expected: str | None, told: bool
) -> None:
    monkeypatch.setattr(speed_machine, "device_name", lambda *_: device)
    said: list[str] = []
    platforms = [load_platform(name) for name in names]
    progress: Any = SimpleNamespace(say=said.append)
    if expected is None:
        with pytest.raises(HalfbyteError, match=f"this machine .{device}. is not mi325x: measure there"):
            speed_machine.measured_here(platforms, progress)
    else:
        found = speed_machine.measured_here(platforms, progress)
        assert found.name == expected and bool(said) == told


@pytest.mark.parametrize(
    ("device", "here"),
    [(None, "cpu"), ("NVIDIA H100 80GB HBM3", "h100"), ("8 x AMD Instinct MI325X", "mi325x"), ("NVIDIA A100", "cpu")],
)
def test_the_platform_that_this_machine_is(monkeypatch: Any, device: str | None, here: str) -> None:
    monkeypatch.setattr(speed_machine, "device_name", lambda *_: device)
    assert speed_machine.platform_here() == here


@pytest.mark.parametrize(
    ("limit", "context", "expected"),
    [
        (None, None, (128, 512)),
        (8192, None, (128, 512)),
        (256, None, (120, 112)),
        (8192, 400, (128, 256)),
        (150, 0, (67, 6)),
    ],
)
def test_answers_fit_the_context(
    tmp_path: Path, limit: int | None, context: int | None, expected: tuple[int, int]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": limit} if limit else {}))
    subject: Any = SimpleNamespace(path=tmp_path, artifact=tmp_path, context=context)
    assert served_measurements.sizes(subject) == expected
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 145}')
    with pytest.raises(HalfbyteError, match="145 tokens leave no room"):
        served_measurements.sizes(subject)


def test_stability_of_a_model_with_a_small_context(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(served_measurements, "LOAD_SECONDS", 0.1)
    make_tiny("llama", tmp_path / "m", num_hidden_layers=2, max_position_embeddings=256)
    (tmp_path / "own.txt").write_text("\n\n".join(f"Paragraph {i}: " + "words and more, " * 20 for i in range(60)))
    recipe = ["-r", "B1", "--set", "calibration={sequences: 40, max_tokens: 64}", "--text", tmp_path / "own.txt"]
    gates = ["--gate", "ppl=off", "--gate", "top1=0%", "--gate", "stability"]
    request = ["run", tmp_path / "m", "--on", "cpu", *recipe, *gates, "--vllm", make_fake(tmp_path / "fake")]
    assert halfbyte(*request, "-o", tmp_path / "out") == 3
    assert json.loads((tmp_path / "out" / "stability.json").read_text())["generations"] == 32
