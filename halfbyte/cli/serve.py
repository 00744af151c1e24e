"""serve, ls, env."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.console import Format, emit
from halfbyte.cli.make import Concurrency, Context, Style
from halfbyte.errors import HalfbyteError, UsageError

if TYPE_CHECKING:
    from halfbyte.models import Checkpoint


def serve(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An artifact's (or a BF16 model's) directory.")],
    on: Annotated[str, typer.Option("--on", metavar="PLATFORM", help="h100, h200, mi325x, cpu.")],
    only_print: Annotated[bool, typer.Option("--print", help="Print the command, run nothing.")] = False,
    length: Context = None,
    concurrency: Concurrency = None,
    port: Annotated[int | None, typer.Option(metavar="N", min=1, max=65535, help="vLLM's own default is 8000.")] = None,
    evidence: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", exists=True, help="Measured speeds of your own (halfbyte bench). Repeatable."),
    ] = None,
    vllm: Annotated[str | None, typer.Option(metavar="PATH", help="vLLM's executable or environment.")] = None,
    style: Style = Format.human,
) -> None:
    """The vLLM command that works for this artifact there; without --print it runs. After --: words for vLLM."""
    from halfbyte.evaluate.served import format_of
    from halfbyte.models import Checkpoint, cache_dir
    from halfbyte.plan.speed import Model, nearest_first
    from halfbyte.platforms import load_platform
    from halfbyte.platforms.evidence import read_table, unused
    from halfbyte.serving import ServeCommand, find_vllm, run_in_place, serve_command

    known = [*(evidence or []), cache_dir() / "evidence"]
    checkpoint = Checkpoint(directory)
    size = Model(
        _parameters(checkpoint), ServeCommand(["vllm", "serve", str(directory), *context.args]).tensor_parallel
    )
    platform = nearest_first(load_platform(on, known), size)
    own = [read_table(path) for path in evidence or [] if path.is_file()]
    seen = [table.vllm for table in own if table.device.casefold() == platform.name.casefold()]
    install = None
    try:
        install = find_vllm(vllm)
    except HalfbyteError:
        if not only_print or vllm:
            raise
    version = install.version if install and not only_print else next(iter(seen), platform.vllm)
    command = serve_command(
        directory,
        format_of(directory),
        platform,
        context=length,
        concurrency=concurrency,
        port=port,
        extra=context.args,
        vllm_version=version,
        size=size,
    )
    notes = [*unused(evidence or [], [platform.model_copy(update={"vllm": version})]), *command.notes]
    if only_print:
        try:
            checkpoint.tensors  # noqa: B018
        except HalfbyteError as error:
            notes.append(f"it cannot be served as it is: {error}")
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    if only_print:
        value = {"argv": command.argv, "env": command.env, "notes": notes}
        emit(value, style, command.shell())
        return
    checkpoint.tensors  # noqa: B018  a missing or truncated shard gets its one line here
    assert install is not None
    run_in_place(command, install)


def _parameters(checkpoint: Checkpoint) -> int:
    """Of the model as it was in BF16: from the manifest (two bytes each), where there is one, else of its tensors.

    0 where the weights cannot be read: no measurement is near then.
    """
    from halfbyte.artifact.manifest import MANIFEST, read_manifest

    try:
        if (checkpoint.path / MANIFEST).is_file():
            return int(read_manifest(checkpoint.path)["bytes_bf16"]) // 2
        return sum(_weights(name, info.dtype, info.shape) for name, info in checkpoint.tensors.items())
    except HalfbyteError:
        return 0


def _weights(name: str, dtype: str, shape: tuple[int, ...]) -> int:
    """How many weights a tensor of anybody's artifact holds: 4-bit codes lie eight in a word or two in a byte."""
    leaf = name.rpartition(".")[2]
    if leaf in ("weight", "qweight", "weight_packed"):
        return math.prod(shape) * {"I32": 8, "U8": 2}.get(dtype, 1)
    beside = ("scale", "scales", "scale_2", "zeros", "zero_point", "g_idx", "shape")
    return 0 if leaf.endswith(beside) else math.prod(shape)


def ls(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="recipes, platforms, methods or matrices.")],
    style: Style = Format.human,
) -> None:
    """List recipes, platforms, methods or matrices, a line each."""
    listings = {"recipes": _recipes, "platforms": _platforms, "methods": _methods, "matrices": _matrices}
    if what not in listings:
        raise UsageError(f"ls {what}: use {', '.join(listings)}")
    rows = listings[what]()
    width = max(len(name) for name in rows)
    emit(rows, style, "\n".join(f"{name:{width}}  {line}" for name, line in rows.items()))


def _recipes() -> dict[str, str]:
    from halfbyte.recipe import list_presets

    return {name: description for name, description, _ in list_presets()}


def _platforms() -> dict[str, str]:
    from halfbyte.platforms import list_platforms, load_platform

    rows = {}
    for name in list_platforms():
        platform = load_platform(name)
        loads = [f for f in platform.formats if platform.support(f, platform.default_variant(f)).loads]
        rows[name] = f"{platform.label}; loads {', '.join(loads)}"
    return rows


def _matrices() -> dict[str, str]:
    from halfbyte.experiments.matrix import list_matrices

    return list_matrices()


def _methods() -> dict[str, str]:
    return {
        "rtn": "round to nearest, scales searched by importance where there is calibration data (int4_sym)",
        "gptq": "columns rounded in order of importance, the rest makes up for the error (int4_sym)",
        "awq": "input scales folded into what precedes, then rounding by GPTQ or to nearest (int4_asym)",
        "nvfp4": "FP4 values with E4M3 block scales; GPTQ rounding, or data-free with rounding: rtn (nvfp4)",
    }


def env(
    vllm: Annotated[str | None, typer.Option(metavar="PATH", help="vLLM's executable or environment.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Ask that vLLM itself whether what is known of it holds.")
    ] = False,
    style: Style = Format.human,
) -> None:
    """Versions, the machine, the vLLM that is found, and what is known of it; --verify: fact by fact."""
    from halfbyte.artifact.manifest import git_commit, versions
    from halfbyte.serving import find_vllm, standing

    if verify:
        return _verify(vllm, style)
    found: dict[str, str | None] = {**versions(), "git": git_commit()}
    try:
        install = find_vllm(vllm)
        found |= {"vllm": install.version, "vllm_executable": str(install.executable)}
        found["vllm_facts"] = standing(install.version)
    except HalfbyteError as error:
        if vllm:
            raise
        found |= {"vllm": None, "vllm_facts": str(error)}
    width = max(map(len, found)) + 2
    emit(
        found, style, "\n".join(f"{name:{width}}{value if value is not None else '-'}" for name, value in found.items())
    )


def _verify(vllm: str | None, style: Format) -> None:
    from halfbyte.cli.console import progress
    from halfbyte.serving import find_vllm, verify

    with progress() as shown:
        shown.start("asking vLLM", 1)
        result = verify(find_vllm(vllm))
        shown.advance()
    width = max(len(row["fact"]) for row in result["facts"])
    lines = [f"{row['fact']:{width}}  {row['verdict']:15}  {row['why']}".rstrip() for row in result["facts"]]
    counts = {
        name: sum(row["verdict"] == name for row in result["facts"]) for name in ("holds", "differs", "cannot be asked")
    }
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    emit(result, style, "\n".join([*lines, "", f"vLLM {result['vllm']}: {told}"]))
    if not result["ok"]:
        raise typer.Exit(1)
