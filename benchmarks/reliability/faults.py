"""Ways in which an artifact gets damaged. Each takes a copy and a chance, changes something, and says what.

A fault returns the words of which a finding must have one: the name of the tensor, module or file that it touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.reliability.faults_of_files import (
    config_of_meaning,
    config_of_quantization,
    config_of_shapes,
    cut_json,
    flip_manifest,
    index_edited,
    lose_file,
    manifest_edited,
    other_tokenizer,
    second_config,
    wide_tokenizer,
)
from benchmarks.reliability.faults_of_tensors import (
    bad_scale,
    duplicate_tensor,
    flip,
    flip_header,
    lengthen,
    lose_shard,
    lose_tensor,
    not_finite,
    others_shard,
    rename_tensor,
    stray_shard,
    swap_names,
    swap_shards,
    truncate,
    wrong_dtype,
    wrong_shape,
)
from benchmarks.reliability.scene import Scene


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
