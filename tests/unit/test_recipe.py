"""The recipe: what loads, and what every mistake is told as."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuner import recipe
from tuner.block import keys_of
from tuner.errors import UserError
from tuner.recipe import Recipe, RecipeError, load, micro_batch

GOOD = """\
base: embedded
method: lora
data:
  source: pictures
  resolution: 128
train:
  steps: 10
  batch_size: 12
  learning_rate: 1e-4
output: runs/x
"""
METHOD = """\
from typing import Literal
from pydantic import Field
from tuner.block import Block

class Config(Block):
    {fields}

class METHOD:
    COMBINES = {combines}
"""
FILES = {
    "lora": METHOD.format(
        fields="rank: int = Field(8, ge=1, description='rank')\n"
        "    layers: Literal['attention', 'all'] | list[str] = Field('attention', description='layers')",
        combines=("textual_inversion",),
    ),
    "textual_inversion": METHOD.format(
        fields="token: str = Field(description='new word')", combines=("lora",)
    ),
    "controlnet": METHOD.format(fields="pass", combines=("lora",)),  # lora does not name it in return
    "_shared": "raise RuntimeError('not a method')",
}
Loader = Callable[..., Recipe]


@pytest.fixture(scope="module")
def methods(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A package of methods whose blocks do not change with the real ones."""
    root = tmp_path_factory.mktemp("methods")
    name = "methods_for_recipe_tests"
    (root / name).mkdir()
    (root / name / "__init__.py").touch()
    for stem, text in FILES.items():
        (root / name / f"{stem}.py").write_text(text)
    sys.path.insert(0, str(root))
    yield name
    sys.path.remove(str(root))
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        del sys.modules[module]


