"""What of a finished run goes to the Hub: exports, a card, pictures and the recipe, and nothing private."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tuner import progress
from tuner.chart import number
from tuner.export import metadata
from tuner.progress import say
from tuner.push import card as model_card
from tuner.push import finished, licences, usage
from tuner.push.card import Card, Measure, Shown
from tuner.push.finished import Finished, PushError, dig, sizes
from tuner.push.usage import Usage

FEW = 4  # pictures that are shown one by one
_PLACE = re.compile(
    r"[^\s/]*/\S*/[^\s/?]*(\?\S*)?"
)  # two slashes and no space: no name at the Hub, no sentence
Pictures = dict[str, bytes]  # by path in the repository


@dataclass(frozen=True)
class Wish:
    """How a run is to be pushed.

    Attributes:
        repo: owner/name.
        branch: at the Hub.
        private: the repository, where it is new.
        licence: an identifier of the Hub's; None: what the exports say.
        message: of the commit; None: made.
        step: the exports of this step; None: the final ones.
    """

    repo: str
    branch: str = "main"
    private: bool = False
    licence: str | None = None
    message: str | None = None
    step: int | None = None


@dataclass(frozen=True)
class Parcel:
    """What is uploaded.

    Attributes:
        files: path in the repository -> a file on this machine, or its bytes.
        message: of the commit.
    """

    files: Mapping[str, Path | bytes]
    message: str

    @property
    def card(self) -> str:
        """README.md."""
        content = self.files["README.md"]
        assert isinstance(content, bytes)
        return content.decode()

    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            path: len(source) if isinstance(source, bytes) else source.stat().st_size
            for path, source in self.files.items()
        }


def pack(run: Path, wish: Wish) -> Parcel:
    """Everything that a push of the run in the folder `run` uploads; read and made in memory.

    Raises:
        PushError: no finished run there, nothing exported, no licence known, or something private in a file.
    """
    source = finished.read(run, wish.step)
    licence = _licence(wish, source.header)
    pictures: Pictures = {}
    card = _card(source, wish, licence, pictures)
    about = f"# The recipe {card.title} as it was trained, without the places of files.\n"
    files: dict[str, Path | bytes] = {
        "README.md": model_card.text(card).encode(),
        "recipe.yaml": (about + card.recipe).encode(),
        **pictures,
    }
    for path in usage.files(source.exports):
        place = path.relative_to(source.exports).as_posix()
        if place in files or path.name.startswith("."):
            raise PushError(f"{path}: a file of that name does not belong to an export; remove it")
        files[place] = path
    _check_private(files, run)
    message = f"{card.title}: {' + '.join(card.methods)}, {source.step:,} steps"
    return Parcel(files, wish.message or message)


def _licence(wish: Wish, header: Mapping[str, str]) -> str:
    told = header.get("modelspec.license")
    licence = wish.licence or told
    if licence is None:
        raise PushError(
            "the licence is not known: give --licence, an identifier of the Hub's such as "
            "creativeml-openrail-m, apache-2.0, cc-by-4.0 or other"
        )
    if told in licences.KNOWN and licence != told:  # what the Hub has no name for, a recipe may say too
        raise PushError(f"--licence {licence}: the exported files say {told}")
    if licence not in licences.KNOWN:
        like = licences.near(licence)
        hint = f"; did you mean {' or '.join(like)}?" if like else ""
        raise PushError(
            f"licence {licence!r}: expected an identifier of the Hub's in small letters, such as "
            f"creativeml-openrail-m or apache-2.0; other for one that it does not list{hint}"
        )
    return licence


# ---- nothing private


def _public_recipe(source: Finished) -> dict[str, Any]:
    """The recipe with names in place of places."""
    recipe = {key: _named(value) for key, value in metadata.scrub(source.recipe).items()}
    assert isinstance(recipe["base"], dict), "a run writes its recipe in full"
    recipe["base"]["path"] = source.base
    return recipe


def _named(value: Any) -> Any:
    """Paths that scrubbing did not know, as they are not there any more, become their last part too."""
    if isinstance(value, Mapping):
        return {key: _named(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_named(item) for item in value]
    if isinstance(value, str) and _PLACE.fullmatch(value):
        return value.partition("?")[0].rstrip("/").rpartition("/")[2]
    return value


def _check_private(files: Mapping[str, Path | bytes], run: Path) -> None:
    """Raises PushError where a text, or a file's header, names the user's or the run's folder."""
    folders = {str(Path.home()), str(Path.cwd()), str(run.resolve())} - {"/"}
    known = re.compile("|".join(rf"(?<![\w.~-]){re.escape(one)}(?![\w.-])" for one in sorted(folders)))
    for name, source in files.items():
        if name.endswith((".md", ".yaml", ".json", ".txt", ".safetensors")):
            found = known.search(_text(source))
            if found is not None:
                raise PushError(f"{name} names a place on this machine: {found[0]}")


def _text(source: Path | bytes) -> str:
    """A text, or the header of a safetensors file."""
    if isinstance(source, bytes):
        return source.decode(errors="replace")
    with source.open("rb") as file:
        if source.suffix == ".safetensors":
            return file.read(int.from_bytes(file.read(8), "little")).decode(errors="replace")
        return file.read().decode(errors="replace")


# ---- the card


