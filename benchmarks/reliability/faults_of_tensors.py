"""Faults in weight files: their bytes, their tensors, and what belongs to which."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from safetensors import safe_open

from benchmarks.reliability.scene import NotHere, Scene, Tensors
from halfbyte.artifact.fingerprint import tensor_digest
from halfbyte.models.checkpoint import read_header


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
