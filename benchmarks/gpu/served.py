"""Does real vLLM compute what each artifact says? Every format, kernel, exemption and KV cache, on this GPU.

    python benchmarks/gpu/served.py MODEL --calibration DIR --text FILE -o DIR [--gpus 0,1] [--jobs N] [--json FILE]
    python benchmarks/gpu/served.py --dry -o DIR      on this CPU with a tiny model: does it work?

MODEL is quantized in all artifacts of served.yaml in one pass; then every case of it is served by vLLM, several at once
on a card. Perplexity over HTTP is held against the fake-quantized transformers model: within 0.5 % passes. For NVFP4
the log-probabilities also tell what the kernel does with its inputs: they are compared with the model with 16-bit, FP8
and NVFP4 inputs. An FP8 KV cache is held against the same artifact without one (2 %). A case that fails is a row with
its reason and the last of vLLM's log. Writes served.json after each case. Exit status 1 where a row fails. What was
served is not served again as long as artifact, case, text, vLLM and GPU are the same.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.activations import Emulation, distance, emulated, fp4_inputs, fp8_inputs, verdict
from benchmarks.gpu.common import (
    GIB,
    card_name,
    cards,
    count,
    digest,
    markdown,
    on_card,
    one_line,
    parser_of,
    random_set,
    say,
)
from benchmarks.gpu.engines import log_tail
from benchmarks.gpu.shapes import random_model
from halfbyte.artifact import load_fake_quantized
from halfbyte.calibration import CalibrationSet
from halfbyte.engine import Here
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate import Windows, text_windows
from halfbyte.evaluate.scoring import logits_of, token_loglik
from halfbyte.evaluate.served import LIMIT, format_of, judge
from halfbyte.experiments.cells import resolve_cells
from halfbyte.experiments.matrix import load_matrix
from halfbyte.experiments.production import Production
from halfbyte.experiments.quantize import device_of
from halfbyte.files import make_directory, write_json
from halfbyte.models import Checkpoint, resolve_model
from halfbyte.models.checkpoint import read_json
from halfbyte.models.library import load_model, load_tokenizer
from halfbyte.platforms import Platform, load_platform
from halfbyte.serving import Client, Server, VllmInstall, declared_variant, find_vllm, perplexity, serve_command
from halfbyte.serving.probe import FAITHFUL
from halfbyte.types import Quiet

PLAN = Path(__file__).with_suffix(".yaml")
KV_LIMIT = 0.02
"""What an FP8 KV cache may change perplexity by."""
WINDOW, SEQUENCES = 512, 8
DRY_TOKENS = 32, 128
"""Sequences and tokens of each that a dry run calibrates on."""
KV_SPACE = 1 << 30
START_S = 300.0
Scores = list[list[float | None]]


@dataclass
class Case:
    """One serving of one artifact (None: BF16), and what came of it."""

    name: str
    artifact: str | None = None
    words: tuple[str, ...] = ()
    against: str | None = None
    compare: bool = False
    scores: Scores | None = None
    row: dict[str, Any] = field(default_factory=dict)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("model", nargs="?", default=None)
    parser.add_argument("--calibration", type=Path, help="a set made by halfbyte calibrate")
    parser.add_argument("--text", type=Path, help="what is scored")
    parser.add_argument("--windows", type=count, default=24, help="of 512 tokens that are scored")
    parser.add_argument("--cases", nargs="+", default=None)
    parser.add_argument("--jobs", type=count, default=6, help="servers at once on a card")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no server starts after so long")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(words)
    if args.dry:
        args.on, args.jobs, args.windows = "cpu", 1, 2
        args.cases = args.cases or ["bf16", "gptq-g32", "gptq-head"]
    elif not (args.model and args.calibration and args.text):
        parser.error("name MODEL, --calibration DIR and --text FILE, or --dry")
    return args


def main() -> None:
    args = parse()
    with one_line("served.py"):
        result = run(args)
    print("\n".join(table(result)))
    sys.exit(0 if all(row["passed"] for row in result["rows"]) else 1)


def run(args: argparse.Namespace) -> dict[str, Any]:
    began = time.monotonic()
    place, install = make_directory(args.output), find_vllm(args.vllm)
    platform = load_platform(args.on).model_copy(update={"speed": ()})  # no kernel but vLLM's own choice, or the case's
    base = random_model(place / "tiny", "random:tiny") if args.dry else resolve_model(args.model)
    data = random_set(base, *DRY_TOKENS) if args.dry else CalibrationSet.load(args.calibration)
    windows = dry_windows(data) if args.dry else text_windows([args.text], load_tokenizer(base), count=args.windows)
    plan = yaml.safe_load(PLAN.read_text(encoding="utf-8"))
    cases = cases_of(plan, args.cases)
    reasons = make_all(plan, cases, base, data, place, args.dry)
    say(f"artifacts made after {time.monotonic() - began:.0f} s")
    scene = Scene(base, place, platform, install, windows, began + args.seconds)
    gpus = cards(args.gpus)
    facts = {"schema": 1, "kind": "gpu-served", "hardware": card_name(), "vllm": install.version}
    facts |= {"model": args.model or "random:tiny", "limit": LIMIT, "text": windows.describe()}

    def result() -> dict[str, Any]:
        return {**facts, "rows": [case.row for case in cases], "seconds": round(time.monotonic() - began, 1)}

    def write() -> None:
        write_json(args.json or place / "served.json", result())

    for case in cases:
        why = reasons.get(case.artifact or "", "")
        case.row = blank(case, f"not made: {why}" if why else "not served yet")
        if not why and (kept := scene.row_file(case)).is_file():
            case.row = read_json(kept)
    todo = [case for case in cases if case.row["status"] != "served" and not reasons.get(case.artifact or "")]
    with ThreadPoolExecutor(args.jobs * len(gpus)) as pool:
        seats: Queue[str] = Queue()
        for _ in range(args.jobs):
            for card in gpus:
                seats.put(card)
        served = {case.name: pool.submit(serve, scene, case, seats) for case in todo}
        try:
            settle(scene, cases, todo, served, write)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # a stop does not wait for what has not begun
    write()
    return result()


def cases_of(plan: Mapping[str, Any], only: Sequence[str] | None) -> list[Case]:
    """The cases, those that were asked for. Raises HalfbyteError for one that is not known."""
    for name in only or ():
        if name not in plan["cases"]:
            raise HalfbyteError(f"no case {name}: use {', '.join(plan['cases'])}")
    return [
        Case(name, **{**entry, "words": tuple(entry.get("words", ()))})
        for name, entry in plan["cases"].items()
        if not only or name in only
    ]


@dataclass(frozen=True)
class Scene:
    """What every serving shares."""

    base: Path
    place: Path
    platform: Platform
    install: VllmInstall
    windows: Windows
    deadline: float

    def directory(self, case: Case) -> Path:
        return self.place / "artifacts" / case.artifact if case.artifact else self.base

    def row_file(self, case: Case) -> Path:
        """Where a case's row is kept, once it is served: another for all that it depends on."""
        manifest = self.directory(case) / "halfbyte.json"
        weights = read_json(manifest)["work"] if case.artifact else Checkpoint(self.base).fingerprint()
        facts = {"weights": weights, "words": list(case.words), "against": case.against, "compare": case.compare}
        facts |= {"text": self.windows.describe(), "vllm": self.install.version, "hardware": card_name()}
        facts |= {"limits": [LIMIT, KV_LIMIT]}
        return self.place / "rows" / f"{case.name}-{digest(facts)}.json"

    @property
    def ids(self) -> list[list[int]]:
        return [ids.tolist() for ids in self.windows.ids]


