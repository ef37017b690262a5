"""A base that is stored quantised: adapters and words on it learn, and nothing else moves.

Each check of training runs on a base as it is, too, so that it is known to hold there.
"""

from __future__ import annotations

import copy
import math
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tuner import base, components, quantised
from tuner.data.cache import Hashes
from tuner.errors import UserError
from tuner.export.files import load
from tuner.family import Options
from tuner.objective import Objective
from tuner.task import Task

functional = pytest.importorskip("bitsandbytes").functional
NEEDS = ("unet", "vae", "text_encoder")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SCHEMES: tuple[Any, ...] = ("nf4", "int8")
NETWORKS = [("sd1", "unet"), ("sd1", "text_encoder"), ("sdxl", "unet"), ("sdxl", "text_encoder_2")]
COUNTS = {"sd1.unet": 40, "sd1.text_encoder": 10, "sdxl.unet": 40, "sdxl.text_encoder_2": 10}


def place_of(folders: dict[str, Path], family: str, name: str) -> Path:
    return folders[family] / name


def weights(place: Path) -> dict[str, Tensor]:
    """A component's tensors, by the names in its file."""
    (path,) = place.glob("*.safetensors")
    return load_file(path)


def stored(network: nn.Module) -> dict[str, Any]:
    return {path: layer for path, layer in network.named_modules() if quantised.is_quantised(layer)}


@pytest.mark.skipif(CUDA, reason="there is a GPU")
@pytest.mark.parametrize("kind", ["BnB4BitDiffusersQuantizer", "BnB8BitDiffusersQuantizer"])
def test_the_reason_for_an_own_way(kind: str) -> None:
    """The library's way refuses a machine without a GPU, on which bitsandbytes computes all the same."""
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    with pytest.raises(RuntimeError, match="No GPU found"):
        getattr(bnb_quantizer, kind).validate_environment(None)


