"""Each method's export, read back by the libraries that users have, has the trainer's own effect."""

from __future__ import annotations

import random
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from tuner import verify

FILES = {
    "controlnet": {"diffusers/diffusion_pytorch_model.safetensors", "control_sd15_case.safetensors"},
    "textual_inversion": {"toy.safetensors"},
    "lora": {"case.safetensors"},
    "full": {"diffusers/unet/diffusion_pytorch_model.safetensors", "case.safetensors"},
    "autoencoder": {"diffusers/vae/diffusion_pytorch_model.safetensors"},
    "contrastive": {"diffusers/text_encoder/model.safetensors", "diffusers/image_encoder/model.safetensors"},
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(FILES))
def test_an_export_has_the_trained_effect(
    name: str, dtype: torch.dtype, sd1_folder: Path, tmp_path: Path, models: ModuleType
) -> None:
    family = models.family_of(sd1_folder, name)
    method = models.move(models.method_of(name, family))
    card = models.card_of(dtype, method)
    files = method.export(family, tmp_path, card)
    assert {path.relative_to(tmp_path).as_posix() for path in files} == FILES[name]
    lines = verify.check(family, [method], files, card)
    assert len(lines) == len(files)
    print("\n".join(lines))  # seen with -s


@pytest.mark.parametrize("name", sorted(FILES))
def test_an_untrained_method_passes_too(
    name: str, sd1_folder: Path, tmp_path: Path, models: ModuleType
) -> None:
    family = models.family_of(sd1_folder, name)
    method = models.method_of(name, family)
    card = models.card_of(torch.float16, method)
    assert verify.check(family, [method], method.export(family, tmp_path, card), card)


@pytest.mark.parametrize("size", [1e-7, 1e-9])
@pytest.mark.parametrize("name", ["controlnet", "lora"])
def test_the_first_step_of_a_warm_up_passes(
    name: str, size: float, sd1_folder: Path, tmp_path: Path, models: ModuleType
) -> None:
    family = models.family_of(sd1_folder, name)
    method = models.method_of(name, family)
    zeros = [p for p in method.trained().values() if not p.any()]
    assert len(zeros) > 5
    for parameter in zeros:
        torch.nn.init.constant_(parameter, size)  # float16 makes 1.19e-7 of 1e-7 and nothing of 1e-9
    card = models.card_of(torch.float16, method)
    assert verify.check(family, [method], method.export(family, tmp_path, card), card)


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_trainer_is_left_as_it_was(
    name: str, sd1_folder: Path, tmp_path: Path, models: ModuleType
) -> None:
    family = models.family_of(sd1_folder, name)
    method = models.move(models.method_of(name, family))
    trained = list(method.trained().values())
    if name != "autoencoder":  # it stays in float32
        family.cast(torch.bfloat16, trained)
    method.train_mode(True)
    card = models.card_of(torch.float16, method)
    files = method.export(family, tmp_path, card)
    modules = [*family.modules().values(), method]
    before = [_everything(module) for module in modules]
    places = [p.data_ptr() for p in trained]
    words = len(family.tokenizer) if family.tokenizer else 0
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(11)
    states = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())

    assert len(verify.check(family, [method], files, card)) == len(files)

    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    assert words == (len(family.tokenizer) if family.tokenizer else 0)
    assert places == [p.data_ptr() for p in method.trained().values()]
    assert torch.is_grad_enabled()
    counts = 0
    for module, (tensors, flags, modes) in zip(modules, before, strict=True):
        now = _everything(module)
        assert now[1:] == (flags, modes)
        assert now[0].keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert tensor.dtype == now[0][key].dtype and torch.equal(tensor, now[0][key]), key
            counts += 1
    assert counts > 20


def _everything(module: torch.nn.Module) -> tuple[dict[str, torch.Tensor], list[bool], list[bool]]:
    tensors = {name: t.detach().clone() for name, t in [*module.named_parameters(), *module.named_buffers()]}
    return tensors, [p.requires_grad for p in module.parameters()], [m.training for m in module.modules()]
