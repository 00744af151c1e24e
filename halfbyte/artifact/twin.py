"""An artifact whose bytes another recipe has made already: the same files under its own recipe and manifest."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from halfbyte.artifact.check_files import MANIFEST
from halfbyte.artifact.fingerprint import sealed
from halfbyte.artifact.manifest import read_manifest
from halfbyte.artifact.writer import work_of
from halfbyte.files import link_or_copy, make_directory, write_json, write_text
from halfbyte.hashing import hash_file
from halfbyte.recipe.schema import Recipe

RECIPE = "recipe.yaml"


def link_twin(source: Path, target: Path, recipe: Recipe, work: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Make `target` an artifact with the bytes of `source`: hard links (copies where the disk knows none), with
    `recipe`, the work's id and `facts` in its manifest, written last. Returns the manifest.

    A finished artifact of the same work stays as it is; anything else in `target` goes.
    """
    if work_of(target) == work and (target / MANIFEST).is_file():
        return read_manifest(target)
    if target.exists():
        shutil.rmtree(target)
    make_directory(target)
    manifest = read_manifest(source)
    for name in manifest["files"]:
        if name != RECIPE:
            link_or_copy(source / name, target / name)
    write_text(target / RECIPE, yaml.safe_dump(recipe.identity(), sort_keys=False))
    own = {"sha256": hash_file(target / RECIPE), "bytes": (target / RECIPE).stat().st_size}
    manifest |= {"work": work, **facts, "recipe": recipe.identity()}
    manifest["files"] = manifest["files"] | {RECIPE: own}
    manifest = sealed(manifest)
    write_json(target / MANIFEST, manifest)
    return manifest
