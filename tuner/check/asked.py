"""What can be asked of `tuner check`: its options, and the command itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from tuner.options import option, signature

TOLD, PAGE, MEMORY = "What is told", "Contact sheet", "Memory"


@dataclass(frozen=True)
class Asked:
    """The options as they were given; None where they were not."""

    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; see recipes/.")]
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Replace the recipe's values, as train.steps=100."),
    ] = None
    as_json: Annotated[bool, option("--json", "For programs.", TOLD)] = False
    time: Annotated[bool, option("--time", "Measure a few steps: how long will it take.", TOLD)] = False
    contact_sheet: Annotated[
        bool, option("--contact-sheet", "Write a page: the first samples as the model gets them.", PAGE)
    ] = False
    out: Annotated[
        Path | None, option("--out", "The page; NAME-contact-sheet.html here if absent.", PAGE)
    ] = None
    samples: Annotated[int, option("--samples", "How many the page shows.", PAGE)] = 24
    memory: Annotated[
        str | None, option("--memory", "What the run is to fit in, as 12GiB; says what helps.", MEMORY)
    ] = None
    device: Annotated[
        str | None, option("--device", "Plan for cpu or cuda; this machine's if absent.", MEMORY)
    ] = None


def check(**given: Any) -> None:
    """Say all that can be known before the first step: problems, data, plan, disk, memory. Trains nothing."""
    from tuner.check.checking import check as run

    raise typer.Exit(run(Asked(**given)))


check.__signature__ = signature(Asked)  # type: ignore[attr-defined]
check.__annotations__ = get_type_hints(Asked, include_extras=True)
