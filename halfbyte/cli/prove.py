"""check, eval, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli import evaluations as asked
from halfbyte.cli.console import Format, emit, progress
from halfbyte.cli.make import Data, Device, Style, Text

Artifact = Annotated[Path, typer.Argument(metavar="DIR", help="An artifact's directory.")]
SERVED_SEED = 7


def check(
    directory: Artifact,
    serve: Annotated[bool, typer.Option("--serve", help="Load it in real vLLM and compare what it computes.")] = False,
    on: asked.On = None,
    text: Text = None,
    vllm: Annotated[str | None, typer.Option(metavar="PATH", help="vLLM's executable or environment.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Write check.json (and served.json) here.")
    ] = None,
    style: Style = Format.human,
) -> None:
    """Structure, numbers, hashes; with --serve it really loads in vLLM and is scored over HTTP."""
    from halfbyte.artifact import check_artifact
    from halfbyte.cli.words import check_words
    from halfbyte.evaluate.speed_machine import measured_here
    from halfbyte.files import make_directory, portable, write_json
    from halfbyte.platforms import load_platform
    from halfbyte.serving import find_vllm

    if serve:
        find_vllm(vllm)
    with progress() as shown:
        if serve and on:
            measured_here([load_platform(on)], shown)
        result = {**check_artifact(directory, shown), "path": portable(directory)}
        served = _serve(directory, on, text, vllm, output, shown) if serve and result["ok"] else None
    if output:
        make_directory(output)
        write_json(output / "check.json", result)
        if served:
            write_json(output / "served.json", served)
    emit({**result, "served": served}, style, check_words(directory, result, served, text or (), output))
    if not result["ok"] or (served is not None and not served["passed"]):
        raise typer.Exit(1)


def _serve(directory, on, text, vllm, output, shown):  # type: ignore[no-untyped-def]
    import tempfile

    from halfbyte.artifact import load_fake_quantized
    from halfbyte.evaluate import compare_served
    from halfbyte.evaluate.served import refused
    from halfbyte.evaluate.speed_machine import platform_here
    from halfbyte.experiments.quantize import device_of
    from halfbyte.experiments.run import own_windows, windows_of
    from halfbyte.models.library import load_tokenizer

    tokenizer, device, on = load_tokenizer(directory), device_of(None), on or platform_here()
    if said := refused(directory, on, vllm):
        return said
    if text:
        windows = windows_of(text, tokenizer, 512, None, 20)
    else:
        windows = own_windows(load_fake_quantized(directory, device=device), tokenizer, SERVED_SEED, shown)
    with tempfile.TemporaryDirectory() as scratch:
        log = (output or Path(scratch)) / "vllm.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        found = compare_served(directory, windows, platform=on, vllm=vllm, log_path=log, device=device, progress=shown)
    if not output:
        found["reason"] = found["reason"].replace("(log: vllm.log)", "(-o DIR keeps vLLM's log)")
    return found


def evaluate(
    directory: Artifact,
    baseline: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The BF16 model; the one it was made of, unless named.")
    ] = None,
    text: Text = None,
    window: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens of a window of text.")] = 512,
    stride: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens from one window's start to the next.")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="How many windows (of text: all; of the model's own: 64).")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="About so many tokens, instead of --windows.")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="mixed|N[,N]",
            help="Windows of mixed lengths up to the model's context, or of N tokens; with --long-context its lengths, "
            "as 4k,16k.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the model's own text, where no text is given.")] = 1,
    device: Device = None,
    task: asked.Task = None,
    data: Data = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Items of a task, questions of a file.")
    ] = None,
    chat_template: asked.ChatTemplate = False,
    qa: asked.Qa = None,
    qa_metric: asked.Metric = "f1",
    chat: asked.Chat = None,
    judge: asked.JudgeUrl = None,
    judge_model: asked.JudgeModel = None,
    max_tokens: asked.MaxTokens = None,
    long_context: asked.LongContext = False,
    samples: asked.Samples = 4,
    backend: asked.BackendOption = asked.Backend.hf,
    on: asked.On = None,
    vllm: asked.Vllm = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Write the results here.")
    ] = None,
    style: Style = Format.human,
) -> None:
    """Perplexity, KL and top-1 agreement against BF16, with intervals and the noise floor.

    Where --task, --qa, --chat or --long-context is given: these instead.
    """
    from halfbyte.experiments.quantize import device_of

    device = device_of(device)
    beyond = asked.Asked.of(locals())
    if beyond.wanted():
        return asked.evaluate_asked(directory, baseline, beyond, output, style)
    from halfbyte.artifact import refuse_damaged
    from halfbyte.cli.words import eval_words
    from halfbyte.evaluate import write_result
    from halfbyte.experiments.evaluating import choose_windows, measure_fidelity
    from halfbyte.experiments.run import baseline_model
    from halfbyte.files import portable
    from halfbyte.models.library import load_tokenizer

    with progress() as shown:
        refuse_damaged(directory, shown)
        name, path = baseline_model(directory, baseline, shown)
        scored = choose_windows(
            path,
            text or (),
            window=window,
            stride=stride,
            count=windows,
            tokens=tokens,
            lengths=lengths,
            seed=seed,
            device=device,
            progress=shown,
        )
        fidelity = measure_fidelity(directory, path, scored, device, shown)
    facts = portable(directory), portable(name), load_tokenizer(path)
    result = fidelity.result(*facts)
    if output:
        write_result(output, fidelity, *facts)
    follow = f"report {directory}" if output else f"serve {directory} --on PLATFORM --print"
    emit(result, style, f"{eval_words(result)}\n\nnext: halfbyte {follow}")


def report(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A run's directory; or an artifact's, then the report goes beside it.")
    ],
    style: Style = Format.human,
) -> None:
    """One self-contained HTML page and the same tables in Markdown, from a run's result files."""
    from halfbyte.report import build_report

    page, plain = build_report(directory)
    emit({"html": str(page), "markdown": str(plain)}, style, f"{page}\n{plain}")
