"""A model larger than the machine: its plan from headers, and some of its blocks in 4 bits, with the memory they take.

    python benchmarks/reliability/large.py [--shape 70b|small] [--blocks 2] [--tokens 2048] [--scratch DIR]
                                           [--skip gptq]

A checkpoint of Llama-3.1-70B's shape is made with complete headers; its files are holes (`truncate`) but for some
blocks with random numbers. It is planned; then, each in a process of its own:

    NVFP4 without data  the first `blocks` of its 80
    GPTQ                one block of a model that has this one block alone and all the widths: to weigh tokens, the
                        engine runs the whole model forward and backward, and of 80 blocks that takes days on two cores

Then reading a block and writing its result, from and to the disk itself, beside plain sequential reads and writes of as
many bytes. The peak is what a process takes beyond what it has after its imports; it counts the weights, which are
mapped from their file, and whose pages the system may take back. Prints tables in Markdown. Time it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from halfbyte.artifact import ArtifactWriter
from halfbyte.engine import BlockResult, Job, Skeleton, quantize_blocks
from halfbyte.engine.memory import need
from halfbyte.files import write_tensors
from halfbyte.models import Checkpoint, family_of
from halfbyte.plan.layers import assign, quantized
from halfbyte.recipe.schema import Recipe
from tests.unit.sparse import LLAMA_70B, shapes

GIB = 1 << 30
CHUNK = 16 << 20
"""Bytes of one plain read or write."""
SHARD = 2
"""Blocks in a file: 3.2 GiB, as real ones are cut. One file of 141 GB could not be mapped on a small machine."""
ROWS = 2048
"""Rows of the embedding and the head that hold numbers: the tokens are below that."""
SHAPES: dict[str, dict[str, Any]] = {
    "70b": LLAMA_70B,
    "small": LLAMA_70B
    | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 4096},
}
RECIPES = {
    "NVFP4 without data": Recipe.model_validate(
        {"method": "nvfp4", "rounding": "rtn", "format": "modelopt", "group_size": 16}
    ),
    "GPTQ": Recipe.model_validate({"method": "gptq", "scaling": "none", "group_size": 128}),
}


def make(directory: Path, config: dict[str, Any], real: int) -> Path:
    """A checkpoint with that config, `SHARD` blocks a file; the first `real` blocks, every norm, and some rows of
    embedding and head hold random numbers."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes(config).items():
        block = int(name.split(".")[2]) // SHARD + 1 if ".layers." in name else 0
        shards.setdefault(f"model-{block:05d}.safetensors", {})[name] = shape
    for file, tensors in shards.items():
        _shard(directory / file, tensors, tuple(f"model.layers.{index}." for index in range(real)), generator)
    places = {name: file for file, tensors in shards.items() for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return directory


def _shard(place: Path, tensors: dict[str, tuple[int, ...]], real: tuple[str, ...], chance: torch.Generator) -> None:
    """A file with all of its header, and a hole in place of what is not real."""
    header, starts, end = {}, dict[str, int](), 0
    for name, shape in tensors.items():
        starts[name], end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [starts[name], end]}
    text = json.dumps(header).encode()
    with place.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for name, shape in tensors.items():
            if (value := _value(name, shape, real, chance)) is not None:
                file.seek(8 + len(text) + starts[name])
                file.write(value.view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _value(name: str, shape: tuple[int, ...], real: tuple[str, ...], chance: torch.Generator) -> torch.Tensor | None:
    """A tensor's numbers, or its first ROWS rows; None: it has none."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    if ".layers." in name and not name.startswith(real):
        return None
    rows = shape[0] if ".layers." in name else min(ROWS, shape[0])
    scale = 1.0 if "embed" in name else shape[1] ** -0.5
    return torch.empty(rows, shape[1], dtype=torch.bfloat16).normal_(generator=chance).mul_(scale)


@dataclass(frozen=True)
class Row:
    """What some blocks took. Seconds of all of them; bytes: peak beyond the imports, and what `need` had foretold."""

    what: str
    blocks: int
    seconds: float
    peak: int
    foretold: int
    written: int


def solve(what: str, model: Path, out: Path, blocks: int, tokens: int, memory: int | None) -> Row:
    """Quantize the first blocks of a model with one of RECIPES and keep them, as halfbyte does."""
    torch.manual_seed(0)
    checkpoint, recipe = Checkpoint(model), RECIPES[what]
    plans = assign(recipe, checkpoint)
    writer = ArtifactWriter(out, checkpoint, recipe, plans, "large")
    writer.open()

    def emit(block: int, result: BlockResult) -> None:
        writer.emit(block, result.linears, result.tensors, result.seconds, result.notices)

    job = Job(recipe, quantized(plans), lambda block: not 0 <= block < blocks or writer.done(block), emit)
    data = [torch.randint(0, ROWS, (64,)) for _ in range(tokens // 64)] if recipe.needs_calibration else None
    Skeleton(checkpoint)  # imports the model's code
    before, started = _forget_peak(), time.monotonic()
    quantize_blocks(checkpoint, [job], data, memory=memory, scratch=writer.partial)
    seconds, peak = time.monotonic() - started, _peak() - before
    files = list(writer.partial.glob("block-*.safetensors"))
    if len(files) != blocks:
        raise SystemExit(f"{what}: {len(files)} blocks are kept, not {blocks}")
    fresh = Job(recipe, quantized(plans), lambda block: not 0 <= block < blocks, emit)
    foretold = need(checkpoint, [fresh], tokens, 4096, data is not None).total
    return Row(what, blocks, seconds, peak, foretold, sum(file.stat().st_size for file in files))


def _forget_peak() -> int:
    """Begin to count the peak anew; returns what is resident now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) << 10


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def plan(model: Path) -> float:
    """Seconds of `halfbyte plan`, from start to end."""
    started = time.monotonic()
    root = str(Path(__file__).resolve().parents[2])
    words = [sys.executable, "-m", "halfbyte", "plan", str(model), "--on", "h100"]
    env = {**os.environ, "PYTHONPATH": root}
    ended = subprocess.run(words, capture_output=True, text=True, env=env, check=False)
    if ended.returncode != 0:
        raise SystemExit(f"plan ends with {ended.returncode}: {ended.stderr}")
    return time.monotonic() - started


