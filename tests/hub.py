"""A stand-in for the Hugging Face Hub on 127.0.0.1, with the part of its HTTP interface that tests need.

Written after what huggingface_hub 2.4 sends and reads: who one is, making repositories and branches, commits
with regular and large (LFS) files, listings, downloads with ranges. Large files lie, as at the Hub, with
another server, here another port, which takes no tokens. Xet is not spoken: clients set HF_HUB_DISABLE_XET=1,
as `environment` does.

Reached through the fixture `hub` of conftest.py. All that it holds is in memory and open to tests. To serve
more, write a function that answers, and add it to ROUTES.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

USER, TOKEN = "tester", "hf_token_of_the_tester"
GUEST, GUEST_TOKEN = "guest", "hf_token_of_the_guest"
ORGANISATION = "guild"  # that the tester belongs to
LARGE = (".safetensors", ".bin", ".parquet", ".arrow", ".tar", ".zip", ".jpg", ".jpeg", ".webp")
MUCH = 10_000_000  # bytes; larger files are large whatever they are called

Kind = Literal["model", "dataset"]
How = Literal["close", "half", "lost"] | int


@dataclass(frozen=True)
class Blob:
    """A file's content."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git holds: the content, or the three lines that stand for it (git-lfs spec v1)."""
        version = "https://git-lfs.github.com/spec/v1"
        about = f"version {version}\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return about.encode() if self.large else self.content

    @property
    def oid(self) -> str:
        """git's name of it."""
        return hashlib.sha1(b"blob %d\0" % len(self.pointer) + self.pointer).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        """As listings tell it."""
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        lfs = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return entry | ({"lfs": lfs} if self.large else {})


@dataclass(frozen=True)
class Commit:
    """A state of a repository."""

    sha: str
    parent: str | None
    title: str
    files: Mapping[str, Blob]


@dataclass
class Repo:
    """A repository: its commits and the branches that point to them."""

    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, title: str, files: Mapping[str, Blob]) -> Commit:
        parent = self.branches.get(branch)
        content = [parent, title, len(self.commits), {path: blob.oid for path, blob in sorted(files.items())}]
        sha = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[sha] = made = Commit(sha, parent, title, dict(files))
        self.branches[branch] = sha
        return made

    def files(self, branch: str = "main") -> dict[str, bytes]:
        """What lies there now."""
        return {path: blob.content for path, blob in self.commits[self.branches[branch]].files.items()}

    def history(self, branch: str = "main") -> list[str]:
        """The titles of a branch's commits, newest first."""
        titles, at = [], self.branches.get(branch)
        while at is not None:
            titles.append(self.commits[at].title)
            at = self.commits[at].parent
        return titles


