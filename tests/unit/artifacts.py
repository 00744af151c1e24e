"""What tests of whole artifacts share: calibration tokens, an independent dequantizer, digests, the command line."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.calibration import CalibrationSet
from halfbyte.serving import install
from halfbyte.types import QuantizedLinear
from tests.tiny import VOCAB

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
CHANGING = {"halfbyte.json", "README.md"}
"""Files of an artifact that hold times and places, and so differ between two runs of the same work."""


def random_set(tokens: int = 2400, longest: int = 96, seed: int = 0) -> CalibrationSet:
    """Random token ids of the tiny models' vocabulary in sequences of mixed lengths."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    while tokens > 0:
        length = min(tokens, int(torch.randint(longest // 2, longest + 1, (), generator=generator)))
        sequences.append(torch.randint(5, VOCAB, (length,), generator=generator))
        tokens -= length
    return CalibrationSet.of(sequences, {"source": {"kind": "random", "seed": seed}})


def values(q: QuantizedLinear) -> torch.Tensor:
    """float32 [O, I]: what the codes mean, written down a second time."""
    scales = q.scales.repeat_interleave(q.group_size, 1)
    if q.grid == "nvfp4":
        assert q.global_scale is not None
        sign = 1 - 2 * (q.codes // 8).float()
        return sign * E2M1[(q.codes % 8).long()] * (scales * q.global_scale)
    zeros: Any = 8 if q.zeros is None else q.zeros.repeat_interleave(q.group_size, 1).float()
    return (q.codes.float() - zeros) * scales


def weight_of(network: Any, name: str) -> torch.Tensor:
    """A linear's weight in a transformers model by the checkpoint's name: of an expert, a view of the stacked ones."""
    found = re.fullmatch(r"(.+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)", name)
    if found is None:
        return network.get_submodule(name).weight
    experts, number = network.get_submodule(f"{found[1]}.mlp.experts"), int(found[2])
    if found[3] in ("down_proj", "w2"):
        return experts.down_proj[number]
    gate, up = experts.gate_up_proj[number].chunk(2)
    return gate if found[3] in ("gate_proj", "w1") else up


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file that does not hold a time or a place."""
    files = [p for p in sorted(directory.rglob("*")) if p.is_file() and p.name not in CHANGING]
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def halfbyte(*words: object) -> int:
    """The command line in this process; returns the exit code."""
    from halfbyte.cli.app import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["halfbyte", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


def edit_json(path: Path, change: Any) -> None:
    """Read a JSON file, let `change` work on it in place, write it back."""
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def without_vllm(patch: pytest.MonkeyPatch, cache: Path | None = None) -> None:
    """No vLLM is found, which also takes no time; with `cache`, what is kept is kept there."""
    if cache is not None:
        patch.setenv("HALFBYTE_CACHE", str(cache))
    patch.delenv("HALFBYTE_VLLM", raising=False)
    patch.setattr(install, "ENVIRONMENT", "no-such-environment")
    patch.setenv("PATH", "/nowhere")
