"""The one way to open a source, whatever it is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from tuner.data.samples import Samples, Say, check
from tuner.data.sources.spec import SourceSpec
from tuner.data.sources.stream import Stream
from tuner.errors import UserError


def look(spec: SourceSpec, say: Say, source: int = 0, index: Path | None = None) -> Samples | Stream:
    """A source with the samples that are right; what is wrong with others is in its problems().

    Args:
        say: takes lines for the user, such as what is ignored.
        source: the source's number in the recipe.
        index: folder where indices of tars and folders are kept; None: they are made anew each time.

    Raises:
        UserError: the source as a whole cannot be used: it is not there, or has no such column.
    """
    kind = spec.kind
    if kind == "folder":
        from tuner.data.sources.folder import open_folder

        return open_folder(spec, say, source, index)
    if kind == "tars":
        from tuner.data.sources.tar import open_tar_stream, open_tars

        return open_tar_stream(spec, say, source) if spec.streaming else open_tars(spec, say, source, index)
    if kind == "urls":
        from tuner.data.sources.urls import open_urls

        return open_urls(spec, say, source)
    from tuner.data.sources.hub import open_set  # datasets takes seconds to import

    return open_set(spec, say, source)


def open_spec(spec: SourceSpec, say: Say = print, index: Path | None = None) -> Samples | Stream:
    """A source in which every sample is right. Arguments as of `look`.

    Raises:
        UserError: with every problem: the first 20, and the number of the rest.
    """
    return open_specs([spec], say, index)[0]


def open_specs(
    specs: Sequence[SourceSpec], say: Say = print, index: Path | None = None, strict: bool = True
) -> list[Samples | Stream]:
    """All sources of a recipe. Arguments as of `look`.

    Args:
        strict: every sample is right; else what is wrong with single samples is in the sources' problems().

    Raises:
        UserError: with every problem of all sources: the first 20, and the number of the rest.
    """
    opened: list[Samples | Stream] = []
    faults: list[str] = []
    for number, spec in enumerate(specs):
        try:
            opened.append(look(spec, say, number, index))
        except UserError as error:
            faults.append(str(error))
    whole = [one.faults() for one in opened if isinstance(one, Samples)]
    check(chain(faults, *whole, *((one.problems() for one in opened) if strict else ())))
    return opened
