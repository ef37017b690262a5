"""A stand-in for the Hugging Face Hub on 127.0.0.1, with the part of its HTTP interface that tests need.

Written after what huggingface_hub 2.4 sends and reads: who one is, making repositories and branches, commits
with regular and large (LFS) files, listings, downloads with ranges. Large files lie, as at the Hub, with
another server, here another port, which takes no tokens. Xet is not spoken: clients set HF_HUB_DISABLE_XET=1,
as `environment` does.

Reached through the fixture `hub` of conftest.py. All that it holds is in memory and open to tests. To serve
more, write a function that answers, and add it to ROUTES, in hub/answers.py.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from .answers import ROUTES
from .state import GUEST, GUEST_TOKEN, TOKEN, USER, Answer, Kind, Refusal, Repo, Request, State

How = Literal["close", "half", "lost"] | int


@dataclass
class Fault:
    """What goes wrong, how often.

    close: the connection breaks in the middle of the request; half: in the middle of the answer; lost: the
    request is carried out and no answer comes; a number: this status is answered.
    """

    method: str
    pattern: str
    how: How
    left: int


class Hub(State):
    """The server; a context manager.

    Attributes:
        requests: method, path and status of every request, in the order in which they were answered.
    """

    def __init__(self) -> None:
        kind = type("OwnHandler", (Handler,), {"hub": self})
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), kind) for _ in range(2)]
        super().__init__(*(f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers))
        self.requests: list[tuple[str, str, int]] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.tokens = {TOKEN: USER, GUEST_TOKEN: GUEST}

    def __enter__(self) -> Hub:
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """The environment of a process that takes this for the Hub, with caches and tokens below `home`."""
        own = ("HF_", "HUGGING", "TRANSFORMERS_", "XDG_", "DISABLE_TELEMETRY")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        made = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home / "huggingface"),
            "XDG_CACHE_HOME": str(home / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        return kept | made | ({} if token is None else {"HF_TOKEN": token})

    def take_in(self, patch: Any, home: Path, token: str | None = TOKEN) -> None:
        """Make this the Hub of the present process, until pytest's monkeypatch `patch` is undone.

        huggingface_hub reads its environment when it is imported, so that its constants are set as well.
        Other libraries may have copied them: what goes through these needs a process with `environment`.
        Pauses (time.sleep) are a fiftieth as long: clients wait a second and more before they try again.
        """
        from huggingface_hub import constants, hf_api

        environment = self.environment(home, token)
        for name in set(os.environ) - set(environment):
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        place = home / "huggingface"
        for name, constant in {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HOME": str(place),
            "HF_HUB_CACHE": str(place / "hub"),
            "HF_TOKEN_PATH": str(place / "token"),
            "HF_STORED_TOKENS_PATH": str(place / "stored_tokens"),
        }.items():
            patch.setattr(constants, name, constant)
        patch.setattr(hf_api.api, "endpoint", self.url)  # behind huggingface_hub.model_info and its like
        sleep = time.sleep
        patch.setattr(time, "sleep", lambda seconds: sleep(seconds / 50))

    def serve(self, folder: Path, name: str, kind: Kind = "model", private: bool = False) -> Repo:
        """Offer a folder as a repository."""
        repo = self.repos[kind, name] = Repo(private)
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        assert files, f"nothing in {folder}"
        blobs = {place: self.blob(place, path.read_bytes()) for place, path in files.items()}
        repo.commit("main", "as served", blobs)
        return repo

    def fail(self, method: str, pattern: str, how: How = "close", times: int = 1) -> None:
        """The next `times` requests of this method to a path with this pattern in it go wrong."""
        self.faults.append(Fault(method, pattern, how, times))

    def fault(self, method: str, path: str) -> How | None:
        with self.lock:
            for fault in self.faults:
                if fault.left and fault.method == method and re.search(fault.pattern, path):
                    fault.left -= 1
                    return fault.how
        return None

    def asked(self, method: str, pattern: str) -> int:
        """How many such requests there were."""
        return sum(m == method and re.search(pattern, path) is not None for m, path, _ in self.requests)


class Handler(BaseHTTPRequestHandler):
    """Reads a request, does to it what a fault says, and answers."""

    protocol_version = "HTTP/1.1"  # connections stay open, so that a broken one is told from a closed one
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Tests look at `requests` instead."""

    def _serve(self) -> None:
        url = urlsplit(self.path)
        how = self.hub.fault(self.command, url.path)
        if how == "close":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            return self._break(url.path)
        body = b"".join(self._body())
        if isinstance(how, int):
            answer = Answer({"error": "the stand-in was told to fail"}, how)
        else:
            answer = self._answer(url.path, {k: v[0] for k, v in parse_qs(url.query).items()}, body)
        if how == "lost":
            return self._break(url.path)
        self.hub.requests.append((self.command, url.path, answer.status))
        return self._send(answer, half=how == "half")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _body(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            yield self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, path: str, query: dict[str, str], body: bytes) -> Answer:
        hub, told = self.hub, self.headers.get("Authorization", "")
        method = "GET" if self.command == "HEAD" else self.command
        try:
            with hub.lock:
                user = hub.tokens.get(told.removeprefix("Bearer "))
                if told and user is None:
                    raise Refusal(401, "Invalid credentials in Authorization header")
                request = Request(method, path, query, body, user, self.headers)
                for wanted, pattern, function in ROUTES:
                    if wanted == method and (found := re.fullmatch(pattern, path)):
                        return function(hub, request, *found.groups())
            raise Refusal(404, f"the stand-in has no {method} {path}")
        except Refusal as refusal:
            headers = {"X-Error-Message": str(refusal)}
            headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
            return Answer({"error": str(refusal)}, refusal.status, headers)

    def _send(self, answer: Answer, half: bool) -> None:
        raw = isinstance(answer.content, bytes)
        content = answer.content if raw else json.dumps(answer.content).encode()
        kind = "text/plain" if raw else "application/json"
        self.send_response(answer.status)
        for name, value in ({"Content-Type": kind} | answer.headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if half else content)
        if half:
            self._cut()

    def _break(self, path: str) -> None:
        self.hub.requests.append((self.command, path, 0))
        self._cut()

    def _cut(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
