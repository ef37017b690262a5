"""From the recipe's `base` to a family with its networks loaded."""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path

import tuner.families
from tuner.data.cache import Hashes
from tuner.errors import UserError
from tuner.family import Family

EMBEDDED = Path(__file__).parent / "embedded"


def load(
    path: str, revision: str | None, new: Sequence[str], needs: Sequence[str], seed: int, hashes: Hashes
) -> Family:
    """Load what a run needs of a base.

    Args:
        path: `embedded`, a local diffusers folder, or a Hub id.
        revision: of a Hub id.
        new: components that are initialised afresh from their config.json.
        needs: components that are loaded.
        seed: for `new`.
        hashes: where content hashes are remembered.

    Raises:
        UserError: there is no such base, or no family knows it, or a component does not load, or a key has no
            effect on this run.
    """
    if unused := [name for name in new if name not in needs]:
        raise UserError(
            f"base.new: {', '.join(unused)} has no effect: this run loads {', '.join(needs)} only"
        )
    if revision is not None and (path == "embedded" or Path(path).is_dir()):
        raise UserError(f"base.revision: {revision} has no effect: {path} is a folder here, not a Hub id")
    folder = _folder(path, revision)
    kind = recognise(folder)
    family: Family = importlib.import_module(f"tuner.families.{kind}").FAMILY.load(folder, needs, new, seed)
    family.title = path if path == "embedded" or not Path(path).exists() else Path(path).resolve().name
    family.digests = {
        name: f"new from seed {seed}" if name in new else component_digest(folder / name, hashes)
        for name in needs
    }
    return family


def recognise(folder: Path) -> str:
    """The name of the family that a diffusers folder belongs to.

    Raises:
        UserError: no family knows it.
    """
    names = sorted(module.name for module in pkgutil.iter_modules(tuner.families.__path__))
    for name in names:
        if importlib.import_module(f"tuner.families.{name}").fits(folder):
            return name
    raise UserError(f"base {folder}: none of the families {', '.join(names)} has these components")


def component_digest(place: Path, hashes: Hashes) -> str:
    """A hash over the files of a component."""
    files = sorted(p for p in place.iterdir() if p.suffix in {".json", ".safetensors"})
    found = hashes.of(files)
    text = "".join(f"{p.name} {found[p]}\n" for p in files)
    return hashlib.sha256(text.encode()).hexdigest()


def _folder(path: str, revision: str | None) -> Path:
    if path == "embedded":
        return EMBEDDED
    local = Path(path)
    if local.is_dir():
        return local
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise UserError(
            f"base.path: {path}: no such folder (expected embedded, a diffusers folder, or a Hub id)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = ["*/config.json", "*.json", "tokenizer/*", "*/*.safetensors", "scheduler/*"]
    try:
        return Path(
            snapshot_download(
                path, revision=revision, allow_patterns=wanted, ignore_patterns=["*.fp16.*", "*non_ema*"]
            )
        )
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"base.path: {path}: neither a folder here nor to be had from the Hub: {error}"
        ) from error
