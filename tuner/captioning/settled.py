"""What the options of `tuner caption` mean, and which of them cannot be meant."""

from __future__ import annotations

from pathlib import Path

import torch

from tuner.captioning.asked import Asked
from tuner.captioning.captioner import How
from tuner.device import DTYPES
from tuner.errors import UserError, few


def settled(asked: Asked) -> tuple[How, torch.dtype, torch.device]:
    """How captions are written, in which precision, and where.

    Raises:
        UserError: an option has no effect beside the others, or its value is out of range.
    """
    if asked.model is None and asked.filter is None:
        raise UserError("expected --model, --filter or both")
    for option in ("revision", "prompt", "beams", "top_p", "seed", "longest", "shortest", "kind", "dtype"):
        if asked.model is None and getattr(asked, option) is not None:
            raise UserError(f"--{option.replace('_', '-')} has no effect without --model")
    for option in ("filter_revision", "threshold", "share"):
        if asked.filter is None and getattr(asked, option) is not None:
            raise UserError(f"--{option.replace('_', '-')} has no effect without --filter")
    if asked.threshold is not None and asked.share is not None:
        raise UserError("found --threshold and --share, expected one of them")
    if asked.top_p is not None and asked.beams is not None:
        raise UserError("--beams has no effect beside --top-p, which draws")
    if asked.top_p is None and asked.seed is not None:
        raise UserError("--seed has no effect without --top-p: nothing is drawn")
    how = How(
        asked.prompt,
        asked.beams if asked.beams is not None else 3 if asked.top_p is None else 1,
        asked.top_p,
        asked.seed or 0,
        40 if asked.longest is None else asked.longest,
        asked.shortest or 0,
    )
    _in_range("--batch", asked.batch, asked.batch >= 1, "at least 1")
    _in_range("--beams", how.beams, how.beams >= 1, "at least 1")
    _in_range("--longest", how.longest, how.longest >= 1, "at least 1")
    _in_range("--shortest", how.shortest, 0 <= how.shortest <= how.longest, f"0 to --longest {how.longest}")
    _in_range("--top-p", how.top_p, how.top_p is None or 0 < how.top_p <= 1, "above 0, at most 1")
    _in_range("--share", asked.share, asked.share is None or 0 < asked.share <= 1, "above 0, at most 1")
    _apart(asked.folder, asked.out)
    device = _device(asked.device)
    name = asked.dtype or ("bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32")
    if name not in DTYPES:
        raise UserError(f"--dtype {name}: expected {few(name, DTYPES)}")
    return how, DTYPES[name], device


def _in_range(option: str, value: object, right: bool, expected: str) -> None:
    if not right:
        raise UserError(f"{option}: found {value}, expected {expected}")


def _apart(folder: Path, out: Path) -> None:
    """Raises UserError where one of the folders lies in the other: links would be taken for pictures."""
    one, other = folder.resolve(), out.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise UserError(f"--out {out}: expected a folder that is not in {folder}, nor around it")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: cannot be used here: {str(error).splitlines()[0]}") from error
    return device
