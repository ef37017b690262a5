"""The part of a checkpoint that every process has a share of: one file each, written and read by
torch.distributed.checkpoint.

The files are safetensors: each of a process's parts with its offset in the whole tensor. Unlike with torch's
own format nothing in them is run when they are read. Any number of processes can read them, also one alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuner.disk import writing
from tuner.errors import UserError
from tuner.processes import is_parted

# What parts and writes takes a second to import: only where something is parted.

FOLDER = "shards"


def take(trained: dict[str, Tensor], state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Take every parted tensor out of a checkpoint's contents, in place; returns them by name.

    Args:
        trained: the trained tensors.
        state: `optimiser` and `ema`, as their state_dict gives them; not what they themselves hold.
    """
    found: dict[str, Tensor] = {}
    for place, tree in _trees(trained, state):
        for name in [name for name, value in tree.items() if is_parted(value)]:
            found[f"{place}/{name}"] = tree.pop(name)
    return found


def put(found: Mapping[str, Tensor], trained: dict[str, Tensor], state: Mapping[str, Any]) -> None:
    """Put back what `take` took."""
    trees = dict(_trees(trained, state))
    for path, tensor in found.items():
        place, _, name = path.partition("/")
        trees[place][name] = tensor


def _trees(trained: dict[str, Tensor], state: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "trained", trained
    if state["ema"] is not None:
        yield "ema", state["ema"]
    for number, kept in state["optimiser"]["state"].items():
        yield f"optimiser.{number}", kept


def part(alike: Mapping[str, Tensor], trained: dict[str, Tensor], state: Mapping[str, Any]) -> None:
    """Part whole tensors of a checkpoint, in place, where those of the present run are.

    Args:
        alike: the present run's trained tensors, as `of` looks them up.
    """
    if not any(map(is_parted, alike.values())):
        return
    from tuner.sharding import like

    for place, tree in _trees(trained, state):
        for name, value in tree.items():
            other = of(f"{place}/{name}", alike)
            if isinstance(value, Tensor) and other is not None:
                tree[name] = like(value, other)


def of(path: str, alike: Mapping[str, Tensor]) -> Tensor | None:
    """The trained tensor that a tensor belongs to: `trained/NAME`, `ema/NAME`, of `optimiser.N/KEY` that
    under `optimiser.N/`."""
    place = path.partition("/")[0]
    return alike.get(f"{place}/" if place.startswith("optimiser.") else path)


def write(folder: Path, parted: Mapping[str, Tensor]) -> None:
    """Write a folder of parts, a file for each process; all of them have to call it.

    Raises:
        DiskError: of one of them it cannot be written.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with writing(folder):
        try:
            save(dict(parted), storage_writer=writer)
        except CheckpointException as error:  # holds what each process met
            causes = [cause for cause, _ in error.failures.values()]
            raise next((c for c in causes if isinstance(c, OSError)), causes[0]) from error


def read(folder: Path, alike: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a folder of parts.

    Args:
        alike: the present run's trained tensors, as `of` looks them up. What belongs to one that is parted,
            and has its shape, comes parted in the same way, and the rest is not read; all else comes whole,
            on the CPU.

    Raises:
        UserError: the files do not hold whole tensors.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    about = reader.read_metadata().state_dict_metadata
    empty: dict[str, Tensor] = {}
    for name, one in about.items():
        assert isinstance(one, TensorStorageMetadata), name
        other = of(name, alike)
        if sum(math.prod(chunk.sizes) for chunk in one.chunks) != math.prod(one.size):
            raise UserError(f"{folder}: a part of {name} is missing")
        if other is not None and is_parted(other) and other.shape == one.size:
            empty[name] = torch.empty_like(other, dtype=one.properties.dtype)
        else:
            empty[name] = torch.empty(one.size, dtype=one.properties.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch asks whether one process alone is meant: it is
        load(empty, storage_reader=reader, no_dist=True)
    return empty