def throughput(model: Path, scratch: Path, written: int) -> dict[str, tuple[int, float, float]]:
    """By what is done: bytes, seconds as halfbyte does it, seconds of the same plainly."""
    checkpoint = Checkpoint(model)
    prefix = family_of(checkpoint.config).block(0) + "."
    block = {name: info for name, info in checkpoint.tensors.items() if name.startswith(prefix)}
    file, size = next(iter(block.values())).file, sum(info.nbytes for info in block.values())
    _drop(file)
    ours = _timed(lambda: [t.clone() for t in checkpoint.load_all(prefix).values()])
    _drop(file)
    plain = _timed(lambda: _read(file, size))
    value = torch.randint(0, 256, (written,), dtype=torch.uint8)
    wrote = _timed(lambda: write_tensors(scratch / "ours.safetensors", {"x": value}))
    plainly = _timed(lambda: _write(scratch / "plain", value))
    return {"reading a block's weights": (size, ours, plain), "writing a block's result": (written, wrote, plainly)}


def _timed(do: Callable[[], Any]) -> float:
    started = time.monotonic()
    do()
    return time.monotonic() - started


def _drop(file: Path) -> None:
    """Have the system forget what it holds of a file."""
    with file.open("rb") as handle:
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(file: Path, size: int) -> None:
    buffer = bytearray(CHUNK)
    with file.open("rb", buffering=0) as handle:
        while size > 0:
            size -= handle.readinto(memoryview(buffer)[: min(size, CHUNK)]) or size


def _write(file: Path, value: torch.Tensor) -> None:
    raw = value.numpy().data
    with file.open("wb", buffering=0) as handle:
        for first in range(0, len(raw), CHUNK):
            handle.write(raw[first : first + CHUNK])
        os.fsync(handle.fileno())


@dataclass(frozen=True)
class Result:
    """All that was measured."""

    config: dict[str, Any]
    bytes: int
    planned: float
    rows: list[Row]
    disk: dict[str, tuple[int, float, float]]


def run(shape: str, blocks: int, tokens: int, scratch: Path, skip: list[str], memory: int | None = None) -> Result:
    """Make the checkpoints below `scratch`, and measure."""
    config = SHAPES[shape]
    model = make(scratch / "model", config, blocks)
    size = Checkpoint(model).total_bytes
    planned = plan(model)
    rows = [apart(solve, "NVFP4 without data", model, scratch / "nvfp4", blocks, 0, memory)]
    if "gptq" not in skip:
        single = make(scratch / "single", {**config, "num_hidden_layers": 1}, 1)
        rows.append(apart(solve, "GPTQ", single, scratch / "gptq", 1, tokens, memory))
    return Result(config, size, planned, rows, throughput(model, scratch, rows[0].written // blocks))


def tables(result: Result) -> str:
    """What was measured, in Markdown, and what it means for the whole model."""
    count = result.config["num_hidden_layers"]
    lines = [
        f"{result.bytes / GIB:.1f} GiB of BF16 in {count} blocks, planned from headers in {result.planned:.1f} s; "
        f"{torch.get_num_threads()} threads",
        "",
        "| what | blocks | seconds a block | all blocks, hours | peak GiB | foretold GiB | written GiB a block |",
        "|---" * 7 + "|",
    ]
    for row in result.rows:
        each = row.seconds / row.blocks
        lines.append(
            f"| {row.what} | {row.blocks} | {each:.1f} | {each * count / 3600:.1f} | {row.peak / GIB:.2f} | "
            f"{row.foretold / GIB:.2f} | {row.written / row.blocks / GIB:.2f} |"
        )
    lines += ["", "| what | GiB | halfbyte MB/s | plain MB/s |", "|---" * 4 + "|"]
    for what, (size, ours, plain) in result.disk.items():
        lines.append(f"| {what} | {size / GIB:.2f} | {size / ours / 1e6:.0f} | {size / plain / 1e6:.0f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="70b")
    parser.add_argument("--blocks", type=int, default=2, help="of NVFP4")
    parser.add_argument("--tokens", type=int, default=2048, help="of calibration, for GPTQ")
    parser.add_argument("--scratch", type=Path, help="where the checkpoints are made (6 GiB); none: a temporary place")
    parser.add_argument("--skip", nargs="*", default=[], choices=["gptq"])
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.scratch) as scratch:
        print(tables(run(asked.shape, asked.blocks, asked.tokens, Path(scratch), asked.skip)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
