"""Mistakes in the recipe's file and on the command line."""

from __future__ import annotations

from .case import Case, World, case, sets

HUGE = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def swap(old: str, new: str) -> object:
    return lambda world: world.swap(old, new)


def text(content: str) -> object:
    return lambda world: setattr(world, "text", content)


def raw(content: bytes) -> object:
    return lambda world: setattr(world, "raw", content)


def words(*given: str) -> object:
    return lambda world: setattr(world, "words", list(given))


def override(*given: str) -> object:
    return words("recipe.yaml", *given)


def folder(world: World) -> None:
    (world.root / "recipes").mkdir()
    (world.root / "recipes" / "mine.yaml").touch()
    world.words = ["recipes"]


def no_method(world: World) -> None:
    world.drop("method")


def checkpoint_for_recipe(world: World) -> None:
    with (world.root / "model.safetensors").open("wb") as file:
        file.truncate(2**30)  # a hole: it takes no room on the disk
    world.words = ["model.safetensors"]


KEYS = [
    case("unknown block", sets(trian={}), "recipe.yaml:", "trian: unknown key; did you mean train?"),
    case("unknown key", sets(train__stpes=4), "train.stpes: unknown key", "did you mean steps?"),
    case("a key of another block", sets(steps=4), "recipe.yaml:", "steps: unknown key", "train.steps"),
    case("unknown key of a method", sets(method__lora__rnak=4), "method.lora.rnak", "did you mean rank?"),
    case("unknown method", sets(method={"lroa": {}}), "method.lroa: unknown method", "did you mean lora?"),
    case("no method", no_method, "recipe.yaml:1: method: is missing", "several that combine)", lines=1),
    case("an empty method", sets(method={}), "method: names no method", "expected one of: autoencoder"),
    case("words for a number", sets(train__steps="ten"), "train.steps: found the text 'ten'",
         "a whole number"),
    case("a number in quotes", sets(data__resolution="64"), "resolution: found the text '64'",
         "a whole number"),
    case("half a picture", sets(train__batch_size=2.5), "batch_size: found the number 2.5", "a whole number"),
    case("true for a number", sets(train__accumulate=True), "accumulate: found true", "a whole number"),
    case("a value for a block", sets(train=5), "train: found the number 5", "expected a block of keys"),
    case("a list for a value", sets(train__seed=[1, 2]), "train.seed: found a list of 2", "a whole number"),
    case("a value for a list", sets(preview__prompts="a toy"), "preview.prompts: found the text", "a list"),
    case("a number for text", sets(output=5), "output: found the number 5", "write '5', with the quotes"),
    case("nothing for text", sets(output=None), "output: found nothing", "write '' for the empty text"),
    case("empty text", sets(output=""), "output: found the text ''", "expected text that is not empty"),
    case("below the range", sets(train__seed=-1), "train.seed: found the number -1", "at least 0"),
    case("above the range", sets(train__ema=1.5), "train.ema: found the number 1.5", "a number below 1"),
    case("no such choice", sets(train__precision="half"), "precision: found the text 'half'",
         "fp32, bf16, fp16"),
    case("three at once", sets(train__steps="eleven", data__flip="maybe", method__lora__rank=0),
         "method.lora.rank: found the number 0", "data.flip: found the text 'maybe'",
         "train.steps: found the text 'eleven'"),
]  # fmt: skip

YAML = [
    case("given twice", swap("steps: 2", "steps: 2\n  steps: 3"), "steps: given twice", "and in line"),
    case("1e-4 in quotes", swap("0.001", '"1e-4"'), "train.learning_rate: found the text '1e-4'", "a number"),
    case("no number", swap("0.001", "1e-4x"), "learning_rate: found the text '1e-4x'", "expected a number"),
    case("no for false", swap("workers: 0", "flip: no"), "flip: found the text 'no'", "write false"),
    case("yes for true", swap("tensorboard: false", "tensorboard: yes"), "the text 'yes'", "write true"),
    case("16:9", swap("resolution: 64", "resolution: 16:9"), "found the text '16:9'",
         "a whole number or a list"),
    case("1e3 steps", swap("steps: 2", "steps: 1e3"), "train.steps: found the number 1000", "a whole number"),
    case("not a number", swap("0.001", ".nan"), "train.learning_rate: found the number nan",
         "a finite number"),
    case("infinite", swap("0.001", ".inf"), "train.learning_rate: found the number inf", "a finite number"),
    case("a space in a number", swap("steps: 2", "steps: 2 000"), "found the text '2 000'", "a whole number"),
    case("a tab", swap("  steps: 2", "\tsteps: 2"), "is not YAML: found character '\\t'", "spaces, not tabs"),
    case("an open bracket", text("base: [a, b\n"), "recipe.yaml:2:1: is not YAML", "expected ',' or ']'"),
    case("a colon too many", text("base: c: d\n"), "recipe.yaml:1:8: is not YAML", "not allowed here"),
    case("two documents", text("base: a\n---\nbase: b\n"), "recipe.yaml:2:1", "expected a single document"),
    case("an unknown alias", text("base: *b\n"), "recipe.yaml:1:7: is not YAML", "undefined alias"),
    case("a tag that runs code", swap("path: base", "path: !!python/object/apply:os.system ['touch ran']"),
         "base.path: found the tag tag:yaml.org,2002:python/object/apply:os.system",
         "tags are not used in recipes"),
    case("a merge key", swap("train:", "rest: &r {seed: 1}\ntrain:\n  <<: *r"), "train.<<: unknown key",
         "rest: unknown"),
    case("a bomb of aliases", text(HUGE), "recipe.yaml", "more than 100000 values", "write it without"),
    case("empty", text("\n"), "recipe.yaml: the file is empty", "expected a recipe (base, method, data"),
    case("a list", text("- base\n"), "recipe.yaml:1: found a list", "such as 'base: embedded'"),
    case("binary", raw(b"\x89PNG\r\n\x1a\n\0\xff"), "recipe.yaml: is not text (byte 0", "a YAML recipe"),
    case("UTF-16", raw("base: embedded\n".encode("utf-16")), "recipe.yaml: is text in UTF-16",
         "save it as UTF-8"),
    case("a checkpoint for a recipe", checkpoint_for_recipe, "model.safetensors: 1073741824 bytes",
         "expected a YAML recipe"),
    case("missing", words("recipes.yaml"), "recipes.yaml: no such file", "recipe.yaml"),
    case("nowhere", words("a/b.yaml"), "a/b.yaml: no such file", "there is no folder a"),
    case("a folder", folder, "recipes: is a folder, expected a recipe file", "it holds: mine.yaml"),
]  # fmt: skip

