"""llm-compressor as peer_scripts/llm_compressor.py calls it, timed block by block on the GPU that this process sees:
MODEL CALIBRATION RESULT OPTIONS. Seconds from one block's end to the next's, and peak device memory, into RESULT.
Nothing is saved of the model."""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "peer_scripts"))

from handed import handed
from llm_compressor import compress
from llmcompressor.core import LifecycleCallbacks
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    given = handed()
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    ends = [time.perf_counter()]
    original = LifecycleCallbacks.sequential_epoch_end

    def noted(*args: object, **kwargs: object) -> object:
        out = original(*args, **kwargs)
        torch.cuda.synchronize()
        ends.append(time.perf_counter())
        print(f"block after {ends[-1] - ends[-2]:.1f} s", flush=True)
        return out

    LifecycleCallbacks.sequential_epoch_end = noted
    compress(model, tokenizer, given.sequences, given.options["method"], given.options["group_size"])
    blocks = model.config.num_hidden_layers
    steps = [b - a for a, b in itertools.pairwise(ends)][1:blocks]  # the first has start-up in it, the last is the head
    peak = torch.cuda.max_memory_allocated() / 2**30
    Path(given.output).write_text(json.dumps({"blocks": steps, "peak_gib": peak, "seconds": ends[-1] - ends[0]}))


if __name__ == "__main__":
    main()
