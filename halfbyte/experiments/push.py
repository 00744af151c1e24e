"""An artifact to the Hugging Face Hub: only when asked, private unless asked otherwise, and only what belongs to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfbyte.artifact import MANIFEST, check_artifact, model_card, read_manifest
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.experiments.cards import card_results, commands_here
from halfbyte.files import portable
from halfbyte.models.hub import check_name, upload
from halfbyte.types import Progress, Quiet

CARD = "README.md"
LEGAL = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")


def push(
    directory: Path,
    repo: str,
    *,
    public: bool = False,
    dry_run: bool = False,
    results: Path | None = None,
    message: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Upload the artifact in `directory` to `repo` (owner/name) as one commit.

    public     make a new repository public; a public one is not written to without it
    dry_run    look, upload nothing, ask the Hub nothing
    results    where eval.json and others lie: the model card is filled from them; none: the artifact's own README.md
               goes, or one from its manifest and the run's directory around it
    Returns {"repo", "private", "files" [{"file", "bytes"}], "left_out" [names], "url", "commit"}; the last two are None
    in a dry run. Raises UsageError for no artifact or name, HalfbyteError for one that `check` finds broken.
    """
    progress = progress or Quiet()
    check_name(repo)
    manifest = read_manifest(directory)
    if results is not None and not results.is_dir():
        raise UsageError(f"{results} is no directory: name the one with eval.json")
    found = check_artifact(directory, progress)
    if not found["ok"]:
        first = found["findings"][0]
        raise HalfbyteError(
            f"{directory} is not sound ({first['where']}: {first['message']}): nothing is uploaded; "
            f"see `halfbyte check {directory}`"
        )
    files = _files(directory, manifest)
    files[CARD] = _card(directory, manifest, results)
    rows = [{"file": name, "bytes": _size(body)} for name, body in sorted(files.items())]
    result = {"repo": repo, "private": not public, "files": rows, "left_out": _left_out(directory, files)}
    if dry_run:
        return {**result, "url": None, "commit": None}
    progress.start(f"uploading {len(rows)} files to {repo}", 1)
    done = upload(files, repo, public=public, message=message or f"{portable(directory)}, made with halfbyte")
    progress.advance()
    if public and done["private"]:
        progress.say(f"{repo} was private before and stays so: change it on the Hub")
    return {**result, **done}


def _files(directory: Path, manifest: Mapping[str, Any]) -> dict[str, Path | bytes]:
    """What belongs to the artifact: the files that its manifest names, the manifest, licences. Nothing else goes."""
    names = [*manifest["files"], MANIFEST, *(name for name in LEGAL if (directory / name).is_file())]
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise HalfbyteError(f"{MANIFEST} names a file outside the artifact ({outside[0]!r}): nothing is uploaded")
    return {name: directory / name for name in names}


def _card(directory: Path, manifest: Mapping[str, Any], results: Path | None) -> Path | bytes:
    """The model card: the artifact's own, or one from its manifest and what was measured."""
    if results is None and (directory / CARD).is_file():
        return directory / CARD
    around = directory.resolve().parent
    place = results or (around if (around / "run.json").is_file() else None)
    found = card_results(place, str(manifest["work"]))
    return model_card(manifest, **found, commands=commands_here(directory, manifest)).encode()


def _left_out(directory: Path, files: Mapping[str, Any]) -> list[str]:
    return sorted(f"{p.name}/" if p.is_dir() else p.name for p in directory.iterdir() if p.name not in files)


def _size(body: Path | bytes) -> int:
    return len(body) if isinstance(body, bytes) else body.stat().st_size
