"""What every peer script is handed: MODEL CALIBRATION OUT OPTIONS; nothing of halfbyte is imported here."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Handed:
    """The model's directory, token ids (one list a sequence), where to write, options by name."""

    model: str
    sequences: list[list[int]]
    output: str
    options: dict[str, Any]


def handed() -> Handed:
    """The four words of the command line; the tokens as halfbyte's calibration set stores them."""
    from safetensors.torch import load_file

    model, calibration, output, options = sys.argv[1:5]
    tensors = load_file(f"{calibration}/tokens.safetensors")
    ids, offsets = tensors["ids"].tolist(), tensors["offsets"].tolist()
    sequences = [ids[a:b] for a, b in itertools.pairwise(offsets)]
    return Handed(model, sequences, output, json.loads(options))
