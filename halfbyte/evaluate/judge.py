"""A judge behind an OpenAI-compatible endpoint that compares two answers, asked in both orders.

Pairwise comparison with swapped positions, after Zheng et al., Judging LLM-as-a-Judge with MT-Bench, 2023: judges
favour the first place, so a verdict that turns with the order is a tie.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpx

from halfbyte.errors import HalfbyteError, UsageError

KEY_VARIABLE = "HALFBYTE_JUDGE_KEY"
ATTEMPTS = 3
TIMEOUT_S = 300.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")
VERDICT = re.compile(r"\[\[\s*(A|B|TIE|C)\s*\]\]", re.I)
SYSTEM = (
    "You compare two assistants that were given the same conversation. Judge how well each follows the user's "
    "instructions: correctness first, then helpfulness, depth and clarity. Do not let the order of the answers, their "
    "length or the assistants' names sway you. Give your reasons in a few sentences. End with exactly one of these: "
    "[[A]] if assistant A is better, [[B]] if assistant B is better, [[TIE]] if neither is."
)


@dataclass(frozen=True)
class Verdict:
    """What the judge made of one conversation: 1, 0.5 or 0 for the second answers (a win, a tie, a loss).

    None where it could not be read. `consistent`: both orders gave the same verdict.
    """

    score: float | None
    consistent: bool


class Judge:
    """Use it as a context manager. `url`: the endpoint's base, with or without /v1 or /chat/completions.

    The key is read from the environment and goes nowhere but into the request's header.
    Raises UsageError for what is no URL.
    """

    def __init__(self, url: str, model: str, key_variable: str = KEY_VARIABLE) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{url!r} is no URL of a judge: write http://HOST/v1 or https://HOST/v1")
        if parts.username or parts.password:
            raise UsageError(f"a judge's URL may hold no password: put the key in {key_variable}")
        base = url.rstrip("/").removesuffix("/chat/completions").rstrip("/")
        self.endpoint = f"{base}/chat/completions" if parts.path.strip("/") else f"{base}/v1/chat/completions"
        self.host, self.model = parts.netloc, model
        self._key = os.environ.get(key_variable, "")
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._http = httpx.Client(headers=headers, timeout=TIMEOUT_S, trust_env=parts.hostname not in LOOPBACK)

    def __enter__(self) -> Judge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def compare(
        self, turns: Sequence[str], first: Sequence[str], second: Sequence[str], reference: Sequence[str] = ()
    ) -> Verdict:
        """The verdict on `second` against `first`: answers to the same turns.

        Raises HalfbyteError when the endpoint refuses or does not answer.
        """
        there = self._verdict(_prompt(turns, first, second, reference))
        back = self._verdict(_prompt(turns, second, first, reference))
        if there is None or back is None:
            return Verdict(None, False)
        back = 1 - back
        return Verdict(there if there == back else 0.5, there == back)

    def _verdict(self, prompt: str) -> float | None:
        """1 where B is better, 0 where A is, 0.5 for a tie; None where the judge's answer holds no verdict."""
        found = VERDICT.findall(self._ask(prompt))
        return {"A": 0.0, "B": 1.0}.get(found[-1].upper(), 0.5) if found else None

    def _ask(self, prompt: str) -> str:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
        body = {"model": self.model, "messages": messages, "temperature": 0.0}
        problem = ""
        for _ in range(ATTEMPTS):
            try:
                answer = self._http.post(self.endpoint, json=body)
            except httpx.HTTPError as error:
                problem = f"the judge at {self.host} does not answer: {error}"
                continue
            if answer.status_code == 200:
                return self._content(answer)
            problem = f"the judge at {self.host} refused ({answer.status_code}): {answer.text[:200]}"
            if answer.status_code < 500 and answer.status_code != 429:
                break
        raise HalfbyteError(self._hidden(problem))

    def _content(self, answer: httpx.Response) -> str:
        try:
            return str(answer.json()["choices"][0]["message"]["content"] or "")
        except (ValueError, KeyError, IndexError, TypeError):
            raise HalfbyteError(f"the judge at {self.host} speaks no OpenAI chat API: name another URL") from None

    def _hidden(self, text: str) -> str:
        """A message of the endpoint's in one line, the key in it blacked out."""
        line = " ".join(text.split())
        return line.replace(self._key, "***") if self._key else line

    def describe(self) -> dict[str, Any]:
        """What a result says of the judge."""
        return {"host": self.host, "model": self.model}


def _prompt(turns: Sequence[str], a: Sequence[str], b: Sequence[str], reference: Sequence[str]) -> str:
    parts = []
    for label, answers in (("assistant A", a), ("assistant B", b), ("a reference answer", reference)):
        if answers:
            lines = [f"User: {turn}\n\nAssistant: {said}" for turn, said in zip(turns, answers)]
            parts.append(f"<conversation with {label}>\n" + "\n\n".join(lines) + "\n</conversation>")
    return "\n\n".join(parts)
