"""What the tests of `quantize` share: models made once, what the quantizer chose, and two readings of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import halfbyte
import halfbyte.artifact.writer as writer
from halfbyte.artifact import check_artifact, load_fake_quantized
from halfbyte.recipe import Recipe
from tests.tiny import make_tiny
from tests.unit.artifacts import random_set, values, weight_of

IDS = torch.randint(5, 300, (2, 40), generator=torch.Generator().manual_seed(9))
RTN = {"method": "rtn", "group_size": 64}
GPTQ = {"method": "gptq", "group_size": 32}
AWQ = {"method": "awq", "group_size": 32}
LEAST = 0.75
"""Correlation with the BF16 model's logits. Random weights amplify rounding, so a tiny model keeps 0.77 to 0.99 of
itself at 4 bits; weights in the wrong place keep next to nothing."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """tiny(family, **overrides): a model directory, made once."""
    made: dict[str, Path] = {}

    def get(family: str, **overrides: Any) -> Path:
        name = json.dumps([family, overrides], sort_keys=True)
        if name not in made:
            made[name] = make_tiny(family, tmp_path_factory.mktemp(family), **overrides)
        return made[name]

    return get


class Chosen:
    """What the quantizer handed to the writer."""

    def __init__(self) -> None:
        self.linears: dict[str, Any] = {}
        self.tensors: dict[str, torch.Tensor] = {}


@pytest.fixture()
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Chosen]:
    seen, emit = Chosen(), writer.ArtifactWriter.emit

    def record(self: Any, block: int, linears: Any, tensors: Any, *rest: Any) -> None:
        seen.linears |= {name: solved.q for name, solved in linears.items()}
        seen.tensors |= tensors
        emit(self, block, linears, tensors, *rest)

    monkeypatch.setattr(writer.ArtifactWriter, "emit", record)
    yield seen


def make(model: Path, output: Path, recipe: dict[str, Any], **more: Any) -> dict[str, Any]:
    needs = Recipe.model_validate(recipe).needs_calibration
    return halfbyte.quantize(str(model), Recipe.model_validate(recipe), output, random_set() if needs else None, **more)


def make_with(model: Path, output: Path, recipe: dict[str, Any], data: Any, **more: Any) -> dict[str, Any]:
    return halfbyte.quantize(str(model), Recipe.model_validate(recipe), output, data, **more)


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits.float()


def by_hand(model: Path, seen: Chosen) -> Any:
    """The BF16 model in float32 with what the quantizer chose put into it: transformers and this file alone."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if any(name == "lm_head" for name in seen.linears) and network.config.tie_word_embeddings:
        raise AssertionError("a tied lm_head was quantized")
    with torch.no_grad():
        for name, q in seen.linears.items():
            weight_of(network, name).copy_(values(q))
        for name, tensor in seen.tensors.items():
            network.get_parameter(name).copy_(tensor)
    return network


def kept(before: torch.Tensor, after: torch.Tensor) -> float:
    """Correlation of the logits, each position centred."""
    a, b = (x - x.mean(-1, keepdim=True) for x in (before, after))
    return float((a * b).sum() / (a.norm() * b.norm()))


def assert_sound(model: Path, output: Path, seen: Chosen) -> None:
    """Structure, numbers, and the same logits by the artifact's reader, by hand, and nearly by the BF16 model."""
    found = check_artifact(output)
    assert found["ok"], found["findings"]
    read = logits(load_fake_quantized(output, dtype=torch.float32))
    torch.testing.assert_close(read, logits(by_hand(model, seen)), rtol=1e-4, atol=1e-4)
    bf16 = logits(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    assert LEAST < kept(bf16, read) < 0.99999
