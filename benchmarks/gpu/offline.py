"""One vLLM engine without a server: it loads, waits until it is told to go, and times batches that start at once.

    python offline.py SPEC.json

Run by vLLM's own Python as a program of its own (see engines.Engine); nothing of halfbyte is imported. SPEC names the
model, words as `vllm serve` takes them, the points [{name, prompts, input, output}], repeats, the vocabulary's size,
`result` (JSON lines are added to it: one when the engine is ready, one for each point) and `go` (measuring begins when
this file exists). Prompts are random token ids, others in each repeat; answers are greedy and of full length.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    started = time.monotonic()
    llm = engine(spec["model"], spec["words"])
    ready = round(time.monotonic() - started, 2)
    tell(spec, {"ready": ready})
    parent = os.getppid()
    while not Path(spec["go"]).exists():
        if os.getppid() != parent:
            return
        time.sleep(0.05)
    for point in spec["points"]:
        tell(spec, {"point": point, "seconds": timed(llm, point, spec["repeats"], spec["vocab"]), "load": ready})
    tell(spec, {"done": True})


def engine(model: str, words: list[str]) -> Any:
    """The engine that `vllm serve MODEL WORDS` would have."""
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    return LLM.from_engine_args(EngineArgs.from_cli_args(parser.parse_args(["--model", model, *words])))


def timed(llm: Any, point: dict[str, Any], repeats: int, vocab: int) -> list[float]:
    """Seconds of each repeat, after one that does not count."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=point["output"], ignore_eos=True, detokenize=False)
    seconds = []
    for repeat in range(repeats + 1):
        draw = random.Random(f"{point['name']} {repeat}")
        prompts = [
            {"prompt_token_ids": [draw.randrange(3, vocab) for _ in range(point["input"])]}
            for _ in range(point["prompts"])
        ]
        began = time.perf_counter()
        answers = llm.generate(prompts, sampling, use_tqdm=False)
        seconds.append(time.perf_counter() - began)
        written = sum(len(answer.outputs[0].token_ids) for answer in answers)
        if written != point["prompts"] * point["output"]:
            raise RuntimeError(f"{written} tokens were written, {point['prompts'] * point['output']} asked for")
    return seconds[1:]


def tell(spec: dict[str, Any], line: dict[str, Any]) -> None:
    with Path(spec["result"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
