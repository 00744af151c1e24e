"""Makes the artifact of kept blocks: shards and their index, tokenizer, configs, recipe, and the manifest last.

What it writes is there already or written anew: it can be killed at any moment and begun again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open

from halfbyte.artifact.check_files import INDEX, MANIFEST, SINGLE
from halfbyte.artifact.fingerprint import sealed, tensor_digest
from halfbyte.artifact.manifest import git_commit, versions
from halfbyte.errors import HalfbyteError
from halfbyte.files import TEMPORARY, in_threads, write_atomically, write_json, write_pieces, write_text
from halfbyte.formats import Format
from halfbyte.hashing import hash_file
from halfbyte.models import Checkpoint, family_of
from halfbyte.models.checkpoint import TensorInfo, opened, read_header
from halfbyte.plan.layers import LinearPlan
from halfbyte.recipe.schema import Recipe

WRITERS = 8
"""Weight files that are written and hashed at the same time: hashing takes longer than a disk does."""
COPIED = ("generation_config.json", "LICENSE", "LICENSE.txt", "NOTICE")


class Assembly:
    """One artifact in the making. parts: the files that a writer keeps, each some tensors and a note."""

    def __init__(
        self,
        directory: Path,
        checkpoint: Checkpoint,
        recipe: Recipe,
        plans: Sequence[LinearPlan],
        form: Format,
        parts: Sequence[Path],
    ):
        self.directory, self.checkpoint, self.recipe, self.plans = directory, checkpoint, recipe, plans
        self.format, self.parts = form, parts
        self._tuning: dict[str, Any] | None = None
        self._experts: dict[str, Any] = {}
        self._marks: dict[str, str] = {}

    def write(self, work: str, facts: Callable[[], dict[str, Any]], shard_bytes: int) -> dict[str, Any]:
        """Write everything, the manifest last; returns it.

        work          its id (halfbyte.engine.work_id)
        facts         asked when the weights are written, for the manifest; their `versions` and `notices` join those
                      that are known here
        shard_bytes   the largest shard
        """
        linears, solving, notices = self._reports()
        tensors = self._write_shards(shard_bytes)
        told = facts()
        self._copy_files()
        schemes = {p.name: p.scheme for p in self.plans}
        producer = {"name": "halfbyte", "version": str(versions()["halfbyte"])}
        quantization = self.format.config(schemes, {p.name: p.fused for p in self.plans}, producer=producer)
        for name, value in self.format.extra_files(quantization).items():
            write_json(self.directory / name, value)
        write_text(self.directory / "recipe.yaml", yaml.safe_dump(self.recipe.identity(), sort_keys=False))
        config = {k: v for k, v in self.checkpoint.config.items() if k != "_model_name_or_path"} | _dense(
            self.checkpoint
        )
        write_json(self.directory / "config.json", {**config, "quantization_config": quantization})
        manifest = {
            "schema": 1,
            "kind": "manifest",
            "work": work,
            **told,
            "recipe": self.recipe.identity(),
            "versions": versions() | told.get("versions", {}),
            "git": git_commit(),
            "solving_seconds": round(solving, 3),
            "notices": [*told.get("notices", []), *notices],
            "tuning": self._tuning,
            "experts": self._experts or None,
            **self._sizes(linears),
            "linears": linears,
            "tensors": tensors,
            "files": self._hashes(),
        }
        manifest = sealed(manifest)
        write_json(self.directory / MANIFEST, manifest)
        return manifest

    def _reports(self) -> tuple[dict[str, Any], float, list[str]]:
        """Every linear's report (BF16 ones with scheme null and the reason), the seconds spent solving, notices."""
        found: dict[str, Any] = {}
        seconds, notices = 0.0, list[str]()
        for file in self.parts:
            note = note_of(file)
            found |= note["linears"]
            self._tuning = note.get("tuning", self._tuning)
            self._experts |= note.get("experts", {})
            seconds += note["seconds"]
            notices += note["notices"]
        rows = {}
        for plan in self.plans:
            shape = {"out_features": plan.out_features, "in_features": plan.in_features, "kind": plan.kind}
            if plan.scheme is None:
                rows[plan.name] = {"scheme": None, "reason": plan.reason, **shape}
            elif plan.name in found:
                rows[plan.name] = {**found[plan.name], **shape}
            else:
                raise HalfbyteError(f"{plan.name} was not quantized: run the same command again")
        return rows, seconds, notices

    def _pieces(self) -> Iterator[TensorInfo]:
        """Every tensor of the artifact and where it lies, in the source model's order of names."""
        kept = {n: i for f in self.parts for n, i in read_header(f).items()}
        replaced = {f"{p.name}.weight" for p in self.plans if p.scheme is not None}
        names = set(kept) | (set(self.checkpoint.tensors) - replaced)
        for name in sorted(names, key=_natural):
            yield kept.get(name) or self.checkpoint.tensors[name]

    def _write_shards(self, shard_bytes: int) -> dict[str, str]:
        """Write the weight files, some at a time, and their index; returns every tensor's digest by name."""
        shards: list[list[TensorInfo]] = [[]]
        for piece in self._pieces():
            if shards[-1] and sum(i.nbytes for i in shards[-1]) + piece.nbytes > shard_bytes:
                shards.append([])
            shards[-1].append(piece)
        drop_weights(self.directory)
        places: dict[str, str] = {}
        digests: dict[str, str] = {}
        count = len(shards)
        names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        for name, (found, mark) in zip(names, in_threads(self._write_shard, zip(names, shards), WRITERS)):
            places |= dict.fromkeys(found, name)
            digests |= found
            self._marks[name] = mark
        if len(shards) > 1:
            total = sum(info.nbytes for pieces in shards for info in pieces)
            write_json(self.directory / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
        return digests

    def _write_shard(self, shard: tuple[str, Sequence[TensorInfo]]) -> tuple[dict[str, str], str]:
        """One weight file, tensor by tensor; returns their digests by name, taken meanwhile, and its own hash."""
        name, pieces = shard
        infos = {info.name: info for info in pieces}
        digests: dict[str, Future[str]] = {}
        with ThreadPoolExecutor(1) as apart, ExitStack() as stack:
            handles = {f: stack.enter_context(opened(f)) for f in dict.fromkeys(info.file for info in pieces)}

            def load(tensor: str) -> torch.Tensor:
                value: torch.Tensor = handles[infos[tensor].file].get_tensor(tensor)
                digests[tensor] = apart.submit(tensor_digest, value)
                return value

            write_pieces(self.directory / name, {i.name: (i.dtype, i.shape, i.nbytes) for i in pieces}, load)
            found = {info.name: digests[info.name].result() for info in pieces}
        return found, hash_file(self.directory / name)

    def _copy_files(self) -> None:
        extras = [self.checkpoint.path / name for name in COPIED]
        for file in [*self.checkpoint.tokenizer_files(), *extras]:
            if file.is_file():
                self.checkpoint.own(file)
                write_atomically(self.directory / file.name, partial(shutil.copyfile, file))

    def _sizes(self, linears: dict[str, Any]) -> dict[str, Any]:
        header = {n: i for f in self.directory.glob("*.safetensors") for n, i in read_header(f).items()}
        quantized = {n: row for n, row in linears.items() if row["scheme"] is not None}
        weights = sum(row["out_features"] * row["in_features"] for row in quantized.values())
        owned = sum(
            i.nbytes for n, i in header.items() if n.rpartition(".")[0] in quantized and not n.endswith(".bias")
        )
        return {
            "bytes": sum(i.nbytes for i in header.values()),
            "bytes_bf16": self.checkpoint.total_bytes,
            "bits_per_weight": 8 * owned / weights if weights else None,
        }

    def _hashes(self) -> dict[str, Any]:
        skip = {MANIFEST, "README.md"}
        files = [p for p in sorted(self.directory.iterdir()) if p.is_file() and p.name not in skip]
        files = [p for p in files if p.suffix != TEMPORARY]  # a killed run's own manifest, half written
        marks = self._marks | {p.name: hash_file(p) for p in files if p.name not in self._marks}
        return {p.name: {"sha256": marks[p.name], "bytes": p.stat().st_size} for p in files}


def drop_weights(directory: Path) -> None:
    """Take away an artifact's weight files and their index."""
    for stale in [*directory.glob("model-*.safetensors"), directory / SINGLE, directory / INDEX]:
        stale.unlink(missing_ok=True)


def _dense(checkpoint: Checkpoint) -> dict[str, Any]:
    """The dense blocks of a mixture, by number: where only a step names them, vLLM does not take their gate_up_proj for
    fused, and so not for quantized."""
    family = family_of(checkpoint.config)
    dense = [i for i in range(family.num_blocks) if i not in family.sparse]
    return {"mlp_only_layers": dense} if family.sparse and dense else {}


def note_of(file: Path) -> dict[str, Any]:
    """What `emit` wrote beside a block's tensors."""
    try:
        with safe_open(file, framework="pt") as handle:
            note: dict[str, Any] = json.loads(handle.metadata()["halfbyte"])
            return note
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise HalfbyteError(f"{file} is damaged: delete it and run the same command again") from error


def _natural(name: str) -> list[Any]:
    """model.layers.2 before model.layers.10; typed so that numbers and words never meet."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
