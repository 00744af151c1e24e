"""Ways in which an artifact gets damaged. Each takes a copy and a chance, changes something, and says what.

A fault returns the words of which a finding must have one: the name of the tensor, module or file that it touched.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from halfbyte.artifact.fingerprint import sealed, tensor_digest
from halfbyte.models import TensorInfo, hash_file
from halfbyte.models.checkpoint import read_header

MANIFEST, INDEX = "halfbyte.json", "model.safetensors.index.json"
ROLES = {
    "codes": (".qweight", ".weight_packed"),
    "scales": (".scales", ".weight_scale", ".weight_scale_2", ".weight_global_scale", ".input_scale"),
    "zeros": (".qzeros", ".weight_zero_point"),
}
Tensors = dict[str, torch.Tensor]


class NotHere(Exception):
    """This artifact has nothing that the fault could damage."""


@dataclass(frozen=True)
class Scene:
    """A copy to damage, the artifact of another model of the same shapes, and a source of chance."""

    place: Path
    other: Path | None
    chance: random.Random

    def shards(self) -> list[Path]:
        return sorted(self.place.glob("*.safetensors"))

    def headers(self) -> dict[str, TensorInfo]:
        return {name: info for shard in self.shards() for name, info in read_header(shard).items()}

    def pick(self, role: str) -> TensorInfo:
        """A tensor of that role, large ones as likely as small ones."""
        found = [info for name, info in self.headers().items() if role_of(name, info) == role and info.nbytes]
        if not found:
            raise NotHere(role)
        return self.chance.choice(found)

    def rewrite(self, shard: Path, change: Callable[[Tensors], Any]) -> None:
        """The shard with its tensors changed, as a writer that went wrong would have written it."""
        with safe_open(shard, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        change(tensors)
        save_file({n: t.clone() for n, t in tensors.items()}, shard, metadata={"format": "pt"})

    def edit(self, file: str, change: Callable[[dict], Any]) -> None:
        tree = json.loads((self.place / file).read_text())
        change(tree)
        (self.place / file).write_text(json.dumps(tree, indent=2))


def role_of(name: str, info: TensorInfo) -> str:
    """codes, scales, zeros, indices, embeddings, or rest (norms, biases, linears left in BF16)."""
    for role, ends in ROLES.items():
        if name.endswith(ends):
            return role
    if info.dtype == "U8":
        return "codes"
    if info.dtype.startswith("I"):
        return "indices"
    return "embeddings" if "embed_tokens" in name or "lm_head" in name else "rest"


def reseal(place: Path) -> None:
    """Bring the manifest's file hashes and its seal up to date, as someone who edits a file on purpose would."""
    manifest = json.loads((place / MANIFEST).read_text())
    files = {n: p for n in manifest.get("files", {}) if (p := place / n).is_file()}
    files |= {p.name: p for p in place.iterdir() if p.name not in (MANIFEST, "README.md") and p.is_file()}
    manifest["files"] = {n: {"sha256": hash_file(p), "bytes": p.stat().st_size} for n, p in files.items()}
    (place / MANIFEST).write_text(json.dumps(sealed(manifest), indent=2))


def flip(role: str) -> Callable[[Scene], list[str]]:
    """A flipped bit in a tensor of that role."""

    def fault(scene: Scene) -> list[str]:
        info = scene.pick(role)
        raw = bytearray(info.file.read_bytes())
        length = int.from_bytes(raw[:8], "little")
        start = json.loads(raw[8 : 8 + length])[info.name]["data_offsets"][0]
        raw[8 + length + start + scene.chance.randrange(info.nbytes)] ^= 1 << scene.chance.randrange(8)
        info.file.write_bytes(raw)
        return [info.file.name, info.name]

    return fault


def flip_header(scene: Scene) -> list[str]:
    shard = scene.chance.choice(scene.shards())
    raw = bytearray(shard.read_bytes())
    raw[scene.chance.randrange(8 + int.from_bytes(raw[:8], "little"))] ^= 1 << scene.chance.randrange(8)
    shard.write_bytes(raw)
    return [shard.name]