def make_all(
    plan: Mapping[str, Any], cases: Sequence[Case], base: Path, data: CalibrationSet, place: Path, dry: bool
) -> dict[str, str]:
    """Every artifact that a case wants, in one pass over the model and one over its untied copy; why some failed."""
    wanted = {case.artifact for case in cases if case.artifact}
    reasons: dict[str, str] = {}
    for group, model in (("artifacts", lambda: base), ("heads", lambda: untied(base, place))):
        recipes = {name: recipe for name, recipe in plan[group].items() if name in wanted}
        if recipes:
            reasons |= produce(recipes, plan["defaults"], model(), data, place / "artifacts")
    return reasons


def produce(
    recipes: Mapping[str, Any], defaults: Mapping[str, Any], model: Path, data: CalibrationSet, place: Path
) -> dict[str, str]:
    """The artifacts place/NAME; the reasons of those that could not be made."""
    checkpoint, device, progress = Checkpoint(model), device_of(None), Quiet()
    cells = resolve_cells(load_matrix({"defaults": dict(defaults), "cells": dict(recipes)}), checkpoint, [])
    able = [cell for cell in cells if not cell.reason]
    if able:
        there = Production(
            able,
            {cell.name: data for cell in able},
            checkpoint,
            checkpoint.fingerprint(),
            place,
            model.name,
            model,
            "served",
            device,
            None,
            progress,
            Here(device, progress),
        )
        there.make()
    return {cell.name: cell.reason for cell in cells if cell.reason}


