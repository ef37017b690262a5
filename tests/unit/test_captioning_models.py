"""Captioners and filters of `tuner caption` against transformers' own calls, on tiny random models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tuner.base import EMBEDDED
from tuner.captioning.captioner import Captioner, How
from tuner.captioning.matching import Filter, filter_of
from tuner.captioning.models import Model, locate
from tuner.data.cache import Hashes
from tuner.data.pictures import Picture, to_signed
from tuner.errors import UserError

CPU = torch.device("cpu")
WRITERS = ("blip", "blip2", "git", "encoder_decoder", "llava")
CHAT = "Describe this picture in one sentence."


@pytest.fixture(scope="module")
def folders(captioners: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    names = (*WRITERS, "blip_itm", "blip2_itm", "clip")
    return {name: getattr(captioners, name)(place / name) for name in names}


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    """Of several sizes: plain ones, and noise."""
    random = np.random.default_rng(0)
    flat = [
        np.full((20, 30 + 3 * i, 3), c, np.uint8)
        for i, c in enumerate([(255, 0, 0), (0, 255, 0), (9, 20, 250)])
    ]
    return [*flat, random.integers(0, 255, (33, 21, 3)).astype(np.uint8)]


@pytest.fixture
def find(tmp_path: Path) -> Callable[..., Model]:
    def found(name: str | Path, option: str = "--model", revision: str | None = None) -> Model:
        return locate(str(name), revision, option, Hashes(tmp_path / "hashes"))

    return found


def own(folder: Path, pictures: list[Picture], prompt: str | None, **how: Any) -> list[str]:
    """Captions by transformers' own classes, as their pages say."""
    network = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    if folder.name == "encoder_decoder":
        images = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        words = transformers.AutoTokenizer.from_pretrained(folder)
        inputs = images(pictures, return_tensors="pt")
    else:
        both = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
        words = both.tokenizer
        text = {} if prompt is None else {"text": [prompt] * len(pictures)}
        inputs = both(images=pictures, return_tensors="pt", **text)
    with torch.no_grad():
        tokens = network.generate(**inputs, **how)
    asked = inputs["input_ids"].shape[1] if folder.name == "llava" else 0  # its question comes back
    told: list[str] = words.batch_decode(tokens[:, asked:], skip_special_tokens=True)
    return told


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", WRITERS)
def test_captions_are_those_of_the_model(
    folders: dict[str, Path], find: Callable[..., Model], pictures: list[Picture], name: str, beams: int
) -> None:
    captioner = Captioner(find(folders[name]), How(beams=beams, longest=7), torch.float32, CPU)
    told = captioner(pictures, ["a"] * 4)
    asked = f"<image> {CHAT} in one" if name == "llava" else None  # its chat template, by hand
    wanted = own(folders[name], pictures, asked, num_beams=beams, max_new_tokens=7)
    assert told == wanted
    assert len(told) == 4 and len(set(told)) > 1, "the model says the same of everything"


def test_a_prompt_is_gone_on_from_and_cut_off(
    folders: dict[str, Path], find: Callable[..., Model], pictures: list[Picture]
) -> None:
    how = How("A photo of", beams=1, longest=5)
    plainly = How(beams=1, longest=5)
    seen = 0
    for name in ("blip", "blip2"):
        model = find(folders[name])
        told = Captioner(model, how, torch.float32, CPU)(pictures, ["a"] * 4)
        wanted = own(folders[name], pictures, "A photo of", max_new_tokens=5)
        assert [f"a photo of {text}" for text in told] == wanted
        assert told != Captioner(model, plainly, torch.float32, CPU)(pictures, ["a"] * 4)
        seen += 1
    assert seen == 2


def test_git_goes_on_from_an_open_prompt(
    folders: dict[str, Path], find: Callable[..., Model], pictures: list[Picture]
) -> None:
    network = transformers.GitForCausalLM.from_pretrained(folders["git"]).eval()
    both = transformers.AutoProcessor.from_pretrained(folders["git"], backend="pil")
    ids = both.tokenizer("a photo of", add_special_tokens=False)["input_ids"]
    open_ids = torch.tensor([[both.tokenizer.cls_token_id, *ids]] * 4)
    pixels = both(images=pictures, return_tensors="pt")["pixel_values"]
    made = network.generate(pixel_values=pixels, input_ids=open_ids, max_new_tokens=5)
    wanted = both.tokenizer.batch_decode(made, skip_special_tokens=True)
    told = Captioner(find(folders["git"]), How("a photo of", 1, longest=5), torch.float32, CPU)(
        pictures, ["a"] * 4
    )
    assert [f"a photo of {text}".replace(" .", ".") for text in told] == wanted
    assert any(told)


