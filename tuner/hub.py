"""A base at the Hugging Face Hub: which of its files a run needs, and why they do not come."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from pathlib import Path

from tuner.errors import UserError

_ALWAYS = ("model_index.json", "*/config.json", "scheduler/*.json", "tokenizer*/*.json", "tokenizer*/*.txt")
_STEMS = ("diffusion_pytorch_model", "model")  # how a component's weights are called
_PARTS = ("{}.safetensors", "{}.safetensors.index.json", "{}-?????-of-?????.safetensors")


class HubError(UserError):
    """A base that cannot be had from the Hub."""


def patterns(needs: Collection[str], without: Collection[str] = ()) -> list[str]:
    """The files of a base in diffusers layout that a run needs, as shell patterns.

    Of each component the weights as safetensors, whole or in shards, in the one precision that loaders take
    unasked: no pickles, no `fp16` and `non_ema` variants beside, no component that is not read.

    Args:
        needs: components; `text_encoder` stands for all that the base has.
        without: those of them whose weights are not read.
    """
    folders = ["text_encoder*" if need == "text_encoder" else need for need in needs if need not in without]
    weights = [f"{folder}/{part.format(stem)}" for folder in folders for stem in _STEMS for part in _PARTS]
    return [*_ALWAYS, *sorted(weights)]


def fetch(
    name: str,
    revision: str | None,
    wanted: Sequence[str],
    keys: tuple[str, str] = ("base.path", "base.revision"),
) -> Path:
    """The folder of a Hub repository's files, downloaded where they are not here yet.

    Args:
        name: owner/name.
        revision: a branch, a tag or a commit; None is `main`.
        wanted: shell patterns of files.
        keys: what the user gave name and revision as.

    Raises:
        HubError: the repository or the revision is not there, or closed to this user, or the Hub cannot be
            reached and nothing was downloaded before; one line that says what to do.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{keys[0]}: {name}"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(wanted)))
    except HFValidationError as error:
        raise HubError(
            f"{where}: no folder or file here, and no name of a repository: {_line(error)}"
        ) from error
    except GatedRepoError as error:  # a kind of RepositoryNotFoundError
        raise HubError(
            f"{where}: gated: accept its terms at {_endpoint()}/{name}, then log in as that user by "
            "`hf auth login`, or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(f"{where}: {_missing()}") from error
    except RevisionNotFoundError as error:
        raise HubError(f"{keys[1]}: {revision}: {_revisions(name, revision)}") from error
    except LocalEntryNotFoundError as error:
        raise HubError(f"{where}: {_unreached(error.__cause__)}") from error
    except (HfHubHTTPError, OSError) as error:
        raise HubError(f"{where}: the download from {_endpoint()} failed: {_line(error)}") from error


def check(name: str, folder: Path, needs: Collection[str], without: Collection[str] = ()) -> None:
    """Raises HubError where a base lacks a component's weights; says which files it has instead."""
    found = {place.parent.name for place in folder.glob("*/config.json")}
    if not found:
        others = [file for file in _others(name, folder.name, "") if "/" not in file]
        raise HubError(
            f"base.path: {name}: expected a base in diffusers layout there (unet/config.json and so on), "
            f"found {', '.join(others) or 'nothing'}; of a checkpoint in one file download that file, "
            "and give its path"
        )
    for need in (need for need in needs if need not in without):
        own = {one for one in found if one.startswith(need)} if need == "text_encoder" else {need} & found
        for part in sorted(own):
            if not list((folder / part).glob("*.safetensors")):
                others = _others(name, folder.name, part)
                raise HubError(
                    f"base.path: {name}: expected {part}/*.safetensors in full precision there, "
                    f"found {', '.join(others) or 'no weights'}; convert them, or take another base"
                )


def check_model(name: str, folder: Path, key: str) -> None:
    """Raises HubError where a transformers model lacks its configuration or weights in safetensors."""
    for file in ("config.json", "*.safetensors"):
        if not list(folder.glob(file)):
            others = [one for one in _others(name, folder.name, "") if "/" not in one]
            raise HubError(
                f"{key}: {name}: expected {file} there, found {', '.join(others) or 'nothing'}; "
                "convert it, or take another model or revision"
            )


def _missing() -> str:
    """There is no such repository, or it is a private one: the Hub does not say which."""
    from huggingface_hub import get_token

    known = "for a private one log in by `hf auth login`, or set HF_TOKEN"
    if get_token() is not None:
        known = "a private one needs another token than the one that is set (HF_TOKEN, or `hf auth login`)"
    return f"no such folder or file here, and no such repository at {_endpoint()}: check the name; {known}"


def _revisions(name: str, revision: str | None) -> str:
    """What the repository has instead."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    text = f"{name} has no such branch, tag or commit"
    try:
        refs = HfApi().list_repo_refs(name)
    except (HfHubHTTPError, OSError):
        return text
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    near = difflib.get_close_matches(str(revision), names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{text}; it has {', '.join(names)}{hint}"


def _unreached(cause: BaseException | None) -> str:
    """The Hub was not asked, or did not answer, and the files are not here."""
    from huggingface_hub import is_offline_mode

    here = "no such folder or file here, and not downloaded before"
    if is_offline_mode():
        return f"{here}, while HF_HUB_OFFLINE keeps from asking the Hub: unset it, or give a folder"
    why = f": {_line(cause)}" if cause is not None else ""
    return f"{here}, and {_endpoint()} does not answer{why}; try again later, or give a folder"


def _others(name: str, commit: str, part: str) -> list[str]:
    """The files of a component at the Hub, or of all (`part` is empty), but for JSON."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        files = HfApi().list_repo_files(name, revision=commit)
    except (HfHubHTTPError, OSError):
        return []
    start = f"{part}/" if part else ""
    return sorted(file for file in files if file.startswith(start) and not file.endswith(".json"))


def _endpoint() -> str:
    from huggingface_hub import HfApi

    return HfApi().endpoint


def _line(error: BaseException) -> str:
    """An error's text as one line."""
    return " ".join(str(error).split())
