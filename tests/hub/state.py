"""What the Hub's stand-in holds, and who may do what with it; hub.py beside this folder serves it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import unquote

USER, TOKEN = "tester", "hf_token_of_the_tester"
GUEST, GUEST_TOKEN = "guest", "hf_token_of_the_guest"
ORGANISATION = "guild"  # that the tester belongs to
LARGE = (".safetensors", ".bin", ".parquet", ".arrow", ".tar", ".zip", ".jpg", ".jpeg", ".webp")
MUCH = 10_000_000  # bytes; larger files are large whatever they are called

Kind = Literal["model", "dataset"]


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
    """A repository: its commits and the branches that point to them.

    A gated one is seen by all, and its files are given to its owner alone.
    """

    private: bool = False
    gated: bool = False
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


class State:
    """What the answers are made of.

    Attributes:
        repos: by kind and name.
        part: large files of more bytes are uploaded in parts of this size; None: none are.
        page: entries on one page of a listing.
        url, storage: where the Hub is, and where large files lie.
    """

    def __init__(self, url: str, storage: str) -> None:
        self.url, self.storage = url, storage
        self.repos: dict[tuple[Kind, str], Repo] = {}
        self.part: int | None = None
        self.page = 1000
        self.store: dict[str, bytes] = {}  # large files by SHA-256
        self.parts: dict[tuple[str, int], bytes] = {}

    def blob(self, path: str, content: bytes) -> Blob:
        blob = Blob(content, large(path, len(content)))
        if blob.large:
            self.store[blob.sha256] = content
        return blob

    def writes(self, user: str | None, name: str) -> bool:
        owner = name.partition("/")[0]
        return owner == user or (user == USER and owner == ORGANISATION)

    def repo(self, request: Request, kind: str, name: str, write: bool = False) -> Repo:
        """The repository that a request is about, if it may know of it."""
        found = self.repos.get((kind_of(kind), name))
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


def kind_of(word: str | None) -> Kind:
    return "dataset" if word in ("datasets", "dataset") else "model"
