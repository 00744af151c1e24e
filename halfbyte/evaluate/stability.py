"""Does a served model stay sane? Long generations of BF16 and of 4 bits on the same prompts, and load for a while.

A small model loops in BF16 too, so that loops and empty answers count where 4 bits have more of them on the same
prompts than chance explains (a one-sided exact sign test on the prompts where the two differ). Anything that is no
number counts by itself, and so does a request that fails under load.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
from scipy.stats import binomtest

from halfbyte.errors import HalfbyteError
from halfbyte.evaluate import bootstrap
from halfbyte.evaluate.repetition import loops
from halfbyte.serving import Client, Server
from halfbyte.serving.bench import FAILED, OK, ended, failure
from halfbyte.serving.client import Refused

PROMPTS = (
    "The most important thing to know about the ocean is",
    "Once upon a time, in a small town by the river,",
    "To bake a good loaf of bread, you first",
    "The difference between a virus and a bacterium is",
    "Dear Sir or Madam,\n\nI am writing to",
    "In the year 1848, Europe",
    "def fibonacci(n):\n",
    "Question: Why is the sky blue?\nAnswer:",
    "The three laws of motion state that",
    "Here is a list of animals that live in the desert:\n1.",
    "The meeting began at nine, and the first item was",
    "A healthy diet consists of",
    "When the train finally stopped, she",
    "Light travels faster than sound, which means that",
    "The city council voted yesterday to",
    "My grandmother taught me that",
)
GREEDY: dict[str, Any] = {"temperature": 0.0}
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95}
LENGTHS = (0.8, 1.25)
"""Mean lengths of answers, 4 bits against BF16, that are no reason."""
CHANCE = 0.05
LOAD_TOKENS = 128
PROMPT_ROOM = 128
"""Tokens that a prompt may have, even where every byte is one."""
MOST_FAILURES = 20
LEFTOVER = 300
"""Characters kept of the end of an answer that went wrong."""


@dataclass(frozen=True)
class Watch:
    """What to look at: `prompts` of PROMPTS, each continued greedily and sampled by up to `tokens` tokens; then load at
    `concurrency` for `seconds` (0: no load)."""

    concurrency: int
    seconds: float = 0.0
    tokens: int = 512
    prompts: int = len(PROMPTS)
    seed: int = 0


def observe(server: Server, watch: Watch) -> dict[str, Any]:
    """What a running server writes, and how it bears the load.

    status       "ok"; "failed", "crashed" or "out of memory" where generations or load went wrong, with `reason`
    answers      for each prompt, greedy ones first: {mode, length (tokens), loop, empty, invalid, end (of a bad one)}
    load         {concurrency, seconds, requests, failed, status, reason}, or None where none was asked for
    """
    try:
        answers = _answers(server.url, watch)
    except HalfbyteError as error:
        return {**failure(server, error), "answers": [], "load": None}
    load = _load(server, watch) if watch.seconds else None
    whole = load or {"status": OK, "reason": ""}
    return {"status": whole["status"], "reason": whole["reason"], "answers": answers, "load": load}


def judge(model: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> dict[str, Any]:
    """stability.json from what was observed of the model, and of BF16 (None: not observed)."""
    ours, theirs = model.get("answers") or [], (baseline or {}).get("answers") or []
    shares = {
        name: {"baseline": _share(theirs, key), "model": _share(ours, key)}
        for name, key in (("repetition", "loop"), ("empty", "empty"), ("invalid", "invalid"))
    }
    ratio = length_ratio(ours, theirs)
    reasons = _reasons(model, baseline, ours, theirs, shares, ratio)
    return {
        "schema": 1,
        "kind": "stability",
        "ok": not reasons,
        "generations": len(ours),
        **shares,
        "length_ratio": ratio,
        "load": model.get("load"),
        "reasons": reasons,
        "judged_against_baseline": bool(theirs),
        "bad": [answer for answer in ours if answer["loop"] or answer["empty"] or answer["invalid"]],
    }


def more_than_chance(ours: Sequence[bool], theirs: Sequence[bool]) -> float:
    """The chance of so many pairs where only ours is bad, if either were as likely (one-sided exact sign test)."""
    only_ours = sum(a and not b for a, b in zip(ours, theirs))
    only_theirs = sum(b and not a for a, b in zip(ours, theirs))
    apart = only_ours + only_theirs
    return float(binomtest(only_ours, apart, 0.5, alternative="greater").pvalue) if apart else 1.0


def length_ratio(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Mean length of ours over theirs, bootstrapped over the prompts; None where one has no answers."""
    if not ours or len(ours) != len(theirs) or not any(answer["length"] for answer in theirs):
        return None
    a, b = (np.array([answer["length"] for answer in side], dtype=np.float64) for side in (ours, theirs))
    counts = bootstrap.draw_counts(len(a), 0)
    return bootstrap.interval((counts @ a) / np.maximum(1e-9, counts @ b), float(a.sum() / b.sum()))


