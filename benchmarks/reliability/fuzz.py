"""Random and mangled input for everything that a user writes: each case is read, or refused in one line.

    python benchmarks/reliability/fuzz.py [--cases 10000] [--seed 0]

Recipes, `--set` words, matrices, gates, calibration specs and files, platforms and evidence, configs of models and
artifacts, safetensors headers. Prints a table in Markdown; exits with 1 on the first error that is no HalfbyteError of
one line.
"""

from __future__ import annotations

import argparse
import functools
import json
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from halfbyte.calibration.spec import spec_from_words
from halfbyte.errors import HalfbyteError
from halfbyte.experiments.gates import resolve_gates
from halfbyte.experiments.matrix import load_matrix
from halfbyte.formats import read_config
from halfbyte.models import Checkpoint, family_of
from halfbyte.models.checkpoint import read_header
from halfbyte.platforms import facts_for, load_platform
from halfbyte.platforms.evidence import load_evidence, read_table
from halfbyte.recipe import list_presets, load_recipe
from halfbyte.recipe.schema import Recipe
from tests.tiny import tiny_tokenizer

LIMIT = 2000
"""Characters of the longest error that is still a line for a reader."""
SECONDS = 5.0
"""The longest a case may take."""
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=30), st.sampled_from([-1, 0, 16, 32, 128]),
    st.sampled_from(["gptq", "awq", "nvfp4", "rtn", "modelopt", "int4_sym", "re:(", "re:.*", "B3", "blocks"]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
mangled = st.text(alphabet=st.characters(codec="utf-8"), max_size=200)


def mapping(keys: list[str]) -> st.SearchStrategy[dict]:
    """Known keys, mostly, with whatever values."""
    names = st.sampled_from(keys) | st.sampled_from(keys) | st.text(max_size=12)
    return st.dictionaries(names, values, max_size=8)


def _replaced(tree: Any, path: list[int], value: Any, gone: bool) -> Any:
    """The tree with what lies at the end of `path` (positions, taken modulo) replaced, or gone."""
    if not path or not isinstance(tree, (dict, list)) or not tree:
        return value
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = keys[path[0] % len(keys)]
    changed = dict(tree) if isinstance(tree, dict) else list(tree)
    if gone and len(path) == 1:
        del changed[key]
    else:
        changed[key] = _replaced(tree[key], path[1:], value, gone)
    return changed


def near(valid: list[Any]) -> st.SearchStrategy[Any]:
    """A valid tree in which one thing, at any depth, is something else or gone."""
    paths = st.lists(st.integers(0, 50), min_size=1, max_size=5)
    return st.builds(_replaced, st.sampled_from(valid), paths, values, st.booleans())


def spelled(trees: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    """YAML or JSON of such trees, whole, or with some bytes changed or cut off; or any bytes at all."""

    def damage(raw: bytes, where: int, what: bytes, cut: bool) -> bytes:
        at = where % (len(raw) + 1)
        return raw[:at] + what + (b"" if cut else raw[at + len(what) :])

    texts = trees.map(lambda tree: yaml.safe_dump(tree).encode(errors="replace")) | trees.map(
        lambda t: json.dumps(t).encode()
    )
    torn = st.builds(damage, texts, st.integers(0, 4000), st.binary(max_size=3), st.booleans())
    return texts | torn | st.binary(max_size=200) | mangled.map(lambda t: t.encode(errors="replace"))


def in_file(name: str, read: Callable[[Path], Any]) -> Callable[[Path, bytes], Any]:
    def act(place: Path, raw: bytes) -> Any:
        (place / name).write_bytes(raw)
        return read(place / name)

    return act


RECIPE = [*Recipe.model_fields]
MATRIX = ["cells", "axes", "extends", "defaults", "exclude", "description", *RECIPE]
SPEC = ["sources", "sequences", "max_tokens", "seed", "languages", "held_out", "near_duplicates", "min_chars"]
CONFIG = [
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "quantization_config", "tie_word_embeddings",
]  # fmt: skip
STATED = [
    "quant_method", "bits", "group_size", "sym", "desc_act", "dynamic", "lm_head", "zero_point", "version", "ignore",
    "modules_to_not_convert", "config_groups", "quant_algo", "format", "quantization", "modules_in_block_to_quantize",
]  # fmt: skip
RECIPES = [{**tree.identity(), "description": name} for name, _, tree in list_presets()]
MATRICES = [
    {"cells": ["A1", "B1"], "defaults": {"group_size": 64}, "exclude": ["B1"]},
    {"cells": {"a": {"extends": "B1", "axes": {"group_size": [32, 64]}}, "b": "a"}, "description": "two"},
    {"extends": "strategy", "axes": {"method": {"one": "gptq", "two": "awq"}}, "exclude": [{"method": "awq"}]},
]
SPECS = [
    {
        "sources": [{"path": "a.txt", "weight": 0.5, "in_domain": True}, {"dataset": "o/n", "weight": 1, "limit": 5}],
        "sequences": 8, "max_tokens": 64, "languages": ["en"], "near_duplicates": 0.8, "held_out": ["b.txt"],
    }
]  # fmt: skip
PLATFORMS = [
    load_platform(name).model_dump(mode="json", exclude={"speed"}) for name in ("h100", "cpu")
] + [{"like": "h100", "name": "mine", "memory_gib": 40}]  # fmt: skip
EVIDENCE = [table.model_dump(mode="json", by_alias=True) for table in load_evidence()]
CONFIGS = [{
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "tie_word_embeddings": True, "vocab_size": 320,
}]  # fmt: skip
STATEDS = [
    {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False, "lm_head": False,
     "dynamic": {"-:model.layers.0.*": {}, "+:x": {"bits": 4, "group_size": 32}}, "checkpoint_format": "gptq"},
    {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm",
     "modules_to_not_convert": ["lm_head"]},
    {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head"],
     "config_groups": {"group_0": {"weights": {"num_bits": 4}, "input_activations": None, "targets": ["Linear"]}}},
    {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
     "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int",
      "symmetric": True, "strategy": "group", "group_size": 64}}}},
]  # fmt: skip
RECORDS = [
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}], "id": 3},
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]},
    {"text": "A text."},
]
HEADERS = [
    {"__metadata__": {"format": "pt"}, "a": {"dtype": "U8", "shape": [2, 1], "data_offsets": [0, 2]},
     "b": {"dtype": "F16", "shape": [1], "data_offsets": [2, 4]}},
]  # fmt: skip
NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "lm_head"]


