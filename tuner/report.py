"""The report of a run: one self-contained HTML page made from what lies in its output folder.

It can be written at any time of a run; what is not there yet is left out and named.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from safetensors import SafetensorError, safe_open

from tuner import log, page, progress
from tuner.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, line_chart, number
from tuner.errors import UserError

HEAVY = 1_500_000  # bytes; a larger picture is inlined as JPEG
LONG_SIDE = 2048  # pixels, of a picture inlined as JPEG

CHARTS = {  # the order of the charts, with title and unit; other scalars follow by name
    "loss": ("Training loss", ""),
    "validation_loss": ("Validation loss", ""),
    "learning_rate": ("Learning rate", ""),
    "images_per_second": ("Speed", "images/s"),
    "data_wait": ("Share of the time in which data is waited for", ""),
}
STEP = re.compile(r"step-(\d+)$")
EXACT = ("validation_loss", "learning_rate")  # drawn without smoothing: they carry no noise of the batch
SECONDS = "seconds"  # the scalar that holds the time used so far: shown in the headline, not drawn
METHODS = {
    "controlnet": "ControlNet",
    "lora": "LoRA",
    "textual_inversion": "Textual Inversion",
    "full": "full training",
}


@dataclass
class Picture:
    """A picture to be inlined, with what is said below it."""

    name: str
    data: str
    width: int
    height: int
    lines: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Export:
    """A file or folder that another tool loads."""

    path: str
    size: str
    keys: int | None
    kind: str
    uses: list[tuple[str, str]]
    """(tool, code or place)"""
    of_step: bool
    """Whether it was written on the way, below export/step-N/."""


def write(output: Path) -> Path:
    """Write `output`/report.html from what lies in the folder `output`, and return its path.

    Raises:
        UserError: there is no such folder, or metrics.jsonl has a line that cannot be read.
    """
    if not output.is_dir():
        raise UserError(f"{output}: no such folder; expected the one that a run wrote to (`output`)")
    template = Path(__file__).with_name("report.html.j2")
    return page.write(output / "report.html", template, _contents(output))


def _contents(output: Path) -> dict[str, Any]:
    """All that the template shows."""
    problems: list[str] = []
    text, recipe = _recipe(output / "recipe.yaml", problems)
    metrics = output / log.FILE
    records = log.read(metrics) if metrics.exists() else log.Records()
    measures = [_measure(output, name, values, problems) for name, values in records.measures.items()]
    shown = {values.get("picture") for values in records.measures.values()}
    pictures = sorted(
        path for path in output.glob("evaluation/*.png") if f"evaluation/{path.name}" not in shown
    )
    contents = {
        "name": str(_dig(recipe, "export", "name") or output.resolve().name),
        "facts": _facts(recipe, records),
        "state": _state(recipe, records),
        "finished": records.finished,
        "measures": measures,
        "pictures": [made for path in pictures if (made := _picture(path, path.name, problems))],
        "charts": _charts(records),
        "events": records.events,
        "previews": _previews(output / "previews", problems),
        "exports": _exports(output, recipe, problems),
        "recipe": text,
        "versions": _versions(output / "versions.json", problems),
        "problems": problems,
        "size": {
            "width": WIDTH,
            "height": HEIGHT,
            "left": LEFT,
            "right": RIGHT,
            "top": TOP,
            "bottom": BOTTOM,
        },
    }
    names = ("recipe", "charts", "measures", "previews", "exports", "versions")
    named = {"charts": "curves", "measures": "figures"}
    contents["missing"] = [named.get(name, name) for name in names if not contents[name]]
    return contents


def _recipe(path: Path, problems: list[str]) -> tuple[str, Any]:
    if not path.exists():
        return "", {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return text, YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        problems.append(f"recipe.yaml cannot be read: {error}")
        return text, {}


def _dig(value: Any, *keys: str) -> Any:
    """The value below these keys, or None."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _facts(recipe: Any, records: log.Records) -> list[tuple[str, str]]:
    """What the headline says of the run, as far as it is known."""
    methods = _dig(recipe, "method")
    base, source = _dig(recipe, "base"), _dig(recipe, "data", "source")
    sources = source if isinstance(source, list) else [source]
    used = records.scalars.get(SECONDS)
    stages = _dig(recipe, "data", "stages") or [_dig(recipe, "data")]
    resolutions = [found for stage in stages if (found := _dig(stage, "resolution"))]
    sides = [" x ".join(map(str, one if isinstance(one, list) else [one])) for one in resolutions]
    facts = {
        "Method": " + ".join(METHODS.get(str(name), str(name)) for name in methods or [])
        if isinstance(methods, Mapping)
        else methods,
        "Base": _dig(base, "path") or base,
        "Data": ", ".join(str(_dig(one, "path") or one) for one in sources if one),
        "Resolution": ", then ".join(sides) + " px" if sides else None,
        "Steps": _dig(recipe, "train", "steps"),
        "Epochs": _dig(recipe, "train", "epochs"),
        "Batch size": _dig(recipe, "train", "batch_size"),
        "Precision": _dig(recipe, "train", "precision"),
        "Time used": progress.duration(used[-1][1]) if used and math.isfinite(used[-1][1]) else None,
    }
    return [
        (name, f"{fact:,}" if isinstance(fact, int) else str(fact)) for name, fact in facts.items() if fact
    ]


