"""Every export is loaded back, and its effect compared with the trainer's own, before a run says it is done.

One file for each method, found by the method's file name. Its `check(scene, method, files, card)` proves the
method's files through the loaders that users have (diffusers, transformers) and returns a line for each. What
the other tools make of a single file is asked of their rules, whatever the method: tools.py, and lora.py for
files that are not for every tool.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

from tuner.export import embedding
from tuner.family import Family
from tuner.method import Card, Method
from tuner.verify.compare import VerifyError
from tuner.verify.public import check_metadata
from tuner.verify.scene import Scene, exact
from tuner.verify.tools import check_names, told

__all__ = ["VerifyError", "check", "check_names"]


class _Check(Protocol):
    def __call__(
        self, scene: Scene, method: Method, files: Sequence[Path], card: Card
    ) -> dict[Path, str]: ...


def check(family: Family, methods: Sequence[Method], files: Sequence[Path], card: Card) -> list[str]:
    """Prove the exported files; a line in plain words for each.

    Everything is computed in float32 without autocast, at inputs that are always the same. Besides the
    trainer's networks one copy of the denoiser (or one network read from the export) is held at a time, and
    while a base is held in half precision, its float32 form.

    The trainer's networks, their modes, which tensors want gradients, and the process's random state are left
    as they were, bitwise.

    Args:
        methods: those that were exported, as they are now.
        files: everything they wrote, as `Method.export` returned it.
        card: what they were exported with.

    Raises:
        VerifyError: a file lacks or has too many keys, does not load, says what it should not about the
            machine, or has another effect than the trainer's own; or a tool that it is for would load it in
            part; the message names keys or the difference.
    """
    lines: dict[Path, str] = {}
    own = [path for path in files if path.parent.name != embedding.FOLDER]
    with exact(family, methods):
        scene = Scene.of(family)
        for method in methods:
            with scene.without([other for other in methods if other is not method]):
                proved = _check_of(method)(scene, method, own, card)
            for path in proved:
                check_metadata(path, {**card.metadata.get(method.kind, {}), **method.retold(path, card)})
            lines |= proved if method.kind == "lora" else _with_tools(proved, family)
        lora, words = (_of_kind(methods, kind) for kind in ("lora", "textual_inversion"))
        if lora is not None and words is not None:
            together = importlib.import_module("tuner.verify.together")
            lines |= _with_tools(together.check(scene, lora, words, files, card), family)
    if unproved := [path.name for path in files if path not in lines]:
        raise VerifyError(f"{len(unproved)} of {len(files)} exported files have no check: {unproved}")
    assert len(lines) == len(files) > 0
    return [lines[path] for path in files]


def _with_tools(proved: dict[Path, str], family: Family) -> dict[Path, str]:
    """The lines, with what the tools make of the files."""
    return {path: "; ".join(filter(None, [line, told(path, family)])) for path, line in proved.items()}


def _of_kind(methods: Sequence[Method], kind: str) -> Method | None:
    """The method of a kind, if the run has one."""
    return next((method for method in methods if method.kind == kind), None)


def _check_of(method: Method) -> _Check:
    """The check that belongs to a method's file."""
    name = type(method).__module__.rpartition(".")[2]
    assert importlib.util.find_spec(f"tuner.verify.{name}") is not None, f"there is no tuner/verify/{name}.py"
    return cast(_Check, importlib.import_module(f"tuner.verify.{name}").check)
