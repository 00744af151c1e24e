"""A stand-in for the Hugging Face Hub: repositories, preupload, LFS and commits over HTTP; every request is kept."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_" + "stand" + "in" * 14
"""What the tests log in with; it must turn up in nothing but the Authorization header."""
COMMIT = "c0ffee" * 6 + "c0ff"


@dataclass
class StandIn:
    """repos: by name, whether private. files: what was committed, by path. requests: (method, path, authorised)."""

    url: str = ""
    repos: dict[str, bool] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    refuse: int | None = None


@contextmanager
def hub() -> Iterator[StandIn]:
    """A running stand-in."""
    state = StandIn()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._note()
            name = self.path.removeprefix("/api/models/").split("/revision/")[0]
            if name not in state.repos:
                return self._say(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            self._say(200, {"id": name, "private": state.repos[name], "sha": COMMIT, "siblings": []})

        do_HEAD = do_GET

        def do_PUT(self) -> None:
            self._note()
            state.blobs[self.path.removeprefix("/lfs/")] = self._body()
            self._say(200, {})

        def do_POST(self) -> None:
            self._note()
            body = self._body()
            if state.refuse is not None:
                return self._say(state.refuse, {"error": "you may not"})
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                name = "/".join(x for x in (asked.get("organization"), asked["name"]) if x)
                state.repos[name] = bool(asked.get("private") or asked.get("visibility") == "private")
                self._say(200, {"url": f"{state.url}/{name}"})
            elif self.path == "/api/validate-yaml":
                asked = json.loads(body)
                front = yaml.safe_load(asked["content"].split("---")[1])
                broken = not isinstance(front, dict) or not isinstance(front.get("tags", []), list)
                self._say(200, {"errors": [{"message": "no mapping"}] if broken else [], "warnings": []})
            elif "/preupload/" in self.path:
                named = [f["path"] for f in json.loads(body)["files"]]
                modes = [{"path": p, "uploadMode": "lfs" if p.endswith(".safetensors") else "regular"} for p in named]
                self._say(200, {"files": [{**mode, "shouldIgnore": False, "oid": None} for mode in modes]})
            elif self.path.endswith("/info/lfs/objects/batch"):
                objects = [
                    {**o, "actions": {"upload": {"href": f"{state.url}/lfs/{o['oid']}"}}}
                    for o in json.loads(body)["objects"]
                ]
                self._say(200, {"transfer": "basic", "objects": objects})
            elif "/commit/" in self.path:
                for row in map(json.loads, body.splitlines()):
                    if row["key"] == "file":
                        state.files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
                    elif row["key"] == "lfsFile":
                        state.files[row["value"]["path"]] = state.blobs[row["value"]["oid"]]
                self._say(200, {"commitUrl": f"{state.url}/{self._repository()}/commit/{COMMIT}", "commitOid": COMMIT})
            else:
                self._say(404, {"error": self.path})

        def _repository(self) -> str:
            return self.path.removeprefix("/api/models/").split("/commit/")[0]

        def _note(self) -> None:
            state.requests.append((self.command, self.path.partition("?")[0], self.headers.get("Authorization", "")))

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _say(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
            text = json.dumps(value).encode()
            self.send_response(status)
            for name, content in {**(headers or {}), "Content-Type": "application/json"}.items():
                self.send_header(name, content)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
