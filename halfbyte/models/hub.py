"""Files to a repository of the Hugging Face Hub. The token is the login's or HF_TOKEN's, and stays inside the library.

HF_ENDPOINT names another server that speaks the Hub's protocol.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from halfbyte.errors import HalfbyteError, UsageError

HINTS = {401: "is the token valid?", 403: "may the token write there?"}
NAME = re.compile(r"[\w.-]+/[\w.-]+")


def upload(files: Mapping[str, Path | bytes], repo: str, *, public: bool, message: str) -> dict[str, Any]:
    """All `files` (by their names in the repository) as one commit to `repo`, made if it is not there.

    A new repository is private unless `public`. One that is public already is written to only with `public`; one that
    is private stays so. Returns {"url", "commit", "private", "created"}.
    Raises UsageError without a login, or where that would publish; HalfbyteError when the Hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if not get_token():
        raise UsageError("there is no login to the Hub: run `hf auth login`, or set HF_TOKEN")
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="halfbyte")
    with _one_line(repo):
        private, created = _repository(api, repo, public)
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=body) for name, body in files.items()]
        done = api.create_commit(repo, operations, commit_message=message, repo_type="model")
    return {"url": f"{api.endpoint}/{repo}", "commit": done.oid, "private": private, "created": created}


def check_name(repo: str) -> None:
    """Raises UsageError for what is no full name of a repository."""
    if not NAME.fullmatch(repo):
        raise UsageError(f"{repo!r} is no repository of the Hub: write owner/name")


def _repository(api: Any, repo: str, public: bool) -> tuple[bool, bool]:
    """(private, created) of the repository, which is there afterwards."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        private = bool(api.repo_info(repo, repo_type="model").private)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=not public, repo_type="model")
        return not public, True
    if not private and not public:
        raise UsageError(f"{repo} is public: give --public to publish there, or choose another name")
    return private, False


@contextmanager
def _one_line(repo: str) -> Iterator[None]:
    """Whatever the Hub, the network or the library says, in one line that tells what to do."""
    from huggingface_hub.errors import HfHubHTTPError

    transport: tuple[Any, ...] = (
        HfHubHTTPError.__bases__
    )  # the errors of the HTTP library, in whichever version the Hub's carries it
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        hint = HINTS.get(int(status or 0), "try again later")
        raise HalfbyteError(
            f"the Hub refused {repo} ({status}: {_first(error.server_message or error)}): {hint}"
        ) from None
    except (*transport, OSError, ValueError, RuntimeError) as error:
        raise HalfbyteError(f"{repo} was not uploaded: {_first(error)}; the same command goes on") from None


def _first(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
