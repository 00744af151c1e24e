"""Serving speed of BF16, GPTQ, AWQ and NVFP4 by kernel and KV cache, as a table and as evidence for plan and serve.

    python benchmarks/gpu/serving.py [MODEL] -o DIR [--configs bf16 gptq …] [--kv auto fp8] [--gpus 0,1] [--json FILE]
    python benchmarks/gpu/serving.py --dry -o DIR        the same on this CPU with a tiny model: does it work?

MODEL is a directory or a hub id, or random:8b (Llama-3.1-8B's shape) or random:32b (Qwen2.5-32B's): random weights, for
machines without network (speed does not depend on what weights say). Several engines load at once on a card, as many as
its memory holds; when all are ready, each is timed alone: N sequences of 128 tokens in and 128 out that start together,
at each N, and long prompts. In order of importance, so that a run that is cut short is still of use: BF16, GPTQ, NVFP4
in Humming, AWQ, NVFP4 in Marlin, with the KV cache of 16 bits, then with FP8. What was timed is not timed again as long
as weights, words for vLLM, load, repeats, vLLM and GPU are the same. In DIR: serving.json, and beside it evidence.json
(halfbyte plan, serve: --evidence). 8B takes 35 GiB of disk (or of /dev/shm).
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.common import (
    GIB,
    card_gib,
    card_name,
    cards,
    count,
    counts,
    loads_of,
    markdown,
    middle,
    one_line,
    pair,
    parser_of,
    random_set,
    say,
)
from benchmarks.gpu.engines import Engine, Work, engine_words, run_engines
from benchmarks.gpu.shapes import NAMES, Packing, config_of, is_random, packed_model, place_of, random_model
from halfbyte import quantize
from halfbyte.errors import UsageError
from halfbyte.evaluate.speed_evidence import kernel_name
from halfbyte.evaluate.speed_room import BESIDE
from halfbyte.evaluate.speed_stats import apart
from halfbyte.files import make_directory, write_json
from halfbyte.models import Checkpoint, resolve_model
from halfbyte.platforms import Platform, load_platform
from halfbyte.platforms.base import within
from halfbyte.platforms.evidence import read_table
from halfbyte.recipe.loader import recipe_from_mapping
from halfbyte.serving import VllmInstall, declared_variant, find_vllm

PACKINGS = {
    "gptq": Packing("gptq", "int4_sym", 128),
    "awq": Packing("awq", "int4_asym", 128),
    "nvfp4": Packing("modelopt", "nvfp4", 16, "fp4"),
}
CONFIGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "bf16": ("bf16", ()),
    "gptq": ("gptq", ()),
    "nvfp4-humming": ("nvfp4", ("--linear-backend", "humming")),
    "awq": ("awq", ()),
    "nvfp4-marlin": ("nvfp4", ()),
}
"""What is timed, by importance: the model, and words that choose its kernel. What NVFP4 gets by itself is Marlin before
vLLM 0.32 (the log says); W4A16_NVFP4 gets it there whatever one says."""
METHODS = {"bf16": "bf16", "gptq": "gptq", "awq": "awq", "nvfp4": "nvfp4"}
PREFILL, PREFILL_PROMPTS = "prefill", 16
TOKENS = 64, 64
"""Sequences and tokens of each that NVFP4's input scales are of."""


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("model", nargs="?", default="random:8b")
    parser.add_argument("--configs", nargs="+", default=None, help=f"{', '.join(CONFIGS)}; more by --on (tune)")
    parser.add_argument("--kv", nargs="+", choices=["auto", "fp8"], default=["auto", "fp8"])
    parser.add_argument("--levels", type=counts, default=[1, 4, 16, 64, 128, 256])
    parser.add_argument("--tokens", type=pair, default=[128, 128], help="of a prompt and an answer")
    parser.add_argument("--prefill", type=int, default=2048, help="tokens of the long prompts; 0: none")
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--abreast", type=count, default=4, help="engines that share a card while they load")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no round begins that could not end")
    parser.add_argument("--least", type=float, default=200, help="seconds that a round takes at least")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(words)
    if args.dry:
        args.model, args.on, args.levels, args.prefill, args.repeats = "random:tiny", "cpu", [1, 2], 32, 2
        args.tokens, args.kv, args.abreast, args.least = [16, 8], ["auto"], 2, 0.0
    return args


