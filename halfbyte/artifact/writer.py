"""Writes an artifact so that it can be killed at any moment and never looks whole before it is.

Each finished block lies in `.partial/` as one file, renamed into place; a second run with the same work id goes on
behind the last. When all are there, shards, index, tokenizer and configs are written, and the manifest last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from halfbyte.algo import Solved
from halfbyte.artifact.assemble import Assembly, drop_weights, note_of
from halfbyte.artifact.check_files import MANIFEST
from halfbyte.artifact.fingerprint import digest_of, values_of, weight_fingerprint
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.files import TEMPORARY, in_threads, link_or_copy, make_directory, write_json, write_tensors
from halfbyte.formats import Format, get_format
from halfbyte.models import Checkpoint
from halfbyte.models.checkpoint import read_json
from halfbyte.plan.layers import LinearPlan
from halfbyte.recipe.schema import Recipe
from halfbyte.types import QuantizedLinear, Scheme

PARTIAL = ".partial"
TUNED = "tuned"
STATE = "work.json"
SHARD_BYTES = 1 << 30
"""Largest shard."""


class ArtifactWriter:
    """Takes blocks in any order and finishes once all are there.

    work    the work's id (halfbyte.engine.work_id): blocks kept under another id are not touched
    """

    def __init__(self, directory: Path, checkpoint: Checkpoint, recipe: Recipe, plans: list[LinearPlan], work: str):
        self.directory, self.checkpoint, self.recipe, self.plans, self.work = directory, checkpoint, recipe, plans, work
        self.partial = directory / PARTIAL
        assert recipe.format is not None
        self.format: Format = get_format(recipe.format, recipe.activations)

    @property
    def finished(self) -> bool:
        """Whether the artifact of this very work is there, whole."""
        return _work_of(self.directory / MANIFEST) == self.work

    def open(self, force: bool = False) -> None:
        """Make the directory ready: resume the same work, refuse anything else.

        force   clear the directory first, unless it holds this very work half done
        Raises UsageError when the directory holds something else.
        """
        state = self.partial / STATE
        if self.finished and not force:
            shutil.rmtree(self.partial, ignore_errors=True)
        elif force and (self.finished or _work_of(state) != self.work):
            _clear(self.directory)
        if _work_of(state) != self.work and not self.finished:
            there = [p.name for p in self.directory.iterdir()] if self.directory.is_dir() else []
            if there == [PARTIAL] and not state.exists():
                shutil.rmtree(self.partial)
            elif there:
                ours = state.exists() or (self.directory / MANIFEST).exists()
                what = "an artifact of another recipe, model or calibration" if ours else f"{sorted(there)[0]!r}"
                raise UsageError(f"{self.directory} is not empty (it holds {what}): choose another -o, or --force")
            make_directory(self.partial)
            write_json(state, {"work": self.work})

    def abandon(self, worthless: bool = False) -> None:
        """Take back what `open` made, where no block is kept yet, or all that was made is worthless, weight files too:
        nothing of worth is lost."""
        if _work_of(self.partial / STATE) == self.work and (worthless or not any(self.partial.glob("*.safetensors"))):
            if worthless:
                drop_weights(self.directory)
            shutil.rmtree(self.partial, ignore_errors=True)
        with suppress(OSError):
            self.partial.rmdir()

    def done(self, block: int) -> bool:
        """Whether that block's result is kept."""
        return self._file(block).is_file()

    def emit(
        self,
        block: int,
        linears: dict[str, Solved],
        tensors: dict[str, torch.Tensor],
        seconds: float,
        notices: Sequence[str] = (),
        experts: dict[str, dict[str, list[int]]] | None = None,
    ) -> None:
        """Keep one block: pack its linears, note what each became, write both in one file."""
        packed: dict[str, torch.Tensor] = dict(tensors)
        report: dict[str, Any] = {}
        marks = in_threads(lambda values: digest_of(*values), [values_of(solved.q) for solved in linears.values()])
        for (name, solved), mark in zip(linears.items(), marks):
            packed |= self.format.pack(name, solved.q)
            report[name] = {
                "scheme": {"grid": solved.q.grid, "group_size": solved.q.group_size},
                "error": {"relative": solved.relative_error},
                "damp": solved.damp,
                "fingerprint": mark,
            }
        told = {"linears": report, "seconds": seconds, "notices": list(notices), "experts": experts or {}}
        note = json.dumps(told, sort_keys=True)
        write_tensors(self._file(block), packed, {"halfbyte": note})

    def adopt(self, block: int, other: ArtifactWriter) -> None:
        """Keep a block that another writer keeps, as the same file: the same linears in the same format."""
        link_or_copy(other._file(block), self._file(block))

    def lend(self, block: int, place: Path) -> None:
        """Put a kept block at `place`, as the same file, so that it outlives this work."""
        link_or_copy(self._file(block), place)

    def take(self, block: int, place: Path) -> None:
        """Keep the block that a writer of the same linears in the same format lent to `place`."""
        link_or_copy(place, self._file(block))

    def block(self, block: int) -> tuple[dict[str, QuantizedLinear], dict[str, torch.Tensor]]:
        """A kept block, read back: its quantized linears and its other tensors, by full name. Nothing where none is
        kept, because the block stays as it is."""
        if not self.done(block):
            return {}, {}
        note, tensors = _read(self._file(block))
        linears = {}
        for name, row in note["linears"].items():
            scheme = Scheme(**row["scheme"])
            own = {n: tensors.pop(n) for n in list(tensors) if n.rpartition(".")[0] == name and not n.endswith(".bias")}
            q = self.format.unpack(name, own, scheme)
            ratio = scheme.group_size // q.group_size
            shared = replace(q, scales=q.scales[:, ::ratio].contiguous(), group_size=scheme.group_size)
            linears[name] = shared if ratio > 1 else q
        return linears, tensors

    @property
    def tuned(self) -> bool:
        """Whether what `tune` was given is kept."""
        return (self.partial / TUNED).is_dir()

    def tune(self, linears: dict[str, QuantizedLinear], tensors: dict[str, torch.Tensor], note: dict[str, Any]) -> None:
        """Keep new scales and tensors beside the blocks that they replace: all of them, or none after a kill.

        note   goes into the manifest as "tuning"
        """
        aside = self.partial / f"{TUNED}{TEMPORARY}"
        shutil.rmtree(aside, ignore_errors=True)
        make_directory(aside)
        left = dict(tensors)
        for file in sorted(self.partial.glob("block-*.safetensors")):
            told, old = _read(file)
            if not linears:
                break
            for name in told["linears"]:
                old |= self.format.pack(name, linears[name])
                told["linears"][name] |= {"fingerprint": weight_fingerprint(linears[name]), "tuned": True}
            prefix = f"model.layers.{int(file.stem.removeprefix('block-'))}."
            old |= {n: left.pop(n).cpu() for n in list(left) if n.startswith(prefix)}
            write_tensors(aside / file.name, old, {"halfbyte": json.dumps(told, sort_keys=True)})
        rest = json.dumps({"linears": {}, "seconds": 0.0, "notices": [], "tuning": note}, sort_keys=True)
        write_tensors(aside / "rest.safetensors", {n: t.cpu() for n, t in left.items()}, {"halfbyte": rest})
        aside.rename(self.partial / TUNED)

    def _parts(self) -> list[Path]:
        """The files that make the artifact: the blocks, or what they were tuned to."""
        files = {p.name: p for d in (self.partial, self.partial / TUNED) for p in sorted(d.glob("*.safetensors"))}
        return [files[name] for name in sorted(files)]

    def _file(self, block: int) -> Path:
        return self.partial / (f"block-{block:05d}.safetensors" if block >= 0 else "head.safetensors")

    def finish(self, facts: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Assemble the artifact from the kept blocks. facts: asked for when the weights are written, for the manifest
        (their `versions` and `notices` join those that are known here). Returns the manifest."""
        whole = Assembly(self.directory, self.checkpoint, self.recipe, self.plans, self.format, self._parts())
        manifest = whole.write(self.work, facts, SHARD_BYTES)
        shutil.rmtree(self.partial, ignore_errors=True)
        return manifest


def _read(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    note = note_of(file)
    with safe_open(file, framework="pt") as handle:
        return note, {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  no mapping


def work_of(directory: Path) -> str | None:
    """The id of the work that a directory holds, finished or half done; None where it holds none."""
    return _work_of(directory / MANIFEST) or _work_of(directory / PARTIAL / STATE)


def _work_of(path: Path) -> str | None:
    try:
        return read_json(path).get("work")
    except HalfbyteError:
        return None


def _clear(directory: Path) -> None:
    """Empty a directory that --force gives up, the manifest and config first: it must not look whole."""
    if not directory.is_dir():
        return
    for name in (MANIFEST, "config.json"):
        (directory / name).unlink(missing_ok=True)
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
