from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tuner.errors import UserError
from tuner.recipe import Recipe, RecipeError, load

Loader = Callable[..., Recipe]

MANY_WRONG = """\
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
KEYS = "base, data, evaluate, export, log, method, objective, output, preview, train, validate"
SOURCE = (
    "a folder; hub:owner/name; *.parquet or *.arrow; a folder of save_to_disk; *.tar, or "
    "http(s)://.../{000..009}.tar"
)
TOLD = [
    "x.yaml:1: base.new.0: found the text 'unte', "
    "expected one of: unet, vae, text_encoder, text_encoder_2, image_encoder; did you mean unet?",
    "x.yaml:1: base.path: found the number 5, expected text; write '5', with the quotes, for this text",
    "x.yaml:1: output: is missing; expected text (folder that the run writes to)",
    "x.yaml:3: method.lora.rnak: unknown key; did you mean rank? (expected one of: layers, rank)",
    "x.yaml:4: method.contrlnet: unknown method; did you mean controlnet? "
    "(expected one of: controlnet, lora, textual_inversion)",
    "x.yaml:8: data.source.1.repeets: unknown key; did you mean repeats? (expected one of: buffer, captions, "
    "captions_from, columns, condition, condition_from, config, folder_repeats, mask_from, path, repeats, "
    "resolution, revision, share, split, streaming, weight)",
    f"x.yaml:9: data.source.2.path: is missing; expected text ({SOURCE})",
    "x.yaml:9: data.source.2.repeats: found the number 0, expected a number of at least 1",
    "x.yaml:10: data.resolution: found the text '128', expected a whole number or a list",
    "x.yaml:11: data.flip: found the text 'no', expected true or false; write false",
    "x.yaml:12: data.captions.templates.1: found 0 times {} in 'a photo', expected it once",
    "x.yaml:14: objective.snr_gamma: has no effect: it belongs to weighting min_snr or "
    "soft_min_snr, and weighting is none",
    "x.yaml:15: objective.timesteps: found a list of 1, expected a list of 2",
    "x.yaml:16: objective.loss: found the text 'hubber', expected one of: mse, l1, huber, smooth_l1; "
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
    f"(expected one of: {KEYS})",
    "x.yaml:29: evaluate.samples: found the number 9, which needs held-out samples: "
    "set data.heldout, or 0 here",
    "x.yaml:30: log.tensorboard: found nothing, expected true or false",
    "x.yaml:30: log.wandb: found the number 7, expected text; write '7', with the quotes, for this text",
]


def problems(read: Loader, text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read(text, *overrides)
    assert isinstance(caught.value, UserError)
    assert str(caught.value) == "\n".join(map(str, caught.value.problems))
    return [str(problem) for problem in caught.value.problems]


def test_every_problem_at_once_with_line_and_nearest_name(read: Loader) -> None:
    assert problems(read, MANY_WRONG) == TOLD


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
def test_override_problems(good: str, read: Loader, override: str, message: str) -> None:
    found = problems(read, good, override)
    shown = [line for line in found if message in line]
    assert len(shown) == 1, found
    assert shown[0].startswith((f"command line: {override}: ", "x.yaml:2: method.lora: cannot"))


def test_overrides_are_all_told_in_their_order(good: str, read: Loader) -> None:
    found = problems(read, good.replace("128", "x"), "foo", "train.seed=a", "bar")
    assert [line.split(": ")[0:2] for line in found] == [
        ["x.yaml:5", "data.resolution"],
        ["command line", "foo"],
        ["command line", "train.seed=a"],
        ["command line", "bar"],
    ]
    several = good.replace("source: pictures", "source: [a, b]")
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
        ("{good}a: &a [*a]\n", "x.yaml:11: a.0: refers to itself"),
        ("{good}a: !x 1\n", "x.yaml:11: a: found the tag !x; tags are not used in recipes"),
        ("{good}? [a]\n: 1\n", "x.yaml:11: found a list or block as a key, expected a name"),
        ("{good}a: !!int b\n", "x.yaml:11: a: found the text 'b' marked as int"),
        ("{good}1: 2\n", "x.yaml:11: 1: unknown key"),
    ],
)
def test_unreadable_files(good: str, read: Loader, text: str, message: str) -> None:
    found = problems(read, text.replace("{good}", good))
    assert any(message in line for line in found), found


def test_missing_binary_and_folder(good: str, read: Loader, tmp_path: Path) -> None:
    read(good)  # x.yaml is there now
    (tmp_path / "binary.yaml").write_bytes(b"a\xff\x00")
    (tmp_path / "binary.txt").touch()
    (tmp_path / "with_mark.yaml").write_bytes(b"\xef\xbb\xbf" + good.encode())
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


def test_a_stem_that_is_no_name_is_an_error(good: str, read: Loader) -> None:
    Path("my recipe.yaml").write_text(good)
    with pytest.raises(RecipeError, match=r"^my recipe\.yaml: export\.name: found the text 'my recipe'"):
        load(Path("my recipe.yaml"))
    assert load(Path("my recipe.yaml"), ["export.name=mine"]).name == "mine"