def truncate(scene: Scene) -> list[str]:
    shard = scene.chance.choice(scene.shards())
    raw = shard.read_bytes()
    shard.write_bytes(raw[: scene.chance.choice((0, 7, len(raw) // 2, len(raw) - 1, scene.chance.randrange(len(raw))))])
    return [shard.name]


def lengthen(scene: Scene) -> list[str]:
    shard = scene.chance.choice(scene.shards())
    shard.write_bytes(shard.read_bytes() + bytes(scene.chance.randrange(1, 4096)))
    return [shard.name]


def swap_shards(scene: Scene) -> list[str]:
    if len(scene.shards()) < 2:
        raise NotHere("shards")
    first, second = scene.chance.sample(scene.shards(), 2)
    held = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(held)
    return [first.name, second.name]


def lose_shard(scene: Scene) -> list[str]:
    shard = scene.chance.choice(scene.shards())
    shard.unlink()
    return [shard.name]


def stray_shard(scene: Scene) -> list[str]:
    shard = scene.chance.choice(scene.shards())
    name = scene.chance.choice(("model-00099-of-00099.safetensors", "extra.safetensors", "pytorch_model.bin"))
    (scene.place / name).write_bytes(shard.read_bytes())
    return [name]


def others_shard(scene: Scene) -> list[str]:
    shard = scene.chance.choice(scene.shards())
    if scene.other is None or not (scene.other / shard.name).is_file():
        raise NotHere("the other's shard")
    shard.write_bytes((scene.other / shard.name).read_bytes())
    return [shard.name, *read_header(shard)]


def rename_tensor(scene: Scene) -> list[str]:
    name = scene.chance.choice(sorted(scene.headers()))
    new = scene.chance.choice((name + "_", name.replace("model.", "model.model.", 1), name.upper()))
    scene.rewrite(scene.headers()[name].file, lambda t: t.update({new: t.pop(name)}))
    return [name]


def swap_names(scene: Scene) -> list[str]:
    """Two tensors of one shape and dtype under each other's names."""
    found = scene.headers()
    pairs = [
        (a, b) for a in found for b in found
        if a < b and (found[a].shape, found[a].dtype, found[a].file) == (found[b].shape, found[b].dtype, found[b].file)
        and not a.endswith((".g_idx", ".qzeros", ".weight_shape"))
    ]  # fmt: skip
    scene.chance.shuffle(pairs)
    for a, b in pairs[:50]:
        with safe_open(found[a].file, framework="pt") as handle:
            if tensor_digest(handle.get_tensor(a)) == tensor_digest(handle.get_tensor(b)):
                continue
        scene.rewrite(found[a].file, lambda t, a=a, b=b: t.update({a: t[b], b: t[a]}))
        return [a, b, a.rpartition(".")[0], b.rpartition(".")[0]]
    raise NotHere("two tensors of one shape")


def lose_tensor(scene: Scene) -> list[str]:
    name = scene.chance.choice(sorted(scene.headers()))
    scene.rewrite(scene.headers()[name].file, lambda t: t.pop(name))
    return [name]


def duplicate_tensor(scene: Scene) -> list[str]:
    name = scene.chance.choice(sorted(scene.headers()))
    shards = [s for s in scene.shards() if s != scene.headers()[name].file]
    with safe_open(scene.headers()[name].file, framework="pt") as handle:
        tensor = handle.get_tensor(name)
    if shards:
        scene.rewrite(scene.chance.choice(shards), lambda t: t.update({name: tensor}))
    else:
        scene.rewrite(scene.headers()[name].file, lambda t: t.update({f"{name}.copy": tensor}))
    return [name]


def wrong_dtype(scene: Scene) -> list[str]:
    info = scene.headers()[scene.chance.choice(sorted(scene.headers()))]
    other = {
        "F16": torch.bfloat16, "BF16": torch.float32, "F32": torch.float16, "F8_E4M3": torch.float16,
        "I32": torch.int64, "I64": torch.int32, "U8": torch.int16,
    }[info.dtype]  # fmt: skip
    scene.rewrite(info.file, lambda t: t.update({info.name: t[info.name].to(other)}))
    return [info.name]


def wrong_shape(scene: Scene) -> list[str]:
    info = scene.headers()[scene.chance.choice(sorted(scene.headers()))]

    def change(tensors: Tensors) -> None:
        tensor = tensors[info.name]
        flat = scene.chance.random() < 0.5 or not tensor.dim()
        tensors[info.name] = tensor.reshape(1, *tensor.shape) if flat else tensor[: len(tensor) // 2].clone()

    scene.rewrite(info.file, change)
    return [info.name]


def bad_scale(value: float) -> Callable[[Scene], list[str]]:
    """One scale of a linear becomes that value (as far as its dtype holds it)."""

    def fault(scene: Scene) -> list[str]:
        info = scene.pick("scales")

        def change(tensors: Tensors) -> None:
            scales = tensors[info.name].reshape(-1)
            worst = min(value, torch.finfo(scales.dtype).max) if value == value else value
            at = scene.chance.randrange(scales.numel())
            scales[at] = -abs(scales[at].float()) - 1 if value < 0 else worst
            tensors[info.name] = scales.reshape(tensors[info.name].shape)

        scene.rewrite(info.file, change)
        return [info.file.name, info.name, info.name.rpartition(".")[0]]

    return fault


def not_finite(scene: Scene) -> list[str]:
    info = scene.pick(scene.chance.choice(("embeddings", "rest")))
    value = scene.chance.choice((float("nan"), float("inf"), -float("inf")))

    def change(tensors: Tensors) -> None:
        flat = tensors[info.name].reshape(-1)
        flat[scene.chance.randrange(flat.numel())] = value
        tensors[info.name] = flat.reshape(tensors[info.name].shape)

    scene.rewrite(info.file, change)
    return [info.name]


def config_of_shapes(scene: Scene) -> list[str]:
    """A number of config.json that decides shapes or counts."""
    key = scene.chance.choice(("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "model_type"))
    scene.edit("config.json", lambda c: c.update({key: "nonsense" if key == "model_type" else c[key] * 2}))
    return ["config.json", "model."]


def config_of_meaning(scene: Scene) -> list[str]:
    """A value of config.json that changes what is computed and no shape."""
    key = scene.chance.choice(("rms_norm_eps", "hidden_act", "bos_token_id", "dtype", "max_position_embeddings"))
    scene.edit("config.json", lambda c: c.update({key: "gelu" if key == "hidden_act" else 3}))
    return ["config.json"]


def config_of_quantization(scene: Scene) -> list[str]:
    def change(config: dict) -> None:
        stated = config["quantization_config"]
        method = stated["quant_method"]
        edits: list[Callable[[], Any]] = [
            lambda: config.pop("quantization_config"),
            lambda: stated.update(quant_method=scene.chance.choice(("bitsandbytes", "", "fp8", None))),
            lambda: stated.pop("quant_method"),
        ]
        if method == "compressed-tensors":
            weights = next(iter(stated["config_groups"].values()))["weights"]
            edits += [lambda: weights.update(num_bits=8), lambda: stated.update(config_groups={})]
        elif method == "modelopt":
            edits += [lambda: stated.update(quant_algo="FP8"), lambda: stated.update(ignore=[])]
        else:
            edits += [lambda: stated.update(bits=8), lambda: stated.update(group_size=128)]
        scene.chance.choice(edits)()

    scene.edit("config.json", change)
    return ["config.json", "model.", "lm_head"]


def second_config(scene: Scene) -> list[str]:
    """The file beside config.json that says the same for other loaders."""
    name = next((n for n in ("quantize_config.json", "hf_quant_config.json") if (scene.place / n).is_file()), None)
    if name is None:
        raise NotHere("a second config")
    if scene.chance.random() < 0.3:
        (scene.place / name).unlink()
    else:
        scene.edit(name, lambda c: c.update(scene.chance.choice(({"bits": 3}, {"quantization": {}}, {"x": 1}))))
    return [name]


def cut_json(scene: Scene) -> list[str]:
    file = scene.chance.choice([p for p in sorted(scene.place.glob("*.json")) if p.name != MANIFEST])
    raw = file.read_bytes()
    file.write_bytes(raw[: scene.chance.randrange(len(raw))])
    return [file.name]


def index_edited(scene: Scene) -> list[str]:
    if not (scene.place / INDEX).is_file():
        raise NotHere("an index")

    def change(index: dict) -> None:
        places = index["weight_map"]
        name = scene.chance.choice(sorted(places))
        edits: list[Callable[[], Any]] = [
            lambda: places.pop(name),
            lambda: places.update({name: "../elsewhere.safetensors"}),
            lambda: places.update({name: "model-00099-of-00099.safetensors"}),
            lambda: places.update({name: next(f for f in sorted(set(places.values())) if f != places[name])}),
            lambda: index["metadata"].update(total_size=1),
        ]
        scene.chance.choice(edits)()

    scene.edit(INDEX, change)
    return [INDEX, "model."]


def wide_tokenizer(scene: Scene) -> list[str]:
    """A tokenizer with tokens that the embeddings have no row for."""

    def change(tree: dict) -> None:
        tree["model"]["vocab"].update({f"far{i}": 320 + i for i in range(scene.chance.randrange(1, 500))})

    scene.edit("tokenizer.json", change)
    return ["tokenizer.json"]


def other_tokenizer(scene: Scene) -> list[str]:
    """A tokenizer of the same size that means other tokens."""

    def change(tree: dict) -> None:
        vocab = tree["model"]["vocab"]
        names = list(vocab)
        turn = scene.chance.randrange(1, len(names))
        tree["model"]["vocab"] = dict(zip(names, [vocab[n] for n in names[turn:] + names[:turn]]))

    scene.edit("tokenizer.json", change)
    return ["tokenizer.json"]


def lose_file(scene: Scene) -> list[str]:
    names = json.loads((scene.place / MANIFEST).read_text())["files"]
    name = scene.chance.choice([n for n in sorted(names) if not n.endswith(".safetensors")])
    (scene.place / name).unlink()
    return [name]


def manifest_edited(scene: Scene) -> list[str]:
    def change(manifest: dict) -> None:
        linears = manifest["linears"]
        name = scene.chance.choice([n for n, row in linears.items() if row["scheme"]])
        file, tensor = (scene.chance.choice(sorted(manifest[key])) for key in ("files", "tensors"))
        edits: list[Callable[[], Any]] = [
            lambda: linears.pop(name),
            lambda: linears[name].update(fingerprint="0" * 64),
            lambda: linears[name].update(scheme=None),
            lambda: linears[name]["scheme"].update(group_size=48, grid="int4"),
            lambda: manifest["files"].pop(file),
            lambda: manifest["files"][file].update(sha256="0" * 64),
            lambda: manifest["tensors"].update({tensor: "0" * 64}),
            lambda: manifest.pop(scene.chance.choice(("linears", "files", "tensors", "seal"))),
            lambda: manifest.update(seconds=0.0, bits_per_weight=2.0),
        ]
        scene.chance.choice(edits)()

    scene.edit(MANIFEST, change)
    return [MANIFEST, "model.", ""]


def flip_manifest(scene: Scene) -> list[str]:
    """A flipped bit anywhere in the manifest."""
    path = scene.place / MANIFEST
    raw = bytearray(path.read_bytes())
    raw[scene.chance.randrange(len(raw))] ^= 1 << scene.chance.randrange(8)
    path.write_bytes(raw)
    return [MANIFEST, ""]


@dataclass(frozen=True)
class Kind:
    """`structure`: also found where the manifest's hashes and seal were brought up to date after the fault."""

    make: Callable[[Scene], list[str]]
    structure: bool = True


KINDS: dict[str, Kind] = {
    "bit flipped in codes": Kind(flip("codes")),
    "bit flipped in scales": Kind(flip("scales")),
    "bit flipped in zeros": Kind(flip("zeros")),
    "bit flipped in embeddings": Kind(flip("embeddings")),
    "bit flipped in norms, biases, BF16 linears": Kind(flip("rest")),
    "bit flipped in g_idx or weight_shape": Kind(flip("indices")),
    "bit flipped in a shard's header": Kind(flip_header),
    "truncated shard": Kind(truncate),
    "shard with bytes too many": Kind(lengthen),
    "swapped shards": Kind(swap_shards),
    "lost shard": Kind(lose_shard),
    "stray weight file": Kind(stray_shard, structure=False),
    "another model's shard": Kind(others_shard),
    "renamed tensor": Kind(rename_tensor),
    "two tensors under each other's name": Kind(swap_names),
    "missing tensor": Kind(lose_tensor),
    "duplicated tensor": Kind(duplicate_tensor),
    "wrong dtype": Kind(wrong_dtype),
    "wrong shape": Kind(wrong_shape),
    "scale NaN": Kind(bad_scale(float("nan"))),
    "scale negative": Kind(bad_scale(-1.0)),
    "scale huge": Kind(bad_scale(1e30)),
    "NaN or infinity in a BF16 tensor": Kind(not_finite),
    "config.json: shapes": Kind(config_of_shapes),
    "config.json: meaning": Kind(config_of_meaning, structure=False),
    "config.json: quantization": Kind(config_of_quantization),
    "second config file": Kind(second_config),
    "JSON file cut off": Kind(cut_json, structure=False),
    "shard index edited": Kind(index_edited),
    "tokenizer too large": Kind(wide_tokenizer),
    "another tokenizer of the same size": Kind(other_tokenizer, structure=False),
    "lost file": Kind(lose_file, structure=False),
    "manifest edited": Kind(manifest_edited, structure=False),
    "bit flipped in the manifest": Kind(flip_manifest, structure=False),
}
