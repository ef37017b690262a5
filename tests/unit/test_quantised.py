"""A base that is stored quantised: adapters and words on it learn, and nothing else moves.

Each check runs on a base as it is, too, so that it is known to hold there.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tuner import base
from tuner.data.cache import Hashes
from tuner.export.files import load
from tuner.family import Options
from tuner.objective import Objective
from tuner.task import Task

NEEDS = ("unet", "vae", "text_encoder")
CUDA = torch.cuda.is_available()
HAS = importlib.util.find_spec("bitsandbytes") is not None
REASON = (
    "needs bitsandbytes and a GPU: diffusers 0.42 refuses to quantise without one (bnb_quantizer.py, "
    "validate_environment: `No GPU found`), also where bitsandbytes could compute on the CPU; "
    f"here bitsandbytes is {'' if HAS else 'not '}installed, and there is {'a' if CUDA else 'no'} GPU"
)
GPU = pytest.mark.skipif(not (CUDA and HAS), reason=REASON)
SCHEMES = [None, pytest.param("nf4", marks=GPU), pytest.param("int8", marks=GPU)]


@pytest.mark.skipif(CUDA, reason="there is a GPU")
@pytest.mark.parametrize("kind", ["BnB4BitDiffusersQuantizer", "BnB8BitDiffusersQuantizer"])
def test_the_reason_for_which_there_is_no_quantising_without_a_gpu(kind: str) -> None:
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    with pytest.raises(RuntimeError, match="No GPU found"):
        getattr(bnb_quantizer, kind).validate_environment(None)


@pytest.fixture(params=SCHEMES, ids=str)
def family(request: pytest.FixtureRequest, sd1_folder: Path, tmp_path: Path) -> Any:
    """The tiny base, stored so."""
    compute = torch.float32 if request.param is None else torch.bfloat16
    options = Options(quantise=request.param, compute=compute)
    made = base.load(str(sd1_folder), None, (), NEEDS, 0, Hashes(tmp_path / "hashes"), options)
    made.to(torch.device("cuda" if CUDA else "cpu"))
    for name in ("unet", "text_encoder"):
        linear = [m for m in made.modules()[name].modules() if isinstance(m, nn.Linear)]
        stored = [m for m in linear if not m.weight.is_floating_point()]
        assert len(linear) > 10 and (not stored if request.param is None else len(stored) > 8), name
    return made


def frozen(family: Any) -> dict[str, Tensor]:
    """The base's tensors, adapters left out."""
    return {
        f"{part}.{key}": tensor.detach().clone()
        for part, network in family.modules().items()
        for key, tensor in network.named_parameters()
        if ".lora_" not in key
    }


def train(family: Any, method: Any, condition: Tensor | None = None, steps: int = 60) -> list[float]:
    """The losses of some steps on one batch; only what is trained has a gradient."""
    task = Task(family, [method], Objective.from_scheduler_config(family.scheduler_config)).to(family.device)
    draw = torch.Generator().manual_seed(0)
    prompts = ["a red <toy>", "a toy"]
    for old, new in method.replacements():
        prompts = [prompt.replace(old, new) for prompt in prompts]
    x_t, noise = (torch.randn(2, 4, 8, 8, generator=draw).to(family.device) for _ in range(2))
    t = torch.tensor([300, 700], device=family.device)
    tokens = family.tokenize(prompts).to(family.device)
    optimiser = torch.optim.AdamW(method.trained().values(), lr=3e-3)
    batch: Any = None  # neither a LoRA nor a word looks at it
    losses = []
    for _ in range(steps):
        with torch.autocast(family.device.type, torch.bfloat16, enabled=family.options.quantise is not None):
            cond = family.condition(task.encode(tokens))
            if condition is None:
                output = method.predict(family, x_t, t, cond, batch)
            else:
                control = family.control(method.branch, x_t, t, cond, condition.to(family.device))
                output = family.predict(family.denoiser, x_t, t, cond, control)
        loss = (output.float() - noise).square().mean()
        optimiser.zero_grad()
        loss.backward()
        trained = {id(parameter) for parameter in method.trained().values()}
        others = [p for network in family.modules().values() for p in network.parameters()]
        assert all(p.grad is None for p in others if id(p) not in trained) and len(others) > 100
        assert any(p.grad is not None and p.grad.any() for p in method.trained().values())
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def unchanged(family: Any, before: dict[str, Tensor]) -> bool:
    after = {key.replace(".base_layer", ""): tensor for key, tensor in frozen(family).items()}
    return len(before) > 100 and all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_a_lora_learns(family: Any, models: ModuleType, tmp_path: Path) -> None:
    before = frozen(family)
    method = models.method_of("lora", family, rank=8)
    assert {p.dtype for p in method.trained().values()} == {torch.float32}
    losses = train(family, method)
    assert losses[-1] < 0.9 * losses[0] and unchanged(family, before)
    (path,) = method.export(family, tmp_path, models.card_of(torch.float32, method))
    tensors, _ = load(path)
    ups = [tensor for key, tensor in tensors.items() if key.endswith("lora_up.weight")]
    assert len(ups) > 20 and all(tensor.isfinite().all() and tensor.any() for tensor in ups)


def test_a_word_learns(family: Any, models: ModuleType) -> None:
    before = frozen(family)
    method = models.method_of("textual_inversion", family)
    start = {name: tensor.clone() for name, tensor in method.tensors().items()}
    losses = train(family, method)
    assert losses[-1] < losses[0] and unchanged(family, before)
    assert all(not torch.equal(tensor, start[name]) for name, tensor in method.tensors().items())


def test_a_controlnet_learns(family: Any, models: ModuleType, sd1_folder: Path) -> None:
    """Its clone begins with the base's numbers as its file has them, not as they are stored."""
    before = frozen(family)
    method = models.method_of("controlnet", family)
    weights, _ = load(sd1_folder / "unet" / "diffusion_pytorch_model.safetensors")
    state = method.branch.state_dict()
    shared = [key for key in state if not key.startswith("controlnet_")]
    assert len(shared) > 60
    assert all(torch.equal(state[key].cpu(), weights[key].float()) for key in shared)
    losses = train(family, method, torch.rand(2, 3, 64, 64), steps=20)
    assert losses[-1] < 0.9 * losses[0] and unchanged(family, before)
