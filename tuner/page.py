"""A page of HTML from a template of this package, in a file that appears whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tuner.export.files import write_whole


def write(path: Path, template: Path, contents: Mapping[str, Any]) -> Path:
    """Fill a template in and write it to `path`, which is returned.

    Whatever the contents say is text there, never HTML, and a name that they lack is a fault.

    Args:
        template: a `.html.j2` file.

    Raises:
        DiskError: it cannot be written.
    """
    templates = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = templates.get_template(template.name).render(contents)
    return write_whole(path, page.encode("utf-8", errors="backslashreplace"))
