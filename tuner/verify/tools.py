"""What the tools of inference make of the exported single files, by their rules of naming."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tuner.adapters import sources
from tuner.errors import UserError
from tuner.export import contents
from tuner.export.identify import identify
from tuner.export.places import ConfigError
from tuner.export.rules_controlnet import misnamed
from tuner.export.tools import CONTROLNETS
from tuner.family import Family
from tuner.files import account
from tuner.method import Method
from tuner.verify.compare import VerifyError


def told(path: Path, family: Family) -> str:
    """Which tools load all of an exported file, and why others do not; empty for a component's folder.

    A tool that does not work with such a base, or reads another one of the exported files, is told.

    Raises:
        VerifyError: a tool that the file is for would load it in part or not at all; the message names keys.
    """
    if (path.parent / "config.json").is_file():
        return ""
    read = contents.read(path)
    if not account.tools_for(identify(read)):
        raise VerifyError(f"{path.name}: there are no rules for this kind of file ({identify(read).kind})")
    try:
        base = sources.base_of(family)
    except ConfigError as error:
        return f"no tool's rules know this base ({error})"
    found = account.ask(read, base)
    if found.problems:
        raise VerifyError(
            "\n  ".join([f"{path.name}: not every tool that it is for would load it:", *found.problems])
        )
    return found.told()


def check_names(name: str, family: Family, methods: Sequence[Method]) -> None:
    """Before anything is trained: no tool takes an exported file for another thing by its name.

    Args:
        name: the export's, without ending.

    Raises:
        UserError: one would.
    """
    if not any(method.kind == "controlnet" for method in methods):
        return
    file = f"control_{family.version}_{name}.safetensors"
    wrong = {tool: misnamed(tool, file, family.name) for tool in CONTROLNETS}
    if found := [f"  {tool}: {why}" for tool, why in wrong.items() if why]:
        raise UserError("\n".join([f"export.name: found {name}; choose another one:", *found]))