def test_shortest_and_longest_count_tokens(
    folders: dict[str, Path], find: Callable[..., Model], pictures: list[Picture]
) -> None:
    model = find(folders["blip"])
    made: list[list[int]] = []
    for shortest, longest in ((0, 30), (0, 3), (12, 12), (0, 12)):
        captioner = Captioner(model, How(beams=1, shortest=shortest, longest=longest), torch.float32, CPU)
        write = captioner._network.generate

        def noted(write: Any = write, **how: Any) -> torch.Tensor:
            tokens: torch.Tensor = write(**how)
            ends = (tokens[:, 1:] == 3).int()  # [SEP]; behind the start token
            made.append([int(row.argmax()) if row.any() else len(row) for row in ends])
            return tokens

        captioner._network.generate = noted
        assert len(captioner(pictures, "abcd")) == 4
    free, short, long, twelve = made
    assert min(free) < 12 < max(free), "the model itself ends earlier and later"
    assert short == [min(3, length) for length in free] and long == [12] * 4
    assert twelve == [min(12, length) for length in free]


def test_what_is_drawn_depends_on_seed_and_picture_alone(
    folders: dict[str, Path], find: Callable[..., Model], pictures: list[Picture]
) -> None:
    model = find(folders["blip"])

    def drawn(seed: int, order: list[int], at_once: int, top_p: float = 0.9) -> dict[int, str]:
        captioner = Captioner(model, How(None, 1, top_p, seed, 8), torch.float32, CPU)
        torch.manual_seed(int(np.random.default_rng().integers(1 << 30)))  # the global generator has no part
        found: dict[int, str] = {}
        for start in range(0, len(order), at_once):
            part = order[start : start + at_once]
            told = captioner([pictures[i] for i in part], [f"picture {i}" for i in part])
            found |= dict(zip(part, told, strict=True))
        return found

    first = drawn(0, [0, 1, 2, 3], 4)
    assert first == drawn(0, [3, 1, 0, 2], 2) == drawn(0, [2, 0, 3, 1], 1)
    assert len({tuple(sorted(drawn(seed, [0, 1, 2, 3], 4).items())) for seed in range(4)}) == 4
    # Of a nucleus of next to nothing only the likeliest token is left.
    greedy = Captioner(model, How(beams=1, longest=8), torch.float32, CPU)(pictures, "abcd")
    assert list(drawn(0, [0, 1, 2, 3], 4, 1e-6).values()) == greedy != list(first.values())


TEXTS = ["a red circle", "a green square on white and a small circle", "blue", "the left", "a red circle"]
OF = [0, 1, 2, 3, 3]


def opened(find: Callable[..., Model], place: str | Path) -> Filter:
    model = find(place, "--filter")
    return filter_of(model)(model, CPU)


@pytest.mark.parametrize("name", ["blip_itm", "blip2_itm", "clip"])
def test_scores_are_those_of_the_model(
    folders: dict[str, Path], find: Callable[..., Model], pictures: list[Picture], name: str
) -> None:
    told = opened(find, folders[name])(pictures, TEXTS, OF)
    images = transformers.AutoImageProcessor.from_pretrained(folders[name], backend="pil")
    words = transformers.AutoTokenizer.from_pretrained(folders[name])
    kind = {
        "blip_itm": transformers.BlipForImageTextRetrieval,
        "blip2_itm": transformers.Blip2ForImageTextRetrieval,
        "clip": transformers.CLIPModel,
    }[name]
    network = kind.from_pretrained(folders[name]).eval()
    wanted = []
    for text, of in zip(TEXTS, OF, strict=True):  # one at a time, without padding
        inputs = dict(words(text, return_tensors="pt", return_token_type_ids=False))
        inputs |= images(pictures[of], return_tensors="pt")
        with torch.no_grad():
            if name == "clip":
                answer = network(**inputs)
                wanted.append(float(answer.logits_per_image[0, 0] / network.logit_scale.exp()))
            elif name == "blip_itm":
                wanted.append(float(network(**inputs).itm_score.softmax(dim=-1)[0, 1]))
            else:
                answer = network(**inputs, use_image_text_matching_head=True)
                wanted.append(float(answer.logits_per_image.softmax(dim=-1)[0, 1]))
    assert told.values == pytest.approx(wanted, abs=2e-6) and told.cut == [0] * 5
    assert len({round(value, 4) for value in told.values}) == 5, "a filter that says one thing shows nothing"


