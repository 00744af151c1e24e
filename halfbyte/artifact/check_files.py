"""The part of the check that reads no weights: config files, headers, the shard index, hashes, the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from halfbyte.artifact.findings import Findings
from halfbyte.artifact.fingerprint import SEAL, seal_holds
from halfbyte.errors import HalfbyteError
from halfbyte.hashing import hash_file
from halfbyte.models import TensorInfo
from halfbyte.models.checkpoint import TOKENIZER_FILES, read_header, read_json
from halfbyte.types import Progress

MANIFEST = "halfbyte.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
RECIPE = "recipe.yaml"
LOADED = {
    *TOKENIZER_FILES, "config.json", "generation_config.json", "adapter_config.json", "processor_config.json",
    "preprocessor_config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json", "params.json",
    "chat_template.json", "additional_chat_templates", "custom_generate",
}  # fmt: skip
"""Names that loaders look for beside the weights."""
LOADED_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".pkl", ".gguf", ".h5", ".msgpack", ".py", ".so", ".jinja"}
"""Weights, and what could be run."""


@dataclass
class Inventory:
    """The tensors of the readable weight files; `lost`: names that the index puts into unreadable ones."""

    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    whole: bool = True


def read_object(path: Path, code: str, findings: Findings) -> dict:
    """A JSON object from a file, or {} and a finding."""
    try:
        return read_json(path)
    except HalfbyteError:
        state = "is not a JSON object" if path.exists() else "is missing"
        findings.add(code, path.name, f"{path.name} {state}: quantize again or fetch the file again")
    return {}


def take_inventory(directory: Path, findings: Findings) -> Inventory:
    """Every tensor by its header, with the index (where there is one) compared against the files."""
    there = {p.name for p in directory.glob("*.safetensors")}
    inventory = Inventory()
    if not (directory / INDEX).is_file():
        if SINGLE not in there:
            findings.add("index", SINGLE, f"there is neither {SINGLE} nor {INDEX}")
        for extra in sorted(there - {SINGLE}):
            findings.add("index", extra, f"{extra} is not part of the checkpoint: there is no {INDEX}")
        _read_files(directory, sorted(there & {SINGLE}), inventory, findings)
        return inventory
    index = read_object(directory / INDEX, "index", findings)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(f, str) and Path(f).name == f for f in places.values()):
        findings.add("index", INDEX, "weight_map does not map tensor names to file names")
        inventory.whole = False
        return inventory
    named = set(places.values())
    for absent in sorted(named - there):
        findings.add("index", absent, f"the index names {absent}, which is missing")
    for extra in sorted(there - named):
        findings.add("index", extra, f"{extra} is there and the index does not name it")
    broken = (named - there) | _read_files(directory, sorted(named & there), inventory, findings)
    inventory.lost = {name for name, file in places.items() if file in broken}
    _compare_index(places, broken, index.get("metadata"), inventory, findings)
    return inventory


def _read_files(directory: Path, names: list[str], inventory: Inventory, findings: Findings) -> set[str]:
    broken = set()
    for name in names:
        try:
            header = read_header(directory / name)
        except HalfbyteError as error:
            findings.add("header", name, str(error).replace(f"{directory}/", ""))
            broken.add(name)
            continue
        for tensor, info in header.items():
            if tensor in inventory.tensors:
                findings.add("index", tensor, f"{tensor} stands in {inventory.tensors[tensor].file.name} and in {name}")
            inventory.tensors[tensor] = info
    inventory.whole = inventory.whole and not broken
    return broken


def _compare_index(
    places: Mapping[str, str], broken: set[str], metadata: Any, inventory: Inventory, findings: Findings
) -> None:
    for tensor, info in inventory.tensors.items():
        if places.get(tensor) != info.file.name:
            findings.add("index", tensor, f"{tensor} lies in {info.file.name}; the index says {places.get(tensor)}")
    for tensor, file in places.items():
        if tensor not in inventory.tensors and file not in broken:
            findings.add("index", tensor, f"the index puts {tensor} into {file}, which does not hold it")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    held = sum(info.nbytes for info in inventory.tensors.values())
    if isinstance(total, int) and total != held and not broken:
        findings.add("index", INDEX, f"total_size says {total:,} bytes, the files hold {held:,}")


def check_hashes(directory: Path, manifest: Mapping[str, Any], progress: Progress, findings: Findings) -> None:
    """Every file that the manifest lists, by size and SHA-256."""
    files = manifest.get("files")
    if not isinstance(files, dict):
        findings.add("manifest", MANIFEST, f"{MANIFEST} lists no files: hashes cannot be compared")
        return
    progress.start("hashes", len(files))
    for name, entry in files.items():
        try:
            problem = _differs(directory, name, entry if isinstance(entry, dict) else {})
        except OSError as error:
            problem = f"{name} cannot be read: {error.strerror}"
        if problem:
            findings.add("hash", name, problem)
        progress.advance(1, name)


def refuse_damaged(directory: Path, progress: Progress) -> None:
    """Raise HalfbyteError where a file that a loader reads is not what the manifest says. A directory without a
    manifest passes."""
    if not (directory / MANIFEST).is_file():
        return
    findings, files = Findings(), read_json(directory / MANIFEST).get("files")
    read = {name: entry for name, entry in files.items() if _is_loaded(name)} if isinstance(files, dict) else files
    check_hashes(directory, {"files": read}, progress, findings)
    if found := findings.listed():
        raise HalfbyteError(f"{directory} is damaged: {found[0]['message']}; halfbyte check {directory} says more")


def check_seal(manifest: Mapping[str, Any], findings: Findings) -> dict[str, str]:
    """The manifest against its own seal; returns its tensor digests ({} where an older one has neither)."""
    digests = manifest.get("tensors")
    if SEAL not in manifest and digests is None:
        return {}
    if not seal_holds(manifest):
        findings.add("manifest", MANIFEST, f"{MANIFEST} was changed after it was written: fetch it again")
    if not isinstance(digests, dict):
        findings.add("manifest", MANIFEST, f"{MANIFEST} lists no tensors: their bytes cannot be compared")
        return {}
    return digests


def check_foreign(directory: Path, manifest: Mapping[str, Any], findings: Findings) -> None:
    """Whatever a loader may read is in the manifest: nothing was put beside the artifact's own files."""
    listed = manifest.get("files")
    if not isinstance(listed, dict) or manifest.get("tensors") is None:
        return
    for path in sorted(directory.iterdir()):
        if path.name not in listed and _is_loaded(path.name):
            findings.add("foreign", path.name, f"{path.name} is not part of the artifact, and a loader may read it")