@pytest.mark.parametrize("family, name", NETWORKS)
def test_the_layers_are_those_of_the_libraries(folders: dict[str, Path], family: str, name: str) -> None:
    """And what is stored is, bitwise, what bitsandbytes makes of the file's numbers; the rest is the
    file's."""
    from diffusers import BitsAndBytesConfig
    from diffusers.quantizers.bitsandbytes.utils import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    place = place_of(folders, family, name)
    theirs: Any = components.fresh(name, place, 0)
    keeps = [] if name == "unet" else get_keys_to_not_convert(theirs)
    replace_with_bnb_linear(theirs, keeps, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    wanted = {path for path, layer in theirs.named_modules() if type(layer).__name__ == "Linear8bitLt"}
    made = components.load_quantised(name, place, "nf4", torch.float32)
    found = stored(made)
    assert found.keys() == wanted and len(found) >= COUNTS[f"{family}.{name}"] // 2
    plain = components.load(name, place)
    own = plain.state_dict()
    for path, layer in found.items():
        packed, state = functional.quantize_4bit(
            own[f"{path}.weight"].to(DEVICE), compress_statistics=True, quant_type="nf4"
        )
        # By whole blocks: for rows of other lengths the library's CPU kernel takes wrong scales.
        shape, state.shape = state.shape, torch.Size((math.prod(state.shape) // 64, 64))
        right = functional.dequantize_4bit(packed, state).view(shape)
        assert torch.equal(layer.weight.data, packed) and torch.equal(quantised.dense(layer.weight), right)
        off = float((right.cpu() - own[f"{path}.weight"]).norm() / own[f"{path}.weight"].norm())
        assert 0.03 < off < 0.15
        x = torch.randn(3, layer.in_features, device=DEVICE)
        wanted_product = torch.nn.functional.linear(x, right, layer.bias)
        torch.testing.assert_close(layer(x), wanted_product, rtol=1e-4, atol=1e-4)
    rest = {
        key: t
        for key, t in made.state_dict().items()
        if key.rpartition(".weight")[0] not in found and ".weight." not in key
    }
    assert len(rest) > 20 and all(torch.equal(tensor.cpu(), own[key]) for key, tensor in rest.items())
    assert not any(p.requires_grad for p in made.parameters()) and not made.training


def test_int8_is_what_bitsandbytes_makes(sd1_folder: Path) -> None:
    made = components.load_quantised("unet", sd1_folder / "unet", "int8", torch.float32)
    own = weights(sd1_folder / "unet")
    assert len(stored(made)) > 30
    for path, layer in stored(made).items():
        bytes_, scales, _ = functional.int8_vectorwise_quant(own[f"{path}.weight"].to(DEVICE, torch.float16))
        assert torch.equal(layer.weight.data, bytes_) and torch.equal(layer.state.CB, bytes_)
        assert torch.equal(layer.state.SCB, scales)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_bytes_are_the_closed_form(sd1_folder: Path, scheme: Any, compute: torch.dtype) -> None:
    """And in all less than half of a bfloat16 base's, of layers with so few weights."""
    made = components.load_quantised("unet", sd1_folder / "unet", scheme, compute)
    held: dict[int, int] = {}
    closed = others = 0
    for layer in stored(made).values():
        about = layer.weight.quant_state if scheme == "nf4" else None
        parts = [layer.weight.data]
        if about is None:
            parts += [layer.state.CB, layer.state.SCB]
        else:
            parts += [about.absmax, about.code, about.offset, about.state2.absmax, about.state2.code]
        held |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in parts}
        closed += quantised.nbytes(layer.out_features, layer.in_features, scheme)
        others += 2 * layer.out_features * layer.in_features
    assert sum(held.values()) == closed
    assert closed < (0.45 if scheme == "nf4" else 0.6) * others


@pytest.mark.parametrize("name", ["unet", "text_encoder"])
def test_loading_holds_a_tensor_of_the_file_at_a_time(
    sd1_folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: set[int] = set()
    most, read = 0, 0
    real = components.safe_open

    class Spy:
        """A file whose tensors are counted until they are gone."""

        def __init__(self, *given: Any, **named: Any) -> None:
            self.file = real(*given, **named)

        def __enter__(self) -> Any:
            self.file = self.file.__enter__()
            return self

        def __exit__(self, *about: Any) -> None:
            self.file.__exit__(*about)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_tensor(self, key: str) -> Tensor:
            nonlocal most, read
            made: Tensor = self.file.get_tensor(key).clone()
            memory = made.untyped_storage()
            alive.add(memory._cdata)
            weakref.finalize(memory, alive.discard, memory._cdata)
            most, read = max(most, len(alive)), read + 1
            return made

    monkeypatch.setattr(components, "safe_open", Spy)
    made = components.load_quantised(name, sd1_folder / name, "nf4", torch.float32)
    assert read == len(weights(sd1_folder / name)) > 30
    assert most <= 2 and not alive, "the next is read before the one before is let go of"
    assert not any(tensor.is_meta for tensor in (*made.parameters(), *made.buffers()))


@pytest.mark.parametrize("name", ["unet", "text_encoder"])
def test_files_that_do_not_fit(sd1_folder: Path, tmp_path: Path, name: str) -> None:
    place = tmp_path / "base" / name
    shutil.copytree(sd1_folder / name, place)
    (path,) = place.glob("*.safetensors")
    tensors = load_file(path)
    key = next(key for key in sorted(tensors) if key.endswith("q.weight") or key.endswith("q_proj.weight"))
    save_file({n: t for n, t in tensors.items() if n != key}, path)
    told = key.removeprefix("text_model.")
    with pytest.raises(UserError, match=rf"component {name}: {told} is missing in its weights \(1 tensors\)"):
        components.load_quantised(name, place, "nf4", torch.float32)
    save_file({**tensors, key: torch.zeros(3, 2)}, path)
    with pytest.raises(UserError, match=r"is \[3, 2\], expected \["):
        components.load_quantised(name, place, "nf4", torch.float32)
    path.write_bytes(b"GGUF")
    with pytest.raises(UserError, match="GGUF"):
        components.load_quantised(name, place, "nf4", torch.float32)
    path.unlink()
    with pytest.raises(UserError, match="download it again"):
        components.load_quantised(name, place, "nf4", torch.float32)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_gradients_pass_after_a_call_without(sd1_folder: Path, scheme: Any, compute: torch.dtype) -> None:
    """bitsandbytes repacks 4-bit weights at such a call on some CPUs, and passes no gradient back then."""
    network: Any = components.load_quantised("text_encoder", sd1_folder / "text_encoder", scheme, compute)
    layer = next(iter(stored(network).values()))
    x = torch.randn(2, 5, layer.in_features, device=DEVICE, dtype=compute)
    with torch.no_grad():
        before = layer(x)
    quantised.move(network, DEVICE)
    x.requires_grad_()
    after = layer(x)
    after.float().sum().backward()
    tight = {"rtol": 0.02, "atol": 0.02 * float(before.float().abs().max())}
    torch.testing.assert_close(after, before, **tight)
    assert x.grad is not None
    if scheme == "nf4":
        whole = quantised.dense(layer.weight)
    else:
        whole = layer.weight.data.to(compute) * (layer.state.SCB / 127).to(compute)[:, None]
        assert (
            layer.state.CB.data_ptr() == layer.weight.data_ptr()
            and layer.state.SCB.device == layer.weight.device
        )
    torch.testing.assert_close(
        x.grad[0, 0].float(), whole.float().sum(0), rtol=0.05, atol=0.02 * float(whole.abs().sum(0).max())
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_exact_products(sd1_folder: Path, scheme: Any) -> None:
    """Without rounding the input to 8 bits or to bfloat16; copies that are made meanwhile keep it."""
    network: Any = components.load_quantised("unet", sd1_folder / "unet", scheme, torch.bfloat16)
    path, layer = next(iter(stored(network).items()))
    own = {}
    x = torch.randn(4, layer.in_features, device=DEVICE)
    before = layer(x)
    with quantised.exact([network, network]):
        copied = copy.deepcopy(network).get_submodule(path)
        for name, one in (("layer", layer), ("copy", copied)):
            own[name] = one(x)
        if scheme == "nf4":
            whole = quantised.dense(layer.weight, torch.float32)
        else:
            whole = layer.weight.data.float() * (layer.state.SCB / 127)[:, None]
        right = torch.nn.functional.linear(x, whole, None if layer.bias is None else layer.bias.float())
        assert torch.equal(own["layer"], own["copy"])
        torch.testing.assert_close(own["layer"], right, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, right, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x), before, rtol=0, atol=0)


@pytest.fixture(params=[None, *SCHEMES], ids=str)
def family(request: pytest.FixtureRequest, sd1_folder: Path, tmp_path: Path) -> Any:
    """The tiny base, stored so."""
    return made_family(sd1_folder, tmp_path, request.param)


def made_family(folder: Path, tmp_path: Path, scheme: Any) -> Any:
    compute = torch.float32 if scheme is None else torch.bfloat16
    options = Options(quantise=scheme, compute=compute)
    made = base.load(str(folder), None, (), NEEDS, 0, Hashes(tmp_path / "hashes"), options)
    made.to(DEVICE)
    for name in ("unet", "text_encoder"):
        linear = [m for m in made.modules()[name].modules() if isinstance(m, nn.Linear)]
        assert len(linear) > 10 and len(stored(made.modules()[name])) == (
            0 if scheme is None else len(linear)
        ), name
    return made


def frozen(family: Any) -> dict[str, Tensor]:
    """The base's tensors, adapters left out."""
    return {
        f"{part}.{key}": tensor.detach().clone()
        for part, network in family.modules().items()
        for key, tensor in network.named_parameters()
        if ".lora_" not in key
    }


def train(family: Any, method: Any, condition: Tensor | None = None, steps: int = 24) -> list[float]:
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


@pytest.fixture(scope="module")
def losses_of() -> Iterator[dict[tuple[str, str], float]]:
    """First losses by method and scheme."""
    kept: dict[tuple[str, str], float] = {}
    yield kept


def near(kept: dict[tuple[str, str], float], method: str, family: Any, loss: float) -> None:
    """A quantised base's first loss is near that of the base as it is, but not the same."""
    scheme = family.options.quantise
    kept[method, str(scheme)] = loss
    plain = kept.get((method, "None"))
    assert plain is not None, "the fixture's first base is the plain one"
    assert scheme is None or 0 < abs(loss - plain) < 0.05 * plain


def test_a_lora_learns(
    family: Any, models: ModuleType, tmp_path: Path, sd1_folder: Path, losses_of: dict[tuple[str, str], float]
) -> None:
    before = frozen(family)
    method = models.method_of("lora", family, rank=8)
    assert {p.dtype for p in method.trained().values()} == {torch.float32}
    losses = train(family, method)
    near(losses_of, "lora", family, losses[0])
    assert losses[-1] < 0.9 * losses[0] and unchanged(family, before)
    (path,) = method.export(family, tmp_path, models.card_of(torch.float32, method))
    tensors, _ = load(path)
    ups = [tensor for key, tensor in tensors.items() if key.endswith("lora_up.weight")]
    assert len(ups) > 20 and all(tensor.isfinite().all() and tensor.any() for tensor in ups)
    plain = models.method_of("lora", made_family(sd1_folder, tmp_path, None), rank=8)
    (other,) = plain.export(family, tmp_path / "plain", models.card_of(torch.float32, plain))
    assert {n: t.shape for n, t in load(other)[0].items()} == {n: t.shape for n, t in tensors.items()}


def test_a_word_learns(family: Any, models: ModuleType, losses_of: dict[tuple[str, str], float]) -> None:
    before = frozen(family)
    method = models.method_of("textual_inversion", family)
    start = {name: tensor.clone() for name, tensor in method.tensors().items()}
    losses = train(family, method)
    near(losses_of, "textual_inversion", family, losses[0])
    assert losses[-1] < losses[0] and unchanged(family, before)
    assert all(not torch.equal(tensor, start[name]) for name, tensor in method.tensors().items())


def test_a_controlnet_learns(
    family: Any, models: ModuleType, sd1_folder: Path, losses_of: dict[tuple[str, str], float]
) -> None:
    """Its clone begins with the base's numbers as its file has them, not as they are stored."""
    before = frozen(family)
    method = models.method_of("controlnet", family)
    weights, _ = load(sd1_folder / "unet" / "diffusion_pytorch_model.safetensors")
    state = method.branch.state_dict()
    shared = [key for key in state if not key.startswith("controlnet_")]
    assert len(shared) > 60
    assert all(torch.equal(state[key].cpu(), weights[key].float()) for key in shared)
    losses = train(family, method, torch.rand(2, 3, 64, 64), steps=12)
    near(losses_of, "controlnet", family, losses[0])
    assert losses[-1] < 0.9 * losses[0] and unchanged(family, before)