def test_a_bases_pair_is_compared_at_the_end_token(find: Callable[..., Model]) -> None:
    square = np.random.default_rng(3).integers(0, 255, (2, 128, 128, 3)).astype(np.uint8)
    texts = ["a red circle", "a small blue star on a white background, hatched"]
    told = opened(find, "embedded")(list(square), texts, [1, 0])
    words = transformers.CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer")
    text = transformers.CLIPTextModel.from_pretrained(EMBEDDED / "text_encoder", dtype=torch.float32)
    image = transformers.CLIPVisionModelWithProjection.from_pretrained(
        EMBEDDED / "image_encoder", dtype=torch.float32
    )
    for value, said, of in zip(told.values, texts, [1, 0], strict=True):
        with torch.no_grad():
            read = text(torch.tensor([words(said)["input_ids"]])).last_hidden_state[0, -1]
            seen = image(torch.from_numpy(to_signed(square[of]))[None]).image_embeds[0]
        assert value == pytest.approx(float(read @ seen / read.norm() / seen.norm()), abs=2e-6)
    assert opened(find, "embedded")([square[0]], ["red " * 80], [0]).cut == [5]


@pytest.mark.parametrize("name, room", [("blip_itm", 32), ("blip2_itm", 32), ("clip", 32)])
def test_long_captions_are_cut_and_counted(
    folders: dict[str, Path], find: Callable[..., Model], pictures: list[Picture], name: str, room: int
) -> None:
    judge = opened(find, folders[name])
    told = judge(pictures[:1], ["red " * 50, "red " * (room - 2)], [0, 0])
    assert told.cut == [50 + 2 - room, 0] and told.values[0] == pytest.approx(told.values[1], abs=1e-6)


def test_a_pooler_may_be_missing(
    folders: dict[str, Path], find: Callable[..., Model], pictures: list[Picture], tmp_path: Path
) -> None:
    def without(place: Path) -> None:
        tensors = load_file(place / "model.safetensors")
        gone = [name for name in tensors if ".pooler." in name]
        assert gone
        save_file(
            {name: tensors[name] for name in tensors if name not in gone},
            place / "model.safetensors",
            {"format": "pt"},
        )

    place = broken(folders["encoder_decoder"], tmp_path / "less", without)
    told = [
        Captioner(find(one), How(longest=6), torch.float32, CPU)(pictures, "abcd")
        for one in (place, folders["encoder_decoder"])
    ]
    assert told[0] == told[1]


@pytest.mark.parametrize("name", WRITERS)
def test_half_precision(
    folders: dict[str, Path], find: Callable[..., Model], pictures: list[Picture], name: str
) -> None:
    captioner = Captioner(find(folders[name]), How(None, 1, 0.9, 0, 5), torch.bfloat16, CPU)
    assert len(captioner(pictures, "abcd")) == 4
    assert torch.bfloat16 in {parameter.dtype for parameter in captioner._network.parameters()}


# What is not a model for this


def broken(folder: Path, place: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(folder, place)
    change(place)
    return place


def _pickled(place: Path) -> None:
    torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()


def _less(place: Path) -> None:
    tensors = load_file(place / "model.safetensors")
    tensors.pop(next(name for name in sorted(tensors) if "vision" in name))
    save_file(tensors, place / "model.safetensors", {"format": "pt"})


def _config(**more: Any) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        file = place / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | more))

    return change


CODE = {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}


