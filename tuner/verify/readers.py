"""A file of each kind on a base: by diffusers, by this project's own reader, and what a run trained."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tuner import components, single_file
from tuner.adapters import sources
from tuner.export import adapter as adapters
from tuner.export import cldm, control_lora, rules_controlnet
from tuner.export import files as export_files
from tuner.export.contents import Contents
from tuner.export.identify import identify
from tuner.export.rules_embedding import PAIR
from tuner.files import account
from tuner.method import Method, public_config
from tuner.methods.controlnet import ControlNet
from tuner.methods.full import Full
from tuner.methods.textual_inversion import TextualInversion
from tuner.text import Text
from tuner.verify import lora, single
from tuner.verify.compare import LOADING, VerifyError, load, same_keys
from tuner.verify.lora import Outputs
from tuner.verify.scene import PROMPTS, Scene
from tuner.verify.textual_inversion import converted, load_word


class Subject(NamedTuple):
    """A file to be proved, and where."""

    path: Path
    contents: Contents
    scene: Scene
    method: Method | None  # of a run, that made it


Named = dict[str, Tensor]


class Reading(NamedTuple):
    """What a base gives with a file, by the output's name.

    Attributes:
        told: what was loaded by whom.
        loaded: through diffusers; None where it does not read such a file.
        own: through this project's reader.
        base: without the file.
        trained: with what the run trained; nothing without one.
    """

    told: str
    loaded: Named | None
    own: Named
    base: Named
    trained: Named


def adapter(subject: Subject) -> Reading:
    """LoRA and kin."""
    path, scene, method = subject.path, subject.scene, subject.method
    base = sources.base_of(scene.family)
    made = adapters.read(load(path), subject.contents.metadata, base)
    pipe = scene.bare_pipeline()
    before = lora.outputs(scene, pipe)
    lora.add(pipe, made)
    own = lora.outputs(scene, pipe)
    told = f"all {len(subject.contents.shapes)} keys added by tuner to {len(made.modules)} layers"
    loaded = None
    kind = identify(subject.contents)
    if account.judge("diffusers", subject.contents, kind, base).loads == "all":
        pipe = scene.bare_pipeline()
        try:
            pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=lora.ADAPTER)
        except LOADING as error:
            raise VerifyError(f"{path.name} does not load in diffusers: {error}") from error
        layers = lora.loaded_layers(pipe)
        count = same_keys(f"{path.name}, loaded by diffusers,", layers, made.modules)
        told = f"all {len(subject.contents.shapes)} keys loaded by diffusers into {count} layers"
        loaded = _named(lora.outputs(scene, pipe))
    else:
        told += f" (diffusers reads no such {kind.kind})"
    trained: Named = {}
    if method is not None:
        text = scene.text(method)
        trained = _named(Outputs(text, scene.own(method, text)))
    return Reading(told, loaded, _named(own), _named(before), trained)


def _named(outputs: Outputs) -> Named:
    return {"the encoded prompt": outputs.text.hidden, "the prediction": outputs.prediction}


def word(subject: Subject) -> Reading:
    """The vectors of a word: a prompt with it, and one without."""
    path, scene, tensors = subject.path, subject.scene, load(subject.path)
    family, encoders = scene.family, list(scene.family.text_encoders)
    keys = list(PAIR) if len(encoders) > 1 else list(tensors)[:1]
    rows = {encoder: tensors[key].float() for encoder, key in zip(encoders, keys, strict=True)}
    count = len(next(iter(rows.values())))
    token, method = _token(subject, keys), subject.method
    names = [token, *(f"{token}_{number}" for number in range(1, count))]
    tables = {encoder: row.to(family.device) for encoder, row in rows.items()}
    new = names
    if method is None:
        family.add_tokens(names)
    else:
        assert isinstance(method, TextualInversion)
        new, place = method.names, method.places()[token]
        trained_rows = {encoder: table.clone() for encoder, table in method.new_rows().items()}
        for encoder, table in trained_rows.items():
            if table[place].shape != rows[encoder].shape:
                sizes = f"{list(rows[encoder].shape)}, the run's {list(table[place].shape)}"
                raise VerifyError(f"{path.name}: the vectors of {token} are {sizes}")
            table[place] = tables[encoder]
        tables = trained_rows
    pipe = scene.bare_pipeline(without_tokens=new)
    load_word(pipe, path, token, rows)
    spelled = [f"a photo of {' '.join(names)} on a red ground", PROMPTS[0]]
    tokens = family.tokenize(spelled).to(family.device)
    other, asked = family.around(pipe), [spelled[0].replace(" ".join(names), token), PROMPTS[0]]
    loaded = other.encode_prompts(other.tokenize(converted(pipe, asked)).to(family.device))
    zeros = {encoder: torch.zeros_like(table) for encoder, table in tables.items()}
    own, base = (family.encode_prompts(tokens, table) for table in (tables, zeros))
    vectors = f"{token} loaded by diffusers with all {count} of its vectors"
    found = [{"the encoded prompt": text.hidden} for text in (loaded, own, base)]
    trained = {} if method is None else {"the encoded prompt": method.encode(family, tokens).hidden}
    return Reading(vectors, found[0], found[1], found[2], trained)


def _token(subject: Subject, keys: list[str]) -> str:
    """The word of a file: its key, or of a file with a key for each text encoder what its name says."""
    method, stem = subject.method, subject.path.stem
    token = keys[0] if len(keys) == 1 else f"<{stem}>"
    if isinstance(method, TextualInversion):
        known = {name.strip("<>"): name for name in method.places()}
        if token.strip("<>") not in known:
            raise VerifyError(f"{subject.path.name} holds the word {token}; the run's are {', '.join(known)}")
        return known[token.strip("<>")]
    return token


def control(subject: Subject) -> Reading:
    """A ControlNet, complete or low-rank: its residuals, and the steered prediction."""
    scene, method = subject.scene, subject.method
    family, small = scene.family, rules_controlnet.is_low_rank(subject.contents)
    branch = _own_branch(subject, small).to(family.device).eval()
    text = scene.text(method) if method is not None else _text(scene)
    found = _by_diffusers(subject, branch, small)
    own = _steered(scene, branch, text)
    loaded = None if found is None else _steered(scene, found.to(family.device).eval(), text)
    base = {what: torch.zeros_like(output) for what, output in own.items()}
    base["the prediction"] = scene.with_denoiser(family.denoiser, text)
    told = f"all {len(subject.contents.shapes)} tensors loaded by "
    told += "diffusers" if loaded is not None else "tuner (diffusers does not read it on this base)"
    trained: Named = {}
    if method is not None:
        assert isinstance(method, ControlNet)
        with method.off(family):  # an unlocked decoder is no part of this file
            trained = _steered(scene, method.branch, text, method)
    return Reading(told, loaded, own, base, trained)


def _text(scene: Scene) -> Text:
    return scene.family.encode_prompts(scene.family.tokenize(PROMPTS).to(scene.family.device))


def _steered(scene: Scene, branch: nn.Module, text: Text, method: ControlNet | None = None) -> Named:
    channels = int(public_config(branch)["conditioning_channels"])
    picture = scene.picture[:, :channels] if method is None else method.look(scene.picture)
    family, cond = scene.family, scene.cond(text)
    control = family.control(branch, scene.x_t, scene.t, cond, picture)
    outputs = {f"residual {number}": one for number, one in enumerate([*control.down, control.middle])}
    return outputs | {"the prediction": family.predict(family.denoiser, scene.x_t, scene.t, cond, control)}


def _own_branch(subject: Subject, small: bool) -> nn.Module:
    """The branch by this project's own reader; every tensor has its place."""
    family, tensors = subject.scene.family, load(subject.path)
    layout = rules_controlnet.layout(subject.contents)
    hint = rules_controlnet.HINT["cldm" if small else layout or ""]
    shapes = subject.contents.shapes
    channels = next(shape[1] for key, shape in shapes.items() if key.removeprefix(cldm.PREFIX) == hint)
    branch = family.control_branch(channels)
    config, own = public_config(branch), branch.state_dict()
    try:
        if small:
            frozen = {k: t for k, t in family.denoiser.state_dict().items() if k in own}
            frozen = {k: t for k, t in frozen.items() if t.shape == own[k].shape}
            state = control_lora.whole(control_lora.from_file(tensors, config), frozen)
        elif layout == "cldm":
            state = cldm.from_cldm(tensors, config)
        else:
            state = {key.removeprefix(cldm.PREFIX): tensor for key, tensor in tensors.items()}
        branch.load_state_dict(state)
    except LOADING as error:
        raise VerifyError(f"{subject.path.name} is no ControlNet of this base: {error}") from error
    return branch.float()


