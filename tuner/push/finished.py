"""A finished run as it lies in its folder: what it exported, drew and measured. Nothing there is changed."""

from __future__ import annotations

import difflib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from tuner import log
from tuner.errors import UserError
from tuner.export import contents, metadata
from tuner.push import usage
from tuner.push.usage import STEP, Part

GAP, HEAD, LINE = 6, 22, 18  # pixels, of the sheets that sample.sheet draws


class PushError(UserError):
    """A run that cannot be pushed as asked, or a Hub that does not take it."""


class Previews(NamedTuple):
    """The contact sheet of one step."""

    sheet: Path
    columns: list[str]
    prompts: list[str]
    rows: list[dict[str, bytes]]  # for each prompt column -> picture as PNG; empty: a sheet of another form


@dataclass(frozen=True)
class Finished:
    """A finished run.

    Attributes:
        output: its folder.
        exports: export/, or the folder of a step in it.
        parts: what is exported.
        header: the metadata of the first exported file that has it.
        step: the optimiser step of the exports.
        last: whether that is the run's last.
    """

    output: Path
    exports: Path
    recipe: dict[str, Any]
    records: log.Records
    parts: list[Part]
    header: Mapping[str, str]
    step: int
    last: bool

    @property
    def name(self) -> str:
        """The exports' stem."""
        return str(dig(self.recipe, "export", "name") or self.output.resolve().name)

    @property
    def base(self) -> str:
        """The base's Hub id, or its name: as the exports tell it, which were written where it lay."""
        told = self.header.get("tuner.base")
        if told is not None:
            return str(json.loads(told)["name"])
        return metadata.local_name(str(dig(self.recipe, "base", "path")))

    @property
    def inpainting(self) -> bool:
        """Whether the base is shown a hole: as the exports tell it, else by its files, else by its name."""
        told = self.header.get("tuner.base")
        if told is not None:
            return bool(json.loads(told).get("inpainting", False))
        config = Path(str(dig(self.recipe, "base", "path"))) / "unet" / "config.json"
        if config.is_file():
            return int(read_json(config).get("in_channels", 4)) == 9
        return "inpaint" in self.base.lower()

    def scalar(self, name: str) -> float | None:
        """The last value until the exports' step."""
        values = [value for step, value in self.records.scalars.get(name, []) if step <= self.step]
        return values[-1] if values else None

    def versions(self) -> dict[str, str]:
        """The libraries it was made with."""
        return {str(name): str(version) for name, version in read_json(self.output / "versions.json").items()}

    def previews(self) -> Previews | None:
        """The newest contact sheet until the exports' step.

        Raises:
            PushError: what is told of it cannot be read.
        """
        folder = self.output / "previews"
        steps = {int(found[1]): one for one in folder.glob("*.png") if (found := STEP.fullmatch(one.stem))}
        steps = {step: place for step, place in steps.items() if step <= self.step}
        if not steps:
            return None
        sheet = steps[max(steps)]
        about = read_json(sheet.with_suffix(".json"))
        columns = [str(column) for column in about.get("columns", [])]
        prompts = [self._plain(str(prompt)) for prompt in about.get("prompts", [])]
        return Previews(sheet, columns, prompts, _cut(sheet, columns, len(prompts)))

    def _plain(self, prompt: str) -> str:
        """A prompt as people write it: a new word once, not once for each of its vectors."""
        for token in (re.escape(token) for part in self.parts for token in part.tokens):
            prompt = re.sub(rf"({token})(?: {token}_\d+)+", r"\1", prompt)
        return prompt


def read(run: Path, step: int | None = None) -> Finished:
    """The run in the folder `run`, with the exports of a step (None: the final ones).

    Raises:
        PushError: there is none, it is not finished, or nothing is exported.
    """
    records = _records(run)
    yaml = YAML(typ="safe", pure=True)
    try:
        recipe = yaml.load((run / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise PushError(f"{run / 'recipe.yaml'} cannot be read: {error}") from error
    exports = run / "export"
    if step is not None:
        steps = sorted(int(found[1]) for one in exports.glob("*") if (found := STEP.fullmatch(one.name)))
        if step not in steps:
            there = ", ".join(map(str, steps)) or "none (export.every in the recipe makes them)"
            raise PushError(f"--step {step}: no exports of that step; there are {there}")
        exports = exports / f"step-{step}"
    base = str(dig(recipe, "base", "path"))
    parts = usage.parts(exports, base) if exports.is_dir() else []
    if not parts:
        raise PushError(f"{exports}: nothing is exported there")
    headers = [contents.read(path).metadata for path in usage.files(exports) if path.suffix == ".safetensors"]
    header = next((one for one in headers if "tuner.base" in one), {})
    at = records.last_step if step is None else step
    return Finished(run, exports, recipe, records, parts, header, at, step is None)


def _records(run: Path) -> log.Records:
    if not (run / log.FILE).is_file() or not (run / "recipe.yaml").is_file():
        what = "is a file" if run.is_file() else "is no run's folder" if run.is_dir() else "does not exist"
        hint = "".join(f"; did you mean {one}?" for one in _near(run))
        raise PushError(
            f"{run} {what}; expected the folder that a run wrote to (its recipe's `output`){hint}"
        )
    records = log.read(run / log.FILE)
    if not records.finished:
        raise PushError(
            f"{run} is not finished (at step {records.last_step:,}); "
            "`tuner train` with the same recipe continues it"
        )
    return records


def _near(run: Path) -> list[Path]:
    """The run that was most likely meant: the one around, or one beside with nearly the same name."""
    if (run.resolve().parent / log.FILE).is_file():
        return [run.parent]
    beside = {path.parent.name: path.parent for path in run.parent.glob(f"*/{log.FILE}")}
    return [beside[name] for name in difflib.get_close_matches(run.name, beside, n=1)]


def _cut(sheet: Path, columns: list[str], rows: int) -> list[dict[str, bytes]]:
    """The pictures of a contact sheet, row by row; none where it is not as sample.sheet draws."""
    with Image.open(sheet) as image:
        whole = image.convert("RGB")
    side = (whole.width - GAP) // len(columns) - GAP if columns else 0
    size = (GAP + (side + GAP) * len(columns), HEAD + rows * (side + LINE + GAP))
    if whole.size != size or side <= 0:
        return []
    found = []
    for y in range(rows):
        row = {}
        for x, column in enumerate(columns):
            left, top = GAP + x * (side + GAP), HEAD + y * (side + LINE + GAP) + LINE
            made = io.BytesIO()
            whole.crop((left, top, left + side, top + side)).save(made, "PNG")
            row[column] = made.getvalue()
        found.append(row)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where there is none.

    Raises:
        PushError: it holds something else.
    """
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise PushError(f"{path} cannot be read: {error}") from error


def dig(value: Any, *keys: str) -> Any:
    """The value below these keys, or None."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def sizes(recipe: Any) -> list[Any]:
    """What a recipe says of its resolution, stage after stage."""
    stages = dig(recipe, "data", "stages")
    return [dig(stage, "resolution") for stage in stages] if stages else [dig(recipe, "data", "resolution")]