class Refusal(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class Answer:
    """What is sent back."""

    content: Any = None  # bytes, or what becomes JSON
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


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


@dataclass
class Request:
    """What came in."""

    method: str
    path: str
    query: dict[str, str]
    body: bytes
    user: str | None
    headers: Mapping[str, str]

    def json(self) -> Any:
        return json.loads(self.body)


class Hub:
    """The server; a context manager.

    Attributes:
        repos: by kind and name.
        requests: method, path and status of every request, in the order in which they were answered.
        part: large files of more bytes are uploaded in parts of this size; None: none are.
        page: entries on one page of a listing.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[Kind, str], Repo] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.part: int | None = None
        self.page = 1000
        self.store: dict[str, bytes] = {}  # large files by SHA-256
        self.parts: dict[tuple[str, int], bytes] = {}
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.tokens = {TOKEN: USER, GUEST_TOKEN: GUEST}
        kind = type("OwnHandler", (Handler,), {"hub": self})
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), kind) for _ in range(2)]
        self.url, self.storage = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

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

    def blob(self, path: str, content: bytes) -> Blob:
        blob = Blob(content, large(path, len(content)))
        if blob.large:
            self.store[blob.sha256] = content
        return blob

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

    # ---- who may do what

    def writes(self, user: str | None, name: str) -> bool:
        owner = name.partition("/")[0]
        return owner == user or (user == USER and owner == ORGANISATION)

    def repo(self, request: Request, kind: str, name: str, write: bool = False) -> Repo:
        """The repository that a request is about, if it may know of it."""
        found = self.repos.get((_kind(kind), name))
        allowed = self.writes(request.user, name)
        if found is None or (found.private and not allowed):
            status = 404 if request.user else 401  # the Hub does not tell whether there is one
            raise Refusal(status, "Repository not found", "RepoNotFound")
        if write and not allowed:
            raise Refusal(403 if request.user else 401, f"You have no right to write to {name}")
        return found

    def commit(self, repo: Repo, revision: str) -> Commit:
        sha = repo.branches.get(unquote(revision), revision)
        if sha not in repo.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo.commits[sha]


def large(path: str, size: int) -> bool:
    return path.lower().endswith(LARGE) or size > MUCH


def _kind(word: str | None) -> Kind:
    return "dataset" if word in ("datasets", "dataset") else "model"


def _prefix(kind: str | None) -> str:
    return "datasets/" if _kind(kind) == "dataset" else ""


# ---- what is answered


def whoami(hub: Hub, request: Request) -> Answer:
    if request.user is None:
        raise Refusal(401, "Invalid username or password.")
    orgs = [{"type": "org", "name": ORGANISATION}] if request.user == USER else []
    return Answer({"type": "user", "name": request.user, "orgs": orgs, "auth": {"type": "access_token"}})


def create(hub: Hub, request: Request) -> Answer:
    about = request.json()
    kind, name = _kind(about.get("type")), f"{about.get('organization') or request.user}/{about['name']}"
    if not hub.writes(request.user, name):
        status = 403 if request.user else 401
        raise Refusal(status, f"You don't have the rights to create a {kind} under this namespace")
    content = {"url": f"{hub.url}/{_prefix(kind)}{name}", "name": name}
    if (kind, name) in hub.repos:
        return Answer(content | {"error": "You already created this repo"}, 409)
    repo = hub.repos[kind, name] = Repo(about.get("visibility") == "private" or bool(about.get("private")))
    rules = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE)
    repo.commit("main", "initial commit", {".gitattributes": Blob(rules.encode(), False)})
    return Answer(content)


def validate_yaml(hub: Hub, request: Request) -> Answer:
    """The rules of the front matter that a card can break most easily."""
    found = re.match(r"---\n(.*?)\n---\n", request.json()["content"], re.DOTALL)
    if found is None:
        return Answer(
            {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        )
    try:
        data = YAML(typ="safe", pure=True).load(found[1])
    except YAMLError as error:
        return Answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
    wrong = []
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", str(data.get("license", "other"))):
        wrong.append('"license" must be one of the known ones')
    base = data.get("base_model", "a/b")
    for one in base if isinstance(base, list) else [base]:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", one):
            wrong.append('"base_model" must be a model on the Hub')
    content = {"errors": [{"message": text} for text in wrong], "warnings": []}
    return Answer(content, 400 if wrong else 200)


def preupload(hub: Hub, request: Request, kind: str, name: str, revision: str) -> Answer:
    repo = hub.repo(request, kind, name, write=True)
    there = hub.commit(repo, revision).files
    told = []
    for one in request.json()["files"]:
        path, old = one["path"], there.get(one["path"])
        mode = "lfs" if large(path, one["size"]) else "regular"
        oid = None if old is None else old.sha256 if old.large else old.oid
        told.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return Answer({"files": told})


def lfs_batch(hub: Hub, request: Request, kind: str | None, name: str) -> Answer:
    hub.repo(request, _kind(kind), name, write=True)
    about = request.json()
    assert about["operation"] == "upload" and about["hash_algo"] == "sha256", about
    objects = []
    for one in about["objects"]:
        told = {"oid": one["oid"], "size": one["size"], "authenticated": True}
        if one["oid"] not in hub.store:
            place = f"{hub.storage}/lfs/{one['oid']}"
            upload: dict[str, Any] = {"href": place}
            if hub.part is not None and one["size"] > hub.part:
                count = -(-one["size"] // hub.part)
                urls = {f"{number:05d}": f"{place}/{number}" for number in range(1, count + 1)}
                upload = {"href": f"{hub.url}/lfs/{one['oid']}/complete"}
                upload["header"] = {"chunk_size": str(hub.part), **urls}
            verify = {"href": f"{hub.url}/lfs/{one['oid']}/verify"}
            told["actions"] = {"upload": upload, "verify": verify}
        objects.append(told)
    return Answer({"transfer": "basic", "objects": objects})


def lfs_put(hub: Hub, request: Request, oid: str, number: str | None) -> Answer:
    digest = hashlib.sha256(request.body).hexdigest()
    if number is not None:
        hub.parts[oid, int(number)] = request.body
    elif digest != oid:
        raise Refusal(400, f"the content's SHA-256 is {digest}, not {oid}")
    else:
        hub.store[oid] = request.body
    return Answer(b"", headers={"ETag": f'"{digest[:32]}"'})


def lfs_complete(hub: Hub, request: Request, oid: str) -> Answer:
    numbers = [part["partNumber"] for part in request.json()["parts"]]
    whole = b"".join(hub.parts.pop((oid, number)) for number in sorted(numbers))
    if hashlib.sha256(whole).hexdigest() != oid:
        raise Refusal(400, "the parts do not make the file")
    hub.store[oid] = whole
    return Answer({"success": True})


def lfs_verify(hub: Hub, request: Request, oid: str) -> Answer:
    about = request.json()
    if len(hub.store.get(about["oid"], b"")) != about["size"]:
        raise Refusal(404, "the object is not there")
    return Answer({"success": True})


def make_commit(hub: Hub, request: Request, kind: str, name: str, revision: str) -> Answer:
    repo = hub.repo(request, kind, name, write=True)
    branch = unquote(revision)
    now = hub.commit(repo, revision)
    if branch not in repo.branches:
        raise Refusal(400, f"{branch} is no branch")
    lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    header = lines[0]["value"]
    assert lines[0]["key"] == "header" and header["summary"], lines[0]
    if header.get("parentCommit", now.sha) != now.sha:
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    files = dict(now.files)
    for line in lines[1:]:
        key, value = line["key"], line["value"]
        path = value["path"].rstrip("/")
        if key == "file":
            assert value["encoding"] == "base64", value["encoding"]
            files[path] = Blob(base64.b64decode(value["content"]), False)
        elif key == "lfsFile":
            if value["oid"] not in hub.store:
                raise Refusal(400, f"the LFS object of {path} was not uploaded")
            files[path] = Blob(hub.store[value["oid"]], True)
        elif key in ("deletedFile", "deletedFolder"):
            gone = [one for one in files if one == path or one.startswith(f"{path}/")]
            if not gone:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            files = {one: blob for one, blob in files.items() if one not in gone}
        else:
            raise Refusal(400, f"unknown operation {key}")
    made = repo.commit(branch, header["summary"], files)
    url = f"{hub.url}/{_prefix(kind)}{name}/commit/{made.sha}"
    return Answer({"success": True, "commitOid": made.sha, "commitUrl": url, "hookOutput": ""})


def make_branch(hub: Hub, request: Request, kind: str, name: str, branch: str) -> Answer:
    repo = hub.repo(request, kind, name, write=True)
    start = (json.loads(request.body) if request.body else {}).get("startingPoint", "main")
    if unquote(branch) in repo.branches:
        raise Refusal(409, "Reference already exists")
    repo.branches[unquote(branch)] = hub.commit(repo, start).sha
    return Answer({"success": True})


def info(hub: Hub, request: Request, kind: str, name: str, revision: str | None = None) -> Answer:
    repo = hub.repo(request, kind, name)
    commit = hub.commit(repo, revision or "main")
    siblings = [{"rfilename": path} for path in sorted(commit.files)]
    told = {"_id": "0", "id": name, "author": name.partition("/")[0], "sha": commit.sha, "siblings": siblings}
    told |= {
        "private": repo.private,
        "gated": False,
        "disabled": False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
    }
    return Answer(told)


def refs(hub: Hub, request: Request, kind: str, name: str) -> Answer:
    repo = hub.repo(request, kind, name)
    heads = [
        {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": sha}
        for branch, sha in repo.branches.items()
    ]
    return Answer({"branches": heads, "converts": [], "tags": []})


def entries(files: Mapping[str, Blob]) -> dict[str, dict[str, Any]]:
    """Files and folders by path."""
    found = {path: blob.entry(path) for path, blob in files.items()}
    folders = {parent.as_posix() for path in files for parent in Path(path).parents} - {"."}
    for folder in folders:
        oid = hashlib.sha1(folder.encode()).hexdigest()
        found[folder] = {"type": "directory", "path": folder, "size": 0, "oid": oid}
    return dict(sorted(found.items()))


def tree(
    hub: Hub, request: Request, kind: str, name: str, revision: str, folder: str | None = None
) -> Answer:
    commit = hub.commit(hub.repo(request, kind, name), revision)
    top = f"{unquote(folder)}/" if folder else ""
    below = [one for path, one in entries(commit.files).items() if path.startswith(top)]
    if top and not below:
        raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    if request.query.get("recursive", "false").lower() != "true":
        below = [one for one in below if "/" not in one["path"].removeprefix(top)]
    if request.query.get("expand", "false").lower() == "true":
        last = {"id": commit.sha, "title": commit.title, "date": "2026-01-01T00:00:00.000Z"}
        below = [one | {"lastCommit": last} for one in below]
    start = int(request.query.get("cursor", 0))
    answer = Answer(below[start : start + hub.page])
    if start + hub.page < len(below):
        query = urlencode(request.query | {"cursor": start + hub.page})
        answer.headers["Link"] = f'<{hub.url}{request.path}?{query}>; rel="next"'
    return answer


def paths_info(hub: Hub, request: Request, kind: str, name: str, revision: str) -> Answer:
    commit = hub.commit(hub.repo(request, kind, name), revision)
    if "json" in request.headers.get("Content-Type", ""):
        wanted = request.json()["paths"]
    else:
        wanted = parse_qs(request.body.decode()).get("paths", [])
    found = entries(commit.files)
    return Answer([found[path] for path in wanted if path in found])


def resolve(hub: Hub, request: Request, kind: str | None, name: str, revision: str, path: str) -> Answer:
    commit = hub.commit(hub.repo(request, _kind(kind), name), revision)
    headers = {"X-Repo-Commit": commit.sha}
    blob = commit.files.get(unquote(path))
    if blob is None:
        refusal = Refusal(404, "Entry not found", "EntryNotFound")
        return Answer({"error": str(refusal)}, 404, headers | {"X-Error-Code": "EntryNotFound"})
    if not blob.large:
        return part(blob.content, request, headers | {"ETag": f'"{blob.oid}"'})
    headers |= {"X-Linked-Size": str(len(blob.content)), "X-Linked-ETag": f'"{blob.sha256}"'}
    return Answer(b"", 302, headers | {"Location": f"{hub.storage}/cdn/{blob.sha256}"})


def cdn(hub: Hub, request: Request, sha256: str) -> Answer:
    if "Authorization" in request.headers:
        raise Refusal(400, "a token of the Hub's was sent to the storage")
    return part(hub.store[sha256], request, {"ETag": f'"{sha256}"'})


def part(content: bytes, request: Request, headers: dict[str, str]) -> Answer:
    """A file, or the range of it that was asked for."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
    headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    if found is None or found[1] + found[2] == "":
        return Answer(content, 200, headers)
    start = int(found[1]) if found[1] else max(len(content) - int(found[2]), 0)
    end = min(int(found[2]) if found[1] and found[2] else len(content) - 1, len(content) - 1)
    if start >= len(content):
        return Answer(b"", 416, headers | {"Content-Range": f"bytes */{len(content)}"})
    headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
    return Answer(content[start : end + 1], 206, headers)


_API = r"/api/(models|datasets)/([^/]+/[^/]+)"
_REPO = r"/(?:(datasets)/)?([^/]+/[^/]+)"
ROUTES: tuple[tuple[str, str, Callable[..., Answer]], ...] = (
    ("GET", r"/api/whoami-v2", whoami),
    ("POST", r"/api/repos/create", create),
    ("POST", r"/api/validate-yaml", validate_yaml),
    ("POST", _API + r"/preupload/([^/]+)", preupload),
    ("POST", _API + r"/commit/([^/]+)", make_commit),
    ("POST", _API + r"/branch/([^/]+)", make_branch),
    ("POST", _API + r"/paths-info/([^/]+)", paths_info),
    ("GET", _API + r"/tree/([^/]+)(?:/(.+))?", tree),
    ("GET", _API + r"/refs", refs),
    ("GET", _API + r"(?:/revision/([^/]+))?", info),
    ("POST", _REPO + r"\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", r"/lfs/([0-9a-f]{64})(?:/(\d+))?", lfs_put),
    ("POST", r"/lfs/([0-9a-f]{64})/complete", lfs_complete),
    ("POST", r"/lfs/([0-9a-f]{64})/verify", lfs_verify),
    ("GET", r"/cdn/([0-9a-f]{64})", cdn),
    ("GET", _REPO + r"/resolve/([^/]+)/(.+)", resolve),
)


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
