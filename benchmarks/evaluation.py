"""What an evaluation costs, in forward passes: BF16 and 4-bit perplexity and KL on one text, BF16 anew and kept.

A forward pass is the model's own, logits and all, over the same batches of the same tokens. Both times are taken
here, one after the other; the models are loaded before. Each as seconds of the clock and of the processor, all threads
together: on a machine that others use, run it with OMP_NUM_THREADS=1 and read the second.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import MODEL, TEXT, data_directory, machine, markdown, number, run_main, say

from halfbyte.artifact import load_fake_quantized
from halfbyte.evaluate import Windows, compare_with_reference, mixed_windows, text_windows
from halfbyte.evaluate.reference import BATCH_TOKENS, Reference, reference_of
from halfbyte.evaluate.scoring import Head, token_statistics
from halfbyte.evaluate.windows import batches
from halfbyte.experiments.evaluating import MIXED
from halfbyte.experiments.quantize import quantize
from halfbyte.models import Checkpoint, resolve_model
from halfbyte.models.library import load_model, load_tokenizer
from halfbyte.recipe import Recipe

Seconds = tuple[float, float]
"""Of the clock, of the processor."""

PASS = "one forward pass"
BASELINE = "BF16's side: its pass, the noise floor"
FOUR_BITS = "the 4-bit side: its pass, KL, agreement, intervals"


@contextmanager
def taking(what: str, found: dict[str, list[Seconds]]) -> Iterator[None]:
    """Time what is done within, as one more entry of found[what]."""
    say(what)
    began = time.perf_counter(), time.process_time()
    yield
    took = time.perf_counter() - began[0], time.process_time() - began[1]
    found.setdefault(what, []).append(took)
    say(f"{what}: {took[0]:.1f} s, {took[1]:.1f} s of the processor")


@torch.inference_mode()
def forward(model: Any, windows: Windows) -> None:
    """One pass of the model over all windows, in the evaluation's batches."""
    for _, ids in batches(windows, BATCH_TOKENS):
        model(ids, use_cache=False)


@torch.inference_mode()
def error_of_keeping(baseline: Any, model: Any, reference: Reference, windows: Windows) -> float:
    """The largest difference of a token's KL between full logits of both models and what the reference keeps."""
    scores = compare_with_reference(reference, model).scores
    largest = 0.0
    for index, (ids, mask) in enumerate(zip(windows.ids, windows.scored)):
        at = mask.nonzero().flatten()
        p, q = (m(ids[None], use_cache=False).logits[0, at - 1] for m in (baseline, model))
        full = token_statistics(p, q, ids[at])["kl"].numpy()
        largest = max(largest, float(abs(full - scores.kl[scores.window == index]).max()))
    return largest


def main(arguments: argparse.Namespace) -> None:
    path, text = resolve_model(MODEL), data_directory(arguments.data) / TEXT
    tokenizer = load_tokenizer(path)
    if arguments.lengths == MIXED:
        context = int(Checkpoint(path).config["max_position_embeddings"])
        windows = mixed_windows(text, tokenizer, tokens=arguments.tokens, longest=context)
    else:
        size = int(arguments.lengths)
        windows = text_windows(text, tokenizer, window=size, count=arguments.tokens // size)
    with tempfile.TemporaryDirectory() as scratch:
        artifact = Path(scratch) / "artifact"
        quantize(MODEL, Recipe(method="rtn", group_size=64), artifact)
        baseline, model = load_model(path), load_fake_quantized(artifact)
    took: dict[str, list[Seconds]] = {}
    with taking(PASS, took):
        forward(baseline, windows)
    with taking(BASELINE, took):
        reference = reference_of(baseline, windows)
    with taking(FOUR_BITS, took):
        result = compare_with_reference(reference, model).result("4-bit", MODEL, tokenizer)
    with taking(PASS, took):
        forward(baseline, windows)
    seconds = {what: tuple(min(column) for column in zip(*entries)) for what, entries in took.items()}
    few = Windows(windows.ids[:4], windows.scored[:4], windows.source, windows.window, windows.stride)
    error = error_of_keeping(baseline, model, reference_of(baseline, few, batch_tokens=1), few)
    facts = {
        "text": windows.describe(),
        "seconds": took,
        "reference_bytes": reference.facts["bytes"],
        "logit_bytes": reference.hidden.shape[0] * len(Head.of(model).weight) * 2,
        "largest_error_of_kl": error,
        "noise_floor_kl": result["noise_floor"]["kl_mean"],
        "kl_mean": result["metrics"]["kl_mean"],
        "machine": machine(),
    }
    seconds["both"] = tuple(map(sum, zip(seconds[BASELINE], seconds[FOUR_BITS])))
    rows = []
    for what, pair in seconds.items():
        passes = [number(mine / whole, 2) for mine, whole in zip(pair, seconds[PASS])]
        rows.append([what, number(pair[0], 1), passes[0], number(pair[1], 1), passes[1]])
    print(markdown(["", "seconds", "forward passes", "processor s", "forward passes"], rows))
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="where the texts are")
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--lengths", default="512", help="mixed, or tokens of a window")
    run_main(main, parser)
