"""Uploads a finished run to the Hugging Face Hub, in one commit.

What breaks on the way is tried again: everything here may be done twice. Files that have arrived are not sent
again, and a commit whose answer was lost is found to have changed nothing. HF_ENDPOINT, HF_TOKEN and HF_HOME
are huggingface_hub's.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tuner import __version__
from tuner.progress import say
from tuner.push import parcel
from tuner.push.finished import PushError
from tuner.push.parcel import Parcel, Wish

__all__ = ["PushError", "Wish", "push"]

WAITS = (1, 2, 4)  # seconds before each further attempt
BUSY = (408, 429, 500, 502, 503, 504)  # answers that another attempt may change

T = TypeVar("T")


def push(run: Path, wish: Wish, dry_run: bool = False) -> None:
    """Upload the run in the folder `run`, or say what would be uploaded.

    Raises:
        PushError: what the user can mend; nothing is uploaded then, unless it says otherwise.
    """
    _check_name(wish)
    packed = parcel.pack(run, wish)
    sizes = packed.sizes()
    if dry_run:
        for path, size in sizes.items():
            say(f"{size:>13,}  {path}")
        say(f"\n{packed.card}")
        return
    hub = _Hub(wish)
    hub.prepare(packed.card)
    say(f"uploading {len(sizes)} files, {sum(sizes.values()):,} bytes, to {wish.repo}")
    commit = hub.upload(packed)
    hub.compare(packed, commit)
    say(f"pushed and compared: {hub.place}")


def _check_name(wish: Wish) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(wish.repo)
    except HFValidationError as error:
        raise PushError(f"{wish.repo}: no name of a repository: {error}") from error
    if wish.repo.count("/") != 1:
        raise PushError(f"{wish.repo}: expected owner/name, the owner being you or your organisation")


class _Hub:
    """The Hub, seen from one repository."""

    def __init__(self, wish: Wish) -> None:
        from huggingface_hub import HfApi, get_token, is_offline_mode

        if is_offline_mode():
            raise PushError(
                "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, so that nothing can be uploaded: unset it"
            )
        token = get_token()
        if token is None:
            raise PushError(
                "there is no token for the Hub: log in by `hf auth login`, or set HF_TOKEN "
                "(made at https://huggingface.co/settings/tokens, with the right to write)"
            )
        self.wish = wish
        self.api = HfApi(token=token, library_name="tuner", library_version=__version__)
        self.user = "unknown"

    @property
    def place(self) -> str:
        branch = "" if self.wish.branch == "main" else f"/tree/{self.wish.branch}"
        return f"{self.api.endpoint}/{self.wish.repo}{branch}"

    def prepare(self, card: str) -> None:
        """Check token and card, and make the repository and the branch where they are missing."""
        from huggingface_hub import ModelCard

        wish, api = self.wish, self.api
        self.user = str(self._patiently("asking whose the token is", api.whoami)["name"])
        self._patiently("having the card checked", lambda: ModelCard(card).validate())
        private = True if wish.private else None
        make = lambda: api.create_repo(wish.repo, private=private, exist_ok=True)  # noqa: E731
        self._patiently("making the repository", make)
        if wish.private:
            info = self._patiently("looking at the repository", lambda: api.model_info(wish.repo))
            if not info.private:
                raise PushError(
                    f"{wish.repo} is there already, and public; --private makes a new repository private. "
                    "Nothing was uploaded: change it in its settings, or leave --private out"
                )
        if wish.branch != "main":
            branch = lambda: api.create_branch(wish.repo, branch=wish.branch, exist_ok=True)  # noqa: E731
            self._patiently("making the branch", branch)

    def upload(self, packed: Parcel) -> str:
        """Send the files in one commit; its name."""
        from huggingface_hub import CommitOperationAdd

        def send() -> Any:
            # Made anew for each attempt, as the library marks what it has done on them.
            operations = [
                CommitOperationAdd(path_in_repo=path, path_or_fileobj=source)
                for path, source in packed.files.items()
            ]
            return self.api.create_commit(
                self.wish.repo, operations, commit_message=packed.message, revision=self.wish.branch
            )

        return str(self._patiently("uploading", send).oid)

    def compare(self, packed: Parcel, commit: str) -> None:
        """Raises PushError where the Hub does not have exactly what was sent."""
        paths = list(packed.files)
        ask = lambda: self.api.get_paths_info(self.wish.repo, paths, revision=commit)  # noqa: E731
        there: dict[str, Any] = {one.path: one for one in self._patiently("comparing", ask)}
        for path, source in packed.files.items():
            found = there.get(path)
            same = found is not None and _digest(source, found.lfs is None) == (
                found.blob_id if found.lfs is None else found.lfs.sha256
            )
            if not same:
                raise PushError(f"{path}: the Hub has another content than was sent, or none; push again")

    def _patiently(self, what: str, action: Callable[[], T]) -> T:
        """Do it, and again where the connection broke or the Hub was busy.

        Raises:
            PushError: it does not work, with the reason.
        """
        from huggingface_hub import errors

        broken: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]  # httpx's, of whichever version
        for wait in (*WAITS, None):
            try:
                return action()
            except (broken, ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
                cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
                if not _passing(cause):
                    raise PushError(self._explained(what, cause)) from error
                if wait is None:
                    raise PushError(
                        f"{what}: no success in {len(WAITS) + 1} attempts: {_first_line(cause)}\n"
                        f"({self.api.endpoint}; nothing on this machine was changed, and the same command "
                        f"sends again only what has not arrived{_hint(cause)})"
                    ) from error
                say(f"{what}: {_first_line(cause)}; again in {wait} s")
                time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _explained(self, what: str, error: BaseException) -> str:
        """Why the Hub refused."""
        wish, status = self.wish, _status(error)
        if status == 401:
            return f"{what}: the Hub does not know this token (HF_TOKEN, or else the one of `hf auth login`)"
        if status == 403:
            owner = wish.repo.partition("/")[0]
            return (
                f"{what}: the token of {self.user} has no right to write to {owner}; it needs the role "
                f"write, and {self.user} has to be {owner} or to belong to it"
            )
        return f"{what}: the Hub refused: {error}"


def _passing(error: BaseException) -> bool:
    """Whether another attempt may help: the connection broke, or the Hub was busy."""
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return False
    status = _status(error)
    if status is not None:
        return status in BUSY
    network: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    # An answer that is no JSON comes from something on the way.
    return isinstance(error, (network, ConnectionError, TimeoutError, json.JSONDecodeError))


def _hint(error: BaseException) -> str:
    """What helps where a Hub of one's own, or a proxy, does not know the newer protocol for large files."""
    return "; HF_HUB_DISABLE_XET=1 does without Xet" if "xet" in str(error).lower() else ""


def _status(error: BaseException) -> int | None:
    """The status of the answer, if there was one."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return None if status is None else int(status)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _digest(source: Path | bytes, git: bool) -> str:
    """The content's name in git, or its SHA-256."""
    if isinstance(source, Path) and not git:
        with source.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    content = source if isinstance(source, bytes) else source.read_bytes()
    return (
        hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if git
        else hashlib.sha256(content).hexdigest()
    )
