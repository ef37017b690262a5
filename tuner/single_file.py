"""One .safetensors checkpoint in the original layout as a base: what it is, and the diffusers folder of it.

The configurations that such a file lacks ship in tuner/configs/, with CLIP's vocabulary, so that no network
is needed.
"""

from __future__ import annotations

import gzip
import json
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tuner import components
from tuner.data.cache import Hashes, key
from tuner.errors import UserError
from tuner.export.cldm import LayoutError
from tuner.export.component import save_component
from tuner.export.files import folder_whole, write_whole
from tuner.export.original import MARKERS, PLACES, component_from_original

CONFIGS = Path(__file__).parent / "configs"
VERSION = 1
"""Raised by hand when the folder made of a file changes; those made by older versions are not used then."""

Shapes = Mapping[str, tuple[int, ...]]

_UNET, _VAE = PLACES["sd1"]["unet"], PLACES["sd1"]["vae"]
_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
_SD2_BIAS = f"{_UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SD2_SPREAD = 0.09  # ComfyUI's border between the two (comfy/supported_models.py, SD20.model_type)

# What else a file can be, by its keys; the first that fits.
_KINDS = {
    r"lora_(up|down|A|B)\b|lora\.(up|down)\.|\.hada_w|\.lokr_w|\.dora_scale": "a LoRA (or LoHa, LoKr)",
    r"^control_model\.|^input_hint_block\.|^zero_convs\.|^controlnet_": "a ControlNet",
    r"^(emb_params|clip_[lg]|string_to_param.*|<.*>)$": "a textual-inversion embedding",
    r"(joint|double|single)_blocks\.|\.ff_context\.": "a model of another family (SD3, Flux or the like)",
    r"^input_blocks\.": "a UNet alone, in the original layout",
    r"^(down|mid|up)_blocks?\.": "the UNet of a diffusers folder; give that",
    r"^(encoder\.down|decoder\.up)_blocks\.": "the autoencoder of a diffusers folder; give that",
    r"^(first_stage_model\.)?(encoder\.down|decoder\.up)\.": "an autoencoder alone, in the original layout",
    r"^(text_model\.)?(encoder\.layers|embeddings)\.": "a text encoder of a diffusers folder; give that",
}


class Checkpoint(NamedTuple):
    """What a checkpoint file is."""

    family: str  # sd1, sd2, sdxl
    config: str  # the folder in tuner/configs/
    prediction: str  # epsilon, v_prediction
    known_by: str  # what the prediction is known, or guessed, by
    zero_snr: bool  # trained with zero terminal SNR (arXiv 2305.08891)
    components: tuple[str, ...]
    ignored: dict[str, int]  # tensors that belong to no component: first part of the key -> how many

    def told(self) -> str:
        """One line for the user."""
        kind = f"{self.family} ({self.config}), {self.prediction} ({self.known_by})"
        told = f"{kind}: {', '.join(self.components)}"
        if not self.ignored:
            return told
        rest = ", ".join(f"{name} ({count})" for name, count in sorted(self.ignored.items()))
        return f"{told}; without use here, tensors of {rest}"


