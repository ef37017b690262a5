"""The recipe: its schema, how it is loaded, and what it says about itself.

`load` reads a YAML file, applies overrides, and either returns a Recipe or raises one RecipeError with
everything that is wrong. A method's block stands in its own file in tuner/methods/ and is found by its name.
"""

from __future__ import annotations

import functools
import importlib
import io
import json
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NotRequired, cast

import pydantic
from pydantic import Field
from ruamel.yaml import YAML
from typing_extensions import TypedDict

from tuner import explain, yaml_source
from tuner.block import Block, Conflict, expand
from tuner.blocks import Base, Data, Evaluate, Export, Logging, Preview, Text, Validation
from tuner.training import Objective, Train
from tuner.yaml_source import Place, Problem, RecipeError

__all__ = ["Recipe", "RecipeError", "json_schema", "load", "method_names", "micro_batch"]

METHODS = "tuner.methods"  # the package whose files are the methods


class Recipe(Block):
    """One run. Paths are relative to the current directory."""

    base: Base = Field(description="the model that is adapted")
    method: dict[str, Block] = Field(description="what is trained: one method, or several that combine")
    data: Data = Field(description="what is trained on")
    objective: Objective = Field(Objective(), description="what is predicted, and how errors count")
    train: Train = Field(description="how long and how fast")
    preview: Preview = Field(Preview(), description="pictures made while training")
    validation: Validation = Field(Validation(), alias="validate", description="loss on held-out samples")
    evaluate: Evaluate = Field(Evaluate(), description="measures on generated pictures at the end")
    export: Export = Field(Export(), description="the files for inference tools")
    log: Logging = Field(Logging(), description="where figures go beside metrics.jsonl")
    output: Text = Field(description="folder that the run writes to")

    @property
    def name(self) -> str:
        """`export.name`, else the stem of the recipe's file."""
        assert self.export.name is not None, "load() puts it in"
        return self.export.name

    def conflicts(self) -> Iterator[Conflict]:
        """Methods that do not go together; measures on held-out samples where there are none."""
        names = list(self.method)
        if not names:
            yield Conflict(("method",), f"names no method, expected one of: {', '.join(method_names())}")
        for i, one in enumerate(names):
            for other in names[i + 1 :]:
                if other not in _combines(one) or one not in _combines(other):
                    keys = (f"method.{other}", f"method.{one}")
                    yield Conflict(keys, f"cannot be combined with method {one}")
        looks = {"evaluate.samples": self.evaluate.samples, "validate.every": self.validation.every}
        for key, count in looks.items():
            if count and not self.data.heldout:
                message = (
                    f"found the number {count}, which needs held-out samples: set data.heldout, or 0 here"
                )
                yield Conflict((key, "data.heldout"), message)

        yield from self._stage_conflicts()

    def _stage_conflicts(self) -> Iterator[Conflict]:
        """Stages that do not fill the run."""
        stages, key = self.data.stages or [], "data.stages"
        if not stages:
            return
        if self.train.steps is None:
            message = "needs train.steps: a stage ends at a step, so epochs do not say how long the run is"
            yield Conflict((key, "train.steps", "train.epochs"), message)
            return
        given = sum(stage.steps or 0 for stage in stages)
        if stages[-1].steps is not None and given != self.train.steps:
            message = f"found {given} steps, but train.steps is {self.train.steps}"
            yield Conflict((key, "train.steps"), f"{message}; the last stage may be without steps")
        elif stages[-1].steps is None and given >= self.train.steps:
            message = f"found {given} steps before the last stage, of {self.train.steps} (train.steps) in all"
            yield Conflict((key, "train.steps"), message)

    def resolved_yaml(self) -> str:
        """The whole recipe with every default written out, as YAML that loads again to an equal recipe."""
        text = io.StringIO()
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        # Declared as None alone in ruamel.yaml; False keeps the order of the schema.
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
        # Unicode's own line ends would be read back as spaces: escaped then, with all that is not ASCII.
        written = json.dumps(self.resolved(), ensure_ascii=False)
        yaml.allow_unicode = not any(mark in written for mark in "\x85\u2028\u2029")
        yaml.width = 4096
        yaml.dump(self.resolved(), text)
        return f"# The recipe {self.name}, with every default written out.\n{text.getvalue()}"

    def decisive(self) -> dict[str, Any]:
        """What the trained tensors at a given step depend on, by dotted key.

        Left out are names and places, what only looks at the training (previews, measures, logs,
        checkpoints), the number of loading processes, what changes the rounding alone (threads, how a batch
        is divided), and, where the learning rate is constant, the run's length: a longer run may continue a
        shorter one.
        """
        flat = dict(flatten({key: part for key, part in self.resolved().items() if key in _DECISIVE}))
        gone = set(MAY_CHANGE)
        if self.train.schedule == "constant":
            gone |= {"train.steps", "train.epochs"}
        return {key: value for key, value in flat.items() if not any(_under(key, other) for other in gone)}


