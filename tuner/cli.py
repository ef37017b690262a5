"""The command line: `tuner train | check | export | sample | condition | report | push | inspect ...`.

Exit codes: 0 done, 1 a fault of the program (with its traceback), 2 a mistake of the user's (with its text
alone), 130 stopped by Ctrl-C. What a command needs is imported when it runs, so that `tuner --help` is quick.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.captioning.asked import caption
from tuner.check.asked import check
from tuner.errors import UserError, of_system
from tuner.generate.asked import sample

if TYPE_CHECKING:
    from tuner.recipe import Recipe

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
File = Annotated[
    Path,
    typer.Argument(metavar="FILE", help="A .safetensors file, or the folder of one and its config.json."),
]
Out = Annotated[Path, typer.Option("--out", help="What is written.")]
BaseName = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="What it was made for: sd15, sd21, sdxl, embedded, a diffusers folder, or a checkpoint's file; "
        "found by itself if it is one of the named ones.",
    ),
]
Rank = Annotated[int | None, typer.Option("--rank", help="The rank of every module.")]
Energy = Annotated[
    float | None,
    typer.Option("--energy", help="The least rank of each module that keeps this share, as 0.9."),
]


@app.command()
def train(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Train a recipe, export the result, measure it, and write the report."""
    with _ended_by_signals():
        from tuner.recipe import load

        loaded = load(recipe, overrides or ())  # before the slow imports: a mistake is shown at once

        from tuner import run

    try:
        code = run.train(loaded)
    except UserError as error:
        raise UserError(_with_others(loaded, error)) from error
    raise typer.Exit(code)


def _with_others(recipe: Recipe, error: UserError) -> str:
    """What a run ended with; where it did not begin, with all else that keeps it from beginning."""
    from tuner.disk import DiskError
    from tuner.loop import TrainingError

    if isinstance(error, (TrainingError, DiskError)):
        return str(error)

    from tuner.check.others import others

    error.__traceback__ = error.__context__ = None  # they hold what was loaded
    try:
        return "\n".join([str(error), *others(recipe, str(error))])
    except KeyboardInterrupt:
        return str(error)


@app.command()
def prepare(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Fill the cache with all that a run would encode before it trains; many processes may share the work."""
    from tuner.recipe import load

    loaded = load(recipe, overrides or ())

    from tuner import prepare as preparing

    raise typer.Exit(preparing.prepare(loaded))


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """While nothing was begun, what asks a run to stop (tuner/signals.py) ends it well."""
    before = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: object) -> None:
    print("stopped before anything was begun; the same command starts again", flush=True)
    raise SystemExit(0)


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


@app.command("export")
def export_again(
    output: Output,
    form: Annotated[
        str | None,
        typer.Option("--format", help="Only what reads it: kohya, peft, diffusers, comfy, a1111 or cldm."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="fp16, bf16 or fp32; the recipe's if absent.")
    ] = None,
    step: Annotated[
        int | None, typer.Option("--step", help="The checkpoint of this step; the newest if absent.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="A new folder; OUTPUT/export-again... if absent.")
    ] = None,
) -> None:
    """Export a run again, from a checkpoint and the base: another form, precision or step."""
    from tuner.reexport import Wish
    from tuner.reexport import export as run

    _tell(run(output, Wish(form, dtype, step, out)))


@app.command("inspect")
def inspect_file(
    file: File,
    base: BaseName = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say what a file is: kind, family, rank, tokens, metadata, and which tools load it."""
    from tuner.export.contents import file_of
    from tuner.files import account

    told = account.describe(file_of(file), base)
    _tell([json.dumps(told, indent=2)] if as_json else account.lines(told))


@app.command()
def verify(
    file: File,
    base: BaseName = None,
    tool: Annotated[
        list[str] | None, typer.Option("--tool", help="Ask this tool's rules only; may be repeated.")
    ] = None,
    made_by: Annotated[
        Path | None,
        typer.Option("--run", help="The folder of the run that made it: its newest checkpoint is compared."),
    ] = None,
) -> None:
    """Account for every key by each tool's rules; with a base that has weights, load the file and compare."""
    from tuner.export.contents import file_of
    from tuner.verify.loaded import verify as run

    _tell(run(file_of(file), base, tool or (), made_by))


@app.command()
def convert(
    file: File,
    to: Annotated[str, typer.Option("--to", help="kohya, peft, diffusers, comfy, a1111 or cldm.")],
    out: Out,
    base: BaseName = None,
) -> None:
    """Write a LoRA, word vectors or a ControlNet in another tool's names."""
    from tuner.files.convert import convert as run

    _tell(run(file, to, out, base))


@app.command()
def merge(
    lora: Annotated[list[str], typer.Option("--lora", help="FILE or FILE:WEIGHT; may be repeated.")],
    out: Out,
    base: BaseName = None,
    into: Annotated[
        Path | None,
        typer.Option(
            "--into",
            help="What they are added to: a diffusers folder, a component's, or a checkpoint's file, which "
            "becomes one again where --out ends in .safetensors.",
        ),
    ] = None,
) -> None:
    """Make one LoRA of several, or add adapters to a base's weights."""
    from tuner.files import merge as merging

    parts = [merging.parse(text) for text in lora]
    if into is not None and base is not None:
        raise UserError("--base has no effect beside --into, which is the base")
    _tell(merging.together(parts, out, base) if into is None else merging.into(parts, into, out))


@app.command()
def resize(file: File, out: Out, rank: Rank = None, energy: Energy = None, base: BaseName = None) -> None:
    """Write the LoRA of another rank that comes nearest; LoHa, LoKr and differences become LoRA."""
    from tuner.files.lowrank import Cut
    from tuner.files.resize import resize as run

    _tell(run(file, Cut(rank, energy), out, base))


@app.command()
def extract(
    base: Annotated[
        Path, typer.Argument(metavar="BASE", help="A diffusers folder, a component's, or a checkpoint.")
    ],
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="The same, fine-tuned.")],
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
) -> None:
    """Write a LoRA of what full fine-tuning changed."""
    from tuner.files.extract import extract as run
    from tuner.files.lowrank import Cut

    _tell(run(base, tuned, Cut(rank, energy), out))


