"""Full fine-tuning: folders and the one file predict and read as the trained networks do."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from tuner import components, single_file
from tuner.errors import UserError
from tuner.method import Card, Method
from tuner.methods.full import Full
from tuner.text import Text
from tuner.verify import single
from tuner.verify.compare import LOADING, VerifyError, load, one, same_keys, same_output, same_tensors, short
from tuner.verify.component import folder_name, read_back
from tuner.verify.public import check_configs
from tuner.verify.scene import Scene

WEIGHTS = {"unet": "diffusion_pytorch_model.safetensors"}


def check(scene: Scene, method: Method, files: Sequence[Path], card: Card) -> dict[Path, str]:
    """Prove the folders below `diffusers/` and `NAME.safetensors`.

    Raises:
        VerifyError: tensors, configuration, an encoded prompt or a prediction are not the trained networks'.
    """
    assert isinstance(method, Full)
    text = scene.text(method)
    own = scene.own(method, text)
    lines = {}
    for name in method.networks():
        path = one(files, f"diffusers/{name}/{WEIGHTS.get(name, 'model.safetensors')}")
        loaded, count = read_back(path, method.networks()[name], card)
        if name == "unet":
            what, found, wanted = "prediction", scene.with_denoiser(loaded, text), own
        else:
            what, found, wanted = "encoded prompt", _text(scene, method, name, loaded).hidden, text.hidden
        difference = same_output(f"{folder_name(path)}: the {what}", found, wanted, card.dtype)
        lines[path] = (
            f"{folder_name(path)}: all {count} tensors loaded by its library; "
            f"{'a' if name == 'unet' else 'an'} {what} differs by {difference:.1e} of its size "
            f"({short(card.dtype)})"
        )
        del loaded
    if method.config.pipeline:
        first = next(iter(lines))
        lines[first] += f"; {_pipeline(scene, method, first.parent.parent)}"
    if method.config.checkpoint_file:
        path = one(files, f"{card.name}.safetensors")
        lines[path] = _checkpoint(scene, method, path, text, own, card)
    return lines


def _pipeline(scene: Scene, method: Full, place: Path) -> str:
    """The whole folder, as users load it; what was trained is given to it, as it has been proved already."""
    from diffusers import DiffusionPipeline

    trained = method.networks()
    try:
        pipe = DiffusionPipeline.from_pretrained(
            place, **trained, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    except LOADING as error:
        raise VerifyError(f"{place.name}/ does not load as a pipeline: {error}") from error
    others = [name for name in scene.family.modules() if name not in trained]
    for name in others:
        own, found = method.state(scene.family, name), pipe.components[name].state_dict()
        same_keys(f"{place.name}/{name}", found, own)
        if different := [key for key in own if not torch.equal(found[key].cpu(), own[key].float())]:
            raise VerifyError(f"{place.name}/{name}: {different[0]} is not what the base has")
    for key in ("prediction_type", "rescale_betas_zero_snr"):
        wanted = scene.family.scheduler_config.get(key, False)
        if pipe.scheduler.config.get(key, False) != wanted:
            raise VerifyError(f"{place.name}/scheduler: {key} is not {wanted}, which was trained for")
    check_configs(place)
    kind = type(pipe).__name__
    return f"{place.name}/ loads whole as {kind}, with the base's {', '.join([*others, 'tokenizers'])}"


def _text(scene: Scene, method: Full, name: str, other: nn.Module) -> Text:
    """The scene's prompts as the family reads them with another network in place of its own one."""
    networks = scene.family.modules()
    kept, networks[name] = networks[name], other
    try:
        return scene.text(method)
    finally:
        networks[name] = kept


def _checkpoint(scene: Scene, method: Full, path: Path, text: Text, own: torch.Tensor, card: Card) -> str:
    """The one file: its tensors, then what this project's reader of such files and diffusers make of it."""
    count = same_tensors(path.name, load(path), method.whole(scene.family), card.dtype)
    assert method.folder is not None, "a base has a folder"
    trained = method.networks()
    predicts = str(scene.family.scheduler_config.get("prediction_type", "epsilon"))
    errors: list[float] = []
    with tempfile.TemporaryDirectory(prefix=".verify-", dir=path.parent) as cache:
        try:
            folder = single_file.as_folder(path, Path(cache), predicts, method.folder)
            for name in scene.family.modules():
                read = components.load(name, folder / name).to(scene.family.device).eval()
                stored = {key: t.to(card.dtype) for key, t in read.state_dict().items()}
                wanted = method.state(scene.family, name)
                same_tensors(f"{path.name}, read back: {name}", stored, wanted, card.dtype)
                if name == "unet" and name in trained:
                    found = scene.with_denoiser(read, text)
                    errors.append(same_output(f"{path.name}: the prediction", found, own, card.dtype))
                elif name in trained:
                    hidden = _text(scene, method, name, read).hidden
                    errors.append(same_output(f"{path.name}: the prompt", hidden, text.hidden, card.dtype))
        except VerifyError:
            raise
        except UserError as error:
            raise VerifyError(f"{path.name} is not read back: {error}") from error
    assert len(errors) == len(trained)
    states = {name: method.state(scene.family, name) for name in trained}
    alike = single.same(path, states, method.folder, scene.family.name, card.dtype)
    return (
        f"{path.name}: all {count} tensors in the original layout, read back as {scene.family.name}; "
        f"the {' and the '.join(trained)} in it differ by {max(errors):.1e} of their outputs' size "
        f"({short(card.dtype)}); {alike}"
    )