def _card(source: Finished, wish: Wish, licence: str, pictures: Pictures) -> Card:
    """The card; the pictures that it shows are added to `pictures`."""
    recipe = _public_recipe(source)
    tokens = [token for part in source.parts for token in part.tokens]
    prefix = str(dig(recipe, "data", "captions", "prefix") or "").strip(" ,")
    trigger = " ".join(tokens) or source.header.get("modelspec.trigger_phrase") or prefix or None
    shown, sheet = _shown(source, pictures)
    data = [str(dig(one, "path")) for one in dig(recipe, "data", "source") or []]
    return Card(
        title=source.name,
        licence=licence,
        methods=list(dig(recipe, "method") or {}),
        trigger=trigger,
        usage=_usage(source, wish, trigger, shown),
        parts=source.parts,
        shown=shown,
        sheet=sheet,
        measures=list(_measures(source, pictures)) if source.last else [],
        facts=_facts(source, data),
        recipe=model_card.yaml_text(recipe),
        versions=source.versions(),
        data=[name.removeprefix("hub:") for name in data if name.startswith("hub:")],
    )


def _shown(source: Finished, pictures: Pictures) -> tuple[list[Shown], tuple[str, list[str]] | None]:
    """The newest previews, whole and cut into single pictures."""
    previews = source.previews()
    if previews is None:
        return [], None
    if not previews.rows:
        say(f"{previews.sheet.name} is not of the form that previews have; it is shown whole only")
    whole = f"pictures/{previews.sheet.name}"
    pictures[whole] = previews.sheet.read_bytes()
    shown = []
    for count, (prompt, row) in enumerate(zip(previews.prompts, previews.rows[:FEW], strict=False), start=1):
        names = {"adapted": f"pictures/{count}.png", "condition": f"pictures/{count}-condition.png"}
        paths = {column: path for column, path in names.items() if column in row}
        pictures |= {path: row[column] for column, path in paths.items()}
        if "adapted" in paths:
            shown.append(Shown(prompt, paths["adapted"], paths.get("condition")))
    return shown, (whole, previews.columns)


def _usage(source: Finished, wish: Wish, trigger: str | None, shown: list[Shown]) -> Usage:
    recipe, base = source.recipe, source.base
    raw, resolution = str(dig(recipe, "base", "path")), sizes(recipe)[-1]
    kind: Literal["hub", "here", "file", "embedded"] = "here"
    if base == "embedded":
        kind = "embedded"
    elif base.count("/") == 1:
        kind = "hub"
    elif raw.endswith((".safetensors", ".ckpt")):
        kind = "file"
    prompts = [one.prompt for one in shown if one.prompt and (trigger is None or trigger in one.prompt)]
    example = "a picture" if trigger is None else f"a picture of {trigger}"
    preview = dig(recipe, "preview") or {}
    return Usage(
        repo=wish.repo,
        branch=wish.branch,
        base=base,
        base_kind=kind,
        family=next((part.family for part in source.parts if part.family), "sd1"),
        prompt=[*prompts, example][0],
        revision=dig(recipe, "base", "revision"),
        inpainting=source.inpainting,
        negative=str(preview.get("negative", "")),
        size=resolution if isinstance(resolution, int) else 512,
        steps=int(preview.get("steps", 20)),
        guidance=float(preview.get("guidance", 5.0)),
        scheduler=_scheduler(dig(recipe, "objective") or {}),
        clip_skip=dig(recipe, "base", "clip_skip"),
        windows=int(dig(recipe, "base", "windows") or 1),
        condition=next((one.condition for one in shown if one.condition), None),
    )


def _scheduler(objective: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the base's scheduler that an objective changes (Objective.sampling)."""
    settings: dict[str, Any] = {}
    if objective.get("prediction", "auto") != "auto":
        settings["prediction_type"] = objective["prediction"]
    if objective.get("zero_terminal_snr"):
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return settings


def _measures(source: Finished, pictures: Pictures) -> Iterator[Measure]:
    """Final figures with their pictures."""
    for name, values in source.records.measures.items():
        special = ("verdict", "columns", "rows", "picture")
        rows = {str(key): value for key, value in (values.get("rows") or {}).items()}
        rows |= {key: value for key, value in values.items() if key not in special}
        lists = {key: row if isinstance(row, list) else [row] for key, row in rows.items()}
        place, path = (source.output / str(values.get("picture", ""))).resolve(), None
        if place.is_file() and place.is_relative_to(source.output.resolve()):
            path = f"pictures/{place.name}"
            pictures[path] = place.read_bytes()
        columns = [str(column) for column in values.get("columns") or []]
        yield Measure(name, str(values.get("verdict", "")), columns, lists, path)


def _facts(source: Finished, data: list[str]) -> dict[str, str]:
    """What the card's table says of the training, as far as it is known."""
    recipe, train = source.recipe, dig(source.recipe, "train") or {}
    prediction = dig(recipe, "objective", "prediction")
    heldout, seconds = source.scalar("validation_loss"), source.scalar("seconds")
    facts: dict[str, Any] = {
        "Base": source.base,
        "Data": ", ".join(data),
        "Condition": dig(recipe, "method", "controlnet", "condition"),
        "Resolution": f"{', then '.join(map(str, sizes(recipe)))} pixels",
        "Steps": f"{source.step:,} of {train.get('batch_size')} pictures",
        "Learning rate": train.get("learning_rate"),
        "Schedule": train.get("schedule"),
        "Optimiser": dig(train, "optimiser", "name"),
        "Prediction": None if prediction == "auto" else prediction,
        "Loss on held-out samples": None if heldout is None else number(heldout),
        "Precision": train.get("precision"),
        "Seed": train.get("seed"),
        "Time": None if seconds is None else progress.duration(seconds),
    }
    return {name: str(fact) for name, fact in facts.items() if fact not in (None, "")}