@app.command()
def condition(
    picture: Annotated[Path, typer.Argument(metavar="PICTURE", help="What it is made of.")],
    kind: Annotated[str, typer.Option("--kind", help="canny, scribble, inpaint ...; as in a recipe.")],
    out: Annotated[Path, typer.Option("--out", help="A .png file.")],
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="A parameter, as low=50; may be repeated.", metavar="KEY=VALUE"),
    ] = None,
    size: Annotated[
        int | None, typer.Option("--size", help="Cut out a square of this side, as training does.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of what is drawn at random; 0 if absent.")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option("--mask", help="With inpaint: a picture, white where the hole is.")
    ] = None,
) -> None:
    """Make the condition picture of a picture, as training makes it."""
    from tuner.condition import Wish, write

    _tell(write(picture, Wish(kind, tuple(setting or ()), size, seed, mask), out))


@app.command()
def push(
    output: Output,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository at the Hub.")],
    licence: Annotated[
        str | None,
        typer.Option(
            "--licence", "--license", help="Of what was trained, as the Hub calls it: apache-2.0 ..."
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str, typer.Option("--revision", help="The branch; made if it is missing.")] = "main",
    message: Annotated[str | None, typer.Option("--message", help="Of the commit.")] = None,
    step: Annotated[int | None, typer.Option("--step", help="The exports of this step.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files and print the card.")] = False,
) -> None:
    """Upload a finished run's exports to the Hugging Face Hub, with a card that says how to use them."""
    from tuner.push import Wish
    from tuner.push import push as upload

    upload(output, Wish(repo, revision, private, licence, message, step), dry_run)


app.command("sample")(sample)  # its options are the fields of tuner.generate.asked.Asked
app.command("caption")(caption)  # of tuner.captioning.asked.Asked
app.command("check")(check)  # of tuner.check.asked.Asked


def _speaks(mistake: str) -> bool:
    """Every process of a torchrun finds the same mistake, and one tells it; what one finds, it tells."""
    if "RANK" not in os.environ:
        return os.environ.get("LOCAL_RANK", "0") == "0"
    from tuner import processes

    return processes.first(mistake)


def _tell(lines: Sequence[str]) -> None:
    print("\n".join(lines))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; `arguments` are those of the process where they are not given.

    Returns:
        The exit code.
    """
    try:
        app(None if arguments is None else list(arguments), prog_name="tuner")
    except UserError as error:
        if _speaks(str(error)):
            print(error, file=sys.stderr)
        return 2
    except OSError as error:
        told = of_system(error)
        if told is None:
            raise
        print(told, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:  # how typer returns
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