def read_header_of(place: Path, raw: bytes) -> Any:
    (place / "x.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + b"1234")
    return read_header(place / "x.safetensors")


def read_model(path: Path) -> Any:
    return family_of(Checkpoint(path.parent).config)


def parse_stated(_: Path, tree: object) -> Any:
    return read_config(tree, NAMES)


@functools.cache
def tokenizer() -> Any:
    return tiny_tokenizer()


def read_calibration(path: Path) -> Any:
    from halfbyte.calibration.readers import read_file

    return [document.text for document in read_file(path, tokenizer())]


conversations = st.lists(
    st.fixed_dictionaries(
        {"messages": values | st.lists(st.dictionaries(st.sampled_from(["role", "content"]), scalars))}
    )
    | st.fixed_dictionaries({"text": values})
    | near(RECORDS)
    | values,
    max_size=4,
).map(lambda rows: "\n".join(json.dumps(row) for row in rows).encode())
entries = st.dictionaries(
    st.text(max_size=8),
    values | st.fixed_dictionaries({"dtype": scalars, "shape": values, "data_offsets": values}),
    max_size=4,
)
TARGETS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Path, Any], Any]]] = {
    "recipes": (spelled(mapping(RECIPE) | near(RECIPES)), in_file("r.yaml", lambda p: load_recipe(str(p)))),
    "--set": (
        st.lists(st.builds("{}={}".format, st.sampled_from(RECIPE) | mangled, mangled | scalars) | mangled, max_size=3),
        lambda _, words: load_recipe("B1", words),
    ),
    "matrices": (spelled(mapping(MATRIX) | near(MATRICES)), in_file("m.yaml", lambda p: load_matrix(str(p)))),
    "gates": (
        st.lists(st.builds("{}={}".format, st.sampled_from(["ppl", "top1", "kl"]), scalars | mangled) | mangled),
        lambda _, words: resolve_gates(words),
    ),
    "calibration specs": (spelled(mapping(SPEC) | near(SPECS)), in_file("c.yaml", lambda p: spec_from_words([str(p)]))),
    "calibration sources": (st.lists(mangled, max_size=3), lambda _, words: spec_from_words(words)),
    "calibration files": (conversations | spelled(values), in_file("c.jsonl", read_calibration)),
    "calibration text": (st.binary(max_size=400) | mangled.map(str.encode), in_file("c.txt", read_calibration)),
    "platforms": (
        spelled(mapping(["like", "name", "flags", "formats", "env"]) | near(PLATFORMS)),
        in_file("p.yaml", lambda p: load_platform(str(p))),
    ),
    "evidence": (spelled(near(EVIDENCE)), in_file("e.yaml", read_table)),
    "vLLM versions": (mangled, lambda _, text: facts_for(text)),
    "config.json": (spelled(mapping(CONFIG) | near(CONFIGS)), in_file("config.json", read_model)),
    "quantization_config": (mapping(STATED) | near(STATEDS), parse_stated),
    "safetensors headers": (spelled(entries | near(HEADERS)), read_header_of),
}  # fmt: skip


