"""llm-compressor on the GPU that this process sees: MODEL CALIBRATION RESULT gptq|awq. Seconds from one block's end to
the next's, and peak device memory, into RESULT. Nothing is saved of the model."""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.core import LifecycleCallbacks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    model_path, calibration, result, method = sys.argv[1:5]
    tensors = load_file(f"{calibration}/tokens.safetensors")
    offsets = tensors["offsets"].tolist()
    sequences = [tensors["ids"][a:b].tolist() for a, b in itertools.pairwise(offsets)]
    scheme = QuantizationArgs(
        num_bits=4,
        type="int",
        strategy="group",
        group_size=128,
        symmetric=method == "gptq",
        actorder="static" if method == "gptq" else None,
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=scheme)}
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    ends = [time.perf_counter()]
    original = LifecycleCallbacks.sequential_epoch_end

    def noted(*args: object, **kwargs: object) -> object:
        out = original(*args, **kwargs)
        torch.cuda.synchronize()
        ends.append(time.perf_counter())
        print(f"block after {ends[-1] - ends[-2]:.1f} s", flush=True)
        return out

    LifecycleCallbacks.sequential_epoch_end = noted
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_dict({"input_ids": sequences, "attention_mask": [[1] * len(s) for s in sequences]}),
        recipe=_recipe(method, groups),
        max_seq_length=max(map(len, sequences)),
        num_calibration_samples=len(sequences),
        shuffle_calibration_samples=False,
    )
    blocks = model.config.num_hidden_layers
    steps = [b - a for a, b in itertools.pairwise(ends)][1:blocks]  # the first has start-up in it, the last is the head
    peak = torch.cuda.max_memory_allocated() / 2**30
    Path(result).write_text(json.dumps({"blocks": steps, "peak_gib": peak, "seconds": ends[-1] - ends[0]}))


def _recipe(method: str, groups: dict) -> list:
    if method == "gptq":
        from llmcompressor.modifiers.gptq import GPTQModifier

        return [GPTQModifier(config_groups=groups, ignore=["lm_head"])]
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform import AWQModifier

    return [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]


if __name__ == "__main__":
    main()
