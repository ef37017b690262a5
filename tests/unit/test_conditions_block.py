"""The recipe's block of conditions: short and long form, what is told of mistakes, what exports say."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pydantic
import pytest
from pydantic import Field

from tuner import explain, yaml_source
from tuner.block import Block, expand
from tuner.data import conditions
from tuner.data.conditions import GIVEN, Condition, kinds, parameters
from tuner.data.conditions._seam import Amount


class Root(Block):
    """As a method's block holds it."""

    condition: Condition = Field(Condition(kind="canny"), description="of the condition picture")


def problems(*words: str) -> list[str]:
    """What is told of a block written on the command line."""
    place = yaml_source.Place((0, 0), "")
    document = yaml_source.Document("", {}, {(): place}, [])
    yaml_source.override(document, words, lambda tree: dict(expand(Root, tree)))  # type: ignore[call-overload]
    try:
        Root.model_validate(document.tree)
    except pydantic.ValidationError as error:
        document.problems += explain.problems(error, Root, document)
    return [f"{yaml_source.dotted(one.key)}: {one.message}" for one in document.problems]


@pytest.mark.parametrize(
    ("tree", "resolved"),
    [
        ("canny", {"kind": "canny", "low": 100, "high": 200}),
        ({"kind": "canny", "low": 50, "high": [100, 200]}, {"kind": "canny", "low": 50, "high": (100, 200)}),
        ("gray", {"kind": "gray"}),
        ("image", {"kind": "image"}),
        ({"kind": "inpaint", "everything": 0.1}, {"kind": "inpaint", "boxes": 0.5, "everything": 0.1}),
        ({"kind": "inpaint", "everything": 1}, {"kind": "inpaint", "everything": 1}),
        (
            {"kind": "model", "path": "owner/name", "task": "depth"},
            {"kind": "model", "path": "owner/name", "task": "depth", "revision": None, "distance": False},
        ),
    ],
)
def test_short_and_long_forms_are_resolved_and_load_again(tree: Any, resolved: dict[str, Any]) -> None:
    block = Root.model_validate({"condition": tree})
    assert block.condition.resolved() == resolved
    again = Root.model_validate(block.resolved())
    assert again == block and pickle.loads(pickle.dumps(again)) == block