_DECISIVE = ("base", "method", "data", "objective", "train")
MAY_CHANGE = (
    "data.heldout",
    "data.cache",
    "data.workers",
    "train.resume",
    "train.checkpoint",
    "train.guard",
    "train.threads",
    "train.accumulate",
    "train.deterministic",
    "train.compile",
    "train.gradient_checkpointing",
)
"""Of these what a run that continues may change: the training is the same, but for rounding."""


def _under(key: str, other: str) -> bool:
    return key == other or key.startswith(other + ".")


def flatten(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a nested mapping by dotted names."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{before}{key}.")
        else:
            yield before + key, value


def method_names() -> tuple[str, ...]:
    """The methods there are: the files of tuner/methods/ without a leading underscore."""
    package = importlib.import_module(METHODS)
    names = (module.name for module in pkgutil.iter_modules(package.__path__))
    return tuple(sorted(name for name in names if not name.startswith("_")))


def _method_file(name: str) -> ModuleType:
    return importlib.import_module(f"{METHODS}.{name}")


def _combines(name: str) -> tuple[str, ...]:
    return tuple(_method_file(name).METHOD.COMBINES)


@functools.cache
def _recipe_type(package: str, names: tuple[str, ...], used: tuple[str, ...]) -> type[Recipe]:
    """Recipe with the blocks of the methods that are used; only their files are imported."""
    kinds = {name: _method_file(name).Config if name in used else Block for name in names}
    assert all(issubclass(kind, Block) for kind in kinds.values()), f"in {package}: Config must be a Block"
    blocks = {name: NotRequired[kind] for name, kind in kinds.items()}
    methods = cast(Any, TypedDict)("Methods", blocks)
    methods.__pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True)
    field = Field(description=Recipe.model_fields["method"].description)
    made = pydantic.create_model("Recipe", __base__=Recipe, __doc__=Recipe.__doc__, method=(methods, field))
    return cast(type[Recipe], made)


def _type_for(tree: Mapping[str, Any]) -> type[Recipe]:
    wanted = tree.get("method")
    chosen = [wanted] if isinstance(wanted, str) else list(wanted) if isinstance(wanted, dict) else []
    names = method_names()
    return _recipe_type(METHODS, names, tuple(name for name in names if name in chosen))


def _expanded(tree: dict[str, Any]) -> dict[str, Any]:
    """The recipe with its short forms written out; `method: lora` is one too."""
    if isinstance(tree.get("method"), str):
        tree = {**tree, "method": {tree["method"]: {}}}
    written = expand(_type_for(tree), tree)
    assert isinstance(written, dict)
    return written


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `key.sub=value` overrides applied in their order.

    Raises:
        RecipeError: with every problem of the file and the overrides.
    """
    path = Path(path)
    document = yaml_source.read(path)
    yaml_source.override(document, overrides, _expanded)
    export = document.tree.setdefault("export", {})
    if isinstance(export, dict) and export.get("name") is None:
        export["name"] = path.stem
        document.places["export", "name"] = Place((0, 0), str(path))
    kind = _type_for(document.tree)
    recipe: Recipe | None = None
    try:
        recipe = kind.model_validate(document.tree)
    except pydantic.ValidationError as error:
        document.problems += explain.problems(error, kind, document)
    if document.problems:
        told: list[Problem] = sorted(
            set(document.problems),
            key=lambda one: (one.place.order, yaml_source.dotted(one.key), one.message),
        )
        raise RecipeError(told)
    assert recipe is not None, "an invalid recipe has a problem to show"
    return recipe


def json_schema() -> dict[str, Any]:
    """The JSON schema of recipes, short forms included, for editors."""
    names = method_names()
    schema = _recipe_type(METHODS, names, names).model_json_schema()
    methods = schema["properties"]["method"]
    target = schema["$defs"][methods["$ref"].rsplit("/", 1)[1]] if "$ref" in methods else methods
    target["minProperties"] = 1
    description = methods.pop("description", Recipe.model_fields["method"].description)
    schema["properties"]["method"] = {"anyOf": [{"enum": list(names)}, methods], "description": description}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "tuner recipe"}


def micro_batch(recipe: Recipe, processes: int) -> int:
    """Pictures in one forward pass of one process; stages may have other numbers.

    Raises:
        RecipeError: `train.batch_size` or a stage's does not divide by processes times `train.accumulate`.
    """
    assert processes >= 1
    passes = processes * recipe.train.accumulate
    sizes = {"train.batch_size": recipe.train.batch_size}
    for number, stage in enumerate(recipe.data.stages or []):
        if stage.batch_size is not None:
            sizes[f"data.stages.{number}.batch_size"] = stage.batch_size
    problems = []
    for key, size in sizes.items():
        if size % passes:
            below = size // passes * passes
            choices = [str(choice) for choice in (below, below + passes) if choice]
            many = f"{processes} process{'es' if processes > 1 else ''} x {recipe.train.accumulate} "
            many += f"(train.accumulate) = {passes} forward passes"
            message = f"found {size}, which {many} cannot share evenly"
            problems.append(f"{key}: {message}; choose {' or '.join(choices)}")
    if problems:
        raise RecipeError(problems)
    return recipe.train.batch_size // passes
