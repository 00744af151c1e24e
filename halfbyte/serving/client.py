"""Talks to a vLLM server over its OpenAI-compatible HTTP API."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import httpx

from halfbyte.errors import HalfbyteError
from halfbyte.types import Progress, Quiet

RETRY_AFTER_S = 0.5
ANSWER_TIMEOUT_S = 600.0
BATCH = 8
_TRANSIENT_STATUS = (429, 500, 502, 503, 504)


class Refused(HalfbyteError):
    """The server answered, and said no; `status` is HTTP's."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """A connection to one server at `url` ("http://127.0.0.1:8000"). Use it as a context manager, or close() it.

    Every call raises HalfbyteError in one line when the server refuses, or does not answer a second time.
    """

    def __init__(self, url: str, *, timeout: float = ANSWER_TIMEOUT_S) -> None:
        self._http = httpx.Client(base_url=url, trust_env=False, timeout=httpx.Timeout(timeout, connect=10.0))
        self._model: str | None = None

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    @property
    def model(self) -> str:
        """The name under which the server serves its model."""
        if self._model is None:
            listed = self._ask("GET", "/v1/models")["data"]
            if not listed:
                raise HalfbyteError("vLLM serves no model")
            self._model = listed[0]["id"]
        return self._model

    def healthy(self) -> bool:
        """Whether the server answers and its engine lives."""
        try:
            return self._http.get("/health").status_code == 200
        except httpx.HTTPError:
            return False

    def complete(self, prompt: str | Sequence[int], max_tokens: int = 32) -> str:
        """The greedy continuation of a text or of token ids."""
        prompt = prompt if isinstance(prompt, str) else list(prompt)
        return self._completions(prompt, max_tokens=max_tokens)[0]["text"]

    def generate(self, prompt: str, max_tokens: int, **options: Any) -> dict[str, Any]:
        """One completion as the API gives it: text, finish_reason, logprobs where `logprobs=1` asks for them.

        options  what the API knows: temperature (0 unless said), top_p, seed, logprobs
        """
        return self._completions(prompt, max_tokens=max_tokens, **options)[0]

    def score(
        self, windows: Sequence[Sequence[int]], batch: int = BATCH, progress: Progress | None = None
    ) -> list[list[float | None]]:
        """Natural-log probability of each token of each window, given those before it in the window.

        windows: token ids; a window must be shorter than the server's context. The first entry of each result is None.
        `batch` windows travel in one request.
        """
        progress = progress or Quiet()
        scored: list[list[float | None]] = []
        progress.start("scoring over HTTP", len(windows))
        for first in range(0, len(windows), batch):
            part = [list(window) for window in windows[first : first + batch]]
            choices = self._completions(part, max_tokens=1, prompt_logprobs=0)
            if len(choices) != len(part):
                raise HalfbyteError(f"vLLM answered {len(choices)} of {len(part)} windows")
            scored += [_token_logprobs(ids, choice) for ids, choice in zip(part, choices)]
            progress.advance(len(part))
        return scored

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        *,
        stop_ids: Sequence[int] = (),
        batch: int = BATCH,
        progress: Progress | None = None,
    ) -> list[str]:
        """The greedy continuations of prompts (token ids) up to any of `stop_ids`, special tokens left out."""
        return [
            choice["text"]
            for choice in self._in_batches(
                prompts, batch, progress, max_tokens=max_tokens, stop_token_ids=list(stop_ids), repetition_penalty=1.0
            )
        ]

    def choose(
        self,
        prompts: Sequence[Sequence[int]],
        candidates: Sequence[int],
        *,
        batch: int = BATCH,
        progress: Progress | None = None,
    ) -> list[int]:
        """Which of the candidate tokens is the most likely one after each prompt (token ids)."""
        options = {"allowed_token_ids": list(candidates), "logprobs": 0, "return_tokens_as_token_ids": True}
        found = []
        for choice in self._in_batches(prompts, batch, progress, max_tokens=1, repetition_penalty=1.0, **options):
            try:
                found.append(int(choice["logprobs"]["tokens"][0].removeprefix("token_id:")))
            except (KeyError, IndexError, TypeError, ValueError):
                raise HalfbyteError("vLLM did not say which token it chose: it is too old") from None
        return found

    def _in_batches(
        self, prompts: Sequence[Sequence[int]], batch: int, progress: Progress | None, **options: Any
    ) -> Iterator[dict[str, Any]]:
        """The choice for each prompt, in order, `batch` of them in one request."""
        for first in range(0, len(prompts), batch):
            part = [list(prompt) for prompt in prompts[first : first + batch]]
            choices = self._completions(part, **options)
            if len(choices) != len(part):
                raise HalfbyteError(f"vLLM answered {len(choices)} of {len(part)} prompts")
            yield from choices
            (progress or Quiet()).advance(len(part))

    def _completions(self, prompt: str | list[int] | list[list[int]], **options: Any) -> list[dict[str, Any]]:
        body = {"model": self.model, "prompt": prompt, "temperature": 0.0, **options}
        choices = self._ask("POST", "/v1/completions", body)["choices"]
        return sorted(choices, key=lambda choice: choice["index"])

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One exchange of JSON, tried again once after a dropped connection or a passing refusal."""
        for last in (False, True):
            try:
                answer = self._http.request(method, path, json=body)
            except httpx.TimeoutException as error:
                raise HalfbyteError(f"vLLM did not answer {path} in time ({type(error).__name__})") from error
            except httpx.TransportError as error:
                if last:
                    raise HalfbyteError(f"vLLM no longer answers at {self._http.base_url}: {error}") from error
            else:
                if answer.status_code == 200:
                    return answer.json()
                if last or answer.status_code not in _TRANSIENT_STATUS:
                    status = answer.status_code
                    raise Refused(f"vLLM refused {path} ({status}): {_reason(answer)}", status)
            time.sleep(RETRY_AFTER_S)
        raise AssertionError("unreachable")


def _token_logprobs(ids: list[int], choice: dict[str, Any]) -> list[float | None]:
    entries = choice.get("prompt_logprobs")
    if not entries or len(entries) != len(ids):
        raise HalfbyteError("vLLM sent no log-probabilities of the prompt: it is too old, or prompt_logprobs is off")
    try:
        return [None] + [float(entry[str(token)]["logprob"]) for token, entry in zip(ids[1:], entries[1:])]
    except (KeyError, TypeError):
        raise HalfbyteError("vLLM's log-probabilities are not those of the tokens that were sent") from None


def _reason(answer: httpx.Response) -> str:
    try:
        tree = answer.json()
        message = tree.get("error", tree)
        message = message.get("message", message) if isinstance(message, dict) else message
    except (ValueError, AttributeError):
        message = answer.text
    return " ".join(str(message).split())[:300] or answer.reason_phrase
