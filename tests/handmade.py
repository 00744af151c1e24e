"""Artifacts assembled by hand from tiny random models: formats and safetensors alone, rounded to nearest."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from halfbyte.algo import get_grid, rtn
from halfbyte.artifact.fingerprint import weight_fingerprint
from halfbyte.formats import get_format
from halfbyte.hashing import hash_file
from halfbyte.models import family_of
from halfbyte.types import QuantizedLinear, Scheme
from tests.tiny import make_tiny


def make_artifact(
    directory: Path,
    kind: str,
    grid: str,
    group: int = 32,
    keep: str = "lm_head",
    family: str = "llama",
    shards: int = 1,
    activations: str = "bf16",
    **overrides: object,
) -> dict[str, QuantizedLinear]:
    """Write a 4-bit artifact of a tiny model; linears whose name `keep` (a regular expression) finds stay in BF16.

    Returns what was quantized, by full name.
    """
    make_tiny(family, directory, **overrides)
    tensors = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    model = family_of(config)
    kept_as = get_format(kind, activations)
    done: dict[str, QuantizedLinear] = {}
    schemes: dict[str, Scheme | None] = {}
    fused: dict[str, str] = {}
    groups = [
        (f"{model.block(i)}.{g.fused}", [f"{model.block(i)}.{n}" for n in g.names])
        for i in range(model.num_blocks)
        for g in model.groups_of(i)
    ]
    schemes |= dict.fromkeys(name for i in range(model.num_blocks) for name in model.routers(i))
    for whole, names in [*groups, ("lm_head", ["lm_head"])]:
        fused |= dict.fromkeys(names, whole)
        if re.search(keep, names[0]) or f"{names[0]}.weight" not in tensors:
            schemes |= dict.fromkeys(names)
            continue
        weights = [tensors.pop(f"{n}.weight").float() for n in names]
        for name, q in zip(names, _round(weights, grid, group, activations)):
            done[name] = q
            schemes[name] = Scheme(grid, q.group_size)
            tensors |= kept_as.pack(name, q)
    config["quantization_config"] = kept_as.config(schemes, fused, producer={"name": "halfbyte", "version": "0"})
    for file, contents in kept_as.extra_files(config["quantization_config"]).items():
        write(directory / file, contents)
    write(directory / "config.json", config)
    save_shards(directory, tensors, shards)
    seal(directory, schemes, done)
    return done


def _round(weights: list[torch.Tensor], grid: str, group: int, activations: str) -> Iterable[QuantizedLinear]:
    chosen = get_grid(grid)
    outer = chosen.global_scale(weights)
    if outer is not None:
        outer = float(1 / (1 / torch.tensor(outer)))
    for weight in weights:
        size = weight.shape[1] if group == -1 else group
        scales = chosen.fit(weight, torch.ones(weight.shape[1]), size, outer, "fast")
        q = rtn(weight, scales, chosen, size)
        fp4 = grid == "nvfp4" and activations == "fp4"
        yield QuantizedLinear(
            q.codes, q.scales, size, grid, q.zeros, q.global_scale, input_scale=0.125 if fp4 else None
        )


def save_shards(directory: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """Write tensors into one file, or into several with an index."""
    (directory / "model.safetensors").unlink(missing_ok=True)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    places = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i::shards]
        save_file({n: tensors[n] for n in part}, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    write(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def seal(directory: Path, schemes: dict[str, Scheme | None], done: dict[str, QuantizedLinear]) -> None:
    """Write the manifest: what was chosen, and every file's size and hash."""
    linears: dict[str, dict] = {}
    for name, scheme in schemes.items():
        stated = None if scheme is None else {"grid": scheme.grid, "group_size": scheme.group_size}
        linears[name] = {"scheme": stated}
        if name in done:
            linears[name]["fingerprint"] = weight_fingerprint(done[name])
    write(directory / "halfbyte.json", {"linears": linears, "files": file_entries(directory)})


def reseal(directory: Path) -> None:
    """Bring the manifest's hashes up to date, as a writer that went wrong before hashing would have them."""
    manifest = json.loads((directory / "halfbyte.json").read_text())
    write(directory / "halfbyte.json", manifest | {"files": file_entries(directory)})


def file_entries(directory: Path) -> dict[str, dict]:
    """Size and SHA-256 of every file but the manifest."""
    files = sorted(p for p in directory.iterdir() if p.name != "halfbyte.json")
    return {p.name: {"sha256": hash_file(p), "bytes": p.stat().st_size} for p in files}


def write(path: Path, contents: dict) -> None:
    """Write JSON."""
    path.write_text(json.dumps(contents, indent=2))
