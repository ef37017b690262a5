"""ControlNet of low rank: factors beside the base's weights, and the small file that holds them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pydantic
import pytest
import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

from tuner import verify
from tuner.adapters import factors
from tuner.adapters.factors import Factored
from tuner.errors import UserError
from tuner.export import cldm, control_lora, files
from tuner.method import public_config
from tuner.methods.controlnet import Config, ControlNet
from tuner.verify.scene import Scene, exact

Make = Callable[..., ControlNet]
BASES = ("sd1", "sd2", "sdxl", "sd1_inpaint")
PLACE = "control_lora/control_lora_{version}_case.safetensors"


@pytest.fixture
def make(make_method: Callable[..., Any]) -> Make:
    """The method of rank 4, unless told otherwise, on a fresh tiny base, which it keeps as `family`."""
    return partial(make_method, "controlnet", rank=4)


@pytest.fixture(scope="module")
def deep(models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bases of two layers a level, as the published ones, which is what diffusers takes every base for."""
    root, plain = tmp_path_factory.mktemp("deep"), models.unet
    made = {"sd1": models.tiny_sd1(root / "sd1", layers=2)}
    try:
        models.unet = lambda width, **more: plain(width, **{**more, "layers_per_block": 2})
        made["sdxl"] = models.tiny_sdxl(root / "sdxl")
    finally:
        models.unet = plain
    return made


def export(method: Any, folder: Path, models: ModuleType, dtype: torch.dtype = torch.float32) -> list[Path]:
    written: list[Path] = method.export(method.family, folder, models.card_of(dtype, method))
    return written


def proved(method: Any, written: list[Path], models: ModuleType, dtype: torch.dtype) -> list[str]:
    return verify.check(method.family, [method], written, models.card_of(dtype, method))


def rebuilt(small: Path, unet: nn.Module, config: dict[str, Any]) -> dict[str, Tensor]:
    """A complete ControlNet of a file of factors and a base, as ComfyUI makes it, in the original's names.

    First all of the base's tensors are put in, then all of the file's; factors are added when they are used.
    """
    tensors, _ = files.load(small)
    assert tensors.pop("lora_controlnet").numel() == 0
    made = cldm.rename(
        {k: v for k, v in unet.state_dict().items() if k.startswith(DOWN)}, cldm.unet_names(config)
    )
    for key, tensor in tensors.items():
        if not key.endswith((".up", ".down")):
            made[key] = tensor.float()
    for key in [key for key in tensors if key.endswith(".up")]:
        up, down = tensors[key].double(), tensors[key[:-2] + "down"].double()
        weight = made[key[:-2] + "weight"]
        change = torch.einsum("or,ri->oi", up.reshape(len(up), -1), down.reshape(len(down), -1))
        made[key[:-2] + "weight"] = weight + change.reshape(weight.shape).float()
    return made


DOWN = ("conv_in.", "time_embedding.", "add_embedding.", "down_blocks.", "mid_block.")


@pytest.mark.parametrize(
    "config, message",
    [
        ({"rank": 4, "arch": "lite"}, "rank: found together with arch: lite, whose weights are drawn"),
        ({"rank": 0}, "greater than or equal to 1"),
    ],
)
def test_impossible_configurations(config: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=re.escape(message)):
        Config(**config)


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Linear(6, 9),
        nn.Linear(6, 9, bias=False),
        nn.Conv2d(6, 9, 1),
        nn.Conv2d(6, 9, 3, padding=1),
        nn.Conv2d(6, 9, 3, stride=2, padding=1),
    ]


@pytest.mark.parametrize("layer", layers(), ids=lambda layer: re.sub(r"\W+", "-", str(layer)))
@pytest.mark.parametrize("kept", [True, False])
def test_a_factored_layer_is_the_layer_and_its_change(layer: Any, kept: bool) -> None:
    made = Factored(layer, layer if kept else None, 3)
    assert [name for name, _ in made.named_parameters()] == ["down", "up"] == list(made.state_dict())
    x = torch.randn(2, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 6, 8, 8)
    assert torch.equal(made(x), layer(x))
    with torch.no_grad():
        made.up.normal_()
    changed = type(layer).__new__(type(layer))
    changed.__dict__.update(layer.__dict__ | {"_parameters": dict(layer._parameters)})
    change = control_lora.change(made.up.detach(), made.down.detach(), layer.weight.detach())
    assert torch.linalg.matrix_rank(change.flatten(1)) == 3
    changed.weight = nn.Parameter(layer.weight.detach() + change)
    torch.testing.assert_close(made(x), changed(x), rtol=1e-4, atol=1e-5)
    # A weight in half precision is used where autocast is off, too, and follows its layer.
    if kept:
        layer.bfloat16()
        assert made.frozen()[0].dtype == torch.bfloat16 and made(x).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert made(x).dtype == torch.bfloat16
        layer.float()


