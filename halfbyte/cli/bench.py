"""bench, tune."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli.console import Format, emit, progress
from halfbyte.cli.make import Force, Levels, Style, Together, _levels
from halfbyte.cli.prove import Artifact
from halfbyte.errors import HalfbyteError, UsageError

Where = Annotated[str, typer.Option("--on", metavar="PLATFORM", help="This machine: h100, h200, mi325x, cpu.")]
Vllm = Annotated[str | None, typer.Option(metavar="PATH", help="vLLM's executable or environment.")]
Into = Annotated[
    Path | None,
    typer.Option("--into", "-o", metavar="DIR", help="Where results go; none: beside the artifact."),
]
Input = Annotated[int, typer.Option("--input", metavar="N", min=1, help="Tokens of a prompt.")]
Answer = Annotated[int, typer.Option("--output", metavar="N", min=1, help="Tokens of an answer.")]
Requests = Annotated[
    int | None,
    typer.Option(
        "--requests",
        metavar="N",
        min=1,
        help="Requests of a run; none: 4 a sequence at once, 8 or more; 2 beyond 256.",
    ),
]
Repeats = Annotated[
    int, typer.Option("--repeats", metavar="N", min=2, help="Runs of everything, each with prompts of its own.")
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, max=4000, help="Seed of the prompts.")]
LONG_PROMPT = 2048


def bench(
    context: typer.Context,
    directory: Artifact,
    on: Where,
    baseline: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The BF16 model; the one it was made of, unless named.")
    ] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Measure DIR only, not the BF16 model beside it.")] = False,
    concurrency: Levels = "1,16,64",
    input_tokens: Input = 128,
    output_tokens: Answer = 128,
    requests: Requests = None,
    repeats: Repeats = 3,
    turns: Annotated[
        int, typer.Option("--turns", metavar="N", min=1, help="Starts of each server, in turn; repeats are spread.")
    ] = 1,
    prefill: Annotated[
        int | None,
        typer.Option("--prefill", metavar="N", min=0, help="Tokens of the long prompts; 0: none. None: up to 2048."),
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option(
            "--config",
            metavar="CONFIG",
            help="Another way to serve DIR, or another model: 'NAME: [OTHER] --linear-backend marlin'. Repeatable.",
        ),
    ] = None,
    stability: Annotated[
        float | None,
        typer.Option(
            "--stability", metavar="SECONDS", min=0, help="Long answers too, then load for so long (0: no load)."
        ),
    ] = None,
    long: Annotated[
        int, typer.Option("--long", metavar="N", min=2, help="Tokens of the long answers of --stability.")
    ] = 512,
    together: Together = 1,
    seconds: Annotated[
        float | None,
        typer.Option(
            "--seconds", metavar="S", min=1, help="Begin no run after so long, and tell what was measured until then."
        ),
    ] = None,
    evidence: Annotated[
        Path | None,
        typer.Option("--evidence", metavar="FILE", dir_okay=False, help="Write what plan and serve read as evidence."),
    ] = None,
    seed: Seed = 0,
    vllm: Vllm = None,
    into: Into = None,
    force: Force = False,
    style: Style = Format.human,
) -> None:
    """Tokens/s, latencies, memory at each concurrency in real vLLM, 4-bit against BF16. After --: words for vLLM."""
    from halfbyte.cli.bench_words import bench_words
    from halfbyte.evaluate.speed import BASELINE, MODEL, BenchRequest, Variant
    from halfbyte.evaluate.speed_evidence import refuse_evidence, refuse_others, write_evidence
    from halfbyte.evaluate.speed_machine import measured_here
    from halfbyte.evaluate.speed_result import write_bench
    from halfbyte.evaluate.speed_runs import INTERRUPTED, measure
    from halfbyte.evaluate.stability import Watch
    from halfbyte.models import Checkpoint
    from halfbyte.platforms import load_platform
    from halfbyte.serving import find_vllm

    levels = _levels(concurrency) or []
    configs = [_config(text) for text in config or []]
    platform, output = load_platform(on), into or beside(directory)
    Checkpoint(directory)
    install = find_vllm(vllm)
    if evidence:
        refuse_evidence(evidence, directory, alone)
    with progress() as shown:
        measured_here([platform], shown)
        reference = None if alone else _baseline(directory, baseline, shown)
        if reference is None and not alone:
            shown.say(f"{directory} is not in 4 bits: it is measured alone")
        first = [Variant(BASELINE, reference)] if reference else []
        for model in (reference, directory, *(other for _, other, _ in configs)):
            Checkpoint(model or directory).tensors  # noqa: B018  a missing or truncated shard gets its one line here
        others = [Variant(name, other or directory, words) for name, other, words in configs]
        variants = (*first, Variant(MODEL, directory), *others)
        request = BenchRequest(
            variants,
            platform,
            tuple(levels),
            input_tokens,
            output_tokens,
            requests,
            repeats,
            turns,
            _prefill(prefill, variants),
            seed,
            tuple(context.args),
            None if stability is None else Watch(max(levels), stability, long, seed=seed),
            together=together,
        )
        if evidence:
            refuse_others(evidence, request, install)
        limit = float("inf") if seconds is None else seconds
        found = measure(request, output, install, force=force, progress=shown, seconds=limit, partial=True)
        result, stable = write_bench(output, found)
        left_out, problem = [], None
        try:
            left_out = write_evidence(evidence, found, result) if evidence else []
        except HalfbyteError as error:
            evidence, problem = None, error
    value: dict[str, Any] = {**result, "stability": stable}
    command, more = ("serve", f" --evidence {evidence}") if evidence else ("tune", "")
    follow = f"\nnext: halfbyte {command} {directory} --on {on} --concurrency {max(levels)}{more}"
    emit(value, style, bench_words(output, value, evidence, left_out) + ("" if found.stopped else follow))
    if found.stopped == INTERRUPTED:
        if problem is not None:
            typer.echo(f"halfbyte: {problem}", err=True)
        raise KeyboardInterrupt
    if stable is not None and not stable["ok"]:
        raise typer.Exit(3)
    if problem is not None:
        raise problem
    if not any_ok(result):
        raise typer.Exit(1)


def tune(
    context: typer.Context,
    directory: Artifact,
    on: Where,
    concurrency: Annotated[int, typer.Option("--concurrency", metavar="N", min=1, help="Sequences served at once.")],
    input_tokens: Input = 128,
    output_tokens: Answer = 128,
    requests: Requests = None,
    repeats: Repeats = 3,
    together: Together = 1,
    seed: Seed = 0,
    vllm: Vllm = None,
    into: Into = None,
    force: Force = False,
    style: Style = Format.human,
) -> None:
    """The fastest vLLM command for this artifact on this machine: the flags that matter, measured one by one."""
    from halfbyte.cli.bench_words import tune_words
    from halfbyte.evaluate.speed import BenchRequest
    from halfbyte.evaluate.speed_machine import measured_here
    from halfbyte.evaluate.speed_tune import served_alike
    from halfbyte.evaluate.speed_tune import tune as do
    from halfbyte.models import Checkpoint
    from halfbyte.platforms import load_platform
    from halfbyte.serving import find_vllm

    Checkpoint(directory).tensors  # noqa: B018  a missing or truncated shard gets its one line here
    output = into or beside(directory)
    request = BenchRequest(
        (),
        load_platform(on),
        (concurrency,),
        input_tokens,
        output_tokens,
        requests,
        repeats,
        1,
        0,
        seed,
        tuple(context.args),
        together=together,
    )
    with progress() as shown:
        measured_here([request.platform], shown)
        install = find_vllm(vllm)
        result = do(request, directory, output, install, force=force, progress=shown)
    same = served_alike(result, directory, request.platform, install)
    emit(result, style, tune_words(directory, output, result, on if same else None))


def beside(directory: Path) -> Path:
    """Where the results of an artifact go: its run's directory, or one beside it."""
    there = directory.resolve()
    return there.parent if (there.parent / "run.json").is_file() else there.with_name(f"{there.name}-bench")


