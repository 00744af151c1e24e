"""AutoRound: learned rounding, symmetric, written as a GPTQ checkpoint."""

from __future__ import annotations

import torch
from auto_round import AutoRound
from handed import handed
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 8


def main() -> None:
    given = handed()
    ids = torch.tensor(given.sequences)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="bfloat16")
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(given.model),
        scheme="W4A16",
        group_size=given.options["group_size"],
        sym=True,
        iters=given.options["iters"],
        dataset=list(ids.split(BATCH)),
        seqlen=ids.shape[1],
        nsamples=len(ids),
        batch_size=BATCH,
        device_map="cuda" if torch.cuda.is_available() else "cpu",
        seed=0,
    )
    rounder.quantize_and_save(given.output, format="auto_gptq")


if __name__ == "__main__":
    main()
