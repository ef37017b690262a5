"""A dataclass's fields as the options of a command: for commands with more of them than fit a function."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, get_type_hints

import typer


def option(name: str, text: str, panel: str, metavar: str | None = None) -> Any:
    """What annotates a field: how its option is called, what `--help` says of it, and under which heading."""
    return typer.Option(name, help=text, rich_help_panel=panel, metavar=metavar)


def signature(kind: type) -> inspect.Signature:
    """A dataclass's fields as a function's named arguments, which typer makes options of."""
    hints = get_type_hints(kind, include_extras=True)
    arguments = []
    for one in dataclasses.fields(kind):
        default = one.default
        if one.default_factory is not dataclasses.MISSING:
            default = one.default_factory()
        elif default is dataclasses.MISSING:
            default = inspect.Parameter.empty
        arguments.append(
            inspect.Parameter(
                one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[one.name]
            )
        )
    return inspect.Signature(arguments)