def _baseline(directory: Path, named: str | None, shown: Any) -> Path | None:
    """The BF16 model's directory; None where DIR is one itself and no other was named."""
    from halfbyte.evaluate.served import format_of
    from halfbyte.experiments.run import baseline_model

    if named is None and format_of(directory) is None:
        return None
    return baseline_model(directory, named, shown)[1]


def _prefill(asked: int | None, variants: Any) -> int:
    """Tokens of the long prompts: as asked for, or 2048 where the model takes so many, else what it takes."""
    from halfbyte.evaluate.speed import ROOM, context_limit

    if asked is not None:
        return asked
    limit = context_limit([variant.directory for variant in variants])
    return LONG_PROMPT if limit is None else max(0, min(LONG_PROMPT, limit - ROOM - 1))


def _config(text: str) -> tuple[str, Path | None, tuple[str, ...]]:
    """("NAME", another model's directory or None, words for vLLM) of "NAME: [OTHER] [FLAGS]". Raises UsageError."""
    from halfbyte.models import Checkpoint

    name, colon, rest = text.partition(":")
    name = name.strip()
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise UsageError(f"--config {text!r}: {str(error).lower()}") from None
    known = name in ("baseline", "model", "BF16", "4-bit") or not name.strip(".")
    if not colon or not re.fullmatch(r"[\w.+=-]+", name) or known or not words or not words[0]:
        raise UsageError(
            f"--config {text!r}: write a name of letters and digits (not baseline, model, BF16, 4-bit), a colon, "
            "and flags or a model's directory: 'marlin: --linear-backend marlin'"
        )
    other = None if words[0].startswith("-") else Path(words.pop(0))
    return name, other and Checkpoint(other).path, tuple(words)


def any_ok(result: Mapping[str, Any]) -> bool:
    """Whether a bench measured anything at any concurrency."""
    sides = [point.get(side) for point in result["points"] for side in ("baseline", "model")]
    sides += [entry for point in result["points"] for entry in point.get("configs", {}).values()]
    return any(entry and entry["status"] == "ok" for entry in sides)
