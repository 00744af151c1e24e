"""Faults in the files around the weights: configs, index, tokenizer, manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from benchmarks.reliability.scene import INDEX, MANIFEST, NotHere, Scene


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