def main() -> None:
    args = parse()
    with one_line("serving.py"):
        result = run(args)
        print("\n".join(table(result)), flush=True)
        if result["evidence"]:
            read_table(result_file(args).with_name("evidence.json"))
        else:
            say("no evidence.json: it takes BF16 with a KV cache of 16 bits (--kv auto) and another row to compare")
    sys.exit(0 if all(row["status"] == "ok" for row in result["rows"]) else 1)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time what is missing; serving.json and evidence.json are whole after every engine."""
    deadline = time.monotonic() + args.seconds
    platform, install = load_platform(args.on), find_vllm(args.vllm)
    output, gpus, points = make_directory(args.output), cards(args.gpus), points_of(args)
    base = None if is_random(args.model) else resolve_model(args.model)
    place, config = place_of(output, args.model, base), shape_config(args.model, base)
    configs = chosen(configs_of(platform, install.version), args.configs)
    engines = [
        engine_of(name, *choice, kv, place, config, points) for kv in args.kv for name, choice in configs.items()
    ]
    lock = Lock()

    def write() -> None:
        with lock:
            result = gathered(args, engines, platform, install, config)
            write_json(result_file(args), result)
            if result["evidence"]:
                write_json(result_file(args).with_name("evidence.json"), result["evidence"])

    work = Work(points, args.repeats, min(config["vocab_size"], 100_000))
    run_engines(
        engines,
        work,
        install,
        place / "runs",
        gpus,
        gib=card_gib(),
        abreast=args.abreast,
        prepare=lambda engine: prepare(engine, args.model, base, place),
        deadline=deadline,
        least=args.least,
        after=write,
    )
    write()
    return gathered(args, engines, platform, install, config)


def result_file(args: argparse.Namespace) -> Path:
    """Where the results go; evidence.json lies beside it."""
    return args.json or args.output / "serving.json"


def points_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The loads: every concurrency, and the long prompts."""
    points = loads_of(args.levels, args.tokens)
    if args.prefill:
        points.append({"name": PREFILL, "prompts": PREFILL_PROMPTS, "input": args.prefill, "output": 1})
    return points