def try_one(act: Callable[[Path, Any], Any], place: Path, value: Any) -> str:
    """ "read" or "refused"; raises AssertionError for anything else."""
    began = time.monotonic()
    try:
        act(place, value)
    except HalfbyteError as error:
        said = str(error)
        assert said.strip() and len(said) < LIMIT, f"no line for a reader: {said[:300]!r}"
        return "refused"
    finally:
        took = time.monotonic() - began
        assert took < SECONDS, f"{took:.1f} s"
    return "read"


def fuzz(name: str, cases: int, place: Path, start: int = 0) -> Counter[str]:
    """So many cases of one target. Raises what a case raised, with hypothesis's smallest example of it."""
    strategy, act = TARGETS[name]
    counts: Counter[str] = Counter()

    @seed(start)
    @settings(
        max_examples=cases, database=None, deadline=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip
    @given(strategy)
    def each(value: Any) -> None:
        counts[try_one(act, place, value)] += 1

    each()
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000, help="in all, over all kinds of input")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    each = -(-asked.cases // len(TARGETS))
    print("| input | cases | read | refused in one line | other | seconds |\n|---|---|---|---|---|---|")
    bad, total = 0, Counter[str]()
    with tempfile.TemporaryDirectory() as place:
        for name in TARGETS:
            began, wrong = time.monotonic(), 0
            try:
                counts = fuzz(name, each, Path(place), asked.seed)
            except BaseException as error:
                counts, wrong = Counter(), 1
                notes = " ".join(getattr(error, "__notes__", []))
                print(f"{name}: {type(error).__name__}: {str(error)[:300]} {notes[:600]}", file=sys.stderr)
            total += counts
            bad += wrong
            took = time.monotonic() - began
            done = counts["read"] + counts["refused"]
            print(f"| {name} | {done} | {counts['read']} | {counts['refused']} | {wrong} | {took:.0f} |", flush=True)
    print(f"| all | {total['read'] + total['refused']} | {total['read']} | {total['refused']} | {bad} | |")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