def untied(base: Path, place: Path) -> Path:
    """The model with an lm_head of its own, which a checkpoint with tied embeddings does not have; made in `place`."""
    checkpoint = Checkpoint(base)
    if checkpoint.has("lm_head.weight"):
        return base
    place /= f"untied-{checkpoint.fingerprint()[:12]}"
    if not (place / "model.safetensors").is_file():
        make_directory(place)
        for file in base.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
                shutil.copy(file, place / file.name)
        tensors = {name: checkpoint.load(name) for name in checkpoint.tensors}
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        write_json(place / "config.json", {**checkpoint.config, "tie_word_embeddings": False})
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    return place


def serve(scene: Scene, case: Case, seats: Queue[str]) -> dict[str, Any]:
    """Serve one case on the next free seat and score the windows over HTTP. Raises HalfbyteError where it fails."""
    card = seats.get()
    try:
        if time.monotonic() > scene.deadline:
            raise HalfbyteError("the time was over before it began")
        say(f"serving {case.name}")
        directory, log = scene.directory(case), scene.place / "logs" / f"{case.name}.log"
        sharing = ("--gpu-memory-utilization", "0.02", "--kv-cache-memory-bytes", str(KV_SPACE)) if card else ()
        plain = tuple(w for w in FAITHFUL if "--kv-cache-dtype" not in case.words or w not in FAITHFUL[:2])
        command = serve_command(
            directory,
            format_of(directory),
            scene.platform,
            vllm_version=scene.install.version,
            context=WINDOW + 64,
            concurrency=SEQUENCES,
            extra=(*plain, *sharing, "--max-num-batched-tokens", "2048", *case.words),
        )
        with Server(command, scene.install, log_path=log, timeout=START_S, env=on_card(card)) as server:
            with Client(server.url) as client:
                try:
                    case.scores = client.score(scene.ids, batch=SEQUENCES)
                    said = client.complete("The capital of France is", 12)
                except HalfbyteError as error:
                    raise error if client.healthy() else server.failure() from error
            facts = server.facts
        ppl, tokens = perplexity(case.scores)
        return {
            "ppl_served": ppl,
            "tokens": tokens,
            "completion": said,
            "weight_gib_reported": facts.weight_gib,
            "kv_cache_tokens": facts.kv_cache_tokens,
            "kernels": list(facts.kernels),
            "quantization": facts.quantization,
            "load_seconds": round(server.load_seconds, 1),
            "command": server.command.argv,
        }
    finally:
        seats.put(card)


def settle(
    scene: Scene,
    cases: Sequence[Case],
    todo: Sequence[Case],
    served: Mapping[str, Future[Any]],
    write: Callable[[], None],
) -> None:
    """Score each artifact in transformers while the servers start, then judge every case of `todo` as it is done."""
    references: dict[str, dict[str, Scores]] = {}
    named = {case.name: case for case in cases}
    for case in todo:
        key = case.artifact or ""
        try:
            if key not in references:
                compare = any(c.compare for c in cases if c.artifact == case.artifact)
                references[key] = reference(scene.directory(case), scene.windows, compare)
            found = served[case.name].result()
            other = named.get(case.against or "")
            before = None
            if other:
                before = (served[other.name].result() if other.name in served else other.row).get("ppl_served")
                if before is None:
                    raise HalfbyteError(f"{other.name}, which it is held against, was not served")
            case.row = judged(scene, case, found, references[key], before)
            write_json(make_directory(scene.place / "rows") / scene.row_file(case).name, case.row)
        except Exception as error:
            case.row = blank(case, " ".join(str(error).split()) or type(error).__name__)
            case.row["log"] = log_tail(scene.place / "logs" / f"{case.name}.log")
        say(f"{case.name}: {'passed' if case.row['passed'] else case.row['reason']}")
        write()


def judged(
    scene: Scene, case: Case, found: dict[str, Any], references: Mapping[str, Scores], before: float | None
) -> dict[str, Any]:
    """The row of a case that was served."""
    directory = scene.directory(case)
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors")) / GIB
    ppl, _ = perplexity(references["16-bit"])
    limit = LIMIT if before is None else KV_LIMIT
    facts = {**blank(case, ""), **found, "artifact_gib": size, "declared": declared_variant(directory)}
    row = judge(facts, ppl if before is None else before, limit)
    row["ppl_reference"] = ppl
    if case.scores is not None:
        row["distances"] = {name: distance(case.scores, scores) for name, scores in references.items()}
        row["inputs"] = verdict(row["distances"]) if case.compare else None
    return {**row, "log": "" if row["passed"] else log_tail(scene.place / "logs" / f"{case.name}.log")}


