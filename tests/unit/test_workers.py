"""Workers: the same bytes whoever does the work, deaths survived and said, errors kept to their own piece."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte.engine.loop as loop
from halfbyte.algo import Stats
from halfbyte.engine import Errand, Here, Processes, Seat, as_done
from halfbyte.engine.parts import Part, divide, merged, parts_of
from halfbyte.engine.wire import pack, unpack
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.experiments.quantize import quantize
from halfbyte.models import Checkpoint, family_of
from halfbyte.recipe import load_recipe
from halfbyte.types import Quiet, Scheme
from tests.tiny import make_tiny
from tests.unit.artifacts import digests, halfbyte, random_set

MARK = "HALFBYTE_TEST_MARK"


def die_once(name: str) -> None:
    """SIGKILL for this process, the first time that it is asked under this name."""
    mark = Path(os.environ[MARK]) / name
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def dying_part(seat: Seat, part: Part) -> Any:
    if part.block == 1 and "down" in part.stats:
        die_once("block-1")
    return loop.solve_part(seat, part)


def square(seat: Seat, number: int, name: str = "") -> tuple[int, str, int, int]:
    if number == 3:
        seat.progress.say("three is odd")
    if number == 4:
        raise HalfbyteError("four is refused")
    if name:
        die_once(name)
    return number * number, seat.device, torch.get_num_threads(), os.getpid()


def die(seat: Seat) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("workers") / "m", num_hidden_layers=3, intermediate_size=192)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two processes, and what they had to say."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, str(tmp_path_factory.mktemp("marks")))
        said = Quiet()
        with Processes(["cpu", "cpu"], said) as workers:
            yield workers, said


def test_pieces_of_work(two: Any) -> None:
    """Values, notices and errors come back; a death costs a retry; threads are as many as here."""
    workers, said = two
    errands = [Errand(f"number {n}", square, (n, "dead" if n == 2 else "")) for n in range(5)]
    found = {errand.arguments[0]: done for errand, done in as_done(workers, errands)}
    values = {n: done.result() for n, done in found.items() if n != 4}
    assert {n: v[:3] for n, v in values.items()} == {n: (n * n, "cpu", torch.get_num_threads()) for n in range(4)}
    assert os.getpid() not in {v[3] for v in values.values()}
    with pytest.raises(HalfbyteError, match="four is refused"):
        found[4].result()
    assert sorted(said.notices) == ["number 2: its worker on cpu died (SIGKILL): tried again", "three is odd"]


def test_what_kills_every_worker_fails_alone(two: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import halfbyte.engine.processes as module

    monkeypatch.setattr(module, "ATTEMPTS", 1)
    workers, _ = two
    bad, good = workers.submit(Errand("bad", die)), workers.submit(Errand("good", square, (1,)))
    with pytest.raises(HalfbyteError, match=r"^bad: its worker on cpu died 1 times: is memory short\?$"):
        bad.result()
    assert good.result()[0] == 1


def test_two_workers_give_the_bytes_of_one(
    two: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a worker is killed in the middle of a block: that part is solved again, and it is said."""
    data = random_set(tokens=2100, longest=64)
    alone = quantize(str(model), "B1", tmp_path / "alone", data, device="cpu")
    workers, said = two
    said.notices.clear()
    monkeypatch.setattr(loop, "solve_part", dying_part)
    spread = quantize(str(model), "B1", tmp_path / "spread", data, device="cpu", workers=workers)
    assert digests(tmp_path / "spread") == digests(tmp_path / "alone")
    assert all(spread[key] == alone[key] for key in ("work", "linears", "notices", "bytes"))
    assert said.notices == ["block 1 (gate_up, down): its worker on cpu died (SIGKILL): tried again"]


def test_without_data_two_workers_give_the_bytes_of_one(two: Any, model: Path, tmp_path: Path) -> None:
    recipe = load_recipe("B3").model_validate({"method": "rtn", "group_size": 32})
    for name, workers in (("alone", None), ("spread", two[0])):
        quantize(str(model), recipe, tmp_path / name, device="cpu", workers=workers)
    assert digests(tmp_path / "spread") == digests(tmp_path / "alone")


def test_ended_in_the_middle_nobody_is_left(tmp_path: Path) -> None:
    with Processes(["cpu"]) as workers:
        pid = workers.submit(Errand("number", square, (1,))).result()[3]
        workers.submit(Errand("for ever", _pause))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def _pause(seat: Seat) -> None:
    signal.pause()


def test_here_one_after_the_other() -> None:
    begun: list[int] = []
    errands = [Errand(str(n), lambda seat, n=n: begun.append(n)) for n in range(3)]
    for errand, done in as_done(Here(), errands):
        assert done.done() and begun[-1] == int(errand.label)
    assert begun == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8, torch.float8_e4m3fn])
def test_tensors_on_the_wire(dtype: torch.dtype) -> None:
    whole = torch.randn(64, 32).to(dtype)
    for tensor in (whole, whole[3:5], whole.T, whole[:, ::2], whole[0, 0], whole[:0]):
        data = pack({"x": (tensor,)})
        (back,) = unpack(data)["x"]
        assert back.dtype == dtype and back.shape == tensor.shape
        assert torch.equal(back.view(torch.uint8) if back.ndim else back.float(), _bytes(tensor))
        assert len(data) < tensor.numel() * tensor.element_size() + 400, "the storage behind a view came along"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor.float()


def test_parts_hold_what_input_scales_tie(model: Path) -> None:
    family = family_of(Checkpoint(model).config)
    kinds = ("qkv", "o", "gate_up", "down")
    assert parts_of(family, load_recipe("A1")) in ([(k,) for k in kinds], [("qkv", "o"), ("gate_up", "down")])
    assert merged(kinds, [("o", "qkv"), ("down", "qkv")]) == [("qkv", "o", "down"), ("gate_up",)]
    assert merged(kinds, []) == [(kind,) for kind in kinds]
    names = [f"model.layers.1.{name}" for group in family.groups for name in group.names]
    awq = (load_recipe("B1"), {name: Scheme("int4_sym", 64) for name in names})
    mlp = (load_recipe("B1"), {name: Scheme("int4_sym", 32) for name in names if "mlp" in name})
    tensors = {f"{name.removeprefix('model.layers.1.')}.weight": torch.ones(1) for name in names}
    tensors["input_layernorm.weight"] = torch.ones(1)
    stats = {kind: Stats.uniform(8) for kind in kinds}
    first, second = divide(Part(family, 1, family.groups_of(1), [awq, mlp], tensors, stats))
    assert tuple(first.stats) == ("qkv", "o") and [len(s) for _, s in first.wanted] == [4, 0]
    assert tuple(second.stats) == ("gate_up", "down") and [len(s) for _, s in second.wanted] == [3, 3]
    assert set(first.tensors) == {n for n in tensors if "mlp" not in n} and set(second.stats) == {"gate_up", "down"}


def test_refusals(model: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["quantize", model, "-r", "B3", "-o", tmp_path / "out"]
    for more, said in (
        (["--devices", "cuda:9"], "device 'cuda:9' is not there: "),
        (["--devices", "cpu,"], "write them as cuda:0,cuda:1"),
        (["--devices", "cpu", "--workers", "2"], "three ways to the same: give one"),
        (["--ray-workers", "2"], "belong to --ray"),
        (["--ray", "head:6379", "--ray-workers", "2"], "--ray-workers belongs to --ray local"),
    ):
        assert halfbyte(*words, *more) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line and not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="device 'nowhere' is unknown"):
        Processes(["nowhere"])
