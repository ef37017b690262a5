"""The command line: `tuner train | schema | report`.

Exit codes: 0 done, 1 a fault of the program (with its traceback), 2 a mistake of the user's (with its text
alone), 130 stopped by Ctrl-C. What a command needs is imported when it runs, so that `tuner --help` is quick.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from tuner.errors import UserError

app = typer.Typer(
    help="Fine-tunes Stable Diffusion by recipe: ControlNet, Textual Inversion, LoRA.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; see recipes/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Replace the recipe's values, as train.steps=100."),
]
Output = Annotated[Path, typer.Argument(metavar="OUTPUT", help="The folder a run wrote to.")]


@app.command()
def train(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Train a recipe, export the result, measure it, and write the report."""
    from tuner.recipe import load

    loaded = load(recipe, overrides or ())  # before the slow imports: a mistake is shown at once

    from tuner import run

    raise typer.Exit(run.train(loaded))


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from tuner.recipe import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command()
def report(output: Output) -> None:
    """Write the page of a run again, from what lies in its folder."""
    from tuner import report as page

    print(page.write(output))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; `arguments` are those of the process where they are not given.

    Returns:
        The exit code.
    """
    try:
        app(None if arguments is None else list(arguments), prog_name="tuner")
    except UserError as error:
        # Every process of a torchrun finds the same mistake; the first one tells.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:  # how typer returns
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
