"""train.gradient_checkpointing: the same loss and gradients, bit for bit, with less kept."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner import memory
from tuner.families.sd1 import FAMILY
from tuner.method import Method
from tuner.text import Text

CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "text_encoder": True, "dropout": 0.2},
    "textual_inversion": {"token": "<new>", "init": "red"},
    "controlnet": {},
    "full": {"text_encoder": True, "checkpoint_file": False},
}
NEEDS = ("unet", "vae", "text_encoder")


def gradients(folder: Path, name: str, again: bool) -> tuple[list[torch.Tensor], int, int]:
    """A step's gradients, the bytes kept for its backward pass, and how often a block was called."""
    file = importlib.import_module(f"tuner.methods.{name}")
    family = FAMILY.load(folder, NEEDS)
    method: Method = file.METHOD(file.Config(**CONFIGS[name]), family, 0)
    if again:
        memory.switch_on(family, [method])
    method.train_mode(True)
    calls: list[int] = []
    block: Any = family.modules()["unet"]
    block.up_blocks[0].resnets[0].norm1.register_forward_hook(lambda *_: calls.append(1))
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(2, 4, 8, 8, generator=generator)
    picture = torch.rand(2, 3, 64, 64, generator=generator)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        text: Text = method.encode(family, family.tokenize(["a <new> toy", "red"]))
        cond = family.condition(text)

        class Batch:
            condition = picture

        seen = method.predict(family, x_t, torch.tensor([10, 500]), cond, Batch())  # type: ignore[arg-type]
        loss = (seen - x_t).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    found = [p.grad for p in method.trained().values()]
    assert found and all(one is not None for one in found)
    return [loss.detach(), *(one for one in found if one is not None)], sum(kept.values()), len(calls)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_gradients_are_the_same(sd1_folder: Path, name: str) -> None:
    plain, much, once = gradients(sd1_folder, name, again=False)
    again, less, twice = gradients(sd1_folder, name, again=True)
    assert len(plain) == len(again) > 1
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)
    assert any(bool(one.any()) for one in plain[1:])
    assert less < much and (once, twice) == (1, 2)
