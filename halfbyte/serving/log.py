"""Reads vLLM's log: how far it has come, what it says of memory and kernels, and why it failed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

STAGES = (
    (r"Resolved architecture", "config read"),
    (r"Initializing a V1 LLM engine", "engine started"),
    (r"Starting to load model|Loading safetensors", "loading weights"),
    (r"Loading weights took", "weights loaded"),
    (r"KV cache size:", "KV cache laid out"),
)
"""What a starting server logs, in this order."""

_PREFIX = re.compile(r"^\([^()]* pid=\d+\) ?|^(?:ERROR|WARNING|INFO|CRITICAL) [\d-]+ [\d:.]+ \[[^\]]*\] ?")
_RAISED = re.compile(r"^(?:[A-Za-z_][\w.]*\.)?(?:[A-Z]\w*(?:Error|Exception|Interrupt|Exit)|Exception)(?:: .*)?$")
_SECOND_HAND = re.compile(
    r"See root cause above|See stack trace for root cause|CancelledError|KeyboardInterrupt|SystemExit"
)
_CHAINED = re.compile(r"^(?:During handling of the above exception|The above exception was the direct cause)")
_USAGE = re.compile(r"^(?:[\w./ -]*vllm[\w ]*: )?error: (?P<message>.+)$")
_MAX_MESSAGE = 400


@dataclass(frozen=True)
class LogFacts:
    """What a started server said of itself; None or empty where its version or device does not say.

    weight_gib       GiB that the weights take on one device
    kv_cache_gib     GiB set aside for keys and values; kv_cache_tokens: how many tokens that holds
    quantization     the method that the engine runs ("auto_gptq"), None for an unquantized model
    kernels          kernel classes that it chose for quantized linears
    """

    weight_gib: float | None
    kv_cache_gib: float | None
    kv_cache_tokens: int | None
    quantization: str | None
    kernels: tuple[str, ...]


def read_log(path: Path) -> str:
    """The log's text; "" before there is one."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def stages_reached(text: str) -> int:
    """How many of STAGES the log shows, counting the furthest."""
    return max((i for i, (pattern, _) in enumerate(STAGES, 1) if re.search(pattern, text)), default=0)


def parse_log(text: str) -> LogFacts:
    """The facts that a log holds."""
    weights = _number(r"Model loading took ([\d.]+) Gi?B", text)
    space = _number(r"Available KV cache memory: ([\d.]+) GiB", text)
    if space is None:
        space = _number(r"Explicitly set \(([\d.]+)/[\d.]+\) GiB for KV cache", text)
    tokens = _number(r"KV cache size: ([\d,]+) tokens", text)
    method = re.search(r"\bquantization=([\w-]+)", text)
    kernels = dict.fromkeys(re.findall(r"Using (\w+Kernel) for", text))
    return LogFacts(
        weight_gib=weights,
        kv_cache_gib=space,
        kv_cache_tokens=None if tokens is None else int(tokens),
        quantization=method[1] if method and method[1] != "None" else None,
        kernels=tuple(kernels),
    )


def root_error(text: str) -> str:
    """The line that tells why vLLM ended: the first error that does not merely report another, else the last line.

    vLLM's processes each log their own failure; the outer ones only say that an inner one failed.
    """
    lines = [_plain(line) for line in text.splitlines()]
    found: list[str] = []
    for i, line in enumerate(lines):
        if _CHAINED.match(line) and found:
            found.pop()
        usage = _USAGE.match(line)
        if usage:
            return _short(usage["message"])
        if _RAISED.match(line) and not _SECOND_HAND.search(line):
            found.append(_whole(lines, i))
    spoken = [line for line in lines if line.strip()]
    return _short(found[0] if found else spoken[-1] if spoken else "it said nothing")


def _whole(lines: list[str], i: int) -> str:
    """A raised error's line, with the detail that pydantic and multiprocessing put on the lines after it."""
    if lines[i].rstrip().endswith(":"):
        return " ".join([lines[i].strip(), *(line.strip() for line in lines[i + 1 :] if line.strip())][:2])
    detail = lines[i + 1] if i + 1 < len(lines) else ""
    if "validation error" in lines[i] and detail.startswith("  "):
        return detail.strip().removeprefix("Value error, ").partition(" [type=")[0]
    return lines[i].strip()


def _plain(line: str) -> str:
    """A line without the prefixes that vLLM's loggers put before it."""
    for _ in range(2):
        line = _PREFIX.sub("", line, count=1)
    return line


def _short(message: str) -> str:
    message = " ".join(message.split())
    return message if len(message) <= _MAX_MESSAGE else message[: _MAX_MESSAGE - 3] + "..."


def _number(pattern: str, text: str) -> float | None:
    match = re.search(pattern, text)
    return float(match[1].replace(",", "")) if match else None