@pytest.mark.parametrize("base", BASES)
def test_what_is_trained(base: str, make: Make, folders: dict[str, Path]) -> None:
    method, whole = make(base), make(base, rank=None)
    family: Any = method.family  # type: ignore[attr-defined]
    unet = family.denoiser.state_dict(keep_vars=True)
    clone = {f"branch.{name}": p for name, p in whole.branch.named_parameters()}
    names = set(method.trained())
    assert names == {name for name, _ in method.named_parameters()} == set(method.tensors())
    pairs = {name.removesuffix(".up") for name in names if name.endswith(".up")}
    assert {f"{path}.down" for path in pairs} == {name for name in names if name.endswith(".down")}
    # Everything of the clone is either trained whole, or the base's own beside factors.
    shared = {f"branch.{name}" for name in factors.frozen_names(method.branch)}
    assert shared == {n for n in clone if n.rpartition(".")[0] in pairs}
    assert {n for n in names if not n.endswith((".up", ".down"))} == clone.keys() - shared
    rest = clone.keys() - shared
    first = {"branch.conv_in.weight", "branch.conv_in.bias"} if base == "sd1_inpaint" else set()
    own = {n for n in rest if n.startswith("branch.controlnet_")}
    norms = {n for n in rest if clone[n].ndim == 1 and "norm" in n.rpartition(".")[0].rpartition(".")[2]}
    assert rest == own | norms | first and len(own) > 20 and len(norms) > 20 and len(pairs) > 30
    for path, layer in factors.factored(method.branch):
        weight, bias = layer.frozen()
        assert weight is unet[f"{path}.weight"] and bias is unet.get(f"{path}.bias")
        assert not weight.requires_grad and not layer.up.any() and layer.down.any()
        assert len(layer.down) == min(4, factors.full_rank(nn.Linear(*reversed(weight.flatten(1).shape))))
    assert sum(p.numel() for p in method.parameters()) < 0.8 * sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("base", BASES)
def test_at_the_start_the_branch_is_the_clone_bitwise(base: str, make: Make) -> None:
    method, whole = (models_woken(make(base, rank=rank)) for rank in (4, None))
    family: Any = method.family
    with exact(family, [method, whole]):
        scene = Scene.of(family)
        cond = scene.cond(scene.text(method))
        found, wanted = (
            family.control(one.branch, scene.x_t, scene.t, cond, scene.picture) for one in (method, whole)
        )
    pairs = list(zip([*found.down, found.middle], [*wanted.down, wanted.middle], strict=True))
    assert len(pairs) >= 5 and all(torch.equal(a, b) and bool(a.any()) for a, b in pairs)


def models_woken(method: Any) -> Any:
    """The joints to the base are open, so that the branch is heard."""
    with torch.no_grad():
        for layer in (*method.branch.controlnet_down_blocks, method.branch.controlnet_mid_block):
            layer.weight.fill_(0.01)
    return method


def test_the_factors_are_a_function_of_the_seed(make: Make) -> None:
    one, again, other = make(), make(), make(seed=4)
    assert all(torch.equal(t, again.trained()[name]) for name, t in one.trained().items())
    changed = {n for n, t in one.trained().items() if not torch.equal(t, other.trained()[n])}
    assert len(changed) > 30 and {n for n in one.trained() if n.endswith(".down")} <= changed
    full = make(rank=None)
    names = [n for n in full.trained() if n in one.trained()]  # drawn before the factors
    assert len(names) > 40 and all(torch.equal(full.trained()[n], one.trained()[n]) for n in names)


PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)
PROVED = [  # each base in one precision, and each precision on some base, also by default
    pytest.param(base, dtype, marks=[] if b % 3 == p else pytest.mark.slow)
    for b, base in enumerate(BASES)
    for p, dtype in enumerate(PRECISIONS)
]


