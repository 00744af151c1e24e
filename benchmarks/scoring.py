"""One text, one baseline, any number of models: the baseline's logits are computed once and every model meets them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import say

from halfbyte.artifact import load_fake_quantized
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate import TokenScores, Windows, noise_floor, summary, text_windows
from halfbyte.evaluate.scoring import logits_of, pair_statistics, scored_positions
from halfbyte.evaluate.windows import batches
from halfbyte.models import Checkpoint, family_of
from halfbyte.models.library import load_model, load_tokenizer
from halfbyte.recipe import Recipe

WINDOW, FEW, MANY = 512, 10, 40
BATCH_TOKENS = 1024


class Reference:
    """The BF16 model's logits on the first MANY windows of a text (about 2 GB), and its noise floor."""

    def __init__(self, model: Path, text: Path, windows: int = MANY, device: str = "cpu"):
        say(f"{text.name}: BF16 logits of {windows} windows of {WINDOW} tokens")
        self.name = text.name
        self.windows: Windows = text_windows(text, load_tokenizer(model), window=WINDOW, count=windows)
        self.model, self.device = load_model(model, device), device
        self.batches = list(batches(self.windows, BATCH_TOKENS))
        self.logits = [logits_of(self.model, ids) for _, ids in self.batches]
        self.noise = noise_floor(self.model, self.windows.first(FEW), BATCH_TOKENS)

    def score(self, model: Any) -> dict[str, Any]:
        """{"10": metrics, "40": metrics} of eval.json's form, on the first few and on all windows. No model: BF16."""
        columns: dict[str, list[np.ndarray]] = {name: [] for name in TokenScores.__dataclass_fields__}
        for (members, ids), p in zip(self.batches, self.logits):
            row, position = scored_positions(self.windows, members, ids.shape[1])
            q = p if model is None else logits_of(model, ids)
            if q.shape != p.shape:
                raise HalfbyteError(f"a vocabulary of {q.shape[-1]} tokens, the baseline has {p.shape[-1]}")
            found = pair_statistics(p, q, ids, row, position)
            found |= {"window": torch.tensor(members)[row], "position": position}
            for name, values in found.items():
                columns[name].append(values.numpy())
        arrays = {name: np.concatenate(values) for name, values in columns.items()}
        if not np.isfinite(arrays["loglik"]).all():
            raise HalfbyteError("log-likelihoods that are not finite")
        first = {name: values[arrays["window"] < FEW] for name, values in arrays.items()}
        return {str(FEW): summary(TokenScores(**first)), str(len(self.windows)): summary(TokenScores(**arrays))}

    def describe(self) -> dict[str, Any]:
        """The text, its windows and the noise floor."""
        return {"text": self.windows.describe(), "noise_floor": self.noise}


def load_scored(directory: Path, device: str = "cpu") -> Any:
    """A model directory of any maker: quantized in a format that halfbyte reads, or fake-quantized BF16 weights."""
    if Checkpoint(directory).config.get("quantization_config"):
        return load_fake_quantized(directory, device=device)
    return load_model(directory, device)


def bits_of_artifact(directory: Path) -> float:
    """Bits that a weight of the decoder blocks' linears takes in a checkpoint, scales and all."""
    checkpoint = Checkpoint(directory)
    family = family_of(checkpoint.config)
    owned, weights = 0, 0
    plain = load_shapes(directory)
    for i in range(family.num_blocks):
        for name in family.linears(i):
            owned += sum(t.nbytes for n, t in checkpoint.tensors.items() if n.startswith(name + "."))
            weights += plain[name]
    return 8 * owned / weights


def load_shapes(directory: Path) -> dict[str, int]:
    """Weights of every linear, from the config alone."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    return {n: m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def bits_of_recipe(recipe: Recipe, model: Path) -> float:
    """The same figure for a recipe that was solved in memory: what its format would store."""
    from halfbyte.formats import get_format
    from halfbyte.plan.layers import assign

    form = get_format(str(recipe.format), recipe.activations)
    owned, weights = 0.0, 0
    for plan in assign(recipe, Checkpoint(model)):
        if plan.block is None:
            continue
        count = plan.out_features * plan.in_features
        weights += count
        if plan.scheme is None:
            owned += 2 * count
            continue
        stored = form.expected(plan.name, plan.out_features, plan.in_features, plan.scheme)
        owned += sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in stored.values())
    return 8 * owned / weights


HEADER = (
    "", "seconds", "solve s", "peak MiB", "bits/weight", "ppl 10 w", "ppl 40 w", "KL 10 w", "KL 40 w", "top-1 40 w",
)  # fmt: skip


def score_row(name: str, scores: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """A row of the JSON: name, scores and whatever else is known of it."""
    return {"name": name, "scores": scores, **facts}


def cells(row: dict[str, Any], many: int = MANY) -> Sequence[str]:
    """A row of the table, in HEADER's order."""
    from common import number

    if row.get("error"):
        return [row["name"], *(["–"] * (len(HEADER) - 2)), row["error"]]
    few, all_ = row["scores"][str(FEW)], row["scores"][str(many)]
    value = {m: (few[m]["value"], all_[m]["value"]) for m in ("ppl", "kl_mean", "top1")}
    return [
        row["name"],
        number(row.get("seconds"), 1),
        number(row.get("solve_seconds"), 1),
        number(row.get("peak_rss_mib"), 0),
        number(row.get("bits_per_weight"), 3),
        number(value["ppl"][0], 2),
        number(value["ppl"][1], 2),
        number(value["kl_mean"][0], 4),
        number(value["kl_mean"][1], 4),
        number(100 * value["top1"][1], 1, " %"),
    ]