def _by_diffusers(subject: Subject, branch: nn.Module, small: bool) -> nn.Module | None:
    """The branch as diffusers makes it of the file; None where it does not read it on this base."""
    from diffusers import ControlNetModel

    path, family = subject.path, subject.scene.family
    layers, config = public_config(branch)["layers_per_block"], public_config(branch)
    folder = (path.parent / "config.json").is_file()
    if small and (layers != 2 or family.inpainting):
        return None
    cldm_names = rules_controlnet.layout(subject.contents) == "cldm"
    if cldm_names and config.get("addition_embed_type") is not None:
        return None  # its converter leaves label_emb out
    made: Any
    try:
        if small:
            made = family.control_branch(int(config["conditioning_channels"]))
            with warnings.catch_warnings(action="ignore"):
                made.load_lora_adapter(str(path.parent), weight_name=path.name, prefix=None)
        elif folder:
            made = ControlNetModel.from_pretrained(
                path.parent, torch_dtype=torch.float32, local_files_only=True
            )
        else:
            with tempfile.TemporaryDirectory() as place:
                branch.save_config(place)  # type: ignore[operator]
                about = {"config": place, "torch_dtype": torch.float32, "local_files_only": True}
                made = ControlNetModel.from_single_file(str(path), **about)
    except LOADING as error:
        raise VerifyError(f"{path.name} does not load in diffusers: {error}") from error
    found: nn.Module = made
    return found