def describe(path: Path, prediction: str | None = None) -> Checkpoint:
    """What a checkpoint is, from the names and shapes in its header and its metadata.

    SD2 comes with two predictions that shapes do not tell apart. Without metadata (`modelspec.*`) they are
    told as ComfyUI does it, by the spread of one bias, the only tensor that is read here. A UNet without that
    bias, or with one that was never trained, is taken for v-prediction, as the 768-pixel models have it.

    Args:
        path: the file.
        prediction: `epsilon` or `v_prediction` where the user knows it.

    Raises:
        UserError: it is no such file, or a model of another kind; says what was found.
    """
    if prediction is not None and prediction not in _PREDICTIONS.values():
        raise UserError(f"prediction {prediction}: expected epsilon or v_prediction")
    shapes, metadata = _header(path)
    first = shapes.get(f"{_UNET}input_blocks.0.0.weight")
    if first is None:
        raise UserError(f"{path} is {kind_of(shapes)}; expected a Stable Diffusion checkpoint")
    family = _family(path, shapes)
    inpainting = first[1] == 9
    if first[1] not in (4, 9) or (inpainting and family == "sd2"):
        raise UserError(
            f"{path}: the UNet of this {family} checkpoint takes {first[1]} channels; expected 4"
            + ("" if family == "sd2" else ", or 9 (inpainting)")
        )
    predicts, known_by = _prediction(path, family, shapes, metadata)
    if prediction is not None:
        predicts, known_by = prediction, "as given"
    config = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}[family] + "-inpainting" * inpainting
    if family == "sd2" and predicts == "epsilon":
        config = "sd21-base"
    places = PLACES[family]
    found = [c for c, prefix in places.items() if any(name.startswith(prefix) for name in shapes)]
    rest = [n for n in shapes if not n.startswith(tuple(places.values())) and n not in MARKERS]
    ignored = dict(Counter(name.split(".")[0] for name in rest))
    zero_snr = MARKERS[1] in shapes
    return Checkpoint(family, config, predicts, known_by, zero_snr, tuple(found), ignored)


def kind_of(shapes: Shapes) -> str:
    """A phrase that says what a file with these keys is, where it is no checkpoint."""
    for pattern, phrase in _KINDS.items():
        if any(re.search(pattern, name) for name in shapes):
            return phrase
    if 0 < len(shapes) <= 2 and all(len(shape) <= 2 for shape in shapes.values()):
        return "a textual-inversion embedding"
    return f"an unknown file of {len(shapes)} tensors ({', '.join(sorted(shapes)[:3])})"


def as_folder(path: Path, cache: Path, prediction: str | None = None, configs: Path | None = None) -> Path:
    """The checkpoint as a diffusers folder with the same weights, in the precision of the file.

    It is made once, whole, and lies in the cache under a hash of all that it depends on. Components that the
    file lacks are not in the folder.

    Args:
        path: the file.
        cache: the cache's folder.
        prediction: `epsilon` or `v_prediction` where the user knows it.
        configs: a diffusers folder (weights are not looked at) whose configurations and tokenizers the model
            has; None takes the shipped ones.

    Raises:
        UserError: as `describe`, or the tensors are not those of the configuration.
    """
    about = describe(path, prediction)
    source = configs or CONFIGS / about.config
    index = _read_json(source / "model_index.json")
    for name in about.components:
        if not (source / name / "config.json").is_file():
            raise UserError(f"{path} holds {name}, but {source} has no {name}/config.json")

    def write(folder: Path) -> None:
        for name in about.components:
            _write_component(path, PLACES[about.family][name], name, source, folder, about.family)
        for name in (n for n in index if n.startswith("tokenizer")):
            write_tokenizer(source / name, folder / name)
        _write_scheduler(source, folder, about)
        networks = set(PLACES[about.family]) - set(about.components)
        whole = {name: [None, None] if name in networks else entry for name, entry in index.items()}
        write_whole(folder / "model_index.json", json.dumps(whole, indent=2, sort_keys=True) + "\n")

    configs_of = (file for file in source.rglob("*") if file.suffix in (".json", ".txt"))
    depends = {str(file.relative_to(source)): file for file in sorted(configs_of)}
    return _made_once(path, cache, depends, write, [about.prediction, about.zero_snr])


