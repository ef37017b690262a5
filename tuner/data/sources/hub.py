"""Sets of the Hugging Face Hub, and what else `datasets` loads: Parquet, Arrow, folders of save_to_disk.

Nothing of a set is ever run: `datasets` from version 4 on knows no scripts.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import LocalEntryNotFoundError

from tuner.data.samples import Sample, Samples, Say
from tuner.data.sources.cells import MEND, SetSamples, belongs, held, homes
from tuner.data.sources.columns import Chosen, choose
from tuner.data.sources.names import nearest
from tuner.data.sources.retry import Broken, retried
from tuner.data.sources.spec import HUB, SourceSpec
from tuner.data.sources.stream import Fault, Stream
from tuner.data.sources.urls import AGAIN, expand
from tuner.errors import UserError

datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are told by ours

CONVERTED = "refs/convert/parquet"
"""The branch in which the Hub keeps Parquet copies of sets that are otherwise."""


def open_set(spec: SourceSpec, say: Say, source: int) -> Samples | Stream:
    """The rows of a set; pictures stay encoded.

    Raises:
        UserError: there is no such set, configuration, split or column; the set needs a script; the token
            in the environment may not read it; the connection stays broken.
    """
    name = _name(spec)
    loaded = retried(lambda: _asked(spec, lambda: _load(spec)), spec.path, say)
    if spec.streaming:
        return Stream(SetShards(loaded, spec, name, say), spec, say, source)
    chosen = choose(spec.columns, loaded.column_names, loaded.features, name)
    for column in chosen.pictures:
        loaded = loaded.cast_column(column, datasets.Image(decode=False))
    _tell(chosen, loaded.column_names, name, say)
    samples = SetSamples(loaded, chosen, name, spec, source)
    if not len(loaded):
        raise UserError(f"{name}: no rows")
    return samples


class SetShards:
    """The files of a set that is read in passing."""

    def __init__(self, loaded: Any, spec: SourceSpec, name: str, say: Say) -> None:
        self.place, self.spec, self._name = spec.path, spec, name
        self.loaded = loaded.decode(False)
        columns = loaded.column_names
        if columns is None:  # without a schema the first row tells them
            columns = retried(lambda: _asked(spec, lambda: list(next(iter(self.loaded), {}))), name, say)
        self.chosen = choose(spec.columns, columns, loaded.features, name)
        _tell(self.chosen, columns, name, say)
        self.masked = "mask" in self.chosen.names
        self.loaded = self.loaded.select_columns(list(self.chosen.used))

    @property
    def count(self) -> int:
        """How many files there are."""
        return int(self.loaded.num_shards)

    def name(self, shard: int) -> str:
        """The set and the file's number."""
        return f"{self._name}, part {shard + 1} of {self.count}"

    def read(self, shard: int, skip: int) -> Iterator[Sample | Fault]:
        """The rows of a file. Raises Broken, or UserError where the set cannot be read."""
        part = self.loaded.shard(num_shards=self.count, index=shard).skip(skip)
        rows = iter(part)
        for number in itertools.count(skip):
            row = _asked(self.spec, lambda: next(rows, None))
            if row is None:
                return
            name, wrong = f"{self.name(shard)}[{number}]", list[str]()
            sample = held(row, self.chosen, name, self._fetch, wrong)
            yield Fault(f"{name}: {'; '.join(wrong)}") if sample is None else sample

    def identity(self) -> Iterator[str]:
        """The commit of a set on the Hub; the names, sizes and times of change of files. Raises Broken."""
        spec = self.spec
        if spec.kind == "hub":
            name = spec.path.removeprefix(HUB)
            about = _asked(spec, lambda: HfApi().dataset_info(name, revision=spec.revision))
            yield f"{spec.config} {spec.split} {about.sha}"
            return
        for file in _found(spec):
            about = os.stat(file)
            yield f"{file} {about.st_size} {about.st_mtime_ns}"

    def _fetch(self, path: str) -> bytes:
        own = f"hf://datasets/{self.spec.path.removeprefix(HUB)}"
        inside = self.spec.kind == "hub" and path.split("::")[-1].startswith((f"{own}@", f"{own}/"))
        if not inside and not ("://" not in path and belongs(path, homes(self.spec))):
            raise UserError(f"{self._name}: names {path}, which leaves the set; {MEND}")

        def read() -> Any:
            with fsspec.open(path, "rb") as file:
                return file.read()

        data: bytes = _asked(self.spec, read)
        return data


def _name(spec: SourceSpec) -> str:
    return f"{spec.path} {spec.split or 'train'}" if spec.kind in ("hub", "saved") else spec.path


