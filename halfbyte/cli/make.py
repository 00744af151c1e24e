"""plan, quantize, run."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.console import Format, emit, own_command, progress
from halfbyte.cli.workers import Count, Devices, Ray, RayWorkers, device_list, solvers
from halfbyte.errors import UsageError
from halfbyte.hashing import hash_ahead

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A directory, a hub id, or smollm2-135m.")]
On = Annotated[
    list[str],
    typer.Option("--on", metavar="PLATFORM", help="Where it will be served: h100, h200, mi325x, cpu. Repeatable."),
]
RecipeOption = Annotated[
    str | None, typer.Option("--recipe", "-r", metavar="RECIPE", help="A preset's name or a YAML file.")
]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key. Repeatable.")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the result goes.")]
Text = Annotated[
    list[Path] | None,
    typer.Option("--text", metavar="FILE", exists=True, dir_okay=False, help="Plain text or JSONL. Repeatable."),
]
Calibration = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="PATH", exists=True, help="A calibration set, or text files. Repeatable. None: the model writes."
    ),
]
Context = Annotated[
    int | None, typer.Option("--context", metavar="TOKENS", min=1, help="Longest sequence served, in tokens.")
]
Levels = Annotated[
    str | None, typer.Option("--concurrency", metavar="N,N,N", help="Sequences served at once; several: 1,16,64.")
]
Concurrency = Annotated[int | None, typer.Option("--concurrency", metavar="N", min=1, help="Sequences served at once.")]
Together = Annotated[
    int,
    typer.Option(
        "--together",
        metavar="N",
        min=1,
        help="Servers loaded at once on a GPU, each with a KV cache of what the load needs; each is measured alone.",
    ),
]
Style = Annotated[Format, typer.Option("--format", metavar="STYLE", help="How results are printed: human or json.")]
Device = Annotated[
    str | None, typer.Option("--device", metavar="DEVICE", help="cpu or cuda; the GPU where there is one.")
]
Memory = Annotated[
    str | None,
    typer.Option("--memory", metavar="LIMIT", help="Host memory to solve blocks in (12GiB); none: what is free."),
]
Data = Annotated[
    Path | None,
    typer.Option("--data", metavar="DIR", exists=True, file_okay=False, help="JSONL files of the bundled tasks."),
]
Limit = Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="Items of a task.")]
Force = Annotated[bool, typer.Option("--force", help="Give up what the output directory holds.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what is there (the default for the same work).")]


def _recipe(name: str | None, overrides: list[str] | None):  # type: ignore[no-untyped-def]
    from halfbyte.recipe import load_recipe

    if name is None and overrides:
        raise UsageError("--set changes a recipe: name one with -r (halfbyte ls recipes)")
    return load_recipe(name, overrides or []) if name else None


def memory_limit(text: str | None) -> int | None:
    """--memory in bytes."""
    from halfbyte.experiments.mitigation import parse_bytes

    return parse_bytes(text, "--memory") if text else None


def plan(
    model: Model,
    on: On,
    recipe: RecipeOption = None,
    override: Set = None,
    text: Text = None,
    context: Context = None,
    concurrency: Levels = None,
    gate: Annotated[
        list[str] | None, typer.Option("--gate", metavar="GATE", help="A budget, as run takes it: ppl=+5%. Repeatable.")
    ] = None,
    tp: Annotated[int, typer.Option("--tp", metavar="N", min=1, help="Devices that share the model.")] = 1,
    vllm_version: Annotated[
        str | None,
        typer.Option(metavar="VERSION", help="vLLM's version; none: the one each platform's data stands on."),
    ] = None,
    evidence: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", exists=True, help="Measured speeds of your own (YAML or JSON). Repeatable."),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Name the rule and the source of everything.")] = False,
    style: Style = Format.human,
) -> None:
    """What to make, for which platform, and what it gives: recipe, memory, speed, serve commands. Reads no weight."""
    from halfbyte.experiments.gates import ALWAYS, resolve_gates
    from halfbyte.models import cache_dir, resolve_model
    from halfbyte.plan import make_plan, open_for_plan, render_plan, spell, variant_of
    from halfbyte.platforms import facts_for, load_platform
    from halfbyte.platforms.evidence import unused
    from halfbyte.recipe import Recipe
    from halfbyte.serving import serve_command

    chosen, levels = _recipe(recipe, override), _levels(concurrency)
    stated = [g for g in resolve_gates(gate or []) if g.stated or g.kind.file in ALWAYS]
    budgets = {g.name: g.limit for g in stated}
    platforms = [load_platform(name, [*(evidence or []), cache_dir() / "evidence"]) for name in dict.fromkeys(on)]
    if vllm_version:
        facts_for(vllm_version)
        platforms = [p.model_copy(update={"vllm": vllm_version}) for p in platforms]
    for note in unused(evidence or [], platforms, " (--vllm-version names another)"):
        typer.echo(f"note: {note}", err=True)
    target, ranks = Path("runs") / Path(model).name, ["--tensor-parallel-size", str(tp)] if tp > 1 else []
    with progress() as shown:
        checkpoint = open_for_plan(model, lambda: resolve_model(model, shown))

        def command(r, p):  # type: ignore[no-untyped-def]
            most = max(levels) if levels else None
            line = serve_command(
                checkpoint.path, r.format, p, variant=variant_of(r), context=context, concurrency=most, extra=ranks
            )
            return replace(line, argv=[*line.argv[:2], str(target / "model"), *line.argv[3:]]).shell()

        result = make_plan(checkpoint, chosen, platforms, context, levels, bool(text), command, gates=budgets, tp=tp)
    result["model"] = {"name": model, **result["model"]}
    words = [word for name in dict.fromkeys(on) for word in ("--on", name)]
    beyond_run = gate or evidence or vllm_version or tp > 1 or len(levels or []) > 1
    words += ["-r", recipe] if recipe else spell(Recipe.model_validate(result["recipe"])) if beyond_run else []
    words += [word for value in override or [] for word in ("--set", value)]
    words += [word for file in text or [] for word in ("--text", str(file))]
    words += ["--context", str(context)] if context else []
    words += ["--concurrency", str(max(levels))] if levels else []
    words += [word for budget in gate or [] for word in ("--gate", budget)]
    follow = shlex.join(["halfbyte", "run", model, *words, "-o", str(target)])
    emit(result, style, f"{render_plan(result, explain, [g.spelled for g in stated if not g.off])}\n\nnext: {follow}")


def _levels(text: str | None) -> list[int] | None:
    """Concurrencies from "1,16,64"."""
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise UsageError(f"--concurrency {text}: write whole numbers above 0, such as 64 or 1,16,64")
    return sorted({int(word) for word in words})


def quantize(
    model: Model,
    recipe: Annotated[str, typer.Option("--recipe", "-r", metavar="RECIPE", help="A preset's name or a YAML file.")],
    output: Output,
    override: Set = None,
    calibration: Calibration = None,
    device: Device = None,
    devices: Devices = None,
    workers: Count = None,
    ray: Ray = None,
    ray_workers: RayWorkers = None,
    memory: Memory = None,
    resume: Resume = False,
    force: Force = False,
    style: Style = Format.human,
) -> None:
    """Make one 4-bit checkpoint. Interrupted, the same command goes on where it was."""
    hash_ahead(model)
    from halfbyte.cli.words import artifact_words
    from halfbyte.experiments.quantize import quantize as make
    from halfbyte.recipe import load_recipe

    chosen = load_recipe(recipe, override or [])
    limit = memory_limit(memory)
    device = device or next(iter(device_list(devices)), None)
    with progress() as shown, solvers(devices, workers, ray, ray_workers, device, shown) as them:
        manifest = make(
            model,
            chosen,
            output,
            list(calibration or []) or None,
            device=device,
            force=force,
            command=own_command(),
            progress=shown,
            workers=them,
            memory=limit,
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
        typer.Option("--gate", metavar="GATE", help="A budget: ppl=+5%, speed@1=+60%, memory@64=fits. Repeatable."),
    ] = None,
    mitigate: Annotated[
        bool, typer.Option("--mitigate/--no-mitigate", help="Climb the ladder of mitigations where a gate failed.")
    ] = True,
    budget: Annotated[
        str | None,
        typer.Option("--budget", metavar="BITS|BYTES", help="For its last rung: 4.6 bits a weight, or 64MiB more."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            "--task",
            metavar="NAMES",
            help="Measure tasks: `default`, or names and files as eval takes them, separated by commas.",
        ),
    ] = None,
    data: Data = None,
    limit: Limit = None,
    long_context: Annotated[bool, typer.Option("--long-context", help="Measure the drift on long context.")] = False,
    bench: Annotated[
        bool,
        typer.Option("--bench", help="Measure tokens/s against BF16 in vLLM, at --concurrency and what gates name."),
    ] = False,
    vllm: Annotated[str | None, typer.Option(metavar="PATH", help="vLLM's executable or environment.")] = None,
    context: Context = None,
    concurrency: Concurrency = None,
    device: Device = None,
    memory: Memory = None,
    resume: Resume = False,
    force: Force = False,
    style: Style = Format.human,
) -> None:
    """The main job: plan, calibrate, quantize, check, evaluate, mitigate, serve in real vLLM, judge, report."""
    hash_ahead(model)
    from halfbyte.cli.words import run_words
    from halfbyte.experiments.run import RunRequest
    from halfbyte.experiments.run import run as do

    measure = {"tasks": tasks} if tasks else {}
    measure |= {name: "" for name, said in (("long-context", long_context), ("bench", bench)) if said}
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
        mitigate=mitigate,
        budget=budget,
        measure=measure,
        memory=memory_limit(memory),
        data=data,
        limit=limit,
    )
    with progress() as shown:
        result = do(request, shown)
    emit(result, style, run_words(output, result))
    if result["gates"]["verdict"] != "accepted":
        raise typer.Exit(3)