def test_every_kind_has_its_own_defaults() -> None:
    seen = 0
    for kind in (*kinds(), GIVEN):
        if kind == "model":
            continue
        block = Condition.model_validate(kind)
        own = {} if block.config is None else block.config.resolved()
        assert block.resolved() == {"kind": kind, **own}
        seen += 1
    assert seen == 9
    sigmas = {
        kind: Condition.model_validate(kind).resolved()["sigma"] for kind in ("blur", "soft_edge", "scribble")
    }
    assert sigmas == {"blur": 6.0, "soft_edge": 1.5, "scribble": 2.0}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["condition=cany"],
            [
                "condition.kind: found cany, expected one of: blur, canny, colour_grid, gray, inpaint, "
                "model, scribble, soft_edge, tile, image; did you mean canny?"
            ],
        ),
        # Nothing is said of a parameter beside a kind that is a mistake.
        (
            ["condition.kind=Tile", "condition.factor=4"],
            [
                "condition.kind: found Tile, expected one of: blur, canny, colour_grid, gray, inpaint, "
                "model, scribble, soft_edge, tile, image; did you mean tile?"
            ],
        ),
        (["condition.kind=blur", "condition.low=3"], ["condition.low: has no effect: blur has none"]),
        (["condition.kind=image", "condition.low=3"], ["condition.low: has no effect: image has none"]),
        (["condition=model"], ["condition.kind: model needs path and task"]),
        (["condition.kind=model", "condition.path=x"], ["condition.kind: model needs task"]),
        (
            ["condition.kind=model", "condition.path=x", "condition.task=dept"],
            [
                "condition.task: found the text 'dept', expected one of: depth, segmentation; "
                "did you mean depth?"
            ],
        ),
        (
            ["condition.kind=model", "condition.path=x", "condition.task=depth", "condition.palette=voc"],
            ["condition.palette: has no effect: task is depth"],
        ),
        (
            ["condition.kind=inpaint", "condition.everything=1", "condition.boxes=0.5"],
            ["condition.boxes: has no effect: everything is 1"],
        ),
        (
            ["condition.low=300"],
            ["condition.low: found up to 300, and high goes down to 200; expected low below high"],
        ),
        (
            ["condition.kind=scribble", "condition.low=[10, 70]", "condition.high=[60, 90]"],
            ["condition.low: found up to 70, and high goes down to 60; expected low below high"],
        ),
        (
            ["condition.kind=blur", "condition.sigma=[3, 2]"],
            ["condition.sigma: found 3 before 2, expected the lower end of the range first"],
        ),
        (
            ["condition.kind=blur", "condition.sigma=[0, 2]"],
            ["condition.sigma: found the number 0, expected a number above 0"],
        ),
        (
            ["condition.kind=tile", "condition.factor=1"],
            ["condition.factor: found the number 1, expected a number above 1"],
        ),
        (
            ["condition.kind=soft_edge", "condition.gamma=0"],
            ["condition.gamma: found the number 0, expected a number above 0"],
        ),
        (
            ["condition.kind=blur", "condition.sigma=[1]"],
            ["condition.sigma: found a list of 1, expected a number or a list of 2"],
        ),
        (
            ["condition.kind=blur", "condition.sigma=soft"],
            ["condition.sigma: found the text 'soft', expected a number or a list"],
        ),
        (
            ["condition.kind=blur", "condition.sigma="],
            ["condition.sigma: found nothing, expected a number or a list"],
        ),
    ],
    ids=lambda value: " ".join(value)[:60] if "=" in value[0] else "",
)
def test_mistakes_are_told(words: list[str], told: list[str]) -> None:
    assert problems(*words) == told


def test_an_unknown_parameter_is_told_with_the_nearest() -> None:
    (told,) = problems("condition.kind=blur", "condition.sigme=3")
    assert told.startswith("condition.sigme: unknown key; did you mean sigma? (expected one of: boxes, cell,")


def test_the_schema_lists_kinds_and_parameters() -> None:
    text, block = Condition.model_json_schema()["anyOf"]
    assert text == {"type": "string"}
    assert block["properties"]["kind"]["enum"] == [*kinds(), GIVEN]
    assert len(block["properties"]) == 15
    assert all("default" not in field for key, field in block["properties"].items() if key != "kind")
    sigma = block["properties"]["sigma"]["description"]
    assert sigma.startswith("blur (6), scribble (2), soft_edge (1.5): deviation of the smoothing, in pixels;")


def test_parameters_for_the_metadata(tmp_path: Path) -> None:
    wanted: list[tuple[Any, dict[str, str | float]]] = [
        ("canny", {"condition": "canny", "low": 100.0, "high": 200.0}),
        (
            {"kind": "canny", "low": 50.5, "high": [100, 200]},
            {"condition": "canny", "low": 50.5, "high": "100 to 200"},
        ),
        (
            {"kind": "model", "path": str(tmp_path / "mine"), "task": "segmentation"},
            {"condition": "model", "path": "mine", "task": "segmentation", "palette": "ade"},
        ),
        (
            {"kind": "model", "path": "owner/name", "revision": "v2", "task": "depth", "distance": True},
            {
                "condition": "model",
                "path": "owner/name",
                "revision": "v2",
                "task": "depth",
                "distance": "true",
            },
        ),
        ("image", {"condition": "image"}),
    ]
    for tree, told in wanted:
        assert parameters(Condition.model_validate(tree)) == told


def test_amounts_are_written_as_they_are_read_again() -> None:
    """A default of 100 would be 100 in a run's recipe and 100.0 in the same recipe loaded again."""
    amounts = 0
    for kind in kinds():
        for key, field in conditions._config(kind).model_fields.items():
            if field.annotation == Amount:
                assert isinstance(field.default, float), (kind, key)
                amounts += 1
    assert amounts >= 10
