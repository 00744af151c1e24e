"""llm-compressor: GPTQ (symmetric, static act-order) or AWQ (asymmetric), as its own examples call it."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from handed import handed
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    given = handed()
    sequences = given.sequences
    if given.options.get("samples"):
        sequences = sequences[:: max(1, len(sequences) // given.options["samples"])][: given.options["samples"]]
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    compress(model, tokenizer, sequences, given.options["method"], given.options["group_size"])
    model.save_pretrained(given.output, save_compressed=True)
    tokenizer.save_pretrained(given.output)


def compress(model: Any, tokenizer: Any, sequences: list[list[int]], method: str, group_size: int) -> None:
    """Quantize a model in its place. method: gptq | awq; sequences: token ids."""
    awq = method == "awq"
    weights = QuantizationArgs(
        num_bits=4,
        type="int",
        strategy="group",
        group_size=group_size,
        symmetric=not awq,
        actorder=None if awq else "static",
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_dict({"input_ids": sequences, "attention_mask": [[1] * len(s) for s in sequences]}),
        recipe=_recipe(awq, groups),
        max_seq_length=max(map(len, sequences)),
        num_calibration_samples=len(sequences),
        shuffle_calibration_samples=False,
    )


def _recipe(awq: bool, groups: dict) -> list:
    if not awq:
        from llmcompressor.modifiers.quantization import GPTQModifier

        return [GPTQModifier(config_groups=groups, ignore=["lm_head"], actorder="static")]
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():  # it pins memory for a GPU, and stops where there is none
        IntermediatesCache.pin_memory = lambda self, *_, **__: None
    return [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]


if __name__ == "__main__":
    main()
