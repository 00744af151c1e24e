"""The two sides of an evaluation, BF16 and 4-bit: models in memory, or directories that vLLM serves in turn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate.served import format_of
from halfbyte.evaluate.subject import Loaded, Served, Subject, stop_tokens
from halfbyte.types import Progress

Side = Literal["baseline", "model"]
SIDES: tuple[Side, Side] = ("baseline", "model")
LABELS = {"baseline": "BF16", "model": "4-bit"}
NEUTRAL = ("--generation-config", "vllm")
"""Without the sampling that a model's own config recommends (penalties, top-p): what is compared is greedy."""
URL = ("http://", "https://")


@dataclass(frozen=True)
class Serving:
    """How vLLM serves: the platform, the user's --vllm, where its logs go, requests at a time."""

    logs: Path
    platform: str = "cpu"
    vllm: str | None = None
    concurrency: int = 8


@dataclass(frozen=True)
class Pair:
    """BF16 and its 4-bit model, with one tokenizer.

    baseline, model   without `serving`: transformers causal LMs in eval mode. With it: directories, each served by a
                      vLLM of its own while it is asked, or URLs of servers that run already.
    names             what results call the two;  work: the one that the 4-bit model's artifact names
    """

    baseline: Any
    model: Any
    tokenizer: Any
    names: tuple[str, str]
    serving: Serving | None = None
    work: str | None = None

    @property
    def backend(self) -> str:
        return "vllm" if self.serving else "hf"

    def header(self, kind: str) -> dict[str, Any]:
        """The first fields of a result."""
        return {
            "schema": 1,
            "kind": kind,
            "baseline": self.names[0],
            "model": self.names[1],
            "backend": self.backend,
            "work": self.work,
        }

    def context(self) -> int | None:
        """The positions that the models have, where their config tells."""
        config = self.baseline.config if self.serving is None else _json_of(self.baseline, "config.json")
        return getattr(config, "max_position_embeddings", None)

    def stop_ids(self) -> list[int]:
        """The tokens that end an answer of either model."""
        if self.serving is None:
            return stop_tokens(self.tokenizer, self.baseline.generation_config, self.model.generation_config)
        return stop_tokens(self.tokenizer, *(_json_of(getattr(self, s), "generation_config.json") for s in SIDES))

    @contextmanager
    def open(self, side: Side, context: int, progress: Progress, kv_cache: str = "auto") -> Iterator[Subject]:
        """One side, ready to answer. `context`: tokens that prompt and answer may take (vLLM's --max-model-len).

        Raises HalfbyteError with vLLM's own reason when it does not start, and for a model that runs out of memory.
        """
        what = getattr(self, side)
        if self.serving is None:
            try:
                yield Loaded(what, self.tokenizer)
            except torch.OutOfMemoryError:
                raise HalfbyteError(f"{context:,} tokens at a time do not fit into memory: ask for fewer") from None
        elif str(what).startswith(URL):
            with _client(str(what).rstrip("/").removesuffix("/v1")) as subject:
                yield subject
        else:
            log = self.serving.logs / f"vllm-{side}-{kv_cache}.log"
            with _served(Path(what), self.serving, context, kv_cache, log, progress) as subject:
                yield subject


@contextmanager
def _served(
    directory: Path, serving: Serving, context: int, kv_cache: str, log: Path, progress: Progress
) -> Iterator[Served]:
    from halfbyte.serving import Server, find_vllm, serve_command
    from halfbyte.serving.probe import OFFLINE

    install = find_vllm(serving.vllm)
    command = serve_command(
        directory,
        format_of(directory),
        serving.platform,
        vllm_version=install.version,
        context=context,
        concurrency=serving.concurrency,
        extra=("--kv-cache-dtype", kv_cache, *NEUTRAL),
    )
    with Server(command, install, log_path=log, env=OFFLINE, progress=progress) as server:
        with _client(server.url) as subject:
            yield subject


@contextmanager
def _client(url: str) -> Iterator[Served]:
    from halfbyte.serving import Client

    with Client(url) as client:
        yield Served(client, url)


def _json_of(directory: Any, name: str) -> Any:
    """A JSON file of a model directory as an object with attributes; an empty one where there is none."""
    try:
        return SimpleNamespace(**json.loads((Path(directory) / name).read_text(encoding="utf-8")))
    except OSError:
        return SimpleNamespace()
    except ValueError:
        raise UsageError(f"{directory}/{name} is no JSON: is the model whole?") from None