@pytest.mark.parametrize("base, dtype", PROVED)
def test_the_files_are_proved(
    base: str, dtype: torch.dtype, make: Make, tmp_path: Path, models: ModuleType
) -> None:
    method: Any = models.move(make(base))
    written = export(method, tmp_path, models, dtype)
    version = method.family.version
    names = ["diffusers/diffusion_pytorch_model.safetensors", f"control_{version}_case.safetensors"]
    assert [p.relative_to(tmp_path).as_posix() for p in written] == [*names, PLACE.format(version=version)]
    lines = proved(method, written, models, dtype)
    assert len(lines) == 3 and "(rank 4), with which the base is the folder's" in lines[2]
    assert "diffusers reads it on bases of two layers a level" in lines[2]
    tensors, told = files.load(written[2])
    assert told["tuner.rank"] == "4"
    key = next(key for key in tensors if key.endswith("attn1.to_q.up"))
    tensors[key] *= 2
    files.save(written[2], tensors, {k: v for k, v in told.items() if "hash" not in k})
    with pytest.raises(verify.VerifyError, match=re.escape(f"{key} is not what was trained")):
        proved(method, written, models, dtype)


@pytest.mark.parametrize("base", BASES)
def test_the_small_file_on_the_base_is_the_branch(
    base: str, make: Make, tmp_path: Path, models: ModuleType, folders: dict[str, Path]
) -> None:
    """By code of its own: what ComfyUI computes, against the trained branch and the complete file."""
    method: Any = models.move(make(base))
    folder, single, small = export(method, tmp_path, models)
    config = public_config(method.branch)
    unet = models.family_of(folders[base], "controlnet").denoiser
    made = rebuilt(small, unet, dict(unet.config))
    complete = {k.removeprefix(cldm.PREFIX): v for k, v in files.load(single)[0].items()}
    assert made.keys() == complete.keys() and len(made) > 100
    for key, tensor in complete.items():
        torch.testing.assert_close(made[key], tensor, rtol=1e-5, atol=1e-6)
    net = ControlNetModel.from_config(method.branch.config)
    net.load_state_dict(cldm.from_cldm(made, config))
    with exact(method.family, [method]):
        scene = Scene.of(method.family)
        cond = scene.cond(scene.text(method))
        a, b = (
            method.family.control(n, scene.x_t, scene.t, cond, scene.picture) for n in (net, method.branch)
        )
    for has, wants in zip([*a.down, a.middle], [*b.down, b.middle], strict=True):
        assert wants.any()
        torch.testing.assert_close(has, wants, rtol=1e-3, atol=1e-4 * float(wants.abs().max()))
    assert small.stat().st_size < folder.stat().st_size


@pytest.mark.parametrize("base", ["sd1", "sdxl"])
def test_diffusers_reads_the_small_file(
    base: str, deep: dict[str, Path], tmp_path: Path, models: ModuleType
) -> None:
    """Its own loader, on a clone of the base: the same residuals, and every tensor is used."""
    family = models.family_of(deep[base], "controlnet")
    method: Any = models.move(models.method_of("controlnet", family, rank=4))
    object.__setattr__(method, "family", family)
    written = export(method, tmp_path, models)
    small = written[2]
    net = ControlNetModel.from_unet(models.family_of(deep[base], "controlnet").denoiser)
    with warnings.catch_warnings(action="ignore"):
        net.load_lora_adapter(str(small.parent), weight_name=small.name, prefix=None, local_files_only=True)
    with exact(family, [method]):
        scene = Scene.of(family)
        cond = scene.cond(scene.text(method))
        a, b = (family.control(n, scene.x_t, scene.t, cond, scene.picture) for n in (net, method.branch))
    for has, wants in zip([*a.down, a.middle], [*b.down, b.middle], strict=True):
        torch.testing.assert_close(has, wants, rtol=1e-3, atol=1e-4 * float(wants.abs().max()))
    lines = proved(method, written, models, torch.float32)
    assert "read by diffusers, whose 7 residuals are right" in lines[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_held_in_half_precision(
    dtype: torch.dtype, make: Make, tmp_path: Path, models: ModuleType
) -> None:
    """The files are made of the weights as the base's file has them."""
    method: Any = models.move(make())
    wanted = {name: tensor.clone() for name, tensor in method.whole(method.family).items()}
    method.family.cast(dtype, method.parameters())
    held = {layer.frozen()[0].dtype for _, layer in factors.factored(method.branch)}
    assert held == {dtype} and {p.dtype for p in method.parameters()} == {torch.float32}
    written = export(method, tmp_path, models)
    tensors, _ = files.load(written[0])
    assert tensors.keys() == wanted.keys() and all(torch.equal(tensors[k], t) for k, t in wanted.items())
    assert len(proved(method, written, models, torch.float32)) == 3


def test_weights_that_no_layer_shares_are_copied(make: Make) -> None:
    method: Any = make()
    whole: Any = make(rank=None).branch
    paths = factors.counterparts(whole, method.family.denoiser)
    factors.put_in(whole, paths, dict.fromkeys(paths, 2), torch.bfloat16)
    found = list(factors.factored(whole))
    unet = dict(method.family.denoiser.named_parameters())
    assert len(found) == len(paths) > 30
    for path, layer in found:
        weight, _ = layer.frozen()
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, unet[f"{path}.weight"].bfloat16())
    assert not [name for name in whole.state_dict() if name.endswith(("to_q.weight", "conv1.weight"))]