@pytest.mark.parametrize(
    "change, wanted",
    [
        (_pickled, "expected *.safetensors in the folder, found config.json"),
        (_less, "1 tensors are missing in its file"),
        (lambda place: (place / "config.json").unlink(), "expected config.json in the folder"),
        (lambda place: (place / "config.json").write_text("{"), "config.json is no JSON"),
        (lambda place: (place / "config.json").write_text("[]"), "expected a model_type in config.json"),
        (_config(model_type="evil", auto_map=CODE), "found a model of type evil, expected one for captions"),
        (_config(model_type="clip"), "found a model of type clip, expected one for captions"),
        (
            lambda place: (place / "model.safetensors").write_bytes(b"x" * 99),
            "does not load to write captions",
        ),
        (lambda place: (place / "preprocessor_config.json").unlink(), "does not load"),
    ],
)
def test_what_writes_no_captions(
    folders: dict[str, Path],
    find: Callable[..., Model],
    tmp_path: Path,
    change: Callable[[Path], None],
    wanted: str,
) -> None:
    place = broken(folders["blip"], tmp_path / "broken", change)
    (place / "evil.py").write_text("raise SystemExit('code of a model was run')")
    with pytest.raises(UserError) as caught:
        Captioner(find(place), How(), torch.float32, CPU)
    text = str(caught.value)
    assert text.startswith(f"--model {place}: ") and wanted in text and "\n" not in text


def test_a_matching_model_writes_nothing_and_a_writing_one_matches_nothing(
    folders: dict[str, Path], find: Callable[..., Model]
) -> None:
    with pytest.raises(UserError, match="tensors are missing .*expected a model trained to write captions"):
        Captioner(find(folders["blip_itm"]), How(), torch.float32, CPU)
    with pytest.raises(UserError, match=r"tensors are missing .*expected a model trained to match captions"):
        opened(find, folders["blip"])
    with pytest.raises(UserError, match="found a model of type git, expected blip or blip-2"):
        opened(find, folders["git"])
    with pytest.raises(UserError, match="found a model of type pair, expected one for captions"):
        Captioner(find("embedded"), How(), torch.float32, CPU)
    with pytest.raises(UserError, match="--prompt has no effect: this kind of model takes none"):
        Captioner(find(folders["encoder_decoder"]), How("a photo"), torch.float32, CPU)


def test_places_that_are_none(folders: dict[str, Path], find: Callable[..., Model]) -> None:
    with pytest.raises(UserError, match=r"--model \./nowhere: no such folder"):
        find("./nowhere")
    with pytest.raises(UserError, match="--filter-revision main: has no effect"):
        find(folders["clip"], "--filter", "main")


def test_from_the_hub(
    hub: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    folders: dict[str, Path],
    find: Callable[..., Model],
    pictures: list[Picture],
) -> None:
    given = shutil.copytree(folders["blip"], tmp_path / "given")
    beside = ("pytorch_model.bin", "model.fp16.safetensors", "tf_model.h5", "modeling.py", "README.md")
    for file in beside:
        (given / file).write_bytes(b"not to be read")
    pickled = broken(folders["clip"], tmp_path / "pickled", _pickled)
    hub.take_in(monkeypatch, tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    hub.serve(given, "tester/blip")
    hub.serve(pickled, "tester/pickled")
    model = find("tester/blip")
    taken = sorted(file.name for file in model.folder.iterdir())
    assert taken == sorted(file.name for file in folders["blip"].iterdir()) and "model.safetensors" in taken
    assert model.digest == find(folders["blip"]).digest, "the same files are the same model"
    how = How(beams=1, longest=5)
    local = Captioner(find(folders["blip"]), how, torch.float32, CPU)(pictures, "abcd")
    assert Captioner(model, how, torch.float32, CPU)(pictures, "abcd") == local
    for name, revision, wanted in (
        ("tester/pickled", None, "--filter: tester/pickled: expected *.safetensors there, found"),
        ("tester/none", None, "--filter: tester/none: no such folder or file here, and no such repository"),
        ("tester/blip", "v9", "--filter-revision: v9: tester/blip has no such branch, tag or commit"),
    ):
        with pytest.raises(UserError) as caught:
            find(name, "--filter", revision)
        assert wanted in str(caught.value) and "\n" not in str(caught.value)
    assert hub.asked("GET", r"\.(bin|h5|py)$") == 0