@pytest.fixture
def read(methods: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Loader:
    """Loads a recipe's text, from x.yaml in the current directory."""
    monkeypatch.setattr(recipe, "METHODS", methods)
    monkeypatch.chdir(tmp_path)

    def read_text(text: str, *overrides: str) -> Recipe:
        Path("x.yaml").write_bytes(text.encode())
        return load(Path("x.yaml"), overrides)

    return read_text


def problems(read: Loader, text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read(text, *overrides)
    assert isinstance(caught.value, UserError)
    assert str(caught.value) == "\n".join(map(str, caught.value.problems))
    return [str(problem) for problem in caught.value.problems]


def test_defaults_and_short_forms(read: Loader) -> None:
    loaded = read(GOOD)
    assert loaded.base.path == "embedded" and loaded.base.revision is None and loaded.base.new == []
    assert list(loaded.method) == ["lora"] and loaded.method["lora"].rank == 8  # type: ignore[attr-defined]
    assert [(source.path, source.repeats) for source in loaded.data.source] == [("pictures", 1)]
    assert loaded.data.heldout == [] and loaded.data.captions.drop is None
    assert loaded.train.learning_rate == 0.0001 and loaded.train.optimiser.betas == (0.9, 0.999)
    assert loaded.name == "x" and loaded.validation.every == 0
    assert loaded.objective.options() == {"weighting": "none", "loss": "mse", "timesteps": None}


@pytest.mark.parametrize(
    "source, expected",
    [
        ("a", [("a", 1)]),
        ("[a, b]", [("a", 1), ("b", 1)]),
        ("{path: a, repeats: 3}", [("a", 3)]),
        ("[a, {path: b, repeats: 2}]", [("a", 1), ("b", 2)]),
    ],
)
def test_source_forms(read: Loader, source: str, expected: list[tuple[str, int]]) -> None:
    text = GOOD.replace("source: pictures", f"source: {source}\n  heldout: {source}")
    loaded = read(text)
    assert [(one.path, one.repeats) for one in loaded.data.source] == expected
    assert [(one.path, one.repeats) for one in loaded.data.heldout] == expected


def test_yaml_1_2(read: Loader) -> None:
    text = GOOD + "preview: {prompts: [no, 16:9, 2001-01-01, on], guidance: 7}\n"
    loaded = read(text, "train.warmup=010", "objective.weighting=min_snr", "objective.snr_gamma=.5")
    assert loaded.preview.prompts == ["no", "16:9", "2001-01-01", "on"]
    assert loaded.preview.guidance == 7 and loaded.train.warmup == 10 and loaded.objective.snr_gamma == 0.5


def test_empty_blocks_and_anchors(read: Loader) -> None:
    text = GOOD.replace("method: lora", "method:\n  lora:") + "preview:\nevaluate: &e {seed: 3}\n"
    loaded = read(text + "log: {}\n")
    assert loaded.evaluate.seed == 3 and loaded.preview.count == 4 and list(loaded.method) == ["lora"]
    shared = read(GOOD.replace("source: pictures", "source: &s [a, b]\n  heldout: *s"))
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
def test_overrides(read: Loader, overrides: list[str], get: Callable[[Any], Any], expected: Any) -> None:
    assert get(read(GOOD, *overrides)) == expected


def test_every_problem_at_once_with_line_and_nearest_name(read: Loader) -> None:
    text = """\
base: {path: 5, new: [unte]}
method:
  lora: {rnak: 4}
  contrlnet: {}
data:
  source:
    - a
    - {path: b, repeets: 3}
    - {repeats: 0}
  resolution: "128"
  flip: no
  captions: {templates: ["a {}", "a photo"]}
objective:
  snr_gamma: 3
  timesteps: [5]
  loss: hubber
train:
  steps: 10
  epochs: 3
  batch_size: true
  learning_rate: 1e-4x
  precision: BF16
  seed: 0
  seed: 1
  optimiser: {betas: [0.9, 2.0]}
  clip: .inf
  accumulate: 1.5
steps: 5
evaluate: {samples: 9}
log: {wandb: 7, tensorboard: }
"""
    keys = "base, data, evaluate, export, log, method, objective, output, preview, train, validate"
    source = "a folder with metadata.jsonl, with .txt beside the pictures, or in datasets/"
    assert problems(read, text) == [
        "x.yaml:1: base.new.0: found the text 'unte', "
        "expected one of: unet, vae, text_encoder, image_encoder; did you mean unet?",
        "x.yaml:1: base.path: found the number 5, expected text; write '5', with the quotes, for this text",
        "x.yaml:1: output: is missing; expected text (folder that the run writes to)",
        "x.yaml:3: method.lora.rnak: unknown key; did you mean rank? (expected one of: layers, rank)",
        "x.yaml:4: method.contrlnet: unknown method; did you mean controlnet? "
        "(expected one of: controlnet, lora, textual_inversion)",
        "x.yaml:8: data.source.1.repeets: unknown key; did you mean repeats? "
        "(expected one of: path, repeats)",
        f"x.yaml:9: data.source.2.path: is missing; expected text ({source})",
        "x.yaml:9: data.source.2.repeats: found the number 0, expected a number of at least 1",
        "x.yaml:10: data.resolution: found the text '128', expected a whole number",
        "x.yaml:11: data.flip: found the text 'no', expected true or false; write false",
        "x.yaml:12: data.captions.templates.1: found 0 times {} in 'a photo', expected it once",
        "x.yaml:14: objective.snr_gamma: has no effect: it belongs to weighting min_snr, "
        "and weighting is none",
        "x.yaml:15: objective.timesteps: found a list of 1, expected a list of 2",
        "x.yaml:16: objective.loss: found the text 'hubber', expected one of: mse, huber; "
        "did you mean huber?",
        "x.yaml:19: train.epochs: found together with steps, expected one of the two "
        "(train.steps=null takes steps away)",
        "x.yaml:20: train.batch_size: found true, expected a whole number",
        "x.yaml:21: train.learning_rate: found the text '1e-4x', expected a number",
        "x.yaml:22: train.precision: found the text 'BF16', expected one of: fp32, bf16, fp16, auto; "
        "did you mean bf16?",
        "x.yaml:24: train.seed: given twice: here and in line 23",
        "x.yaml:25: train.optimiser.betas.1: found the number 2.0, expected a number in [0, 1)",
        "x.yaml:26: train.clip: found the number inf, expected a finite number",
        "x.yaml:27: train.accumulate: found the number 1.5, expected a whole number",
        "x.yaml:28: steps: unknown key; did you mean evaluate.steps or preview.steps or train.steps? "
        f"(expected one of: {keys})",
        "x.yaml:29: evaluate.samples: found the number 9, which needs held-out samples: "
        "set data.heldout, or 0 here",
        "x.yaml:30: log.tensorboard: found nothing, expected true or false",
        "x.yaml:30: log.wandb: found the number 7, expected text; write '7', with the quotes, for this text",
    ]


def test_missing_keys_name_their_block(read: Loader) -> None:
    found = problems(read, "# a comment\n\ndata:\n  flip: true\ntrain:\n  seed: 1\n")
    assert [line.split(": is missing")[0] for line in found] == [
        "x.yaml:3: base",
        "x.yaml:3: data.resolution",
        "x.yaml:3: data.source",
        "x.yaml:3: method",
        "x.yaml:3: output",
        "x.yaml:5: train.batch_size",
        "x.yaml:5: train.learning_rate",
        "x.yaml:5: train.steps",
    ]


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.steps=abc", "train.steps: found the text 'abc', expected a whole number"),
        ("train.stpes=4", "train.stpes: unknown key; did you mean steps?"),
        ("trian.steps=4", "trian: unknown key; did you mean train?"),
        ("train.steps.more=4", "train.steps: holds one value, so there is no key 'more' in it"),
        ("train", "expected KEY=VALUE, such as train.steps=100"),
        ("=4", "expected KEY=VALUE"),
        ("train..steps=4", "expected KEY=VALUE"),
        ("preview.prompts=[a, b", "the value is not YAML"),
        ("preview.prompts={a: 1, a: 2}", "preview.prompts.a: given twice"),
        (
            "data.source.2=c",
            "data.source.2: the list holds 1: say which one, as data.source.0 or data.source.1",
        ),
        ("data.source=[]", "data.source: found a list of 0, expected a list of at least 1"),
        ("data.source=", "data.source: found nothing, expected a list"),
        ("output=", "output: found nothing, expected text; write '' for the empty text"),
        ("output=''", "output: found the text '', expected text that is not empty"),
        ("method=lroa", "method.lroa: unknown method; did you mean lora?"),
        ("method={}", "method: names no method, expected one of: controlnet, lora, textual_inversion"),
        ("method.controlnet={}", "cannot be combined with method"),
        (
            "method.textual_inversion={}",
            "method.textual_inversion.token: is missing; expected text (new word)",
        ),
        ("method.lora.layers=5", "expected one of: attention, all or a list"),
        ("method.lora.layers=atention", "did you mean attention? or a list"),
        ("method.lora.layers=[1]", "method.lora.layers.0: found the number 1, expected text"),
        ("objective.timesteps=[9, 3]", "found [9, 3], expected [start, end] with 0 <= start < end"),
        ("objective.huber_delta=0.1", "objective.huber_delta: has no effect: it belongs to loss huber"),
        ("train.seed=-1", "found the number -1, expected a number of at least 0"),
        ("train.learning_rate=0", "found the number 0, expected a number above 0"),
        ("train.learning_rate=true", "found true, expected a number"),
        ("train.ema=1", "found the number 1, expected a number below 1"),
        ("data.captions.drop=2", "found the number 2, expected a number of at most 1"),
        ("validate.every=5", "validate.every: found the number 5, which needs held-out samples"),
        ("export.name=a/b", "export.name: found the text 'a/b', expected text of the form"),
    ],
)
def test_override_problems(read: Loader, override: str, message: str) -> None:
    found = problems(read, GOOD, override)
    shown = [line for line in found if message in line]
    assert len(shown) == 1, found
    assert shown[0].startswith((f"command line: {override}: ", "x.yaml:2: method.lora: cannot"))


