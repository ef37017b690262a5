"""Textual Inversion: words by recipe, where their rows start, what stays where it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pydantic
import pytest
import torch
from torch import Tensor

from tuner import optimiser
from tuner.errors import UserError
from tuner.evaluate import textual_inversion as measures
from tuner.export import embedding, files
from tuner.methods.textual_inversion import TEMPLATES, Config, TextualInversion
from tuner.objective import Objective
from tuner.task import Task

Make = Callable[..., TextualInversion]
ONE = {"token": "<a>", "init": "red"}
TWO = [{"token": "<a>", "init": "red"}, {"token": "<b>", "init": "toy", "vectors": 2, "replace": "x"}]


@pytest.fixture
def make(make_method: Callable[..., Any]) -> Make:
    """The method on a fresh tiny base, which it keeps as `family`."""
    return partial(make_method, "textual_inversion")


def table(method: Any, encoder: str = "text_encoder") -> Tensor:
    found: Tensor = method.family.embedding(encoder).weight.detach()
    return found


def row(method: Any, word: str) -> Tensor:
    found: Tensor = table(method)[method.family.tokenizer(word, add_special_tokens=False)["input_ids"]]
    assert found.shape[0] == 1
    return found


@pytest.mark.parametrize(
    "config, message",
    [
        ({}, "token: is missing; expected a new word here, or several in tokens"),
        ({"token": "<a>"}, "init: is missing"),
        ({"tokens": TWO, "token": "<c>"}, "token: has no effect: tokens has its own for each word"),
        ({"tokens": TWO, "replace": "c"}, "replace: has no effect"),
        ({**ONE, "tokens": []}, "tokens: has no effect"),
        ({"tokens": [ONE, {**ONE, "token": "<A>"}]}, "tokens.1.token: found <A>, a file's name twice"),
        ({"tokens": [ONE, {**ONE, "token": "b<a>"}]}, "tokens.1.token: found b<a>, which holds <a>"),
        (
            {"tokens": [{**ONE, "replace": "x"}, TWO[1]]},
            "tokens.1.replace: found x again",
        ),
        (
            {"tokens": [{**ONE, "replace": "b"}, TWO[1]]},
            "tokens.0.replace: found b, which stands in the token <b>",
        ),
        ({**ONE, "vectors": 76}, "vectors"),
        ({**ONE, "norm": "fixed"}, "norm"),
    ],
)
def test_impossible_words_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=re.escape(message)):
        Config(**config)


def test_one_word_is_short_for_a_list_of_one(make: Make) -> None:
    short = Config(**ONE, vectors=2, replace="x")
    (word,) = short.words()
    assert word == Config(tokens=[{**ONE, "vectors": 2, "replace": "x"}]).words()[0]
    assert word.names() == ["<a>", "<a>_1"]
    assert "tokens" not in short.resolved() and "token" not in Config(tokens=TWO).resolved()
    assert Config(**short.resolved()) == short
    one, other = make(**ONE, vectors=2), make(tokens=[{**ONE, "vectors": 2}])
    assert torch.equal(one.table("text_encoder"), other.table("text_encoder"))


def test_rows_start_at_words(make: Make) -> None:
    two = make(tokens=TWO)
    red, toy = row(two, "red"), row(two, "toy")
    assert torch.equal(two.table("text_encoder"), torch.cat([red, toy, toy]))
    assert two.places() == {"<a>": slice(0, 1), "<b>": slice(1, 3)}
    assert two.names == ["<a>", "<b>", "<b>_1"]
    assert two.replacements() == (("x", "<b>"), ("<b>", "<b> <b>_1"))
    assert torch.equal(make(token="<a>", init="red toy").table("text_encoder"), (red + toy) / 2)
    each = make(token="<a>", init="toy red", vectors=2)
    assert torch.equal(each.table("text_encoder"), torch.cat([toy, red]))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"init": "thing"}, "'thing' is 5 tokens of the base, expected one"),
        (
            {"init": "red toy", "vectors": 3},
            "'red toy' has 2 words, but <a> has vectors: 3; expected 1 or 3",
        ),
        ({"init": " "}, "found no word"),
        ({"init": "nowhere.safetensors"}, "nowhere.safetensors: no such file"),
        ({"init": "old.pt"}, "old.pt: a pickle, which can run any code"),
        ({"init": "red", "token": "two words"}, "cannot name a file"),
        ({"init": "red", "token": "red</w>"}, "is in the base's vocabulary already"),
        ({"init": "red", "text_encoders": "second"}, "text_encoders: second has no effect"),
    ],
)
def test_starts_that_cannot_be(make: Make, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        make(**{"token": "<a>", **config})


@pytest.mark.parametrize("base", ["sd1", "sdxl"])
def test_random_rows_have_the_known_ones_mean_norm(make: Make, base: str) -> None:
    method, other = (make(base, seed, token="<a>", init="random", vectors=3) for seed in (3, 4))
    again = make(base, 3, token="<a>", init="random", vectors=3)
    assert len(method.encoders) == {"sd1": 1, "sdxl": 2}[base]
    for encoder in method.encoders:
        rows, known = method.table(encoder), table(method, encoder)
        torch.testing.assert_close(rows.norm(dim=1), known.norm(dim=1).mean().expand(3))
        assert torch.equal(rows, again.table(encoder)) and not torch.equal(rows, other.table(encoder))
        assert not torch.equal(rows[0], rows[1])


@pytest.mark.parametrize("base", ["sd1", "sd2", "sdxl"])
def test_an_export_is_a_start(make: Make, base: str, tmp_path: Path, models: ModuleType) -> None:
    method = models.move(make(base, token="<old>", init="red", vectors=2))
    (path,) = method.export(method.family, tmp_path, models.card_of(torch.float32, method))
    again = make(base, token="<new>", init=str(path), vectors=2)
    for encoder in method.encoders:
        assert torch.equal(again.table(encoder), method.table(encoder))
    assert again.depends() == {"method.textual_inversion.init of <new>": path} and method.depends() == {}
    with pytest.raises(UserError, match="has 2 vectors, but <new> has vectors: 1; expected 2|expected 1"):
        make(base, token="<new>", init=str(path))


@pytest.mark.parametrize(
    "tensors, widths, message",
    [
        ({"a": (2, 8), "b": (2, 8)}, [8], "holds a, b; expected one tensor"),
        ({"a": (2, 8)}, [8, 16], "holds a; expected clip_l and clip_g"),
        ({"clip_l": (2, 8), "clip_g": (1, 16)}, [8, 16], "different numbers of vectors"),
        ({"clip_l": (2, 8), "clip_g": (2, 8)}, [8, 16], "clip_g is [2, 8]; expected finite vectors [n, 16]"),
        ({"a": (2, 9)}, [8], "a is [2, 9]; expected finite vectors [n, 8]"),
        ({"a": (1, 2, 8)}, [8], "a is [1, 2, 8]"),
    ],
)
def test_files_that_hold_something_else(
    tensors: dict[str, tuple[int, ...]], widths: list[int], message: str, tmp_path: Path
) -> None:
    made = {name: torch.zeros(shape) for name, shape in tensors.items()}
    path = files.save(tmp_path / "x.safetensors", made, {})
    with pytest.raises(embedding.TokenError, match=re.escape(message)):
        embedding.from_file(path, widths)


def test_files_that_can_be_read(tmp_path: Path) -> None:
    path = files.save(tmp_path / "x.safetensors", {"emb_params": torch.arange(8).half()}, {})
    (rows,) = embedding.from_file(path, [8])
    assert rows.dtype == torch.float32 and rows.tolist() == [list(range(8))]
    files.save(path, {"a": torch.full((1, 8), float("nan"))}, {})
    with pytest.raises(embedding.TokenError, match="finite"):
        embedding.from_file(path, [8])
    path.write_bytes(b"no tensors")
    with pytest.raises(embedding.TokenError, match="not a whole .safetensors file"):
        embedding.from_file(path, [8])


def test_one_of_two_text_encoders_learns(make: Make, tmp_path: Path, models: ModuleType) -> None:
    for which, encoder in (("first", "text_encoder"), ("second", "text_encoder_2")):
        method = models.move(make("sdxl", **ONE, text_encoders=which))
        assert list(method.trained()) == [f"rows.{encoder}"]
        assert method.new_rows().keys() == {"text_encoder", "text_encoder_2"}
        (path,) = method.export(method.family, tmp_path / which, models.card_of(torch.float32, method))
        tensors, _ = files.load(path)
        assert list(tensors) == ["clip_g", "clip_l"]
        moved = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}[encoder]
        for key, name in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2")):
            assert torch.equal(tensors[key], method.start(name)) == (key != moved)


def test_kept_norms_are_kept_and_free_ones_are_not(make: Make) -> None:
    for norm in ("free", "kept"):
        method = make(tokens=TWO, norm=norm)
        assert (norm == "kept") == method.SETTLES
        made = optimiser.build(method.groups(0.3), "adamw", 0.3, weight_decay=0.1)
        rows, start = method.table("text_encoder"), method.start("text_encoder")
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            rows.grad = torch.randn(rows.shape, generator=generator)
            made.step()
            method.after_update()
        kept = torch.allclose(rows.norm(dim=1), start.norm(dim=1), rtol=1e-6, atol=0)
        assert kept == (norm == "kept")
        assert float((rows - start).detach().norm() / start.norm()) > 0.5
        before = rows.detach().clone()
        method.after_update()
        torch.testing.assert_close(rows.detach(), before, rtol=1e-6, atol=0)


def test_the_rows_have_their_own_learning_rate(make: Make) -> None:
    assert make(**ONE).groups(0.1)[0]["lr"] == 0.1
    assert make(**ONE, learning_rate=0.2).groups(0.1)[0]["lr"] == 0.2


def test_captions_need_a_word_and_words_a_caption(make: Make) -> None:
    method = make(tokens=TWO)
    assert method.check_captions({"<a> here", "a <b> <b>_1", "none", ""}) == ["", "none"]
    with pytest.raises(UserError, match="no caption has <b>, so that it would learn nothing"):
        method.check_captions({"<a> here", "none"})
    assert method.check_captions({"none"}) == ["none"]


def test_templates_have_one_place_each() -> None:
    assert TEMPLATES.keys() == {"none", "object", "style"} and TEMPLATES["none"] == ()
    for name in ("object", "style"):
        sentences = TEMPLATES[name]
        assert len(set(sentences)) == len(sentences) > 10
        assert all(sentence.count("{}") == 1 for sentence in sentences)


@pytest.mark.parametrize("base", ["sd1", "sdxl"])
def test_what_is_told_of_the_rows(make: Make, base: str) -> None:
    method: Any = make(base, tokens=TWO)
    task = Task(method.family, [method], Objective.from_scheduler_config(method.family.scheduler_config))
    encoders = {"sd1": 1, "sdxl": 2}[base]
    assert method.figures()["row_drift"] == 0.0
    told = measures.weights(task)["new words"]
    assert len(told["columns"]) == 4 and len(told["rows"]) == 3 * encoders
    for name, (near, norm, start, drift) in told["rows"].items():
        word = "red" if name.startswith("<a>") else "toy"
        assert near.startswith(f"{word} 1.00, ") and near.count(",") == 4
        assert norm == start > 0 and drift == 0.0
    with torch.no_grad():
        for rows in method.rows.values():
            rows.mul_(1.5)
    told = measures.weights(task)["new words"]
    assert "50% of their start's norm" in told["verdict"]
    for _, norm, start, drift in told["rows"].values():
        assert norm == pytest.approx(1.5 * start) and drift == pytest.approx(0.5)
    assert float(method.figures()["row_drift"]) == pytest.approx(0.5)


def test_a_bundle_has_the_lora_and_the_words() -> None:
    lora = {"lora_unet_x.alpha": torch.ones(())}
    one, pair = {"<a>": torch.zeros(2, 8)}, {"clip_l": torch.zeros(1, 8), "clip_g": torch.ones(1, 16)}
    made = embedding.bundle(lora, {"a": one, "b": pair})
    assert made.keys() == {
        "lora_unet_x.alpha",
        "bundle_emb.a.string_to_param.*",
        "bundle_emb.b.clip_l",
        "bundle_emb.b.clip_g",
    }
    assert made["bundle_emb.a.string_to_param.*"] is one["<a>"]
    with pytest.raises(embedding.TokenError, match="a dot cannot stand"):
        embedding.bundle(lora, {"a.b": one})
