"""Models of a well-known shape with random weights, in BF16 and packed in 4 bits, for machines without network.

Speed does not depend on what weights say, but on their being there: codes are uniform, scales are of the size that
makes a weight as large as training leaves it, nothing is zero. The 4-bit ones are packed by halfbyte's own formats, a
linear at a time, without a BF16 model or a calibration: an 8B one takes seconds on a GPU.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from halfbyte.files import make_directory, write_json
from halfbyte.formats import get_format
from halfbyte.models import Checkpoint, family_of
from halfbyte.models.checkpoint import read_json
from halfbyte.types import NVFP4_BLOCK, QuantizedLinear, Scheme

SHAPES = {
    "random:tiny": (128, 256, 2, 4, 2, 512),
    "random:8b": (4096, 14336, 32, 32, 8, 128256),
    "random:32b": (5120, 27648, 64, 40, 8, 152064),
}
"""hidden, intermediate, blocks, heads, key/value heads, vocabulary."""
NAMES = {"random:tiny": "tiny Llama", "random:8b": "Llama-3.1-8B", "random:32b": "Qwen2.5-32B"}
"""Whose shape it is."""
SEED = 1000
INDEX = "model.safetensors.index.json"
CODES_RMS = {"int4_sym": 4.6, "int4_asym": 4.6, "nvfp4": 2.9}
"""Root mean square of uniform codes' values."""
SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class Packing:
    """A format to pack random weights in."""

    format: str
    grid: str
    group_size: int
    activations: str = "bf16"


def is_random(name: str) -> bool:
    """Whether a model's name is that of a shape."""
    return name in SHAPES


def place_of(output: Path, name: str, base: Path | None = None) -> Path:
    """Where models of that shape, or of that model's weights (`base`), and what was measured of them lie."""
    return output / (name.replace(":", "-") if base is None else f"{base.name}-{Checkpoint(base).fingerprint()[:12]}")


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def random_model(directory: Path, name: str, blocks: int | None = None) -> Path:
    """A Llama of that shape in BF16 (of its first `blocks` blocks), and a tokenizer in which every id is a word. What
    is there is kept where it is just that."""
    config = config_of(name, blocks)
    made = made_of(name, config)
    if not is_made(directory, made):
        shutil.rmtree(directory, ignore_errors=True)
        write_model(directory, config, ((t, random_tensor(t, shape)) for t, shape in shapes_of(config).items()), made)
    return directory


def packed_model(directory: Path, name: str, packing: Packing) -> Path:
    """The same shape with the blocks' linears packed in 4 bits; lm_head and embeddings in BF16. Kept as `random_model`
    keeps what is there."""
    config = config_of(name)
    made = made_of(name, config, packing)
    if is_made(directory, made):
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    family, shapes = family_of(config.to_dict()), shapes_of(config)
    form = get_format(packing.format, packing.activations)
    groups = [(index, group) for index in range(family.num_blocks) for group in family.groups_of(index)]
    fused = {f"{family.block(i)}.{n}": f"{family.block(i)}.{g.fused}" for i, g in groups for n in g.names}
    scheme = Scheme(packing.grid, packing.group_size)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for tensor, shape in shapes.items():
            linear = tensor.removesuffix(".weight")
            if linear in fused:
                yield from form.pack(linear, random_linear(linear, shape, packing)).items()
            else:
                yield tensor, random_tensor(tensor, shape)

    schemes = {**dict.fromkeys(fused, scheme), family.lm_head: None}
    declared = form.config(schemes, {**fused, family.lm_head: family.lm_head}, producer={"name": "halfbyte"})
    for file, value in form.extra_files(declared).items():
        write_json(make_directory(directory) / file, value)
    write_model(directory, config, tensors(), made, quantization_config=declared)
    return directory


def made_of(name: str, config: LlamaConfig, packing: Packing | None = None) -> dict[str, Any]:
    """What a model is made of: stands in its index, which is written last."""
    packed = asdict(packing) if packing else None
    return {"shape": name, "sizes": SHAPES[name], "blocks": config.num_hidden_layers, "seed": SEED, "packing": packed}


def is_made(directory: Path, made: Mapping[str, Any]) -> bool:
    """Whether the model in that directory is whole and made of that."""
    index = directory / INDEX
    return index.is_file() and read_json(index).get("metadata") == json.loads(json.dumps(made))


def config_of(name: str, blocks: int | None = None) -> LlamaConfig:
    hidden, inner, whole, heads, kv_heads, vocab = SHAPES[name]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks or whole,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def shapes_of(config: LlamaConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {k: v.shape for k, v in AutoModelForCausalLM.from_config(config).state_dict().items()}


def write_model(
    directory: Path,
    config: LlamaConfig,
    tensors: Iterator[tuple[str, torch.Tensor]],
    made: Mapping[str, Any],
    **more: Any,
) -> None:
    """A model directory; the index, with what it is made of, is written last."""
    make_directory(directory)
    places: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}

    def flush() -> None:
        file = f"model-{len(set(places.values())):05}.safetensors"
        save_file(held, directory / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(held, file))
        held.clear()

    for tensor, value in tensors:
        held[tensor] = value.contiguous().cpu()
        if sum(t.nbytes for t in held.values()) > SHARD_BYTES:
            flush()
    flush()
    config.save_pretrained(directory)
    if more:
        stated = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        write_json(directory / "config.json", {**stated, **more})
    write_tokenizer(directory, config.vocab_size)
    write_json(directory / INDEX, {"metadata": made, "weight_map": places})


def write_tokenizer(directory: Path, vocab: int) -> None:
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    whole = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0", bos_token="w1", eos_token="w2")
    whole.save_pretrained(directory)


def seeded(name: str) -> torch.Generator:
    return torch.Generator(device()).manual_seed(len(name) * SEED + sum(map(ord, name)))


def random_tensor(name: str, shape: torch.Size) -> torch.Tensor:
    """Norms near one, weights of the size that training leaves; BF16."""
    noise = torch.randn(shape, generator=seeded(name), device=device())
    values = 1 + 0.1 * noise if "norm" in name else noise * shape[-1] ** -0.5
    return values.to(torch.bfloat16)


def random_linear(name: str, shape: torch.Size, packing: Packing) -> QuantizedLinear:
    """Uniform codes [O, I] with scales that vary by half around what makes the weights as large as random_tensor's."""
    draw = {"generator": seeded(name), "device": device()}
    out, width = shape
    group = packing.group_size if packing.grid != "nvfp4" else NVFP4_BLOCK
    codes = torch.randint(0, 16, (out, width), dtype=torch.uint8, **draw)
    spread = 0.5 + torch.rand((out, width // group), **draw)
    size = width**-0.5 / CODES_RMS[packing.grid]
    if packing.grid == "nvfp4":
        scales = (256 * spread).to(torch.float8_e4m3fn).float()
        return QuantizedLinear(codes, scales, group, "nvfp4", None, size / 256, 6.0 / (6 * 448))
    scales = (size * spread).bfloat16().float()
    zeros = torch.randint(6, 10, scales.shape, dtype=torch.uint8, **draw) if packing.grid == "int4_asym" else None
    return QuantizedLinear(codes, scales, group, packing.grid, zeros)
