"""Streamed gradients against the whole model's own."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from halfbyte.engine import Skeleton
from halfbyte.engine.backprop import Tape, equal_lengths
from halfbyte.engine.importance import SINK, SMOOTH, every_token, first_token
from halfbyte.models import Checkpoint
from tests.tiny import DENSE, VOCAB, make_tiny


def _ids(batch: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(5, VOCAB, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", DENSE)
def test_streamed_gradients_are_the_models_own(family: str, tmp_path: Path) -> None:
    path = make_tiny(family, tmp_path)
    ids, labels = _ids(), _ids().roll(1, 1)
    skeleton = Skeleton(Checkpoint(path), dtype=torch.float32)
    found: dict[str, torch.Tensor] = {}

    @contextmanager
    def watch(index, block):
        for parameter in block.parameters():
            parameter.requires_grad_(True)
        yield
        for name, parameter in block.named_parameters():
            found[f"model.layers.{index}.{name}"] = parameter.grad

    def loss(logits, piece):
        return torch.nn.functional.cross_entropy(logits, labels.flatten()[piece], reduction="sum")

    tape = Tape(skeleton, ids)
    gradient, total = tape.head(loss)
    tape.backward(gradient, watch)

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    logits = model(ids).logits
    torch.testing.assert_close(skeleton.logits(tape.output), logits, rtol=1e-4, atol=1e-4)
    whole = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    whole.backward()
    assert total == pytest.approx(whole.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        if ".layers." in name:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-4)


def test_batches_are_cut_to_their_shortest() -> None:
    batches = list(equal_lengths([torch.arange(5), torch.arange(3), torch.arange(9)], 2))
    assert [b.tolist() for b in batches] == [[[0, 1, 2], [0, 1, 2]], [list(range(9))]]


def _model_powers(path: Path, ids: torch.Tensor, seed: int) -> torch.Tensor:
    """Squared gradients of block 1's qkv outputs, by autograd in the whole model, at the labels drawn by `seed`."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    outputs = []
    for name in ("k_proj", "q_proj", "v_proj"):
        linear = model.get_submodule(f"model.layers.1.self_attn.{name}")
        linear.register_forward_hook(lambda m, a, o: (o.retain_grad(), outputs.append(o))[0])
    log_p = torch.log_softmax(model(ids).logits.flatten(0, 1), -1)
    y = torch.multinomial(log_p.detach().exp(), 1, generator=torch.Generator().manual_seed(seed))
    (-log_p.gather(1, y).sum()).backward()
    return sum(o.grad.square().sum(-1) for o in outputs)


def test_the_first_token_counts_by_its_gradient(tmp_path: Path) -> None:
    path = make_tiny("llama", tmp_path)
    ids = _ids(4, 64)
    found = first_token(Skeleton(Checkpoint(path), dtype=torch.float32), list(ids), seed=5)
    assert set(found.first) == {(i, k) for i in range(2) for k in ("qkv", "o", "gate_up", "down")}
    power = _model_powers(path, ids, 5)
    assert found.first[1, "qkv"] == pytest.approx(float(power[:, 0].mean() / power[:, 1:].mean()), rel=1e-3)
    weights = found.weights((1, "qkv"), 0, (2, 5))
    assert weights[:, 0].tolist() == [found.first[1, "qkv"]] * 2
    assert weights[:, 1:].eq(1).all()


def test_every_token_counts_by_its_gradient(tmp_path: Path) -> None:
    path = make_tiny("llama", tmp_path)
    ids = _ids(3, 40)
    found = every_token(Skeleton(Checkpoint(path), dtype=torch.float32), [(ids, None)], seed=2)
    power = _model_powers(path, ids, 2)
    expected = (power / power.mean() + SMOOTH) / (1 + SMOOTH)
    torch.testing.assert_close(found.weights((1, "qkv"), 0, (3, 40)), expected, rtol=1e-3, atol=1e-3)


def test_padding_has_no_part_in_the_weights(tmp_path: Path) -> None:
    skeleton = Skeleton(Checkpoint(make_tiny("llama", tmp_path)), dtype=torch.float32)
    ids = _ids(2, 40)
    keep = torch.ones(2, 40, dtype=torch.bool)
    keep[1, 30:] = False
    other = ids.clone()
    other[1, 30:] = 7
    one = every_token(skeleton, [(ids, keep.flatten())]).weights((0, "down"), 0, (2, 40))
    two = every_token(skeleton, [(other, keep.flatten())]).weights((0, "down"), 0, (2, 40))
    torch.testing.assert_close(one[keep], two[keep], rtol=0.2, atol=0.2)
    assert float(one[keep].mean()) == pytest.approx(1, rel=1e-4)


def test_short_sequences_leave_the_default(tmp_path: Path) -> None:
    skeleton = Skeleton(Checkpoint(make_tiny("llama", tmp_path)))
    found = first_token(skeleton, [torch.arange(5, 12)])
    assert found.weights((0, "qkv"), 0, (1, 3)).tolist() == [[SINK, 1, 1]]