OVERRIDES = [
    case("no equals sign", override("train.steps"), "command line: train.steps", "such as train.steps=100"),
    case("an unknown override", override("train.stesp=4"), "command line: train.stesp=4", "mean steps?"),
    case("a wrong value", override("train.steps=many"), "command line: train.steps=many", "a whole number"),
    case("below a value", override("train.steps.x=4"), "command line: train.steps.x=4", "holds one value"),
    case("no YAML", override("preview.prompts=[a"), "command line: preview.prompts=[a", "in quotes"),
    case("which source", override("data.source.3.repeats=2"), "data.source.3", "as data.source.0"),
]  # fmt: skip

COMBINED = [
    case("two ends", sets(train__epochs=3), "train.epochs: found together with steps", "train.steps=null"),
    case("no end", lambda world: world.drop("train.steps"), "train.steps: is missing", "or at epochs"),
    case("methods", sets(method__controlnet={}), "method.lora", "cannot be combined with method controlnet"),
    case("timesteps", sets(objective__timesteps=[9, 3]), "objective.timesteps: found [9, 3]",
         "0 <= start < end"),
    case("timesteps beyond", sets(objective__timesteps=[0, 5000]), "objective: ", "1000"),
    case("without effect", sets(objective__snr_gamma=3.0), "snr_gamma: has no effect", "weighting is none"),
    case("averages twice", sets(train__optimiser="adamwschedulefree", train__ema=0.9), "train.ema",
         "take null"),
    case("no warm-up", sets(train__schedule="inverse_sqrt"), "train.warmup: found the number 0", "give one"),
    case("nothing held out", sets(validate__every=1), "validate.every: found the number 1",
         "set data.heldout"),
    case("a place for captions", sets(data__captions={"templates": ["a toy"]}),
         "templates.0: found 0 times {}", "once"),
    case("optimiser", sets(train__optimiser="adamv"), "train.optimiser: unknown optimiser 'adamv'",
         "mean adam or"),
    case("its option", sets(train__optimiser={"name": "sgd", "options": {"momentun": 0.9}}), "'momentun'",
         "momentum"),
    case("its numbers", sets(train__optimiser={"name": "sgd", "betas": [0.5, 0.9]}), "train.optimiser: SGD",
         "does not take betas"),
    case("layers", sets(method__lora__targets="atention"), "method.lora.targets", "attention"),
    case("a regular expression", sets(method__lora__patterns=[{"match": "(", "rank": 2}]),
         "patterns.0.match", "regular"),
    case("uneven parts", sets(train__accumulate=2, train__batch_size=3), "batch_size: found 3",
         "choose 2 or 4"),
    case("held out in vain", sets(data__heldout=[{"path": "data", "repeats": 2}]), "heldout.0.repeats",
         "no effect"),
    case("resolution", sets(data__resolution=60), "data.resolution: 60 is no multiple of 8",
         "autoencoder's factor"),
    case("pictures of nothing", sets(preview__every=1), "preview.every: there is nothing to show",
         "preview.prompts"),
    case("measures", lambda w: (w.method("full"), w.set("evaluate.samples", 2), w.set("data.heldout",
         "data")),
         "evaluate.samples: there are no measures for method full", "set 0"),
    case("quantised and trained", lambda w: (w.method("full"), w.set("base.quantise", "nf4")),
         "base.quantise: method full trains the unet itself", "set it to null"),
]  # fmt: skip

RECIPES: list[Case] = [*KEYS, *YAML, *OVERRIDES, *COMBINED]