def blank(case: Case, reason: str) -> dict[str, Any]:
    return {
        "name": case.name,
        "artifact": case.artifact,
        "words": list(case.words),
        "against": case.against,
        "status": "not served",
        "reason": reason,
        "passed": False,
        "kernels": [],
    }


def reference(directory: Path, windows: Windows, compare: bool) -> dict[str, Scores]:
    """Log-probabilities of the windows' tokens by the transformers model, by what its quantized linears' inputs are."""
    device = device_of(None)
    quantized = format_of(directory) is not None
    model = load_fake_quantized(directory, device=device) if quantized else load_model(directory, device)
    found = {"16-bit": log_probabilities(model, windows)}
    if compare and quantized:
        for name, linears in emulations(directory).items():
            with emulated(model, linears):
                found[name] = log_probabilities(model, windows)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    return found


def emulations(directory: Path) -> dict[str, dict[str, Emulation]]:
    """FP8 inputs for every NVFP4 linear, and NVFP4 inputs: under its input_scale, or without one, under its largest."""
    checkpoint = Checkpoint(directory)
    leaves = ("weight_scale_2", "weight_global_scale")
    linears = [name.rpartition(".")[0] for name in checkpoint.tensors if name.rpartition(".")[2] in leaves]
    found: dict[str, dict[str, Emulation]] = {"FP8": dict.fromkeys(linears, fp8_inputs), "NVFP4": {}}
    for name in linears:
        stored = f"{name}.input_scale"
        found["NVFP4"][name] = fp4_inputs(float(checkpoint.load(stored))) if checkpoint.has(stored) else own_scale
    return found


def own_scale(x: torch.Tensor) -> torch.Tensor:
    """NVFP4 inputs under the scale that their own largest gives."""
    return fp4_inputs(max(float(x.abs().max()), 1e-12) / (6 * 448))(x)


def log_probabilities(model: Any, windows: Windows) -> Scores:
    """Of every token but a window's first, as vLLM's prompt_logprobs has them."""
    found: Scores = []
    for ids in windows.ids:
        batch, at = ids[None], torch.arange(1, len(ids))
        values = token_loglik(logits_of(model, batch), batch, torch.zeros_like(at), at)
        found.append([None, *values.tolist()])
    return found


def dry_windows(data: CalibrationSet) -> Windows:
    ids = data.sequences[:2]
    return Windows(ids, [torch.ones_like(i).bool() for i in ids], "random", len(ids[0]), len(ids[0]))


def table(result: Mapping[str, Any]) -> list[str]:
    """A row for each case, as Markdown."""
    head = ["case", "declared", "kernel", "KV tokens", "ppl served", "ppl HF", "apart", "GiB vLLM / file", "inputs", ""]
    rows = []
    for row in result["rows"]:
        if row["status"] != "served":
            rows.append([row["name"], *["–"] * 8, f"FAIL: {row['reason'][:120]}"])
            continue
        near = ", ".join(f"{name} {value:.4f}" for name, value in row.get("distances", {}).items())
        told = f"{row['inputs']} ({near})" if row.get("inputs") else f"({near})"
        size = "–" if row["weight_gib_reported"] is None else f"{row['weight_gib_reported']:.3f}"
        rows.append(
            [
                row["name"],
                row["declared"] or row["quantization"] or "BF16",
                ", ".join(row["kernels"]) or "not named",
                str(row["kv_cache_tokens"] or "–"),
                f"{row['ppl_served']:.3f}",
                f"{row['ppl_reference']:.3f}",
                f"{row['relative_difference']:.2%}" + (f" of {row['against']}" if row["against"] else ""),
                f"{size} / {row['artifact_gib']:.3f}",
                told,
                "pass" if row["passed"] else f"FAIL: {row['reason'][:120]}",
            ]
        )
    passed = sum(row["passed"] for row in result["rows"])
    title = f"{result['hardware']}, vLLM {result['vllm']}, {result['model']}: {passed} of {len(rows)} pass"
    return [f"{title}, {result['seconds']:.0f} s", *markdown(head, rows)]


if __name__ == "__main__":
    main()