def configs_of(platform: Platform, version: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """What can be timed there: CONFIGS first, then every other kernel that the platform's data names (`tune`)."""
    found = dict(CONFIGS)
    for model, packing in PACKINGS.items():
        for knob in platform.tune:
            if knob.flag == "--linear-backend" and knob.matters(packing.format, version):
                found |= {f"{model}-{value}": (model, (knob.flag, value)) for value in knob.values}
    return {name: choice for name, choice in found.items() if loads(choice[0], platform)}


def loads(model: str, platform: Platform) -> bool:
    """Whether the platform loads a model's format."""
    packing = PACKINGS.get(model)
    return packing is None or platform.support(packing.format, default_variant(packing)).loads


def default_variant(packing: Packing) -> str | None:
    """What a packed model declares within its format."""
    return "NVFP4" if packing.format == "modelopt" else None


def chosen(known: dict[str, Any], asked: Sequence[str] | None) -> dict[str, Any]:
    """Those that were asked for, in that order. Raises UsageError for one that is not known."""
    for name in asked or ():
        if name not in known:
            raise UsageError(f"no configuration {name}: use {', '.join(known)}")
    return {name: known[name] for name in asked or known}


def engine_of(
    name: str,
    model: str,
    words: tuple[str, ...],
    kv: str,
    place: Path,
    config: Mapping[str, Any],
    points: Sequence[Mapping[str, Any]],
) -> Engine:
    """A configuration with one KV cache: what vLLM is told, and what it takes of a card."""
    told, space = engine_words(config, kv, points)
    weights = parameters(config) * (2 if model == "bf16" else 0.72) / GIB
    facts = {"config": name, "model": model, "kv": kv, "backend": dict(zip(words[::2], words[1::2]))}
    title = name if kv == "auto" else f"{name}-{kv}"
    size, named = weights + space + BESIDE / GIB, f"{place.name} {PACKINGS.get(model)}"
    return Engine(title, place / "models" / model, (*told, *words), size, facts, weights=named)


def parameters(config: Mapping[str, Any]) -> int:
    """How many weights a dense model of that shape has, embeddings and a head apart from them among them."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kv = (config.get("num_key_value_heads") or heads) / heads
    block = hidden * hidden * (2 + 2 * kv) + 3 * hidden * inner + 2 * hidden
    return int(config["num_hidden_layers"] * block + 2 * config["vocab_size"] * hidden + hidden)


def shape_config(name: str, base: Path | None) -> dict[str, Any]:
    return dict(Checkpoint(base).config) if base else config_of(name).to_dict()


def prepare(engine: Engine, name: str, base: Path | None, place: Path) -> None:
    """Make the model that an engine serves, where it is not there yet."""
    engine.model = made(engine.facts["model"], name, base, place)


def made(model: str, name: str, base: Path | None, place: Path) -> Path:
    """BF16, or one of PACKINGS, of a shape or of the model in `base`: made in `place` where it is not there yet."""
    directory, began = place / "models" / model, time.monotonic()
    if base is None:
        random_model(directory, name) if model == "bf16" else packed_model(directory, name, PACKINGS[model])
    elif model == "bf16":
        return base
    elif not (directory / "halfbyte.json").is_file():
        quantize(str(base), nearest(PACKINGS[model]), directory, random_set(base, *TOKENS))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    took = time.monotonic() - began
    if took > 1:
        say(f"{model}: made in {took:.0f} s")
    return directory


def nearest(packing: Packing) -> Any:
    """The recipe of round-to-nearest in a packing's format."""
    words: dict[str, Any] = {"method": "nvfp4" if packing.grid == "nvfp4" else "rtn", "rounding": "rtn"}
    words |= {"grid": packing.grid, "format": packing.format, "group_size": packing.group_size}
    return recipe_from_mapping({**words, "activations": packing.activations, "indivisible": "smaller"}, "serving.py")


def gathered(
    args: argparse.Namespace,
    engines: Sequence[Engine],
    platform: Platform,
    install: VllmInstall,
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """serving.json: a row for each engine, and the evidence where BF16 and something else were timed."""
    prompt, answer = args.tokens
    result: dict[str, Any] = {
        "schema": 1,
        "kind": "gpu-serving",
        "platform": platform.name,
        "hardware": card_name(),
        "vllm": install.version,
        "date": oldest(engines).isoformat(),
        "model": args.model,
        "levels": args.levels,
        "prompt_tokens": prompt,
        "output_tokens": answer,
        "prefill": {"prompts": PREFILL_PROMPTS, "tokens": args.prefill} if args.prefill else None,
        "repeats": args.repeats,
        "holds": holds(platform, install.version),
        "rows": [engine.result() for engine in engines],
    }
    for row, engine in zip(result["rows"], engines):
        row["kernel"] = kernel_of(engine, platform)
        if row["weights_gib"] is None and engine.model.is_dir():
            row["weights_gib"] = sum(file.stat().st_size for file in engine.model.glob("*.safetensors")) / GIB
    return {**result, "evidence": evidence(result, config)}


def oldest(engines: Sequence[Engine]) -> datetime.date:
    """The day of the oldest of their timings; today where there are none."""
    times = [engine.log.stat().st_mtime for engine in engines if engine.seconds and engine.log]
    return datetime.date.fromtimestamp(min(times, default=time.time()))


def holds(platform: Platform, version: str) -> dict[str, str]:
    """The vLLM versions that choose kernels as this one does, where the platform's data says so."""
    pins = platform.pins
    if pins is None or not within(pins.since, version, pins.before):
        return {}
    return {"since": pins.since, "before": pins.before}


def kernel_of(engine: Engine, platform: Platform) -> str:
    """The kernel that the log names, in the platform's word for it."""
    packing = PACKINGS.get(engine.facts["model"])
    if packing is None:
        return "BF16"
    declared = declared_variant(engine.model) or platform.default_variant(packing.format)
    return kernel_name(platform, packing.format, declared, list(engine.logged().kernels))


def evidence(result: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """A table as plan and serve read it (halfbyte.platforms.SpeedTable), of the rows and levels that are whole."""
    rows = [row for row in result["rows"] if any(name.startswith("c") for name in row["seconds"])]
    base = next((row for row in rows if row["model"] == "bf16" and row["kv"] == "auto"), None)
    if base is None or len(rows) < 2:
        return None
    levels = [n for n in result["levels"] if f"c{n}" in base["seconds"]]
    rows = [row for row in rows if all(f"c{n}" in row["seconds"] for n in levels)]
    shape = NAMES.get(result["model"])
    named = f"{shape} shape, random packed weights, bf16" if shape else result["model"]
    return {
        "schema": 1,
        "kind": "speed",
        "measured": True,
        "device": result["platform"],
        "hardware": result["hardware"],
        "vllm": result["vllm"],
        **result["holds"],
        "date": result["date"],
        "model": {
            "name": named,
            "parameters": parameters(config),
            "hidden_size": config["hidden_size"],
            "intermediate_size": config["intermediate_size"],
            "blocks": config["num_hidden_layers"],
            "vocab_size": config["vocab_size"],
        },
        "prompt_tokens": result["prompt_tokens"],
        "output_tokens": result["output_tokens"],
        **({"prefill": result["prefill"]} if result["prefill"] else {}),
        "note": f"offline generation, all sequences started at once, median of {result['repeats']}",
        "apart": {str(n): max(apart(row["seconds"][f"c{n}"]) for row in rows) for n in levels},
        "rows": [evidence_row(row, levels) for row in rows],
    }


def evidence_row(row: Mapping[str, Any], levels: Sequence[int]) -> dict[str, Any]:
    packing = PACKINGS.get(row["model"])
    seconds = row["seconds"]
    return {
        "kernel": row["kernel"] + ("" if row["kv"] == "auto" else f", {row['kv'].upper()} KV cache"),
        "method": METHODS[row["model"]],
        "format": packing.format if packing else "bf16",
        "variants": variants_of(row, packing),
        "group_size": packing.group_size if packing else None,
        "flags": row["backend"],
        "kv_cache": row["kv"],
        "weights_gib": round(row["weights_gib"], 6),
        "seconds": {str(n): round(middle(seconds[f"c{n}"]), 4) for n in levels},
        **({"prefill": round(middle(seconds[PREFILL]), 4)} if PREFILL in seconds else {}),
    }


def variants_of(row: Mapping[str, Any], packing: Packing | None) -> list[str]:
    """What a row speaks for: NVFP4 that was given no kernel stands for weight-only NVFP4 too, which gets the same."""
    if packing is None or packing.format != "modelopt":
        return []
    return ["NVFP4"] if row["backend"] else ["W4A16_NVFP4", "NVFP4"]


def table(result: Mapping[str, Any]) -> list[str]:
    """Seconds of a batch and times BF16, by configuration and concurrency, as Markdown."""
    points = [f"c{n}" for n in result["levels"]] + ([PREFILL] if result["prefill"] else [])
    base = next((r["seconds"] for r in result["rows"] if r["config"] == "bf16" and r["kv"] == "auto"), {})
    head = ["", "kernel", "GiB", "load s", *(p.removeprefix("c") for p in points)]
    rows = []
    for row in result["rows"]:
        cells = [cell(row["seconds"].get(point), base.get(point)) for point in points]
        size = "–" if row["weights_gib"] is None else f"{row['weights_gib']:.2f}"
        rows.append([row["name"], row["kernel"], size, f"{row['load_seconds'] or 0:.0f}", *cells])
    title = f"{result['hardware']}, vLLM {result['vllm']}, {result['model']}: seconds of a batch (times BF16)"
    failed = [f"{row['name']}: {row['status']}: {row['reason']}" for row in result["rows"] if row["status"] != "ok"]
    return [title, *markdown(head, rows), *failed]


def cell(seconds: Sequence[float] | None, base: Sequence[float] | None) -> str:
    if not seconds:
        return "–"
    gain = f" ({middle(base) / middle(seconds):.2f}x)" if base else ""
    return f"{middle(seconds):.3f}{gain}"


if __name__ == "__main__":
    main()
