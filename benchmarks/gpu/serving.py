"""Serving speed of BF16, GPTQ, AWQ and NVFP4 by kernel on this machine, as a table and as evidence for plan and serve.

    python benchmarks/gpu/serving.py [MODEL] -o DIR [--on h100] [--levels 1,4,16,64,128,256] [--vllm PATH] [--json FILE]
    python benchmarks/gpu/serving.py --dry -o DIR        the same on this CPU with a tiny model: does it work?

MODEL is a directory or a hub id, or random:8b or random:32b: a model of that shape with random weights, for machines
without network (speed does not depend on what weights say). Each format is quantized once (nearest rounding: speed does
not depend on the method either), then `halfbyte bench` measures it with every kernel and KV cache that the platform's
data names (`tune`), beside BF16, at each concurrency, and long prompts. BF16 is measured once. It goes on where it was
when it is interrupted. In DIR: the models, a bench.json for each format, serving.json with all of it, and evidence.json
(halfbyte plan, serve: --evidence). Needs vLLM (in an environment of its own), a GPU and, for 8B, 40 GiB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from halfbyte.calibration import CalibrationSet
from halfbyte.errors import HalfbyteError
from halfbyte.files import make_directory, write_json
from halfbyte.models import resolve_model
from halfbyte.platforms import Platform, load_platform
from halfbyte.platforms.evidence import read_table
from halfbyte.serving import find_vllm

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {
    "random:tiny": (128, 256, 2, 4, 2, 512),
    "random:8b": (4096, 14336, 32, 32, 8, 128256),
    "random:32b": (5120, 27648, 64, 40, 8, 152064),
}
"""hidden, intermediate, blocks, heads, key/value heads, vocabulary; 8b is Llama-3.1-8B's, 32b Qwen2.5-32B's."""
FORMATS = {
    "gptq": {"method": "rtn", "group_size": 128},
    "awq": {"method": "rtn", "grid": "int4_asym", "format": "awq", "group_size": 128},
    "modelopt": {"method": "nvfp4", "rounding": "rtn", "group_size": 16, "activations": "fp4"},
}
COMPARED = ("--linear-backend", "--kv-cache-dtype")
SEQUENCES, LENGTH = 64, 64
"""Random token ids that NVFP4's input scales are taken from."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="random:8b")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--on", default="h100")
    parser.add_argument("--levels", default="1,4,16,64,128,256")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=None)
    parser.add_argument("--prefill", type=int, default=2048)
    parser.add_argument("--vllm", default=None)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    if args.dry:
        args.model, args.on, args.levels, args.repeats, args.requests, args.prefill = (
            "random:tiny",
            "cpu",
            "1,2",
            2,
            2,
            0,
        )
    try:
        result = run(args)
    except HalfbyteError as error:
        sys.exit(f"serving.py: {error}")
    write_json(args.json or args.output / "serving.json", result)
    print("\n".join(table(result)))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Make what is missing, bench it, gather the results."""
    platform, install = load_platform(args.on), find_vllm(args.vllm)
    place = make_directory(args.output)
    base = random_model(place / "bf16", args.model) if args.model in SHAPES else resolve_model(args.model)
    calibration = random_tokens(place / "calibration", base)
    benches: dict[str, Any] = {}
    for name, recipe in FORMATS.items():
        if not platform.support(name, "NVFP4" if name == "modelopt" else None).loads:
            continue
        artifact, out = place / name, place / f"{name}-bench"
        write_json(place / f"{name}.recipe.yaml", recipe)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        words = ["-r", place / f"{name}.recipe.yaml", "--calibration", calibration, "--device", device, "-o", artifact]
        halfbyte("quantize", base, *words)
        share_baseline(place, out)
        halfbyte("bench", artifact, *bench_words(args, base, out, place, platform, name, install.version))
        benches[name] = json.loads((out / "bench.json").read_text(encoding="utf-8"))
    evidence = merged([place / f"{name}.evidence.json" for name in benches])
    write_json(place / "evidence.json", evidence)
    read_table(place / "evidence.json")
    return {"schema": 1, "kind": "gpu-serving", "model": args.model, "benches": benches}


def bench_words(
    args: argparse.Namespace, base: Path, out: Path, place: Path, platform: Platform, name: str, version: str
) -> Iterator[object]:
    """The words of `halfbyte bench` for a format: every kernel and KV cache that the platform's data names."""
    yield from ("--baseline", base, "--on", platform.name, "--concurrency", args.levels, "--repeats", args.repeats)
    yield from ("--prefill", args.prefill, "-o", out, "--evidence", place / f"{name}.evidence.json")
    yield from ("--requests", args.requests) if args.requests else ()
    yield from ("--vllm", args.vllm) if args.vllm else ()
    for knob in platform.tune:
        if knob.flag in COMPARED and knob.matters(name, version):
            for value in knob.values:
                yield from ("--config", f"{knob.flag.strip('-')}-{value}: {knob.flag} {value}")


