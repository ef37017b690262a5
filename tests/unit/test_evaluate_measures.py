"""What is shared by the measures: captions with what they name, judged pictures, tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tuner.data.blob import File
from tuner.data.samples import Sample
from tuner.evaluate.captions import Named, NamedObject, captions_of
from tuner.evaluate.measures import caption_of, judged, measured, table
from tuner.evaluate.render import render
from tuner.evaluate.textual_inversion import _detailed
from tuner.evaluate.world import BACKGROUNDS, COLOURS, CONFUSABLE, PLACES, draw_scene

COUNT = 12


def sample(index: int, records: bool = True) -> Sample:
    """A scene's sample as datasets/shapes/prepare.py writes it."""
    scene = draw_scene("heldout", index)
    captions = captions_of(scene, "heldout", index)
    named = [{"form": caption.form, "named": caption.named.to_json()} for caption in captions]
    record = {**scene.to_json(), "captions": named}
    texts = tuple(caption.text for caption in captions)
    return Sample(File(Path("x.png")), texts, scene=record if records else None)


@pytest.mark.parametrize("form", ["short", "long"])
def test_the_caption_of_a_form(form: str) -> None:
    for index in range(COUNT):
        captions = captions_of(draw_scene("heldout", index), "heldout", index)
        (wanted,) = (caption for caption in captions if caption.form == form)
        assert caption_of(sample(index), form) == (wanted.text, wanted.named)


def test_another_form_is_the_first_caption() -> None:
    first = captions_of(draw_scene("heldout", 0), "heldout", 0)[0]
    assert caption_of(sample(0), "rhymed") == (first.text, first.named)


def test_a_caption_without_a_record_names_nothing_known() -> None:
    text = captions_of(draw_scene("heldout", 0), "heldout", 0)[0].text
    assert caption_of(sample(0, records=False), "long") == (text, None)


def test_clean_renders_are_right_and_others_are_not() -> None:
    pictures = [render(draw_scene("heldout", index)) for index in range(COUNT)]
    named = [caption_of(sample(index), "long")[1] for index in range(COUNT)]
    known = [one for one in named if one is not None]
    assert len(known) == COUNT
    right = judged(pictures, known)
    assert {"colour", "shape", "background", "all"} <= right.keys()
    assert set(right.values()) == {1.0}
    wrong = judged([*pictures[1:], pictures[0]], known)
    assert wrong.keys() == right.keys()
    assert wrong["all"] == 0.0 and wrong["colour"] < 0.7 and wrong["shape"] < 0.7
    blank = judged([np.full_like(pictures[0], 128)] * COUNT, known)
    assert blank["all"] == blank["colour"] == blank["shape"] == 0.0


def test_a_share_is_of_those_that_name_the_attribute() -> None:
    scene = draw_scene("heldout", 0)
    picture, thing = render(scene), scene.objects[0]
    wrong = next(name for name in BACKGROUNDS if name != scene.background)
    wanted = [
        Named((NamedObject(colour=thing.colour),), whole=False),
        Named((NamedObject(colour=thing.colour),), background=scene.background, whole=False),
        Named((NamedObject(colour=thing.colour),), background=wrong, whole=False),
    ]
    found = judged([picture] * 3, wanted)
    assert found == {"colour": 1.0, "background": 0.5, "all": pytest.approx(2 / 3)}


def test_pictures_and_names_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="zip"):
        judged([render(draw_scene("heldout", 0))], [])


def test_a_table_has_none_where_a_row_has_no_value() -> None:
    found = table({"one": {"a": 0.5, "b": 0.0}, "two": {"c": 1.0, "a": 0.25}}, "so it is", picture="x.png")
    assert found == {
        "verdict": "so it is",
        "columns": ["a", "b", "c"],
        "rows": {"one": [0.5, 0.0, None], "two": [0.25, None, 1.0]},
        "picture": "x.png",
    }


def test_which_methods_have_measures() -> None:
    names = ["controlnet", "textual_inversion", "lora", "full", "autoencoder", "contrastive"]
    assert measured(names) == names[:3]


def test_detailed_prompts_ask_for_what_can_be_seen() -> None:
    found = [_detailed("<x>", number) for number in range(64)]
    assert found == [_detailed("<x>", number) for number in range(64)]
    assert len({prompt for prompt, _ in found}) > 50
    for prompt, named in found:
        (thing,) = named.objects
        assert thing.colour in COLOURS and thing.place in PLACES and named.background in BACKGROUNDS
        assert thing.colour not in CONFUSABLE.get(named.background, ())
        assert f"{thing.colour} <x> " in prompt and f"on a {named.background} background" in prompt
        assert prompt.startswith("an orange" if thing.colour == "orange" else f"a {thing.colour}")