def _is_loaded(name: str) -> bool:
    return name in LOADED or Path(name).suffix.lower() in LOADED_SUFFIXES


def check_recipe(directory: Path, manifest: Mapping[str, Any], findings: Findings) -> None:
    """recipe.yaml says what the manifest says of the recipe."""
    path = directory / RECIPE
    if not path.is_file() or "recipe" not in manifest:
        return
    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        told = None
    if told != manifest["recipe"]:
        findings.add("config", RECIPE, f"{RECIPE} does not say what {MANIFEST} says: fetch it again")


def _differs(directory: Path, name: str, stated: Mapping[str, Any]) -> str:
    path = directory / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return "the manifest names a file outside the directory"
    if not path.is_file():
        return f"{name} stands in the manifest and is missing"
    size = path.stat().st_size
    if size != stated.get("bytes"):
        return f"{name} has {size:,} bytes, the manifest says {stated.get('bytes')}"
    if hash_file(path) != stated.get("sha256"):
        return f"{name} is not what was written: its SHA-256 differs from the manifest's"
    return ""


def check_tokenizer(directory: Path, rows: int | None, findings: Findings) -> None:
    """The tokenizer is there, and no token of its vocabulary lies beyond the `rows` of the embeddings.

    Tokens added beside the vocabulary are let pass: text-only models keep such of their image models unused.
    """
    if not any((directory / name).is_file() for name in TOKENIZERS):
        findings.add("tokenizer", "tokenizer.json", "there are no tokenizer files: copy them from the model")
    path = directory / TOKENIZERS[0]
    if rows is None or not path.is_file():
        return
    model = read_object(path, "tokenizer", findings).get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict) and all(isinstance(i, int) for i in vocab.values()):
        size = max(vocab.values(), default=-1) + 1
    elif isinstance(vocab, list):
        size = len(vocab)
    else:
        findings.add("tokenizer", path.name, "tokenizer.json holds no vocabulary")
        return
    if size > rows:
        findings.add("tokenizer", path.name, f"the vocabulary has {size:,} tokens, the embeddings {rows:,} rows")