def test_overrides_are_all_told_in_their_order(read: Loader) -> None:
    found = problems(read, GOOD.replace("128", "x"), "foo", "train.seed=a", "bar")
    assert [line.split(": ")[0:2] for line in found] == [
        ["x.yaml:5", "data.resolution"],
        ["command line", "foo"],
        ["command line", "train.seed=a"],
        ["command line", "bar"],
    ]
    several = GOOD.replace("source: pictures", "source: [a, b]")
    (line,) = problems(read, several, "data.source.repeats=2")
    assert "the list holds 2: say which one, as data.source.0 or data.source.1 or data.source.2" in line


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "x.yaml: the file is empty, expected a recipe"),
        ("# nothing\n", "x.yaml: the file is empty, expected a recipe"),
        ("\n- a\n", "x.yaml:2: found a list, expected keys and values such as 'base: embedded'"),
        ("hello\n", "x.yaml:1: found plain text or a lone value, expected keys"),
        ("a: 1\nb: c: d\n", "x.yaml:2:5: is not YAML: mapping values are not allowed here"),
        ("a:\n\tb: 1\n", "x.yaml:2:1: is not YAML: found character '\\t' that cannot start any token"),
        ("a: 1\n---\nb: 2\n", "is not YAML: but found another document expected a single document"),
        ("a: [1\n", "is not YAML"),
        ("a: *b\n", "x.yaml:1:4: is not YAML: found undefined alias"),
        ("a: \x01\n", "x.yaml: is not YAML"),
        (GOOD + "a: &a [*a]\n", "x.yaml:11: a.0: refers to itself"),
        (GOOD + "a: !x 1\n", "x.yaml:11: a: found the tag !x; tags are not used in recipes"),
        (GOOD + "? [a]\n: 1\n", "x.yaml:11: found a list or block as a key, expected a name"),
        (GOOD + "a: !!int b\n", "x.yaml:11: a: found the text 'b' marked as int"),
        (GOOD + "1: 2\n", "x.yaml:11: 1: unknown key"),
    ],
)
def test_unreadable_files(read: Loader, text: str, message: str) -> None:
    found = problems(read, text)
    assert any(message in line for line in found), found