def _state(recipe: Any, records: log.Records) -> str:
    if records.finished:
        return "finished"
    steps = _dig(recipe, "train", "steps")
    of = f" of {steps:,}" if isinstance(steps, int) else ""
    return f"unfinished, at step {records.last_step:,}{of}"


def _measure(output: Path, name: str, values: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """A measure as a table: from columns and rows, or from plain values by name."""
    special = ("verdict", "picture", "columns", "rows")
    plain = [(key, [value]) for key, value in values.items() if key not in special]
    rows = values.get("rows")
    table = isinstance(rows, Mapping)
    if isinstance(rows, Mapping):
        body = [(str(key), row if isinstance(row, list) else [row]) for key, row in rows.items()]
    else:
        body = plain
    columns = [str(column) for column in values.get("columns") or []]
    found = [value for _, row in body for value in row if _is_number(value)]
    shares = bool(found) and all(0 <= float(value) <= 1 for value in found)
    width = max([len(columns)] + [len(row) for _, row in body])
    picture = values.get("picture")
    return {
        "name": name,
        "verdict": values.get("verdict"),
        "columns": columns + [""] * (width - len(columns)) if columns else [],
        "rows": [
            {
                "name": key,
                "bound": any(word in key.lower() for word in ("floor", "ceiling")),
                "cells": [_cell(value, shares) for value in row] + [("", None)] * (width - len(row)),
            }
            for key, row in body
        ],
        "others": [(key, _cell(value[0], False)[0]) for key, value in plain] if table else [],
        "picture": _named_picture(output, str(picture), problems) if picture else None,
    }


def _cell(value: Any, shares: bool) -> tuple[str, float | None]:
    """What a cell says, and how many percent of it are filled where all figures are shares."""
    if _is_number(value):
        share = shares and not isinstance(value, int)
        return number(value), round(100 * float(value), 1) if share else None
    if isinstance(value, list | Mapping):
        return json.dumps(value, ensure_ascii=False), None
    return ("" if value is None else str(value)), None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _charts(records: log.Records) -> list[Chart]:
    last = max((values[-1][0] for values in records.scalars.values()), default=0)
    names = [name for name in CHARTS if name in records.scalars]
    names += sorted(name for name in records.scalars if name not in CHARTS and name != SECONDS)
    charts = []
    for name in names:
        words = name.replace("_", " ").replace("/", " / ")
        title, unit = CHARTS.get(name, (words[:1].upper() + words[1:], ""))
        charts.append(
            line_chart(title, unit, records.scalars[name], last, records.events, smooth=name not in EXACT)
        )
    return charts


# ---- pictures


def _previews(folder: Path, problems: list[str]) -> list[Picture]:
    """The contact sheets previews/step-N.png, newest first, with the prompts from the JSON beside."""
    numbered = {int(found[1]): path for path in folder.glob("*.png") if (found := STEP.match(path.stem))}
    previews = []
    for step in sorted(numbered, reverse=True):
        picture = _picture(numbered[step], f"Step {step:,}", problems)
        if picture is None:
            continue
        said = _json(numbered[step].with_suffix(".json"), problems)
        columns, prompts = _dig(said, "columns"), _dig(said, "prompts")
        if isinstance(columns, list):
            picture.lines.append("Columns: " + ", ".join(str(column) for column in columns))
        if isinstance(prompts, list):
            picture.lines += [
                f"Row {row}: {prompt or '(no prompt)'}" for row, prompt in enumerate(prompts, start=1)
            ]
        previews.append(picture)
    return previews


def _named_picture(output: Path, name: str, problems: list[str]) -> Picture | None:
    """A picture that a measure names, if it lies in the output folder."""
    path = (output / name).resolve()
    if not path.is_relative_to(output.resolve()) or not path.is_file():
        problems.append(f"the picture {name} is named by a measure and not in the output folder")
        return None
    return _picture(path, "", problems)


def _picture(path: Path, name: str, problems: list[str]) -> Picture | None:
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            width, height = image.size
            kind = str(image.format).lower()
            if len(content) > HEAVY:
                image.thumbnail((LONG_SIDE, LONG_SIDE))
                smaller, kind = io.BytesIO(), "jpeg"
                image.convert("RGB").save(smaller, "JPEG", quality=88)
                content = smaller.getvalue()
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
        problems.append(f"{path.parent.name}/{path.name} cannot be read: {error}")
        return None
    encoded = base64.b64encode(content).decode("ascii")
    return Picture(name, f"data:image/{kind};base64,{encoded}", width, height)


# ---- exports and versions


def _exports(output: Path, recipe: Any, problems: list[str]) -> list[Export]:
    """Every model folder and every other file of export/, the final ones before those of single steps."""
    root = output / "export"
    place = str(_dig(recipe, "output") or output.name).rstrip("/") + "/export/"
    marked = {path.parent for name in ("config.json", "model_index.json") for path in root.rglob(name)}
    # the outermost ones: a pipeline's folder holds those of its networks
    folders = {folder for folder in marked if not marked & set(folder.parents)}
    files = {path for path in root.rglob("*") if path.is_file() and not folders & set(path.parents)}
    found = []
    for path in sorted(folders | files):
        inside = sorted(path.rglob("*")) if path in folders else [path]
        size = sum(one.stat().st_size for one in inside if one.is_file())
        listed = [_keys(one, problems) for one in inside if one.suffix == ".safetensors"]
        keys = [key for names in listed for key in names]
        where = path.relative_to(root).as_posix()
        if path in folders:
            kind, uses = _folder_uses(path, json.dumps(place + where), problems)
        else:
            kind, uses = _file_uses(path, json.dumps(place + where), keys)
        of_step = bool(STEP.match(where.split("/")[0]))
        shown = where + "/" if path in folders else where
        found.append(Export(shown, _bytes(size), len(keys) if listed else None, kind, uses, of_step))
    return found


def _keys(path: Path, problems: list[str]) -> list[str]:
    try:
        with safe_open(path, framework="np") as tensors:
            return list(tensors.keys())
    except SafetensorError as error:
        problems.append(f"{path.name} cannot be read: {error}")
        return []


def _folder_uses(path: Path, place: str, problems: list[str]) -> tuple[str, list[tuple[str, str]]]:
    if (path / "model_index.json").exists():
        return "pipeline", [("diffusers", f"pipeline = DiffusionPipeline.from_pretrained({place})")]
    name = _dig(_json(path / "config.json", problems), "_class_name")
    if not name:
        return "folder", []
    variable = "controlnet" if name == "ControlNetModel" else "model"
    return f"folder of a {name}", [("diffusers", f"{variable} = {name}.from_pretrained({place})")]


def _file_uses(path: Path, place: str, keys: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """What a single file is, told from the names of its tensors, and how each tool loads it."""
    if not keys:
        return "", []
    stem = path.stem
    load = ("diffusers", f"pipeline.load_lora_weights({place})")
    webui = [
        ("ComfyUI", "models/loras/"),
        ("A1111", f"models/Lora/, and <lora:{stem}:1> in the prompt"),
    ]
    if all(key.startswith(("lora_", "bundle_emb.")) for key in keys):  # with words: a bundle
        plain = all(key.endswith((".lora_down.weight", ".lora_up.weight", ".alpha")) for key in keys)
        return "LoRA", [load, *webui] if plain else webui
    if all(".lora_" in key for key in keys):
        return "LoRA, peft names", [load]
    if any(key.startswith("model.diffusion_model.") for key in keys):
        return "checkpoint", [("ComfyUI", "models/checkpoints/"), ("A1111", "models/Stable-diffusion/")]
    if any(key.removeprefix("control_model.").startswith("zero_convs.") for key in keys):
        return "ControlNet", [("ComfyUI", "models/controlnet/"), ("A1111", "models/ControlNet/")]
    embedding = [("ComfyUI", f"models/embeddings/, and embedding:{stem} in the prompt")]
    embedding.append(("A1111", f"embeddings/, and {stem} in the prompt"))
    if len(keys) == 1:
        token = json.dumps(keys[0])
        code = f"pipeline.load_textual_inversion({place}, token={token})"
        return "embedding", [("diffusers", code), *embedding]
    return ("embedding", embedding) if set(keys) == {"clip_l", "clip_g"} else ("tensors", [])


def _bytes(size: int) -> str:
    """A file's size, in units of 1000."""
    for limit, unit, digits in ((1e9, "GB", 2), (1e6, "MB", 1), (1e3, "kB", 1)):
        if size >= limit:
            return f"{size / limit:.{digits}f} {unit}"
    return f"{size} bytes"


def _versions(path: Path, problems: list[str]) -> list[tuple[str, str]]:
    versions = _json(path, problems)
    return (
        [(str(name), str(version)) for name, version in versions.items()]
        if isinstance(versions, Mapping)
        else []
    )


def _json(path: Path, problems: list[str]) -> Any:
    """What a JSON file holds; None where there is no such file or it cannot be read."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        problems.append(f"{path.name} cannot be read: {error}")
        return None
