"""plan, calibrate, quantize, run."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.console import Format, emit, own_command, progress
from halfbyte.errors import UsageError

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A directory, a hub id, or smollm2-135m.")]
On = Annotated[
    list[str], typer.Option("--on", metavar="PLATFORM", help="Where it will be served: h100, mi325x, cpu. Repeatable.")
]
RecipeOption = Annotated[
    str | None, typer.Option("--recipe", "-r", metavar="RECIPE", help="A preset's name or a YAML file.")
]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key. Repeatable.")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the result goes.")]
Text = Annotated[list[Path] | None, typer.Option("--text", metavar="FILE", help="Plain text or JSONL. Repeatable.")]
Context = Annotated[
    int | None, typer.Option("--context", metavar="TOKENS", min=1, help="Longest sequence served, in tokens.")
]
Concurrency = Annotated[int | None, typer.Option("--concurrency", metavar="N", min=1, help="Sequences served at once.")]
Style = Annotated[Format, typer.Option("--format", metavar="STYLE", help="How results are printed: human or json.")]
Device = Annotated[
    str | None, typer.Option("--device", metavar="DEVICE", help="cpu or cuda; the GPU where there is one.")
]
Force = Annotated[bool, typer.Option("--force", help="Give up what the output directory holds.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what is there (the default for the same work).")]


class Strategy(StrEnum):
    """How text is cut."""

    mixed = "mixed"
    stream = "stream"


def _recipe(name: str | None, overrides: list[str] | None):  # type: ignore[no-untyped-def]
    from halfbyte.recipe import load_recipe

    if name is None and overrides:
        raise UsageError("--set changes a recipe: name one with -r (halfbyte ls recipes)")
    return load_recipe(name, overrides or []) if name else None


def plan(
    model: Model,
    on: On,
    recipe: RecipeOption = None,
    override: Set = None,
    text: Annotated[bool, typer.Option("--text/--no-text", help="Whether calibration text will be given.")] = False,
    context: Context = None,
    concurrency: Concurrency = None,
    style: Style = Format.human,
) -> None:
    """What to make and why: method, group, exemptions, bytes, serve commands. No weight is read."""
    from halfbyte.models import Checkpoint, resolve_model
    from halfbyte.plan import make_plan, render_plan, variant_of
    from halfbyte.platforms import load_platform
    from halfbyte.serving import serve_command

    chosen = _recipe(recipe, override)
    platforms = [load_platform(name) for name in on]
    with progress() as shown:
        checkpoint = Checkpoint(resolve_model(model, shown))

        def command(r, p):  # type: ignore[no-untyped-def]
            line = serve_command("DIR", r.format, p, variant=variant_of(r), context=context, concurrency=concurrency)
            return line.shell()

        result = make_plan(checkpoint, chosen, platforms, context, concurrency, text, command)
    words = [word for name in on for word in ("--on", name)]
    words += ["-r", recipe] if recipe else []
    words += [word for value in override or [] for word in ("--set", value)]
    words += ["--context", str(context)] if context else []
    words += ["--concurrency", str(concurrency)] if concurrency else []
    follow = shlex.join(["halfbyte", "run", model, *words, "-o", f"runs/{Path(model).name}"])
    emit(result, style, f"{render_plan(result)}\n\nnext: {follow}")


def calibrate(
    model: Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help="Whose tokenizer, and who writes.")],
    output: Output,
    text: Annotated[
        list[Path] | None, typer.Argument(metavar="[TEXT]...", help="Text files; none: the model writes.")
    ] = None,
    sequences: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences (the strategy: 128 to 512).")] = 128,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=16, help="Tokens of the longest sequence.")] = 512,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of sampling.")] = 0,
    strategy: Annotated[
        Strategy, typer.Option(metavar="HOW", help="mixed (lengths) or stream (even strides, one length).")
    ] = Strategy.mixed,
    force: Force = False,
    style: Style = Format.human,
) -> None:
    """Build a calibration set from text, or let the model write its own."""
    from halfbyte.calibration import build
    from halfbyte.experiments.quantize import LEAST_TOKENS, load_model, load_tokenizer
    from halfbyte.models import resolve_model
    from halfbyte.recipe import CalibrationSpec

    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file: choose another -o")
    if output.exists() and any(output.iterdir()) and not force:
        raise UsageError(f"{output} is not empty: choose another -o, or --force")
    spec = CalibrationSpec(sequences=sequences, max_tokens=max_tokens, seed=seed)
    with progress() as shown:
        path = resolve_model(model, shown)
        writer = None if text else load_model(path)
        data = build(
            load_tokenizer(path),
            spec,
            sources=text or [],
            model=writer,
            strategy=strategy.value,
            progress=shown,
        )
        data.save(output)
    rows = "\n".join(
        f"  {r['from']:>5}-{r['to']:<5} tokens  {r['sequences']:>5} sequences  {r['tokens']:>8,} tokens"
        for r in data.manifest["histogram"]
    )
    said = f"{output}: {len(data.sequences)} sequences, {data.tokens:,} tokens, SHA-256 {data.sha256[:16]}\n{rows}"
    follow = f"next: halfbyte quantize {model} -r RECIPE --calibration {output} -o DIR"
    if data.tokens < LEAST_TOKENS:
        follow = f"too few for quantize, which takes {LEAST_TOKENS:,} tokens or more: raise --sequences or --max-tokens"
    emit(data.manifest, style, f"{said}\n{follow}")


def quantize(
    model: Model,
    recipe: Annotated[str, typer.Option("--recipe", "-r", metavar="RECIPE", help="A preset's name or a YAML file.")],
    output: Output,
    override: Set = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="A calibration set, or text files. Repeatable. None: the model writes."),
    ] = None,
    device: Device = None,
    resume: Resume = False,
    force: Force = False,
    style: Style = Format.human,
) -> None:
    """Make one 4-bit checkpoint. Interrupted, the same command goes on where it was."""
    from halfbyte.cli.words import artifact_words
    from halfbyte.experiments.quantize import quantize as make
    from halfbyte.recipe import load_recipe

    chosen = load_recipe(recipe, override or [])
    with progress() as shown:
        manifest = make(
            model,
            chosen,
            output,
            list(calibration or []) or None,
            device=device,
            force=force,
            command=own_command(),
            progress=shown,
        )
    emit(manifest, style, artifact_words(output, manifest))


def run(
    model: Model,
    on: On,
    output: Output,
    recipe: RecipeOption = None,
    override: Set = None,
    text: Text = None,
    gate: Annotated[
        list[str] | None,
        typer.Option("--gate", metavar="GATE", help="A budget: ppl=+5%, top1=90%, kl=0.1. Repeatable."),
    ] = None,
    vllm: Annotated[str | None, typer.Option(metavar="PATH", help="vLLM's executable or environment.")] = None,
    context: Context = None,
    concurrency: Concurrency = None,
    device: Device = None,
    resume: Resume = False,
    force: Force = False,
    style: Style = Format.human,
) -> None:
    """The main job: plan, calibrate, quantize, check, serve in real vLLM, evaluate, judge, report."""
    from halfbyte.cli.words import run_words
    from halfbyte.experiments.run import RunRequest
    from halfbyte.experiments.run import run as do

    request = RunRequest(
        model=model,
        platforms=tuple(on),
        output=output,
        recipe=_recipe(recipe, override),
        text=tuple(text or ()),
        gates=tuple(gate or ()),
        vllm=vllm,
        context=context,
        concurrency=concurrency,
        device=device,
        force=force,
        command=own_command(),
    )
    with progress() as shown:
        result = do(request, shown)
    emit(result, style, run_words(output, result))
    if result["gates"]["verdict"] != "accepted":
        raise typer.Exit(3)
