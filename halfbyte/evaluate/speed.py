"""Serving speed in real vLLM, what is asked and what is found: BF16, the 4-bit artifact, other configurations of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from halfbyte.evaluate.served import format_of
from halfbyte.evaluate.speed_room import cache_tokens, space_words
from halfbyte.evaluate.stability import PROMPT_ROOM, Watch
from halfbyte.models.checkpoint import read_json
from halfbyte.platforms import Platform
from halfbyte.serving import ServeCommand, VllmInstall, serve_command
from halfbyte.serving.bench import NO_REUSE, Load

BASELINE, MODEL = "baseline", "model"
PREFILL, STABILITY = "prefill", "stability"
RUNS = "bench"
"""The directory of single runs and vLLM's logs, below the output."""
PREFILL_PROMPTS = 16
ROOM = 16
"""Tokens of context beyond prompt and answer: a prompt of random ids may be read as a few more."""
FEWEST, MANY = 8, 256
"""Requests of a run: four for every sequence at once, FEWEST at least; beyond MANY two for every sequence."""


@dataclass(frozen=True)
class Variant:
    """One server to measure: a directory and words for vLLM beyond what `serve` would say. `name` is a file name;
    without: flags that are not taken from measured speeds."""

    name: str
    directory: Path
    words: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class BenchRequest:
    """What to measure.

    variants    "baseline" (BF16) and "model", where wanted, then further configurations of the model
    requests    of a run; None: four for every sequence at once, 8 at least, and two for every one beyond 256
    repeats     of each run, with other prompts each time; 2 at least, or there is no interval
    turns       how often every server is started; repeats are spread over the turns
    prefill     tokens of the long prompts that are answered by one token; 0: not measured
    extra       words for every vLLM
    watch       what to look for in long generations (halfbyte.evaluate.stability), or None
    loads       whether speed is measured; False: only what `watch` looks for, of the same servers
    together    how many servers are loaded at once, each with a KV cache of what the loads need; each is measured alone
    """

    variants: tuple[Variant, ...]
    platform: Platform
    concurrency: tuple[int, ...]
    input_tokens: int = 128
    output_tokens: int = 128
    requests: int | None = None
    repeats: int = 3
    turns: int = 1
    prefill: int = 0
    seed: int = 0
    extra: tuple[str, ...] = ()
    watch: Watch | None = None
    loads: bool = True
    together: int = 1

    @cached_property
    def points(self) -> dict[str, Load]:
        """The loads by name: c1, c16, … and prefill."""
        if not self.loads:
            return {}
        found = {f"c{level}": self._load(level) for level in self.concurrency}
        if self.prefill:
            prompts = min(PREFILL_PROMPTS, self.requests or PREFILL_PROMPTS)
            found[PREFILL] = Load(min(prompts, max(self.concurrency)), prompts, self.prefill, 1)
        return found

    @property
    def context(self) -> int:
        """--max-model-len that holds everything that is asked for."""
        longest = [self.input_tokens + self.output_tokens, self.prefill + 1]
        return max([*longest, self.watch.tokens + PROMPT_ROOM if self.watch else 0]) + ROOM

    @property
    def cache_tokens(self) -> int:
        """Tokens of keys and values that are in flight at most."""
        long = [Load(self.watch.concurrency, 0, PROMPT_ROOM, self.watch.tokens)] if self.watch else []
        return cache_tokens([*self.points.values(), *long], self.context)

    def _load(self, level: int) -> Load:
        asked = self.requests or max(FEWEST, min(4 * level, max(MANY, 2 * level)))
        return Load(level, max(asked, level), self.input_tokens, self.output_tokens)


@dataclass
class Job:
    """One run that is wanted: where its result lies, and the key under which it counts. load None: stability."""

    variant: Variant
    point: str
    load: Load | None
    turn: int
    file: Path
    key: str = ""
    result: dict[str, Any] | None = None


@dataclass
class Measured:
    """All runs, and what they were measured with. `place`: the directory of single runs and vLLM's logs; `stopped`: why
    not all were done, or empty."""

    request: BenchRequest
    install: VllmInstall
    commands: dict[str, ServeCommand]
    jobs: list[Job]
    hardware: str
    place: Path
    seconds: float = 0.0
    stopped: str = ""
    notes: list[str] = field(default_factory=list)

    def runs(self, variant: str, point: str) -> list[dict[str, Any]]:
        """The results of a configuration at a point, in the order of repeats."""
        found = [job.result for job in self.jobs if (job.variant.name, job.point) == (variant, point)]
        return [result for result in found if result is not None]


def command_for(request: BenchRequest, variant: Variant, install: VllmInstall) -> ServeCommand:
    """What `serve` would say for it, the variant's words, and no reuse of prompts; of a device that servers share, only
    the memory that the loads need."""
    words = (*variant.words, *request.extra)
    extra = words if "--enable-prefix-caching" in words else (*NO_REUSE, *words)

    def command(*more: str) -> ServeCommand:
        return serve_command(
            variant.directory,
            format_of(variant.directory),
            request.platform,
            vllm_version=install.version,
            context=request.context,
            concurrency=max(request.concurrency),
            extra=(*extra, *more),
            without=variant.without,
        )

    plain = command()
    if request.together == 1 or not request.platform.capabilities.accelerator:
        return plain
    return command(*space_words(plain, variant.directory, request.cache_tokens))


def context_limit(models: Sequence[Path]) -> int | None:
    """The longest sequence that all of these take; None where none of them says."""
    limits = [read_json(model / "config.json").get("max_position_embeddings") for model in models]
    return min((limit for limit in limits if limit), default=None)
