"""From the recipe's `base` to a family with its networks loaded."""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import tuner.families
from tuner import hub, quantised, single_file
from tuner.components import config_of
from tuner.data.cache import Hashes
from tuner.errors import UserError
from tuner.family import Family, Options
from tuner.progress import say

EMBEDDED = Path(__file__).parent / "embedded"


def load(
    path: str,
    revision: str | None,
    new: Sequence[str],
    needs: Sequence[str],
    seed: int,
    hashes: Hashes,
    options: Options | None = None,
) -> Family:
    """Load what a run needs of a base.

    Args:
        path: `embedded`, a local diffusers folder, a checkpoint in one file, or a Hub id.
        revision: of a Hub id.
        new: components that are initialised afresh from their config.json.
        needs: components that are loaded; `text_encoder` stands for all that the family has.
        seed: for `new`.
        hashes: where content hashes are remembered.
        options: how it is held and read.

    Raises:
        UserError: there is no such base, or no family knows it, or a component does not load, or a key has no
            effect on this run.
    """
    folder, options = find(path, revision, new, needs, hashes, Options() if options is None else options)
    kind = importlib.import_module(f"tuner.families.{recognise(folder)}").FAMILY
    family: Family = kind.load(folder, needs, new, seed, options)
    if unused := [name for name in new if name not in family.modules()]:
        loaded = ", ".join(family.modules())
        raise UserError(f"base.new: {', '.join(unused)} has no effect: this run loads {loaded} only")
    family.title = title_of(path)
    family.digests = digests(family, folder, new, seed, hashes)
    return family


def find(
    path: str,
    revision: str | None,
    new: Sequence[str],
    needs: Sequence[str],
    hashes: Hashes,
    options: Options,
) -> tuple[Path, Options]:
    """The diffusers folder of a base, wherever it is, and the options with an autoencoder's file as a folder.

    Arguments and errors as of `load`; no network is loaded.
    """
    if revision is not None and (path == "embedded" or Path(path).exists()):
        raise UserError(f"base.revision: {revision} has no effect: {path} is here, and not a Hub id")
    if options.prediction is not None and not Path(path).is_file():
        raise UserError(
            f"base.prediction: {options.prediction} has no effect: {path} is no checkpoint in one file; "
            "the configuration of its scheduler says it"
        )
    check_options(options, needs)
    cache = hashes.place.parent
    folder = _folder(path, revision, cache, needs, new, options)
    if options.vae is not None and options.vae.is_file():
        options = replace(options, vae=single_file.autoencoder_folder(options.vae, cache, folder) / "vae")
    return folder, options


def title_of(path: str) -> str:
    """The base's name: of a folder or a file here without its place."""
    place = Path(path)
    if path == "embedded" or not place.exists():
        return path
    return place.resolve().stem if place.is_file() else place.resolve().name


def check_options(options: Options, needs: Sequence[str]) -> None:
    """Raises UserError where an option has no effect on this run, or cannot have its effect here."""
    reads = ", ".join(needs)
    if options.vae is not None:
        if "vae" not in needs:
            raise UserError(f"base.vae: has no effect: this run loads {reads} only")
        if not options.vae.is_file() and not (options.vae / "config.json").is_file():
            raise UserError(
                f"base.vae: {options.vae}: expected a folder with an autoencoder's config.json, "
                "or a .safetensors file"
            )
    if options.quantise is None:
        return
    if not {"unet", "text_encoder"} & set(needs):
        raise UserError(f"base.quantise: has no effect: this run loads {reads} only")
    try:
        quantised.library()
    # A build for another CUDA fails to load its binary in one of these ways.
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"base.quantise: {options.quantise} needs bitsandbytes, which cannot be used here ({error}): "
            "pip install 'tuner[gpu]', or set it to null"
        ) from error


def recognise(folder: Path) -> str:
    """The name of the family that a diffusers folder belongs to, by its configuration files.

    Raises:
        UserError: no family knows it.
    """
    names = sorted(module.name for module in pkgutil.iter_modules(tuner.families.__path__))
    for name in names:
        if importlib.import_module(f"tuner.families.{name}").fits(folder):
            return name
    unet = config_of(folder, "unet")
    found = f"a {unet.get('_class_name', 'denoiser without a name')}" if unet else "no unet/config.json"
    encoders = sorted(place.name for place in folder.glob("text_encoder*"))
    raise UserError(
        f"base {folder}: none of the families {', '.join(names)} has these components: "
        f"{found}, {', '.join(encoders) or 'no text encoder'}"
    )


def digests(family: Family, folder: Path, new: Sequence[str], seed: int, hashes: Hashes) -> dict[str, str]:
    """A hash for each loaded network, and for each text encoder's tokeniser."""
    found: dict[str, str] = {}
    for name in family.modules():
        own = family.options.vae if name == "vae" else None
        found[name] = (
            f"new from seed {seed}" if name in new else component_digest(own or folder / name, hashes)
        )
    for name in family.text_encoders:
        tokenizer = name.replace("text_encoder", "tokenizer")
        found[tokenizer] = component_digest(folder / tokenizer, hashes)
    return found


def component_digest(place: Path, hashes: Hashes) -> str:
    """A hash over the files of a component."""
    files = sorted(p for p in place.iterdir() if p.suffix in {".json", ".safetensors", ".txt"})
    found = hashes.of(files)
    text = "".join(f"{p.name} {found[p]}\n" for p in files)
    return hashlib.sha256(text.encode()).hexdigest()


def _folder(
    path: str,
    revision: str | None,
    cache: Path,
    needs: Sequence[str],
    new: Sequence[str],
    options: Options,
) -> Path:
    """The diffusers folder of a base, wherever it is."""
    if path == "embedded":
        return EMBEDDED
    local = Path(path)
    if local.is_dir():
        return local
    if local.is_file():  # a checkpoint in the original layout
        say(f"{local.name} is {single_file.describe(local, options.prediction).told()}")
        return single_file.as_folder(local, cache, options.prediction)
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise UserError(
            f"base.path: {path}: no such folder or file "
            "(expected embedded, a diffusers folder, a .safetensors checkpoint, or a Hub id)"
        )
    without = {*new, *(["vae"] if options.vae is not None else [])}
    folder = hub.fetch(path, revision, hub.patterns(needs, without))
    hub.check(path, folder, needs, without)
    return folder
