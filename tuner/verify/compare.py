"""Comparing what was read back with what was trained: keys, tensors, configurations, effects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from tuner.errors import UserError
from tuner.export import files as export_files
from tuner.method import stored_type

EFFECT = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""How far an effect may be off, relative to its size, by the type it was stored in: a multiple of the type's
rounding (2^-24, 2^-11, 2^-8), since the errors of many layers add up."""

WHOLE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""How far a prediction may be off besides, relative to its size: the change of a hardly trained adapter may
be lost in the type's rounding."""

READ = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""How far the effect may be off that of the trained tensors in the type they were stored in, where tools
may compute in it; else only the order of sums differs."""

NOISE = 1e-5
"""How far a prediction may be off relative to its own size, whatever the effect: rounding of float32 sums."""

OWN_CONFIG = ("_diffusers_version", "_name_or_path", "transformers_version", "torch_dtype", "dtype")
"""Keys of a configuration that are about its file or its library."""

LOADING = (OSError, ValueError, RuntimeError, KeyError, TypeError, safetensors.SafetensorError)
"""What the loaders of diffusers and transformers raise for files they cannot use."""


class VerifyError(UserError):
    """An export that is not what was trained. The run is not done; its checkpoint is kept."""


def one(found: Sequence[Path], name: str) -> Path:
    """The exported file whose path ends with `name`.

    Raises:
        VerifyError: it was not exported, or is not there any more.
    """
    fitting = [path for path in found if path.as_posix().endswith(f"/{name}")]
    if len(fitting) != 1 or not fitting[0].is_file():
        raise VerifyError(f"the export {name} is not there; written were {', '.join(p.name for p in found)}")
    return fitting[0]


def load(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        VerifyError: it cannot be read, or holds a number that is not finite.
    """
    try:
        tensors, _ = export_files.load(path)
    except LOADING as error:
        raise VerifyError(f"{path.name} cannot be read: {error}") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise VerifyError(f"{path.name}: {name} holds numbers that are not finite")
    return tensors


def same_keys(where: str, found: Iterable[str], expected: Iterable[str]) -> int:
    """Require exactly the expected keys; returns how many.

    Raises:
        VerifyError: keys are missing or unexpected.
    """
    has, wants = set(found), set(expected)
    parts = []
    for kind, keys in (("missing", wants - has), ("unexpected", has - wants)):
        if keys:
            more = ", ..." if len(keys) > 3 else ""
            parts.append(f"{len(keys)} {kind} ({', '.join(sorted(keys)[:3])}{more})")
    if parts:
        raise VerifyError(f"{where}: of {len(wants)} keys {' and '.join(parts)}")
    assert wants, where
    return len(wants)


def same_tensors(
    where: str, found: Mapping[str, Tensor], trained: Mapping[str, Tensor], dtype: torch.dtype
) -> int:
    """Require the trained tensors, each as a file in `dtype` holds it, bitwise; returns how many.

    Raises:
        VerifyError: keys, shapes, types or values differ.
    """
    count = same_keys(where, found, trained)
    for name, tensor in trained.items():
        wanted = tensor.detach().to(stored_type(name, tensor, dtype))
        have = found[name].to(wanted.device)
        if have.shape != wanted.shape or have.dtype != wanted.dtype:
            raise VerifyError(
                f"{where}: {name} is {short(have.dtype)} {list(have.shape)}, "
                f"trained was {short(wanted.dtype)} {list(wanted.shape)}"
            )
        if not torch.equal(have, wanted):
            error = distance(have, wanted)
            raise VerifyError(f"{where}: {name} is not what was trained: off by {error:.3g} of its size")
    return count


def same_config(
    where: str, found: Mapping[str, Any], trained: Mapping[str, Any], but: Sequence[str] = ()
) -> None:
    """Require equal configurations, apart from keys about the file and those in `but`.

    Raises:
        VerifyError: a key differs.
    """
    for key in sorted((found.keys() | trained.keys()) - {*OWN_CONFIG, *but}):
        has, wants = _plain(found.get(key)), _plain(trained.get(key))
        if has != wants:
            raise VerifyError(f"{where}: config.json says {key} {has}, trained was {wants}")


def same_effect(what: str, loaded: Tensor, own: Tensor, base: Tensor, dtype: torch.dtype) -> float:
    """Require that a loaded export changes the base as the trainer's own adapter does.

    Args:
        loaded, own, base: outputs of one shape: with the export, with what was trained, with neither.
        dtype: the export's type; EFFECT and WHOLE give the bound
            |loaded - own| <= EFFECT |own - base| + WHOLE |own|, in Euclidean norms.

    Returns:
        |loaded - own| / |own - base|, or 0 where the trained adapter has no effect either.

    Raises:
        VerifyError: the bound is not kept, or the export changes nothing while the trained adapter does.
    """
    assert loaded.shape == own.shape == base.shape
    error, effect, size = norm(loaded - own), norm(own - base), norm(own)
    if effect > NOISE * size and torch.equal(loaded, base):
        hint = "" if dtype == torch.float32 else f"; its numbers may be too small for {short(dtype)}"
        raise VerifyError(f"{what}: the export changes nothing, training {effect / size:.2g} of it{hint}")
    if not error <= EFFECT[dtype] * effect + WHOLE[dtype] * size:  # so that a NaN fails
        relative = error / effect if effect else float("inf")
        raise VerifyError(
            f"{what}: the export's effect is off by {relative:.2g} of its size "
            f"({error / size if size else error:.2g} of the whole); {short(dtype)} allows {EFFECT[dtype]:g}"
        )
    return error / effect if effect else 0.0


def same_reading(what: str, loaded: Tensor, stored: Tensor, base: Tensor, dtype: torch.dtype) -> None:
    """Require that a loaded export does what the trainer's module does with its tensors in the export's type.

    Args:
        loaded, stored, base: outputs of one shape: with the export, with what was trained rounded to `dtype`,
            and with neither; |loaded - stored| <= READ |stored - base| + NOISE |stored|.

    Raises:
        VerifyError: the bound is not kept.
    """
    assert loaded.shape == stored.shape == base.shape
    error, effect, size = norm(loaded - stored), norm(stored - base), norm(stored)
    if not error <= READ[dtype] * effect + NOISE * size:
        raise VerifyError(
            f"{what} is another one than the stored tensors give in training, off by "
            f"{error / effect if effect else error:.2g} of its effect; {short(dtype)} allows {READ[dtype]:g}"
        )


def same_output(what: str, loaded: Tensor, own: Tensor, dtype: torch.dtype) -> float:
    """Require equal outputs of a whole network within EFFECT of their size; returns the relative difference.

    Raises:
        VerifyError: they differ by more.
    """
    error = distance(loaded, own)
    if not error <= EFFECT[dtype]:
        allowed = f"{short(dtype)} allows {EFFECT[dtype]:g}"
        raise VerifyError(f"{what} differs by {error:.2g} of its size; {allowed}")
    return error


def norm(values: Tensor) -> float:
    """The Euclidean norm of all values, summed in float64."""
    return float(values.double().norm())


def distance(found: Tensor, wanted: Tensor) -> float:
    """The difference's norm over the wanted tensor's norm; the difference's alone where that is 0."""
    size = norm(wanted)
    difference = norm(found.double() - wanted.double())
    return difference / size if size else difference


def short(dtype: torch.dtype) -> str:
    """`float16` for torch.float16."""
    return str(dtype).removeprefix("torch.")


def _plain(value: Any) -> Any:
    """Tuples and lists, and enumerations and their values, are the same in a file."""
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