def checkpoint(subject: Subject) -> Reading:
    """A whole model: its denoiser and text encoders, beside those of the base."""
    path, scene, method = subject.path, subject.scene, subject.method
    family: Any = scene.family
    predicts = str(family.scheduler_config.get("prediction_type", "epsilon"))
    names = ["unet", *family.text_encoders]
    with tempfile.TemporaryDirectory() as cache:
        folder = single_file.as_folder(path, Path(cache), predicts, family.folder)
        own = {name: components.load(name, folder / name) for name in names}
        found = {name: single.read(path, name, family.folder, family.name) for name in names}
    for name in names:
        same_keys(f"{path.name}, read by diffusers: {name}", found[name].state_dict(), own[name].state_dict())
    told = f"its {' and '.join(names)} loaded by diffusers' from_single_file"
    loaded, read, base = (_with(scene, networks) for networks in (found, own, {}))
    return Reading(told, loaded, read, base, _trained(scene, method))


def unet(subject: Subject) -> Reading:
    """A UNet's weights, in a folder or alone."""
    from diffusers import UNet2DConditionModel

    path, scene = subject.path, subject.scene
    kind, own = scene.family.denoiser, scene.bare_pipeline().unet
    try:
        own.load_state_dict(load(path))
        with tempfile.TemporaryDirectory() as place:
            kind.save_config(place)  # type: ignore[operator]
            tensors, _ = export_files.load(path)
            export_files.save(Path(place) / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})
            found = UNet2DConditionModel.from_pretrained(
                place, torch_dtype=torch.float32, local_files_only=True
            )
    except LOADING as error:
        raise VerifyError(f"{path.name} does not load as a UNet of this base: {error}") from error
    loaded, read, base = (_with(scene, networks) for networks in ({"unet": found}, {"unet": own}, {}))
    told = f"all {len(subject.contents.shapes)} tensors loaded by diffusers"
    return Reading(told, loaded, read, base, _trained(scene, subject.method))


def _with(scene: Scene, networks: dict[str, nn.Module]) -> Named:
    """What the base gives with other networks in place of its own."""
    modules = scene.family.modules()
    kept = {name: modules[name] for name in networks}
    modules.update({name: network.to(scene.family.device).eval() for name, network in networks.items()})
    try:
        text = _text(scene)
        return _named(Outputs(text, scene.with_denoiser(scene.family.denoiser, text)))
    finally:
        modules.update(kept)


def _trained(scene: Scene, method: Method | None) -> Named:
    if method is None:
        return {}
    assert isinstance(method, Full)
    text = scene.text(method)
    return _named(Outputs(text, scene.own(method, text)))