def test_missing_binary_and_folder(read: Loader, tmp_path: Path) -> None:
    read(GOOD)  # x.yaml is there now
    (tmp_path / "binary.yaml").write_bytes(b"a\xff\x00")
    (tmp_path / "binary.txt").touch()
    (tmp_path / "with_mark.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load(Path("with_mark.yaml")).name == "with_mark"
    cases = {
        "y.yaml": "y.yaml: no such file; did you mean x.yaml?",
        "qqqqqqqqqq": "qqqqqqqqqq: no such file; . holds: binary.yaml, with_mark.yaml, x.yaml",
        "nowhere/x.yaml": "nowhere/x.yaml: no such file; there is no folder nowhere",
        "binary.yaml": "binary.yaml: is not text (byte 1 is not UTF-8), expected a YAML recipe",
        ".": ".: is a folder, expected a recipe file; it holds: binary.yaml, with_mark.yaml, x.yaml",
    }
    for path, message in cases.items():
        with pytest.raises(RecipeError) as caught:
            load(Path(path))
        assert str(caught.value) == message


def test_a_stem_that_is_no_name_is_an_error(read: Loader) -> None:
    Path("my recipe.yaml").write_text(GOOD)
    with pytest.raises(RecipeError, match=r"^my recipe\.yaml: export\.name: found the text 'my recipe'"):
        load(Path("my recipe.yaml"))
    assert load(Path("my recipe.yaml"), ["export.name=mine"]).name == "mine"


def leaves(tree: Any) -> int:
    return sum(map(leaves, tree.values())) if isinstance(tree, dict) and tree else 1


def test_resolved_recipe_is_complete_and_loads_again(read: Loader) -> None:
    changes = (
        "export.name=edges",
        "objective.weighting=min_snr",
        "train.optimiser.eps=1e-12",
        "data.heldout=h",
    )
    loaded = read(GOOD, *changes)
    text = loaded.resolved_yaml()
    assert text.startswith("# The recipe edges, with every default written out.\nbase:\n  path: embedded\n")
    again = read(text)
    assert again == loaded and again.resolved_yaml() == text
    assert set(loaded.resolved()) == set(keys_of(Recipe) or {})
    assert loaded.resolved()["objective"]["snr_gamma"] == 5.0
    assert "huber_delta" not in loaded.resolved()["objective"]  # it would have no effect
    assert leaves(loaded.resolved()) > 50
    assert read(text, "train.seed=1") != loaded


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=st.lists(st.text()),
    rate=st.floats(min_value=1e-300, max_value=1e300),
    cache=st.text(min_size=1),
)
def test_any_values_survive_resolving(read: Loader, prompts: list[str], rate: float, cache: str) -> None:
    plain = read(GOOD)
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
def test_odd_texts_survive_resolving(read: Loader, text: str) -> None:
    plain = read(GOOD)
    preview = plain.preview.model_copy(update={"negative": text})
    assert read(plain.model_copy(update={"preview": preview}).resolved_yaml()).preview.negative == text


def test_decisive_leaves_out_what_only_looks(read: Loader) -> None:
    plain = read(GOOD)
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
    assert [word for word in same if read(GOOD, word).decisive() != plain.decisive()] == []
    assert [word for word in other if read(GOOD, word).decisive() == plain.decisive()] == []
    cosine = [read(GOOD, "train.schedule=cosine", f"train.steps={n}").decisive() for n in (10, 20)]
    assert cosine[0] != cosine[1]


def test_nothing_can_be_changed(read: Loader) -> None:
    loaded = read(GOOD)
    with pytest.raises(ValueError, match="frozen"):
        loaded.train.seed = 1  # type: ignore[misc]


def test_micro_batch(read: Loader) -> None:
    loaded = read(GOOD, "train.accumulate=2")
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


def test_only_the_used_method_is_imported(read: Loader, methods: str) -> None:
    assert recipe.method_names() == ("controlnet", "lora", "textual_inversion")
    for name in FILES:
        sys.modules.pop(f"{methods}.{name}", None)
    recipe._recipe_type.cache_clear()
    read(GOOD)
    assert {name for name in FILES if f"{methods}.{name}" in sys.modules} == {"lora"}


def test_the_methods_that_ship() -> None:
    names = recipe.method_names()
    assert len(names) >= 3 and not any(name.startswith("_") for name in names)
    schema = recipe.json_schema()
    assert sorted(schema["$defs"]["Methods"]["properties"]) == sorted(names)
    for name in names:
        for other in recipe._combines(name):
            assert name in recipe._combines(other), f"{name} names {other}, which does not name it"