def halfbyte(*words: object) -> None:
    """One command of halfbyte, shown as it runs. Raises HalfbyteError where it fails."""
    line = [str(word) for word in words]
    print("halfbyte " + " ".join(line), file=sys.stderr, flush=True)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = subprocess.run([sys.executable, "-m", "halfbyte.cli.app", *line], env=env, stdout=sys.stderr).returncode
    if code:
        raise HalfbyteError(f"halfbyte {line[0]} failed with exit code {code}")


def share_baseline(place: Path, out: Path) -> None:
    """The runs of BF16 that another format's bench has made; where they do not hold there, they are made again."""
    there = next(iter(sorted(place.glob("*-bench/bench/baseline"))), None)
    if there and not (out / "bench" / "baseline").exists():
        shutil.copytree(there, make_directory(out / "bench") / "baseline")


def merged(files: list[Path]) -> dict[str, Any]:
    """One table of all formats' rows, at the concurrencies that all have."""
    tables = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    rows = tables[0]["rows"] + [row for table in tables[1:] for row in table["rows"] if row["format"] != "bf16"]
    levels = set.intersection(*(set(row["seconds"]) for row in rows))
    if not levels:
        raise HalfbyteError("no concurrency was measured for all formats")
    for row in rows:
        row["seconds"] = {level: row["seconds"][level] for level in row["seconds"] if level in levels}
    return {**tables[0], "rows": rows}


def random_model(directory: Path, name: str) -> Path:
    """A Llama of that shape with random weights, a shard a block, and a tokenizer in which every id is a word."""
    if (directory / "model.safetensors.index.json").is_file():
        return directory
    hidden, inner, blocks, heads, kv_heads, vocab = SHAPES[name]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in AutoModelForCausalLM.from_config(config).state_dict().items()}
    make_directory(directory)
    shards: dict[str, list[str]] = {}
    for tensor in shapes:
        part = tensor.split(".")[2] if ".layers." in tensor else "rest"
        shards.setdefault(f"model-{part}.safetensors", []).append(tensor)
    for file, tensors in shards.items():
        save_file({t: random_tensor(t, shapes[t]) for t in tensors}, directory / file, metadata={"format": "pt"})
    config.save_pretrained(directory)
    words = {f"w{i}": i for i in range(vocab)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0", bos_token="w1", eos_token="w2").save_pretrained(
        directory
    )
    places = {tensor: file for file, tensors in shards.items() for tensor in tensors}
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    return directory


def random_tensor(name: str, shape: torch.Size) -> torch.Tensor:
    """Norms near one, weights of the size that training leaves."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(len(name) * 1000 + sum(map(ord, name)))
    noise = torch.randn(shape, generator=generator, device=device)
    values = 1 + 0.1 * noise if "norm" in name else noise * shape[-1] ** -0.5
    return values.to(torch.bfloat16).cpu()


def random_tokens(directory: Path, model: Path) -> Path:
    """A calibration set of random ids of the model's vocabulary."""
    vocab = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, min(vocab, 100_000), (SEQUENCES, LENGTH), generator=generator)
    return CalibrationSet.of(list(ids), {"source": {"kind": "random", "seed": 0}}).save(directory)


def table(result: dict[str, Any]) -> list[str]:
    """Speed-up over BF16 by format, configuration and concurrency, as Markdown."""
    first = next(iter(result["benches"].values()))
    levels = [point["concurrency"] for point in first["points"]]
    lines = [f"{first['hardware']}, vLLM {first['vllm']}, {result['model']}: tokens/s, times BF16"]
    lines += ["| | " + " | ".join(map(str, levels)) + " | prefill |", "|---" * (len(levels) + 2) + "|"]
    for name, bench in result["benches"].items():
        points = bench["points"] + ([bench["prefill"]] if bench["prefill"] else [])
        for config in ("model", *bench["configs"]):
            entries = [point["model"] if config == "model" else point["configs"][config] for point in points]
            gains = [point["speedup"] if config == "model" else e["speedup"] for point, e in zip(points, entries)]
            cells = [f"{g['value']:.2f}" if g else e["status"] for g, e in zip(gains, entries)]
            cells += ["–"] * (len(levels) + 1 - len(cells))
            title = name if config == "model" else f"{name}, {config}"
            lines.append(f"| {title} | {' | '.join(cells)} |")
    for name, bench in result["benches"].items():
        lines += [f"{name}: {text}" for text in bench["text"]]
    return lines


if __name__ == "__main__":
    main()