def _reasons(
    model: Mapping[str, Any],
    baseline: Mapping[str, Any] | None,
    ours: Sequence[Mapping[str, Any]],
    theirs: Sequence[Mapping[str, Any]],
    shares: Mapping[str, Mapping[str, Any]],
    ratio: Mapping[str, float] | None,
) -> list[str]:
    if not ours:
        return [f"no answer could be had: {model.get('reason') or 'the model was not served'}"]
    reasons = []
    if shares["invalid"]["model"]:
        reasons.append(f"{shares['invalid']['model']:.1%} of the answers hold probabilities that are no numbers")
    for name, key, words in (("repetition", "loop", "run into a loop"), ("empty", "empty", "are empty")):
        mine, other = shares[name]["model"], shares[name]["baseline"]
        chance = more_than_chance([a[key] for a in ours], [a[key] for a in theirs])
        if theirs and chance < CHANCE:
            reasons.append(f"{mine:.1%} of the answers {words}, of BF16's {other:.1%} (by chance: {chance:.1%})")
    if ratio and (ratio["low"] > LENGTHS[1] or ratio["high"] < LENGTHS[0]):
        reasons.append(f"answers are {ratio['value']:.2f} times as long as BF16's")
    if baseline is not None and not theirs:
        reasons.append(f"BF16 could not be observed: {baseline.get('reason') or 'it was not served'}")
    load = model.get("load")
    if load and load["status"] != OK:
        reasons.append(f"under load at concurrency {load['concurrency']}: {load['status']}: {load['reason']}")
    return reasons


def _share(answers: Sequence[Mapping[str, Any]], key: str) -> float | None:
    return sum(bool(answer[key]) for answer in answers) / len(answers) if answers else None


def _answers(url: str, watch: Watch) -> list[dict[str, Any]]:
    prompts = list(islice(cycle(PROMPTS), watch.prompts))
    asked = [(prompt, mode, watch.seed + i) for mode in (GREEDY, SAMPLED) for i, prompt in enumerate(prompts)]
    with Client(url) as client, ThreadPoolExecutor(max(1, min(watch.concurrency, len(asked)))) as pool:
        return list(pool.map(lambda item: _answer(client, item[0], item[1], item[2], watch.tokens), asked))


def _answer(client: Client, prompt: str, mode: Mapping[str, Any], seed: int, tokens: int) -> dict[str, Any]:
    """One generation in facts. An internal error of a healthy server is what vLLM makes of NaN."""
    name = "greedy" if mode is GREEDY else "sampled"
    try:
        choice = client.generate(prompt, tokens, seed=seed, logprobs=1, **mode)
    except Refused as error:
        if error.status < 500 or not client.healthy():
            raise
        return {"mode": name, "length": 0, "loop": False, "empty": False, "invalid": True, "end": str(error)}
    return {"mode": name, **facts_of(choice)}


def facts_of(choice: Mapping[str, Any]) -> dict[str, Any]:
    """Length, loop, empty, invalid and, of a bad one, its end, from a completion with log-probabilities."""
    told = choice.get("logprobs") or {}
    tokens = told.get("tokens") or list(choice["text"])
    invalid = any(value is None or not math.isfinite(value) for value in told.get("token_logprobs") or [])
    empty, loop = not choice["text"].strip(), loops(tokens)
    end = choice["text"][-LEFTOVER:] if invalid or empty or loop else None
    return {"length": len(tokens), "loop": loop, "empty": empty, "invalid": invalid, "end": end}


def _load(server: Server, watch: Watch) -> dict[str, Any]:
    """`concurrency` requests in flight, each followed by the next, until the time is over or the server has failed."""
    counts = {"requests": 0, "failed": 0}
    lock, first, began = threading.Lock(), [], time.monotonic()

    def worker(number: int) -> None:
        with Client(server.url) as client:
            for prompt in islice(cycle(PROMPTS), number, None):
                problem = None
                try:
                    client.generate(prompt, min(LOAD_TOKENS, watch.tokens), ignore_eos=True)
                except HalfbyteError as error:
                    problem = str(error)
                with lock:
                    counts["requests"] += 1
                    counts["failed"] += problem is not None
                    first.extend([problem] if problem else [])
                if time.monotonic() - began > watch.seconds or counts["failed"] >= MOST_FAILURES or not server.running:
                    return

    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(watch.concurrency))
        list(pool.map(worker, range(watch.concurrency)))
    result = {"concurrency": watch.concurrency, "seconds": round(time.monotonic() - began, 2), **counts}
    if not server.running:
        reason = server.reason()
        return {**result, "status": ended(reason), "reason": reason}
    if counts["failed"]:
        return {**result, "status": FAILED, "reason": f"{counts['failed']} requests failed: {first[0]}"}
    return {**result, "status": OK, "reason": ""}
