"""The recipe: what loads, and what every mistake is told as."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuner import recipe
from tuner.block import keys_of
from tuner.recipe import Recipe, RecipeError, micro_batch

Loader = Callable[..., Recipe]
METHODS = ("controlnet", "lora", "textual_inversion")


def test_defaults_and_short_forms(good: str, read: Loader) -> None:
    loaded = read(good)
    assert loaded.base.path == "embedded" and loaded.base.revision is None and loaded.base.new == []
    assert list(loaded.method) == ["lora"] and loaded.method["lora"].rank == 8  # type: ignore[attr-defined]
    assert [(source.path, source.repeats) for source in loaded.data.source] == [("pictures", 1)]
    assert loaded.data.heldout == [] and loaded.data.captions.drop is None
    assert loaded.train.learning_rate == 0.0001 and loaded.train.optimiser.betas is None
    assert loaded.name == "x" and loaded.validation.every == 0
    assert loaded.objective.options() == {
        "zero_terminal_snr": False,
        "weighting": "none",
        "loss": "mse",
        "timesteps": None,
        "timestep_shape": "uniform",
    }


@pytest.mark.parametrize(
    "source, expected",
    [
        ("a", [("a", 1)]),
        ("[a, b]", [("a", 1), ("b", 1)]),
        ("{path: a, repeats: 3}", [("a", 3)]),
        ("[a, {path: b, repeats: 2}]", [("a", 1), ("b", 2)]),
    ],
)
def test_source_forms(good: str, read: Loader, source: str, expected: list[tuple[str, int]]) -> None:
    loaded = read(good.replace("source: pictures", f"source: {source}"))
    assert [(one.path, one.repeats) for one in loaded.data.source] == expected


@pytest.mark.parametrize(
    "source, expected",
    [("a", ["a"]), ("[a, b]", ["a", "b"]), ("{path: a}", ["a"]), ("[a, {path: b}]", ["a", "b"])],
)
def test_heldout_forms(good: str, read: Loader, source: str, expected: list[str]) -> None:
    loaded = read(good.replace("source: pictures", f"source: pictures\n  heldout: {source}"))
    assert [one.path for one in loaded.data.heldout] == expected


def test_yaml_1_2(good: str, read: Loader) -> None:
    text = good + "preview: {prompts: [no, 16:9, 2001-01-01, on], guidance: 7}\n"
    loaded = read(text, "train.warmup=010", "objective.weighting=min_snr", "objective.snr_gamma=.5")
    assert loaded.preview.prompts == ["no", "16:9", "2001-01-01", "on"]
    assert loaded.preview.guidance == 7 and loaded.train.warmup == 10 and loaded.objective.snr_gamma == 0.5


def test_empty_blocks_and_anchors(good: str, read: Loader) -> None:
    text = good.replace("method: lora", "method:\n  lora:") + "preview:\nevaluate: &e {seed: 3}\n"
    loaded = read(text + "log: {}\n")
    assert loaded.evaluate.seed == 3 and loaded.preview.count == 4 and list(loaded.method) == ["lora"]
    shared = read(good.replace("source: pictures", "source: &s [a, b]\n  heldout: *s"))
    assert shared.data.heldout == shared.data.source and len(shared.data.source) == 2


@pytest.mark.parametrize(
    "overrides, get, expected",
    [
        (["base=other"], lambda r: r.base.path, "other"),
        (["base.path=other"], lambda r: r.base.path, "other"),
        (["base.revision=r1"], lambda r: (r.base.path, r.base.revision), ("embedded", "r1")),
        (["base.new=[unet, vae]"], lambda r: r.base.new, ["unet", "vae"]),
        (["data.source=b"], lambda r: r.data.source[0].path, "b"),
        (["data.source.0.repeats=20"], lambda r: r.data.source[0].repeats, 20),
        (
            ["data.source.repeats=20"],
            lambda r: (r.data.source[0].path, r.data.source[0].repeats),
            ("pictures", 20),
        ),
        (["data.source.1=b"], lambda r: [s.path for s in r.data.source], ["pictures", "b"]),
        (["data.heldout.path=h"], lambda r: r.data.heldout[0].path, "h"),
        (["data.heldout.0.path=h"], lambda r: r.data.heldout[0].path, "h"),
        (["method.lora.rank=4"], lambda r: r.method["lora"].rank, 4),
        (["method=controlnet"], lambda r: list(r.method), ["controlnet"]),
        (["method.textual_inversion.token=<c>"], lambda r: sorted(r.method), ["lora", "textual_inversion"]),
        (["train.steps=null", "train.epochs=2"], lambda r: (r.train.steps, r.train.epochs), (None, 2)),
        (["train.optimiser=sgd"], lambda r: r.train.optimiser.name, "sgd"),
        (["train.optimiser.eps=1e-6"], lambda r: r.train.optimiser.eps, 1e-6),
        (["train.learning_rate=1"], lambda r: r.train.learning_rate, 1),
        (["train.steps=1", "train.steps=2"], lambda r: r.train.steps, 2),
        (["data.captions.prefix=a: b #c"], lambda r: r.data.captions.prefix, "a: b #c"),
        (["data.captions.prefix=a #c"], lambda r: r.data.captions.prefix, "a #c"),
        (["data.captions.prefix='a #c'"], lambda r: r.data.captions.prefix, "a #c"),
        (["data.captions.prefix=x=y"], lambda r: r.data.captions.prefix, "x=y"),
        (["data.cache=off"], lambda r: r.data.cache, "off"),
        (["data.cache="], lambda r: r.data.cache, None),
        (["export.name=edges-1.0"], lambda r: r.name, "edges-1.0"),
    ],
)
def test_overrides(
    good: str, read: Loader, overrides: list[str], get: Callable[[Any], Any], expected: Any
) -> None:
    assert get(read(good, *overrides)) == expected


def test_a_faulty_piece_of_a_schedule_is_told_in_place(good: str, read: Loader) -> None:
    with pytest.raises(RecipeError) as caught:
        read(good, "train.schedule=piecewise_constant", "train.schedule_pieces=[[a, 1], [5], [7, 0.1]]")
    text = str(caught.value)
    assert "train.schedule_pieces.0.0: found the text 'a', expected a whole number" in text
    assert "train.schedule_pieces.1: found a list of 1, expected a list of 2" in text
    assert text.count("schedule_pieces.") == 2


def leaves(tree: Any) -> int:
    return sum(map(leaves, tree.values())) if isinstance(tree, dict) and tree else 1


def test_resolved_recipe_is_complete_and_loads_again(good: str, read: Loader) -> None:
    changes = (
        "export.name=edges",
        "objective.weighting=min_snr",
        "train.optimiser={eps: 1e-12, betas: [0.8, 0.9], options: {amsgrad: true, maximize: null}}",
        "train.schedule=piecewise_constant",
        "train.schedule_pieces=[[5, 0.5], [7, 0.1]]",
        "data.heldout=h",
    )
    loaded = read(good, *changes)
    text = loaded.resolved_yaml()
    assert text.startswith("# The recipe edges, with every default written out.\nbase:\n  path: embedded\n")
    again = read(text)
    assert again == loaded and again.resolved_yaml() == text
    assert set(loaded.resolved()) == set(keys_of(Recipe) or {})
    assert loaded.resolved()["objective"]["snr_gamma"] == 5.0
    assert "huber_delta" not in loaded.resolved()["objective"]  # it would have no effect
    assert leaves(loaded.resolved()) > 50
    assert read(text, "train.seed=1") != loaded


TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))  # a recipe has no zeros


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=st.lists(TEXTS),
    rate=st.floats(min_value=1e-300, max_value=1e300),
    cache=TEXTS.filter(bool),
)
def test_any_values_survive_resolving(
    good: str, read: Loader, prompts: list[str], rate: float, cache: str
) -> None:
    plain = read(good)
    blocks = {
        "preview": plain.preview.model_copy(update={"prompts": prompts}),
        "train": plain.train.model_copy(update={"learning_rate": rate}),
        "data": plain.data.model_copy(update={"cache": cache}),
    }
    again = read(plain.model_copy(update=blocks).resolved_yaml())
    assert (again.preview.prompts, again.train.learning_rate, again.data.cache) == (prompts, rate, cache)


@pytest.mark.parametrize(
    "text", ["\x85", "a\u2028b", "\u2029", "\t", "\r\n", "\ufeff", "\x7f", "no", "1e-4", "", "äöü 猫"]
)
def test_odd_texts_survive_resolving(good: str, read: Loader, text: str) -> None:
    plain = read(good)
    preview = plain.preview.model_copy(update={"negative": text})
    assert read(plain.model_copy(update={"preview": preview}).resolved_yaml()).preview.negative == text


def test_decisive_leaves_out_what_only_looks(good: str, read: Loader) -> None:
    plain = read(good)
    assert plain.decisive()["train.learning_rate"] == 0.0001 and plain.decisive()["method.lora.rank"] == 8
    same = [
        "output=y",
        "train.steps=99",
        "preview.every=3",
        "data.cache=off",
        "data.workers=2",
        "data.heldout=h",
    ]
    same += [
        "train.checkpoint.every=5",
        "train.resume=never",
        "export.name=z",
        "log.wandb=p",
        "train.threads=1",
    ]
    other = ["train.seed=1", "data.source=b", "method.lora.rank=2", "base=b", "train.clip=null"]
    other += ["train.schedule=cosine", "objective.loss=huber", "train.batch_size=6", "data.flip=true"]
    assert [word for word in same if read(good, word).decisive() != plain.decisive()] == []
    assert [word for word in other if read(good, word).decisive() == plain.decisive()] == []
    cosine = [read(good, "train.schedule=cosine", f"train.steps={n}").decisive() for n in (10, 20)]
    assert cosine[0] != cosine[1]


def test_nothing_can_be_changed(good: str, read: Loader) -> None:
    loaded = read(good)
    with pytest.raises(ValueError, match="frozen"):
        loaded.train.seed = 1  # type: ignore[misc]


def test_micro_batch(good: str, read: Loader) -> None:
    loaded = read(good, "train.accumulate=2")
    assert [micro_batch(loaded, n) for n in (1, 2, 3)] == [6, 3, 2]
    with pytest.raises(RecipeError) as caught:
        micro_batch(loaded, 4)
    assert str(caught.value) == (
        "train.batch_size: found 12, which 4 processes x 2 (train.accumulate) = 8 forward passes "
        "cannot share evenly; choose 8 or 16"
    )
    with pytest.raises(RecipeError, match="choose 24$"):
        micro_batch(loaded, 12)


def test_json_schema(read: Loader) -> None:
    schema = recipe.json_schema()
    json.dumps(schema)
    method, blocks = schema["properties"]["method"], schema["$defs"]
    assert method["anyOf"][0] == {"enum": ["controlnet", "lora", "textual_inversion"]}
    assert sorted(blocks["Methods"]["properties"]) == ["controlnet", "lora", "textual_inversion"]
    assert blocks["Methods"]["additionalProperties"] is False and blocks["Methods"]["minProperties"] == 1
    assert {"type": "string"} in blocks["Base"]["anyOf"]
    single, several = blocks["Data"]["properties"]["source"]["anyOf"]
    assert single == {"$ref": "#/$defs/Source"} and {"type": "string"} in blocks["Source"]["anyOf"]
    assert several["type"] == "array" and several["items"] == single
    assert sorted(schema["required"]) == ["base", "data", "method", "output", "train"]
    described = [
        (name, key)
        for name, block in {**blocks, "Recipe": schema}.items()
        for key, field in block.get("properties", {}).items()
        if name != "Methods" and not field.get("description")
    ]
    assert described == [] and len(blocks) >= 13


def test_only_the_used_method_is_imported(good: str, read: Loader, methods: str) -> None:
    assert recipe.method_names() == METHODS
    for name in METHODS:
        sys.modules.pop(f"{methods}.{name}", None)
    recipe._recipe_type.cache_clear()
    read(good)
    assert {name for name in METHODS if f"{methods}.{name}" in sys.modules} == {"lora"}


def test_the_methods_that_ship() -> None:
    names = recipe.method_names()
    assert len(names) >= 3 and not any(name.startswith("_") for name in names)
    schema = recipe.json_schema()
    assert sorted(schema["$defs"]["Methods"]["properties"]) == sorted(names)
    for name in names:
        for other in recipe._combines(name):
            assert name in recipe._combines(other), f"{name} names {other}, which does not name it"
