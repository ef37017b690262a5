"""What a safetensors file holds, as far as its rules of naming go: keys, shapes, types, alphas, metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors
from torch import Tensor

from tuner.errors import UserError


class Contents(NamedTuple):
    """A file without its weights.

    Attributes:
        name: the file's name; some tools read it.
        shapes: key -> shape, in the order in which readers meet the tensors.
        dtypes: key -> type as safetensors writes it (F32, F16, BF16 ...).
        alphas: the values of the keys that end in `.alpha`.
        metadata: the header's.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    alphas: Mapping[str, float]
    metadata: Mapping[str, str]


def read(path: Path) -> Contents:
    """The contents of a safetensors file; of its tensors only the alphas are read.

    Raises:
        UserError: there is no such file, or it is no safetensors file.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the .safetensors in it")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.offset_keys()}
            return Contents(
                path.name,
                {key: tuple(part.get_shape()) for key, part in slices.items()},
                {key: part.get_dtype() for key, part in slices.items()},
                {key: _number(file.get_tensor(key)) for key in slices if key.endswith(".alpha")},
                dict(file.metadata() or {}),
            )
    except (safetensors.SafetensorError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: no safetensors file ({error})") from error


def file_of(path: Path) -> Path:
    """The weights of a network's folder (one file with config.json beside it); another path as it is."""
    if not (path / "config.json").is_file():
        return path
    found = sorted(path.glob("*.safetensors"))
    return found[0] if len(found) == 1 else path


def of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], name: str) -> Contents:
    """The contents of a file that would hold these tensors in this order."""
    return Contents(
        name,
        {key: tuple(tensor.shape) for key, tensor in tensors.items()},
        {key: _NAMES.get(str(tensor.dtype), str(tensor.dtype)) for key, tensor in tensors.items()},
        {key: _number(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")},
        dict(metadata),
    )


def _number(tensor: Tensor) -> float:
    """A scalar; what is none is not a number."""
    return float(tensor) if tensor.numel() == 1 else math.nan


_NAMES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float64": "F64"}
