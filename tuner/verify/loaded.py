"""`tuner verify FILE`: its keys by the tools' rules, and on a base with weights the file loaded and compared.

diffusers loads the file onto the base; every module or tensor of it has to arrive, and the base with it has
to predict what it predicts with what this project's own reader makes of the file. With a run, the result is
compared with the prediction of the run's newest checkpoint, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tuner.adapters import sources
from tuner.errors import UserError
from tuner.export import contents as reading
from tuner.export.contents import Contents
from tuner.export.identify import ADAPTERS, identify
from tuner.export.places import Base
from tuner.export.rules import bundled
from tuner.files import account, bases
from tuner.method import Method
from tuner.verify import readers
from tuner.verify.compare import NOISE, VerifyError, norm, same_effect, short
from tuner.verify.ground import Ground, has_weights, of_folder, of_run
from tuner.verify.readers import Reading, Subject
from tuner.verify.scene import Scene, exact, quiet


class Kind(NamedTuple):
    """How a kind of file is read, and the method that makes such files."""

    read: Callable[[Subject], Reading]
    method: str


KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(ADAPTERS, Kind(readers.adapter, "lora")),
    "embedding": Kind(readers.word, "textual_inversion"),
    "ControlNet": Kind(readers.control, "controlnet"),
    "Control-LoRA": Kind(readers.control, "controlnet"),
    "checkpoint": Kind(readers.checkpoint, "full"),
    "UNet": Kind(readers.unet, "full"),
}
READER = 1e-3
"""How far the effect of the same numbers, read twice, may be off: float32, and strong files amplify it."""

_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16}


def verify(path: Path, base: str | None, tools: Sequence[str], run: Path | None) -> list[str]:
    """What was proved of a file, and how; a line for each tool, and one for what loading it showed.

    Args:
        path: the file.
        base: a base's name, its diffusers folder, or its checkpoint; None: as the sizes say.
        tools: those whose rules alone are asked; all, and the loader, where empty.
        run: the folder of a run that made the file.

    Raises:
        UserError: a tool would load the file in part; it does not load; it does not have the effect that its
            tensors, or the run's checkpoint, have; or options that do not go together.
    """
    if run is not None and (other := "--base" if base is not None else "--tool" if tools else None):
        raise UserError(f"{other} has no effect beside --run: the file is compared with what the run trained")
    path = reading.file_of(path)
    with quiet():
        ground = None if run is None else of_run(run)
    folder = None if base is None else bases.folder_named(base)
    made: str | Base | None = base
    if ground is not None:
        made = sources.base_of(ground.family)._replace(name=ground.name)
    lines = account.check(path, made, tools)
    if tools:
        return lines
    rules = f"{path.name}: proved by the tools' rules of naming alone"
    if ground is None:
        if folder is None or base is None:
            return [*lines, f"{rules}; --base FOLDER or FILE with weights, or --run, loads and compares it"]
        if not has_weights(folder):
            return [*lines, f"{rules}: there are no weights in {base}"]
        with quiet():
            ground = of_folder(folder, base if base in bases.SHIPPED else bases.title(Path(base)))
    found = reading.read(path)
    if why := _unread(found):
        return [*lines, f"{rules}: {why}"]
    return [*lines, _loaded(path, found, ground)]


def _unread(found: Contents) -> str:
    """Why a file is not loaded here."""
    if words := bundled(found.shapes):
        return f"words lie in this LoRA's file ({', '.join(words)}); prove the LoRA's own and theirs"
    kind = identify(found).kind
    return "" if kind in KINDS else f"{kind} is not loaded here"


def _loaded(path: Path, found: Contents, ground: Ground) -> str:
    """Load the file, and compare; the line that says what was proved."""
    kind, dtype = KINDS[identify(found).kind], _type(found)
    method = _method(path, found, kind, ground)
    others = [other for other in ground.methods if other is not method]
    with exact(ground.family, ground.methods), ExitStack() as stack:
        scene = Scene.of(ground.family)
        stack.enter_context(scene.without(others))
        made = kind.read(Subject(path, found, scene, method))
        line = f"{path.name}: {made.told} on {ground.name}"
        if made.loaded is not None:
            errors = _compare(path, made.own, made, None)
            line += f", with the effect of its tensors as tuner reads them (off by {errors:.1e} of it)"
        if method is not None:
            errors = _compare(path, made.trained, made, dtype)
            line += f"; {ground.told} has the same effect within {short(dtype)} (off by {errors:.1e} of it)"
    return line


def _compare(path: Path, wanted: Mapping[str, Tensor], made: Reading, dtype: torch.dtype | None) -> float:
    """Each output of the loaded file (of the reader's own where nothing loads it) beside the wanted one.

    Args:
        dtype: what the file rounds to what is wanted; None: both have the file's numbers, and only the order
            of sums differs, through all of a network (READER).

    Returns:
        The largest difference, relative to the file's effect.
    """
    found = made.own if made.loaded is None else made.loaded
    assert found.keys() == wanted.keys() == made.base.keys() and found
    errors = []
    for key, output in found.items():
        what, own, base = f"{path.name}: {key}", wanted[key], made.base[key]
        if dtype is not None:
            errors.append(same_effect(what, output, own, base, dtype))
            continue
        error, effect = norm(output - own), norm(own - base)
        if not error <= READER * effect + NOISE * norm(own):  # so that a NaN fails
            raise VerifyError(
                f"{what}, loaded by diffusers, is off by {error / effect if effect else error:.2g} of the "
                f"effect that the file's tensors have; {READER:g} is allowed"
            )
        errors.append(error / effect if effect else 0.0)
    return max(errors)


def _method(path: Path, found: Contents, kind: Kind, ground: Ground) -> Method | None:
    """The run's method that makes such files; None where no run was named."""
    if not ground.methods:
        return None
    for method in ground.methods:
        if method.kind == kind.method:
            return method
    trained = " and ".join(method.kind.replace("_", " ") for method in ground.methods)
    raise UserError(f"{path.name} is a {identify(found).kind}; the run trained {trained}")


def _type(found: Contents) -> torch.dtype:
    """The least precise type in a file."""
    return next((dtype for name, dtype in _TYPES.items() if name in found.dtypes.values()), torch.float32)