def _load(spec: SourceSpec) -> Any:
    if spec.kind == "saved":
        return _saved(spec)
    if spec.kind == "table":
        return _files(spec)
    name = spec.path.removeprefix(HUB)
    if os.path.isdir(name):
        raise UserError(
            f"{spec.path}: a folder {name} lies in the current directory, and `datasets` would take it; "
            f"write source: {name} if you mean the folder, or start somewhere else"
        )
    # The token is the environment's: HF_TOKEN, or that of `hf auth login`.
    return datasets.load_dataset(
        name, spec.config, split=spec.split or "train", revision=spec.revision, streaming=spec.streaming
    )


def _saved(spec: SourceSpec) -> Any:
    loaded = datasets.load_from_disk(spec.path)
    if not isinstance(loaded, datasets.DatasetDict):
        if spec.split is not None and str(loaded.split) != spec.split:
            raise UserError(f"{spec.path}: one set without parts was saved there, so it has no {spec.split}")
        return loaded
    split = spec.split or "train"
    if split not in loaded:
        near = nearest(split, list(loaded))
        raise UserError(f"{spec.path}: no split {split}; there are: {', '.join(loaded)}{near}")
    return loaded[split]


def _files(spec: SourceSpec) -> Any:
    files = _found(spec)
    if spec.path.endswith(".arrow") and not spec.streaming:
        return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])
    kind = Path(files[0]).suffix.removeprefix(".")
    return datasets.load_dataset(kind, data_files=files, split="train", streaming=spec.streaming)


def _found(spec: SourceSpec) -> list[str]:
    files = [file for pattern in expand(spec.path) for file in sorted(glob.glob(pattern))]
    if not files:
        raise UserError(f"{spec.path}: no such file")
    return files


def _tell(chosen: Chosen, columns: list[str], name: str, say: Say) -> None:
    used = ", ".join(f"{column} ({key})" for column, key in chosen.used.items())
    unused = [column for column in columns if column not in chosen.used]
    say(f"{name}: columns {used}" + (f"; not used: {', '.join(unused)}" if unused else ""))


def _asked(spec: SourceSpec, action: Any) -> Any:
    """What `datasets` answers; its errors as Broken or UserError."""
    try:
        return action()
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        if isinstance(error, DatasetNotFoundError) and _status(error) is None:
            raise UserError(_not_found(spec, error)) from error
        if _is_broken(error):
            raise Broken(_first_line(error)) from error
        raise UserError(f"{spec.path}: {_explained(spec, error)}") from error
    except Exception as error:
        if not _is_broken(error):
            raise
        raise Broken(_first_line(error)) from error


def _not_found(spec: SourceSpec, error: Exception) -> str:
    if spec.revision is not None and "Revision" in str(error):
        return f"{spec.path}: {_first_line(error)}"
    from huggingface_hub import get_token

    told = (
        "the token in the environment may not read it, or its terms are not accepted yet"
        if get_token()
        else "it is private and no token is set: set HF_TOKEN, or log in with `hf auth login`"
    )
    return f"{spec.path}: not found. Either its name is wrong, or {told}"


def _explained(spec: SourceSpec, error: Exception) -> str:
    if "scripts are no longer supported" in str(error):
        return (
            "it is loaded by a script, which is never run; most such sets have a copy in Parquet: "
            f"set revision: {CONVERTED}"
        )
    if constants.HF_HUB_OFFLINE and spec.kind == "hub":
        return "HF_HUB_OFFLINE is set, and it was not downloaded before"
    text = _first_line(error)
    found = re.search(r"\[(.*)\]", " ".join(str(error).split()))
    if found and re.search("split|config", text, re.IGNORECASE):
        names = re.findall(r"'([^']*)'", found[1])
        wrong = spec.config if "onfig" in text else spec.split or "train"
        what = "configuration" if "onfig" in text else "split"
        asked = f"no {what} {wrong}" if wrong else "it has several configurations: set config"
        return f"{asked}; there are: {', '.join(names)}{nearest(wrong or '', names)}"
    causes = [_first_line(one) for one in _chain(error)]
    return "; ".join(dict.fromkeys(causes))


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in found:
        found.append(at)
        at = at.__cause__ or at.__context__
    return found


def _status(error: BaseException) -> int | None:
    """The number of an answer behind an error that may be another one later."""
    for one in _chain(error):
        code = getattr(getattr(one, "response", None), "status_code", None)
        if code in AGAIN:
            return int(code)
    return None


def _is_broken(error: BaseException) -> bool:
    chain = _chain(error)
    if constants.HF_HUB_OFFLINE:
        return False
    if any(getattr(getattr(one, "response", None), "status_code", None) is not None for one in chain):
        return _status(error) is not None
    return any(
        isinstance(one, (ConnectionError, TimeoutError, LocalEntryNotFoundError))
        or type(one).__module__.startswith(("httpx", "httpcore", "aiohttp", "requests", "urllib3"))
        for one in chain
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