def autoencoder_folder(path: Path, cache: Path, configs: Path) -> Path:
    """An autoencoder in the original layout, alone or in a checkpoint, as a diffusers folder with only `vae`.

    Args:
        path: the file.
        cache: the cache's folder.
        configs: the folder of the base it is for, whose vae/config.json (scaling factor) it takes.

    Raises:
        UserError: it is no such file, or its tensors are not those of the configuration.
    """
    config = configs / "vae" / "config.json"
    _read_json(config)
    shapes, _ = _header(path)
    prefix = _VAE if any(name.startswith(_VAE) for name in shapes) else ""
    if not {f"{prefix}encoder.conv_in.weight", f"{prefix}decoder.mid.block_1.conv1.weight"} <= set(shapes):
        raise UserError(f"{path} is {kind_of(shapes)}; expected an autoencoder in the original layout")

    def write(folder: Path) -> None:
        _write_component(path, prefix, "vae", configs, folder, "sd1")

    return _made_once(path, cache, {config.name: config}, write, ["vae"])


def write_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer's folder; CLIP's own vocabulary is added where it holds none.

    The vocabulary is OpenAI's (MIT; see configs/tokenizer/NOTICE): 256 bytes, these at the end of a word,
    48,894 merges, and the two ends of a text, 49,408 tokens in all.
    """
    files = [file for file in sorted(source.iterdir()) if file.is_file()]
    for file in files:
        write_whole(folder / file.name, file.read_bytes())
    if {"vocab.json", "tokenizer.json"} & {file.name for file in files}:
        return
    merges = gzip.decompress((CONFIGS / "tokenizer" / "merges.txt.gz").read_bytes()).decode()
    # Bytes that print stand for themselves; the others are named by the letters from 256 on, in order.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in plain] + [chr(256 + n) for n in range(256 - len(plain))]
    words = letters + [f"{letter}</w>" for letter in letters]
    words += [line.replace(" ", "") for line in merges.splitlines()[1:]]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    assert len(vocabulary) == len(words) == 49408
    write_whole(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    write_whole(folder / "merges.txt", merges)


def _header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes by key, and metadata."""
    try:
        if (other := components.other_kind(path)) is not None:
            raise UserError(f"{path} is {other}; expected a .safetensors checkpoint")
        with safe_open(path, framework="pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            return shapes, dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole .safetensors file: {error}; download it again") from error


def _family(path: Path, shapes: Shapes) -> str:
    """The family by the structure of the UNet; the text encoders' keys must be those of the same family.

    Raises:
        UserError: a UNet of another kind.
    """
    labelled = f"{_UNET}label_emb.0.0.weight" in shapes
    if labelled and any(name.startswith(f"{_UNET}input_blocks.1.1.") for name in shapes):
        raise UserError(f"{path}: its UNet reads an image's embedding (unCLIP, or video); not a known family")
    if labelled and any(name.startswith("conditioner.embedders.0.model.") for name in shapes):
        raise UserError(f"{path}: the refiner of SDXL; expected its base model")
    names = [name for name in shapes if name.startswith(_UNET) and name.endswith(".1.proj_in.weight")]
    if not names:
        raise UserError(f"{path}: its UNet has no cross-attention; not a known family")
    family = "sdxl" if labelled else "sd2" if len(shapes[names[0]]) == 2 else "sd1"
    text = [name for name in shapes if name.startswith(("cond_stage_model.", "conditioner.embedders."))]
    ours = tuple(prefix for name, prefix in PLACES[family].items() if name.startswith("text_encoder"))
    if text and not any(name.startswith(ours) for name in text):
        raise UserError(f"{path}: the UNet is of {family}, but its text encoder is not ({text[0]})")
    return family


