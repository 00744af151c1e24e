"""Hidden states on every tier: the same bits, in the same order, and nothing left."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest
import torch

import halfbyte.engine.loop as loop_module
from halfbyte.engine import BlockResult, Job, quantize_blocks
from halfbyte.engine.activations import Activations, Room
from halfbyte.engine.memory import Fit
from halfbyte.errors import HalfbyteError
from halfbyte.models import Checkpoint
from halfbyte.plan.layers import assign, quantized
from halfbyte.recipe.schema import Recipe
from tests.tiny import VOCAB, make_tiny

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SHAPES = ((2, 9, 8), (3, 5, 8), (1, 40, 8), (4, 4, 8))
SIZES = [2 * a * b * c for a, b, c in SHAPES]


def batches(seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).bfloat16() for shape in SHAPES]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("on_device", [None, 0, SIZES[0]])
@pytest.mark.parametrize("host", [None, 0, SIZES[0] + SIZES[1]])
def test_a_store_is_a_list_wherever_it_lies(
    device: str, on_device: int | None, host: int | None, tmp_path: Path
) -> None:
    """Read, replaced in passes as the engine does it, read twice, read again: equal bits, and bytes where told."""
    plain = batches()
    with Activations(device, Room(on_device, host, tmp_path)) as store:
        for x in plain:
            store.append(x.to(device))
        for turn in range(3):
            for i, x in enumerate(store):
                assert x.device.type == device and torch.equal(x.cpu(), plain[i])
                plain[i] = (plain[i].float() * 1.5 + turn).bfloat16()
                store[i] = plain[i].to(device)
            assert all(torch.equal(x.cpu(), y) for x, y in zip(store, plain, strict=True))
        fits = (host is None or host >= SIZES[0]) or (device == "cuda" and on_device is None)
        if device == "cpu":
            assert store.spilled == (0 if host is None else sum(SIZES[2:] if host else SIZES))
        elif fits:
            assert store.spilled < sum(SIZES)
        assert not list(tmp_path.iterdir()), "the file has no name that could be left behind"


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(HalfbyteError, match="cannot be written"), Activations("cpu", Room(0, 0, tmp_path)) as store:
            for x in batches():
                store.append(x)
            list(store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("propagate", [False, True])
def test_the_pass_gives_the_same_codes_from_every_tier(
    propagate: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(make_tiny("llama", tmp_path / "model"))
    recipe = Recipe.model_validate({"group_size": 32, "method": "gptq", "propagate": propagate})
    g = torch.Generator().manual_seed(0)
    data = [torch.randint(0, VOCAB, (n,), generator=g) for n in (40, 40, 33, 20, 7)]

    def run(room: Room) -> dict[int, BlockResult]:
        monkeypatch.setattr(loop_module, "fit", lambda *_: Fit(80, room, room))
        kept: dict[int, BlockResult] = {}
        job = Job(recipe, quantized(assign(recipe, checkpoint)), kept.__contains__, kept.__setitem__)
        quantize_blocks(checkpoint, [job], data)
        return kept

    whole, spilled = run(Room()), run(Room(0, 0, tmp_path / "scratch"))
    assert (tmp_path / "scratch").is_dir() and not os.listdir(tmp_path / "scratch")
    for index, block in whole.items():
        for name, one in block.linears.items():
            other = spilled[index].linears[name]
            assert torch.equal(one.q.codes, other.q.codes) and torch.equal(one.q.scales, other.q.scales)
            assert one.relative_error == other.relative_error
