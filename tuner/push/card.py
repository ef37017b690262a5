"""The page that the Hub shows of a model: README.md, with its description for machines in front.

Fields of the front matter: https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ruamel.yaml import YAML

from tuner.chart import number
from tuner.push.usage import TOOLS, Part, Usage, diffusers_code
from tuner.report import METHODS

TAGS = {
    "lora": ("lora",),
    "textual_inversion": ("textual_inversion",),
    "controlnet": ("controlnet",),
}
FAMILIES = {  # title, and the tag that says so
    "sd1": ("Stable Diffusion 1.x", "stable-diffusion"),
    "sd2": ("Stable Diffusion 2.x", "stable-diffusion"),
    "sdxl": ("Stable Diffusion XL", "stable-diffusion-xl"),
}
WITHOUT_PICTURES = ("autoencoder", "contrastive")  # methods whose result draws nothing by itself


class Shown(NamedTuple):
    """A picture with its prompt; paths in the repository."""

    prompt: str
    path: str
    condition: str | None = None


class Measure(NamedTuple):
    """Final figures of one kind."""

    name: str
    verdict: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[Any]]
    picture: str | None = None  # in the repository


class Card(NamedTuple):
    """What the page tells.

    Attributes:
        title: the run's name.
        licence: an identifier of the Hub's.
        methods: as recipes name them.
        trigger: what a prompt has to say; None for nothing.
        facts: name -> value, of the training.
        recipe: as YAML, without anything private.
        sheet: the contact sheet in the repository, and what its columns are.
        data: Hub ids of data sets.
    """

    title: str
    licence: str
    methods: Sequence[str]
    trigger: str | None
    usage: Usage
    parts: Sequence[Part]
    shown: Sequence[Shown]
    sheet: tuple[str, Sequence[str]] | None
    measures: Sequence[Measure]
    facts: Mapping[str, str]
    recipe: str
    versions: Mapping[str, str]
    data: Sequence[str] = ()


def text(card: Card) -> str:
    """The whole README.md."""
    blocks = [
        f"# {plain(card.title)}",
        _what(card),
        *_pictures(card),
        *_use(card),
        *_measures(card.measures),
        *_files(card.parts),
        *_making(card),
    ]
    return f"---\n{yaml_text(front_matter(card))}---\n\n" + "\n\n".join(blocks) + "\n"


def front_matter(card: Card) -> dict[str, Any]:
    """The description for machines."""
    usage, draws = card.usage, not set(card.methods) <= set(WITHOUT_PICTURES)
    tags = [tag for method in card.methods for tag in TAGS.get(method, ())]
    fields: dict[str, Any] = {"license": card.licence, "library_name": "diffusers"}
    if draws:
        fields["pipeline_tag"] = "text-to-image"
    if usage.base_kind == "hub":
        fields["base_model"] = usage.base
        adapters = set(card.methods) <= set(TAGS)
        fields["base_model_relation"] = "adapter" if adapters else "finetune"
    drawing = ["text-to-image"] if draws else []
    fields["tags"] = ["diffusers", FAMILIES[usage.family][1], *drawing, *tags, "tuner"]
    if card.trigger:
        fields["instance_prompt"] = card.trigger
    if card.data:
        fields["datasets"] = list(card.data)
    if card.shown and draws:
        fields["widget"] = [{"text": one.prompt or " ", "output": {"url": one.path}} for one in card.shown]
    return fields


def yaml_text(value: Any) -> str:
    """Plain values as YAML, in their order."""
    made = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # declared as None alone
    yaml.width = 4096
    yaml.dump(value, made)
    return made.getvalue()


def quoted(text: str) -> str:
    """A text in Markdown as it is: `<toy>` is no HTML."""
    text = " ".join(text.split())
    fence = "`" * (_backticks(text) + 1)
    space = " " if len(fence) > 1 else ""
    return f"{fence}{space}{text}{space}{fence}" if text else "*(no prompt)*"


def plain(text: str) -> str:
    """A text in Markdown, of which nothing is taken for a tag or for emphasis."""
    return re.sub(r"([<*`])", r"\\\1", " ".join(text.split()))


def _block(language: str, text: str) -> str:
    fence = "`" * max(3, _backticks(text) + 1)
    return f"{fence}{language}\n{text}{fence}"


def _backticks(text: str) -> int:
    """How many there are in a row at most."""
    return max(map(len, re.findall("`+", text)), default=0)


def _base(usage: Usage) -> str:
    if usage.base_kind == "hub":
        return f"[{usage.base}](https://huggingface.co/{usage.base})"
    if usage.base_kind == "embedded":
        return "the small base model that ships with tuner (`tuner/embedded`)"
    return f"{quoted(usage.base)}, a base of the trainer's own"


def _what(card: Card) -> str:
    """The first lines: what it is, of which base, and the words that call it."""
    usage = card.usage
    methods = " and ".join(METHODS.get(name, name.replace("_", " ")) for name in card.methods)
    family = FAMILIES[usage.family][0] + (" for inpainting" if usage.inpainting else "")
    lines = [f"{methods[:1].upper()}{methods[1:]} for {_base(usage)}: {family}."]
    if card.trigger:
        lines.append(f"Write {quoted(card.trigger)} in the prompt.")
    if usage.clip_skip is not None:
        lines.append(f"It was trained at clip skip {usage.clip_skip}; use it at the same.")
    if usage.scheduler:
        settings = ", ".join(f"`{name}: {value}`" for name, value in usage.scheduler.items())
        lines.append(f"Its sampler needs {settings}.")
    return "\n".join([*lines, f"Licence: {card.licence}."])


def _pictures(card: Card) -> Iterable[str]:
    if not card.shown and card.sheet is None:
        return
    yield "## Pictures"
    if card.shown:
        controlled = any(one.condition for one in card.shown)
        head = ["prompt", *(["condition"] if controlled else []), "picture"]
        rows = []
        for one in card.shown:
            condition = [f"![]({one.condition})" if one.condition else ""] if controlled else []
            rows.append([quoted(one.prompt), *condition, f"![]({one.path})"])
        yield _table(head, rows)
    if card.sheet is not None:
        path, columns = card.sheet
        yield (
            f"All of them side by side: [{', '.join(map(plain, columns))}]({path})."
            if columns
            else f"![]({path})"
        )


def _use(card: Card) -> Iterable[str]:
    usage = card.usage
    yield "## How to use it"
    code = diffusers_code(list(card.parts), usage)
    if code is None:
        yield "Nothing here is loaded by diffusers' pipelines alone."
    else:
        yield "With diffusers:\n\n" + _block("python", code)
        if usage.windows > 1:
            windows = f"{usage.windows} windows of 75 tokens"
            yield f"It was trained on prompts of up to {windows}; the code above reads one."
    rows = []
    for tool in TOOLS[1:]:
        for part in card.parts:
            if tool in part.places:
                rows.append([tool, f"`{part.path}`", f"`{part.places[tool]}`", _word(tool, part)])
    if rows:
        yield "In other tools:"
        yield _table(["tool", "file", "goes to", "in the prompt"], rows)
        if usage.base_kind == "embedded":
            yield "These tools do not load the small base itself; the files are named as they read them."


def _word(tool: str, part: Part) -> str:
    """What a prompt says there."""
    if part.kind in ("checkpoint", "ControlNet"):
        return ""
    if part.kind == "embedding":
        return f"`embedding:{part.stem}`" if tool == "ComfyUI" else f"`{part.stem}`"
    if part.words:
        names = " ".join(part.words)
        return f"`embedding:{part.stem}`" if tool == "ComfyUI" else f"`{names} <lora:{part.stem}:1>`"
    return f"`<lora:{part.stem}:1>`" if tool in ("A1111", "Forge") else ""


def _measures(measures: Sequence[Measure]) -> Iterable[str]:
    if measures:
        yield "## What was measured"
    for one in measures:
        yield f"**{plain(one.name)}**" + (f": {plain(one.verdict)}" if one.verdict else "")
        if one.rows:
            width = max(len(one.columns), *(len(row) for row in one.rows.values()))
            head = ["", *map(plain, one.columns), *[""] * (width - len(one.columns))]
            cells = [
                [plain(name), *map(_figure, row), *[""] * (width - len(row))]
                for name, row in one.rows.items()
            ]
            yield _table(head, cells)
        if one.picture:
            yield f"![]({one.picture})"


def _figure(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return number(value)
    return "" if value is None else plain(str(value))


def _files(parts: Sequence[Part]) -> Iterable[str]:
    yield "## Files"
    rows = []
    for part in parts:
        path = f"`{part.path}/`" if part.layout == "folder" else f"`{part.path}`"
        layout = "diffusers" if part.layout == "folder" else part.layout
        rows.append([path, part.kind, layout, part.about])
    yield _table(["file", "what it is", "names", ""], rows)


def _making(card: Card) -> Iterable[str]:
    yield "## How it was made"
    yield _table(["", ""], [[name, plain(value)] for name, value in card.facts.items()])
    versions = ", ".join(f"{name} {version}" for name, version in card.versions.items())
    told = f" ({versions})" if versions else ""
    yield f"By tuner{told}, from this recipe, in which folders are called by their last name alone:"
    yield _block("yaml", card.recipe)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines.insert(1, ["---"] * len(head))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