def _prediction(path: Path, family: str, shapes: Shapes, metadata: Mapping[str, str]) -> tuple[str, str]:
    """What the UNet predicts, and what that is known by.

    `v_pred` is a convention of SDXL fine-tunes that ComfyUI reads (comfy/supported_models.py).

    Raises:
        UserError: another parameterisation.
    """
    if found := sorted({"edm_mean", "edm_vpred.sigma_max"} & set(shapes)):
        raise UserError(
            f"{path}: trained in the EDM formulation ({found[0]}); expected epsilon or v-prediction"
        )
    if told := metadata.get("modelspec.prediction_type"):
        if told not in _PREDICTIONS:
            raise UserError(
                f"{path}: modelspec.prediction_type is {told}; known are {', '.join(_PREDICTIONS)}"
            )
        return _PREDICTIONS[told], "its metadata, modelspec.prediction_type"
    if MARKERS[0] in shapes:
        return "v_prediction", f"its key {MARKERS[0]}"
    if family != "sd2":
        return "epsilon", "as published"
    for ending, predicts in (("v2-768-v", "v_prediction"), ("v2-512", "epsilon")):
        if ending in metadata.get("modelspec.architecture", ""):
            return predicts, "its metadata, modelspec.architecture"
    if _SD2_BIAS in shapes:
        with safe_open(path, framework="pt") as file:
            spread = float(file.get_tensor(_SD2_BIAS).float().std(correction=0))
        if spread > 0:
            guess = "v_prediction" if spread > _SD2_SPREAD else "epsilon"
            return guess, f"a guess by the spread of one bias, {spread:.3f}"
    return "v_prediction", "assumed, as the 768-pixel models have it"


def _write_component(path: Path, prefix: str, name: str, source: Path, folder: Path, family: str) -> None:
    """One component of the checkpoint, converted and checked, as a folder."""
    network, config = _without_weights(name, source)
    with safe_open(path, framework="pt") as file:
        keys = [found for found in file.keys() if found.startswith(prefix)]  # noqa: SIM118
        state = {found.removeprefix(prefix): file.get_tensor(found) for found in keys}
    try:
        tensors = component_from_original(name, state, config, family)
    except LayoutError as error:
        raise UserError(f"{path}: its {name} is not that of {source.name}: {error}") from error
    _check(f"{path}: its {name} is not that of {source.name}", tensors, network.state_dict())
    told = _read_json(source / name / "config.json")
    library = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}
    save_component(folder / name, told, tensors, {}, library[components.KINDS[name][0]])


def _without_weights(name: str, source: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A component on the meta device, and its whole configuration, defaults included."""
    with torch.device("meta"):
        network: Any = components.fresh(name, source / name, seed=0)
    config = network.config
    return network, config.to_dict() if hasattr(config, "to_dict") else dict(config)


def _check(problem: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raises UserError where names or shapes differ from the network's."""
    if differs := components.misfit(tensors, wanted):
        raise UserError(f"{problem}: {differs}")


def _write_scheduler(source: Path, folder: Path, about: Checkpoint) -> None:
    """The scheduler's configuration, with the prediction that the checkpoint was trained for."""
    config = _read_json(source / "scheduler" / "scheduler_config.json")
    config["prediction_type"] = about.prediction
    if about.zero_snr:
        config["rescale_betas_zero_snr"] = True
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_whole(folder / "scheduler" / "scheduler_config.json", text)


def _made_once(
    path: Path, cache: Path, depends: Mapping[str, Path], write: Callable[[Path], None], parts: list[object]
) -> Path:
    """The cache's folder for this file and these configurations; `write` fills it where it is not there yet.

    Processes that want the same folder wait for the first one.
    """
    found = Hashes(cache).of([path, *depends.values()])
    configs = {relative: found[file] for relative, file in depends.items()}
    name = key(kind="checkpoint", code=VERSION, file=found[path], configs=configs, parts=parts)
    place = cache / "checkpoints" / name
    place.parent.mkdir(parents=True, exist_ok=True)
    with _alone(place.with_name(f"{name}.lock")):
        if not place.is_dir():
            with folder_whole(place) as beside:
                write(beside)
    return place


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Run a block while no other process runs one with the same lock; freed when a process dies."""
    with closing(sqlite3.connect(lock, timeout=3600, isolation_level=None)) as held:
        held.execute("begin exclusive")
        yield


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path.parent}: there is no {path.name}")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
