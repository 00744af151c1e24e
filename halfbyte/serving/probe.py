"""The proof that an artifact is served: start vLLM on it, complete a prompt, score windows of tokens, stop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.platforms import Platform, facts_for, load_platform
from halfbyte.serving.client import Client
from halfbyte.serving.command import declared_variant, serve_command
from halfbyte.serving.install import VllmInstall
from halfbyte.serving.process import START_TIMEOUT_S, Server
from halfbyte.types import Progress, Quiet

PROMPT = "The capital of France is"
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
FAITHFUL = ("--kv-cache-dtype", "auto", "--enforce-eager")
"""A probe compares with transformers: a 16-bit KV cache whatever the platform prefers, and no graphs to wait for."""
TRACKED = ("--model-loader-extra-config", '{"enable_weights_track": true}')
"""Makes vLLM refuse a checkpoint that lacks a tensor; by default it looks only at unquantized ones."""
SEQUENCES = 8


def probe(
    directory: str | Path,
    format_name: str | None,
    windows: Sequence[Sequence[int]],
    *,
    platform: Platform | str,
    install: VllmInstall,
    log_path: Path,
    progress: Progress | None = None,
    context: int | None = None,
    timeout: float = START_TIMEOUT_S,
    extra: Sequence[str] = (),
) -> dict[str, Any]:
    """Serve `directory` once and measure it over HTTP.

    windows  token ids, each of at least two tokens; every token but a window's first is scored given those before it.
    context  --max-model-len; None: just enough for the windows and the completion.
    Returns {"ppl_served": exp of the mean negative log-likelihood over the scored tokens, "tokens": how many,
    "completion", "weight_gib_reported" (None where vLLM's log does not say), "kv_cache_tokens", "kernels",
    "quantization", "load_seconds", "vllm", "command", "env"}.
    Raises HalfbyteError with vLLM's own reason when it does not start, dies or refuses; UsageError for bad windows or a
    format that the platform cannot load.
    """
    progress = progress or Quiet()
    platform = load_platform(platform) if isinstance(platform, str) else platform
    longest = max((len(window) for window in windows), default=0)
    if not windows or min(len(window) for window in windows) < 2:
        raise UsageError("a probe needs windows of at least two tokens each")
    if context is not None and context <= longest:
        raise UsageError(f"windows of {longest} tokens need a context of at least {longest + 1}, not {context}")
    command = serve_command(
        directory,
        format_name,
        platform,
        vllm_version=install.version,
        context=context or max(longest + 1, 64),
        concurrency=SEQUENCES,
        extra=(*FAITHFUL, *_tracked(directory, install), *extra),
    )
    with Server(command, install, log_path=log_path, timeout=timeout, env=OFFLINE, progress=progress) as server:
        with Client(server.url) as client:
            try:
                completion = client.complete(PROMPT)
                scored = client.score(windows, batch=SEQUENCES, progress=progress)
            except HalfbyteError as error:
                if client.healthy():
                    raise
                raise server.failure() from error
        facts = server.facts
    ppl, tokens = perplexity(scored)
    return {
        "ppl_served": ppl,
        "tokens": tokens,
        "completion": completion,
        "weight_gib_reported": facts.weight_gib,
        "kv_cache_tokens": facts.kv_cache_tokens,
        "kernels": list(facts.kernels),
        "quantization": facts.quantization,
        "load_seconds": round(server.load_seconds, 2),
        "vllm": install.version,
        "command": server.command.argv,
        "env": server.env,
    }


def perplexity(scored: Sequence[Sequence[float | None]]) -> tuple[float, int]:
    """(exp of the mean negative log-likelihood, tokens) of scored windows; entries that are None do not count."""
    known = [value for window in scored for value in window if value is not None]
    if not known:
        raise HalfbyteError("no token was scored")
    return math.exp(-math.fsum(known) / len(known)), len(known)


def _tracked(directory: str | Path, install: VllmInstall) -> tuple[str, ...]:
    """The flag that makes vLLM refuse a checkpoint with a tensor missing, where it can be asked for.

    For W4A16_NVFP4 vLLM 0.32 registers an input_scale that it never reads, and would refuse every sound artifact.
    """
    usable = facts_for(install.version).weights_track and declared_variant(directory) != "W4A16_NVFP4"
    return TRACKED if usable else ()
