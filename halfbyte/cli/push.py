"""push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli.console import MIB, Format, emit, progress
from halfbyte.cli.make import Style
from halfbyte.cli.prove import Artifact


def push(
    directory: Artifact,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub; made if it is not there.")],
    public: Annotated[bool, typer.Option("--public", help="Make it public; without this it is private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go; upload nothing.")] = False,
    results: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Fill the model card from the results (eval.json, …) here.")
    ] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", metavar="TEXT", help="Of the commit.")] = None,
    style: Style = Format.human,
) -> None:
    """Publish an artifact on the Hugging Face Hub, with the login of `hf auth login` or HF_TOKEN."""
    from halfbyte.experiments.push import push as publish

    with progress() as shown:
        result = publish(
            directory, repo, public=public, dry_run=dry_run, results=results, message=message, progress=shown
        )
    emit(result, style, push_words(result, directory))


def push_words(result: dict[str, Any], directory: Path) -> str:
    """The files with their sizes, what stays behind, and where they went."""
    lines = [f"{row['bytes'] / MIB:>10,.2f} MiB  {row['file']}" for row in result["files"]]
    lines += [f"left out: {name}" for name in result["left_out"]]
    total = sum(row["bytes"] for row in result["files"]) / MIB
    kind = "private" if result["private"] else "public"
    if result["url"] is None:
        lines.append(f"{total:,.0f} MiB would go to {result['repo']} ({kind})")
        public = "" if result["private"] else " --public"
        return "\n".join([*lines, f"next: halfbyte push {directory} {result['repo']}{public}"])
    lines.append(f"{total:,.0f} MiB are at {result['url']} ({kind}), commit {result['commit']}")
    return "\n".join([*lines, f"next: vllm serve {result['repo']}"])
