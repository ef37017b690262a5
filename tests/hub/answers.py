"""What the Hub's stand-in answers: a function for each request, and which paths they serve (ROUTES)."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from .state import LARGE, ORGANISATION, USER, Answer, Blob, Refusal, Repo, Request, State, kind_of, large


def _prefix(kind: str | None) -> str:
    return "datasets/" if kind_of(kind) == "dataset" else ""


def whoami(hub: State, request: Request) -> Answer:
    if request.user is None:
        raise Refusal(401, "Invalid username or password.")
    orgs = [{"type": "org", "name": ORGANISATION}] if request.user == USER else []
    return Answer({"type": "user", "name": request.user, "orgs": orgs, "auth": {"type": "access_token"}})


def create(hub: State, request: Request) -> Answer:
    about = request.json()
    kind, name = kind_of(about.get("type")), f"{about.get('organization') or request.user}/{about['name']}"
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


def validate_yaml(hub: State, request: Request) -> Answer:
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


def preupload(hub: State, request: Request, kind: str, name: str, revision: str) -> Answer:
    repo = hub.repo(request, kind, name, write=True)
    there = hub.commit(repo, revision).files
    told = []
    for one in request.json()["files"]:
        path, old = one["path"], there.get(one["path"])
        mode = "lfs" if large(path, one["size"]) else "regular"
        oid = None if old is None else old.sha256 if old.large else old.oid
        told.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return Answer({"files": told})


def lfs_batch(hub: State, request: Request, kind: str | None, name: str) -> Answer:
    hub.repo(request, kind_of(kind), name, write=True)
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


def lfs_put(hub: State, request: Request, oid: str, number: str | None) -> Answer:
    digest = hashlib.sha256(request.body).hexdigest()
    if number is not None:
        hub.parts[oid, int(number)] = request.body
    elif digest != oid:
        raise Refusal(400, f"the content's SHA-256 is {digest}, not {oid}")
    else:
        hub.store[oid] = request.body
    return Answer(b"", headers={"ETag": f'"{digest[:32]}"'})


def lfs_complete(hub: State, request: Request, oid: str) -> Answer:
    numbers = [part["partNumber"] for part in request.json()["parts"]]
    whole = b"".join(hub.parts.pop((oid, number)) for number in sorted(numbers))
    if hashlib.sha256(whole).hexdigest() != oid:
        raise Refusal(400, "the parts do not make the file")
    hub.store[oid] = whole
    return Answer({"success": True})


def lfs_verify(hub: State, request: Request, oid: str) -> Answer:
    about = request.json()
    if len(hub.store.get(about["oid"], b"")) != about["size"]:
        raise Refusal(404, "the object is not there")
    return Answer({"success": True})


def make_commit(hub: State, request: Request, kind: str, name: str, revision: str) -> Answer:
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


def make_branch(hub: State, request: Request, kind: str, name: str, branch: str) -> Answer:
    repo = hub.repo(request, kind, name, write=True)
    start = (json.loads(request.body) if request.body else {}).get("startingPoint", "main")
    if unquote(branch) in repo.branches:
        raise Refusal(409, "Reference already exists")
    repo.branches[unquote(branch)] = hub.commit(repo, start).sha
    return Answer({"success": True})


def info(hub: State, request: Request, kind: str, name: str, revision: str | None = None) -> Answer:
    repo = hub.repo(request, kind, name)
    commit = hub.commit(repo, revision or "main")
    siblings = [{"rfilename": path} for path in sorted(commit.files)]
    told = {"_id": "0", "id": name, "author": name.partition("/")[0], "sha": commit.sha, "siblings": siblings}
    told |= {
        "private": repo.private,
        "gated": "auto" if repo.gated else False,
        "disabled": False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
    }
    return Answer(told)


def refs(hub: State, request: Request, kind: str, name: str) -> Answer:
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
    hub: State, request: Request, kind: str, name: str, revision: str, folder: str | None = None
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


def paths_info(hub: State, request: Request, kind: str, name: str, revision: str) -> Answer:
    commit = hub.commit(hub.repo(request, kind, name), revision)
    if "json" in request.headers.get("Content-Type", ""):
        wanted = request.json()["paths"]
    else:
        wanted = parse_qs(request.body.decode()).get("paths", [])
    found = entries(commit.files)
    return Answer([found[path] for path in wanted if path in found])


def resolve(hub: State, request: Request, kind: str | None, name: str, revision: str, path: str) -> Answer:
    repo = hub.repo(request, kind_of(kind), name)
    if repo.gated and not hub.writes(request.user, name):
        raise Refusal(403 if request.user else 401, f"Access to model {name} is restricted", "GatedRepo")
    commit = hub.commit(repo, revision)
    headers = {"X-Repo-Commit": commit.sha}
    blob = commit.files.get(unquote(path))
    if blob is None:
        refusal = Refusal(404, "Entry not found", "EntryNotFound")
        return Answer({"error": str(refusal)}, 404, headers | {"X-Error-Code": "EntryNotFound"})
    if not blob.large:
        return part(blob.content, request, headers | {"ETag": f'"{blob.oid}"'})
    headers |= {"X-Linked-Size": str(len(blob.content)), "X-Linked-ETag": f'"{blob.sha256}"'}
    return Answer(b"", 302, headers | {"Location": f"{hub.storage}/cdn/{blob.sha256}"})


def cdn(hub: State, request: Request, sha256: str) -> Answer:
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