@pytest.mark.parametrize("base", ["sd1", "sd2", "sdxl"])
def test_a_small_file_is_a_start(base: str, make: Make, tmp_path: Path, models: ModuleType) -> None:
    old: Any = models.move(make(base))
    small = export(old, tmp_path, models)[2]
    again = make(base, seed=9, start=str(small))
    assert again.trained().keys() == old.trained().keys()
    assert all(torch.equal(t, old.trained()[name]) for name, t in again.trained().items())
    assert [path.name for path in again.depends().values()] == [small.name]
    whole = make(base, seed=9, rank=None, start=str(small))  # trained further without a rank
    wanted = old.whole(old.family)
    assert whole.branch.state_dict().keys() == wanted.keys()
    for name, tensor in whole.branch.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-7)


def test_starts_that_do_not_fit(make: Make, tmp_path: Path, models: ModuleType) -> None:
    folder, single, small = export(make(), tmp_path, models)
    with pytest.raises(UserError, match="found rank 4, expected the recipe's, 8"):
        make(rank=8, start=str(small))
    for complete in (folder.parent, single):
        with pytest.raises(UserError, match="found a complete ControlNet, expected a Control-LoRA file"):
            make(start=str(complete))
    with pytest.raises(UserError, match="no Control-LoRA of this base|no ControlNet of this base"):
        make("sdxl", start=str(small))
    tensors, _ = files.load(small)

    def changed(message: str, rank: int | None = 4, **new: Tensor | None) -> None:
        kept = {k: v for k, v in {**tensors, **new}.items() if v is not None}
        other = files.save(tmp_path / "other.safetensors", kept, {})
        with pytest.raises(UserError, match=re.escape(message)):
            make(start=str(other), rank=rank)

    query = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    changed(f"{name_of(query)}.up is missing", **{f"{query}.up": None})
    changed(f"{name_of(query)}.down: there is no up for it", None, **{f"{query}.up": None})
    changed(f"{name_of(query)}.up: there is no down for it", None, **{f"{query}.down": None})
    changed("factors [64, 3] and [4, 64] for a weight [64, 64]", None, **{f"{query}.up": torch.ones(64, 3)})
    changed("controlnet_mid_block.bias is missing", None, **{"middle_block_out.0.bias": None})
    changed("output_blocks.0.x", None, **{"output_blocks.0.x": torch.ones(1)})
    bias = "input_blocks.1.0.in_layers.2.bias"
    changed("conv1.bias is not the base's; biases beside factors are not", **{bias: tensors[bias] + 1})
    none = {key: None for key in tensors if key.endswith((".up", ".down"))}
    changed("there are no factors in it", **none)


def name_of(place: str) -> str:
    return place.replace("input_blocks.1.1", "down_blocks.0.attentions.0")


def test_the_decoder_may_be_unlocked_beside_it(make: Make, tmp_path: Path, models: ModuleType) -> None:
    method: Any = models.move(make(unlock_decoder_at=1))
    written = export(method, tmp_path, models)
    assert len(written) == 4 and len(proved(method, written, models, torch.float32)) == 4
