"""The memory plan: what is counted is what closed forms say, and what a real step takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tuner import components, memory, quantised, recipe, rounding
from tuner.blocks import Stage
from tuner.errors import UserError
from tuner.memory import live, planning, state, step
from tuner.memory.rules import Rules
from tuner.recipe import Recipe
from tuner.training import Optimiser

ROOT = Path(__file__).resolve().parents[2]
TEXT = """\
base: {base}
method: {method}
data: {{source: none, resolution: {side}}}
train: {{steps: 2, batch_size: {batch}, learning_rate: 1e-4, precision: fp32, {more}}}
output: none
"""


@pytest.fixture
def made(tmp_path: Path, sd1_folder: Path) -> Any:
    """A recipe on a tiny base."""

    def build(
        method: str = "lora", side: int = 64, batch: int = 4, more: str = "", base: str | None = None
    ) -> Recipe:
        path = tmp_path / "r.yaml"
        base = str(sd1_folder) if base is None else base
        path.write_text(TEXT.format(base=base, method=method, side=side, batch=batch, more=more))
        return recipe.load(path)

    return build


@pytest.mark.parametrize(
    "text, size",
    [("12GiB", 12 * 2**30), ("12GB", 12 * 10**9), ("8000MiB", 8000 * 2**20), (" 1.5 gib ", 3 * 2**29)],
)
def test_sizes(text: str, size: int) -> None:
    assert memory.parse(text) == size


@pytest.mark.parametrize(
    "text, told",
    [("12", "no unit"), ("12G", "GiB or GB"), ("much", "a number and a unit"), ("0GiB", "more than nothing")],
)
def test_no_sizes(text: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        memory.parse(text)


def test_what_a_small_network_saves() -> None:
    """Two linear layers and a relu: input, the relu's result (its own backward's and the second's input)."""
    first, second = nn.Linear(8, 16, device="meta"), nn.Linear(16, 4, device="meta")
    counted = live.Live([*first.parameters(), *second.parameters()])
    with counted:
        x = torch.empty(32, 8, device="meta")
        y = second(F.relu(first(x)))
        assert counted.now == 4 * 32 * (8 + 16 + 4)  # what went into the relu is gone
        assert counted.peak == 4 * 32 * (8 + 16 + 16 + 4) - 4 * 32 * 4
        del x
        assert counted.now == 4 * 32 * (8 + 16 + 4)  # saved for the first layer's weights
        y.sum().backward()
        del y
    grads = [p.grad for p in (*first.parameters(), *second.parameters()) if p.grad is not None]
    assert len(grads) == 4
    assert counted.now == live.nbytes(grads) == 4 * (8 * 16 + 16 + 16 * 4 + 4)


@pytest.mark.parametrize("device, dtype", [("cpu", torch.bfloat16), ("cuda", torch.float32)])
def test_types_are_autocast_s(device: str, dtype: torch.dtype) -> None:
    """A linear layer computes in bfloat16 on both, group norm in float32 on CUDA alone."""
    with Rules(device, torch.bfloat16):
        assert F.linear(*(torch.empty(4, 4, device="meta") for _ in range(2))).dtype == torch.bfloat16
        half = torch.empty(2, 4, 3, 3, device="meta", dtype=torch.bfloat16)
        assert F.group_norm(half, 2).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(*(torch.zeros(4, 4) for _ in range(2))).dtype == torch.bfloat16
        assert F.group_norm(torch.zeros(2, 4, 3, 3, dtype=torch.bfloat16), 2).dtype == torch.bfloat16


def test_attention_is_the_fused_one() -> None:
    """It keeps queries, keys, values, result and a number for each query, not the matrix."""
    counted = live.Live([])
    with counted, Rules("cpu", torch.float32):
        q, k, v = (torch.empty(1, 2, 256, 8, device="meta", requires_grad=True) for _ in range(3))
        seen = F.scaled_dot_product_attention(q, k, v)
    assert seen.shape == (1, 2, 256, 8)
    assert counted.now == 4 * (4 * 2 * 256 * 8 + 2 * 256) < 4 * 2 * 256 * 256


@pytest.mark.parametrize(
    "name, options, each",
    [("adamw", {}, 8), ("sgd", {}, 0), ("sgd", {"momentum": 0.9}, 4), ("lion", {}, 4)],
)
def test_states(name: str, options: dict[str, Any], each: int) -> None:
    shapes = [(40, 30), (20,), (8, 4, 3, 3)]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    about = Optimiser(name=name, options=options)
    kept, paged = state.state(about, parameters)
    built = planning.state.optimiser.build([{"params": parameters}], **about.resolved(), learning_rate=1e-3)
    built.step()
    real = [t for own in built.state.values() for t in own.values() if isinstance(t, torch.Tensor)]
    assert paged == 0 and kept == sum(t.numel() * t.element_size() for t in real)
    numbers = sum(p.numel() for p in parameters)
    assert each * numbers <= kept <= each * numbers + 8 * len(shapes)  # and a count of steps


def test_state_that_is_factored_or_in_8_bits() -> None:
    large, small = nn.Parameter(torch.zeros(400, 300)), nn.Parameter(torch.zeros(10))
    kept, _ = state.state(Optimiser(name="adafactor"), [large])
    assert 4 * (400 + 300) <= kept <= 4 * (400 + 300 + 2)
    assert state.state(Optimiser(name="adamw8bit"), [large, small]) == (2 * (120000 + 4 * 469) + 80, 0)
    assert state.state(Optimiser(name="pagedadamw32bit"), [large]) == (0, 8 * 120000)


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("name", sorted(state._BITSANDBYTES))
def test_bitsandbytes_keeps_what_is_planned(name: str) -> None:
    """Besides the table of a number's 256 values, one for each kind of state; on the CPU nothing is paged."""
    pytest.importorskip("bitsandbytes")
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in [(130, 70), (20,), (64, 64)]]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    built = planning.state.optimiser.build([{"params": parameters}], name, 1e-3)
    built.step()
    real = {n: t for p, own in built.state.items() for n, t in _named(p, own) if not n.startswith("qmap")}
    assert len(real) >= 3
    assert sum(state.state(Optimiser(name=name), parameters)) == sum(t.nbytes for t in real.values())


def _named(parameter: Any, own: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    return [(f"{name} {id(parameter)}", t) for name, t in own.items() if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_quantised_base_holds_what_is_planned(made: Any, sd1_folder: Path, scheme: Any) -> None:
    """Every network's bytes, of those that are stored and of the rest."""
    pytest.importorskip("bitsandbytes")
    asked = made("lora")
    base = asked.base.model_copy(update={"quantise": scheme})
    train = asked.train.model_copy(update={"precision": "bf16"})
    plan = memory.plan(asked.model_copy(update={"base": base, "train": train}))
    for name in ("unet", "text_encoder"):
        network = components.load_quantised(name, sd1_folder / name, scheme, torch.bfloat16)
        held = [*network.parameters(), *network.buffers()]
        for layer in network.modules():
            about = getattr(getattr(layer, "weight", None), "quant_state", None)
            if about is not None:
                held += [about.absmax, about.code, about.offset, about.state2.absmax, about.state2.code]
            elif quantised.is_quantised(layer):
                held.append(layer.state.SCB)
        assert plan.weights[name] == live.nbytes(held), name


def test_weights_in_bfloat16_take_half(made: Any) -> None:
    """So do gradients; moments stay: 2 + 2 + 8 bytes a weight in place of 4 + 4 + 8, and 2 + 2 + 2 with 8
    bits."""
    asked = made("{full: {checkpoint_file: false}}")

    def each(**values: Any) -> tuple[float, ...]:
        train = asked.train.model_copy(update={"precision": "bf16", **values})
        needs = memory.plan(asked.model_copy(update={"train": train}))
        numbers = memory.plan(asked).gradients / 4
        return tuple(size / numbers for size in (needs.weights["unet"], needs.gradients, needs.optimiser))

    eight = Optimiser(name="adamw8bit")
    assert each() == pytest.approx((4, 4, 8), abs=0.02)
    assert each(trained_precision="bf16") == pytest.approx((2, 2, 8), abs=0.02)
    assert each(trained_precision="bf16", optimiser=eight) == pytest.approx((2, 2, 2), abs=0.5)


@pytest.mark.parametrize("method, there", [("{full: {checkpoint_file: false}}", True), ("lora", False)])
def test_weights_in_bfloat16_are_suggested(
    made: Any, method: str, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "LOT", 1)  # else the tiny base is updated in one lot: nothing is saved
    asked = made(method, batch=1)
    train = asked.train.model_copy(update={"precision": "bf16"})
    asked = asked.model_copy(update={"train": train})
    found = memory.fits(asked, 2**20, device="cuda", phases=("training",))
    assert len(found) >= 2
    assert (("train.trained_precision=bf16",) in [one.overrides for one in found]) == there


def test_what_is_cached_waits_elsewhere(made: Any) -> None:
    """Autoencoder and text encoder while a GPU trains; not where they are asked, or previews are drawn."""
    asked = made("{lora: {rank: 2}}", more="ema: 0.9")
    own, needs = memory.plan(asked), memory.plan(asked, 1, "cuda")
    assert own.aside == 0 and needs.aside == needs.weights["vae"] + needs.weights["text_encoder"] > 0
    data = asked.data.model_copy(update={"cache": "off"})
    anew = memory.plan(asked.model_copy(update={"data": data}), 1, "cuda")
    assert anew.aside == 0
    held = sum(needs.weights.values()) + needs.trained + needs.optimiser + needs.ema - needs.aside
    step_ = dict(needs.phases)["training"] - needs.libraries - held
    assert step_ == pytest.approx(needs.activations + 1.1 * needs.gradients, rel=0.01)
    assert any("not on it while training" in line for line in needs.lines())
    words = memory.plan(made("{lora: {rank: 2, text_encoder: true}}"), 1, "cuda")
    assert words.aside == words.weights["vae"]


def test_lora(made: Any, sd1_folder: Path) -> None:
    """Its weights, gradients and states are counted from ranks and shapes; the base's from its files."""
    from safetensors.torch import load_file

    asked = made("{lora: {rank: 4}}", more="ema: 0.9")
    needs = memory.plan(asked)
    file = load_file(sd1_folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert needs.weights["unet"] == sum(t.numel() * 4 for t in file.values())
    layers = [t for n, t in file.items() if "attn" in n and n.endswith(("q.weight", "k.weight", "v.weight"))]
    layers += [t for n, t in file.items() if "attn" in n and n.endswith("to_out.0.weight")]
    assert len(layers) > 20
    trained = sum(4 * 4 * sum(t.shape) for t in layers)
    assert needs.trained == needs.gradients == needs.ema == trained
    assert 2 * trained <= needs.optimiser <= 2 * trained + 8 * 2 * len(layers)
    assert needs.peak == needs.at.peak == max(phase.peak for phase in needs.phases)
    assert needs.as_json()["phases"]["training"] > needs.libraries > 50 * 2**20
    assert len([line for line in needs.lines() if line.startswith("*")]) == 1


def test_activations_grow_with_the_batch(made: Any) -> None:
    """Each picture adds the same."""
    two, four, six = (memory.plan(made(batch=n)).activations for n in (2, 4, 6))
    assert abs((six - four) - (four - two)) < 0.01 * four and four > 1.5 * two


def test_accumulating_and_processes_share_the_batch(made: Any) -> None:
    whole, parts = memory.plan(made()), memory.plan(made(more="accumulate: 4"))
    assert (whole.pictures, parts.pictures) == (4, 1) and parts.activations < 0.5 * whole.activations
    several = memory.plan(made(), processes=2)
    assert several.pictures == 2 and several.gradients == 2 * whole.gradients  # DDP's buckets
    with pytest.raises(UserError, match="batch_size"):
        memory.plan(made(), processes=3)


def test_the_stage_that_holds_most_is_planned(made: Any) -> None:
    """Neither train.batch_size nor the largest side alone: small pictures in large batches may be most."""

    def staged(*stages: dict[str, Any], more: str = "") -> Recipe:
        asked = made(batch=4, more=more)
        data = asked.data.model_copy(update={"resolution": None, "stages": [Stage(**one) for one in stages]})
        return asked.model_copy(update={"data": data})

    small, large = {"resolution": 32, "steps": 1, "batch_size": 32}, {"resolution": 64, "batch_size": 1}
    alone = memory.plan(made(side=32, batch=32))
    passes = planning.Passes()
    both = memory.plan(staged(small, large), passes=passes)
    assert (both.pictures, both.activations) == (alone.pictures, alone.activations) == (32, alone.activations)
    plain = memory.plan(staged(small, {"resolution": 64}), passes=passes)  # of train.batch_size
    four = memory.plan(made(side=64, batch=4))
    assert plain.activations == max(alone.activations, four.activations)
    less = memory.plan(staged(small | {"batch_size": 2}, {"resolution": 64}), passes=passes)
    assert (less.pictures, less.activations) == (4, four.activations), "no other stage's passes are taken"
    with pytest.raises(UserError, match=r"data\.stages\.1\.batch_size: found 1"):
        memory.plan(staged(small, large), processes=2)
    # What divides all stages is suggested, though it divides no further than the smallest.
    asked = staged(small, large | {"batch_size": 2})
    limit = memory.plan(asked).most(("training",)) - alone.activations // 3
    found = memory.fits(asked, limit, phases=("training",))
    assert [one.overrides for one in found if "accumulate" in one.overrides[0]] == [("train.accumulate=2",)]


METHODS = (
    ("{lora: {kind: lokr, text_encoder: true}}", "cpu"),
    ("{lora: {rank: 2}, textual_inversion: {token: <new>, init: red toy, vectors: 2}}", "cuda"),
    ("{controlnet: {unlock_decoder_at: 0}}", "cuda"),
    ("{controlnet: {rank: 2}}", "cpu"),
    ("{full: {text_encoder: true}}", "cuda"),
    ("autoencoder", "cpu"),
)


@pytest.mark.parametrize("method, device", METHODS)
def test_every_method(made: Any, method: str, device: str) -> None:
    asked = made(method, batch=2)
    needs = memory.plan(asked, device=device)
    train = asked.train.model_copy(update=CHECKPOINTED)
    again = memory.plan(asked.model_copy(update={"train": train}), 1, device)
    assert needs.activations > 0 and needs.gradients > 0
    # A ControlNet's condition encoder, which is not computed again, is the most in so small a base.
    assert again.activations < needs.activations or "controlnet" in method
    assert (needs.host > 0) == (device == "cuda")


CHECKPOINTED = {"gradient_checkpointing": True}


@pytest.mark.parametrize("family", ["sd2", "sdxl", "sdxl_inpaint"])
def test_every_family(made: Any, folders: dict[str, Path], family: str) -> None:
    needs = memory.plan(made(base=str(folders[family]), more="", batch=1))
    assert needs.activations > 0 and set(needs.weights) >= {"unet", "vae", "text_encoder"}


def test_full_trains_the_weights_themselves(made: Any) -> None:
    needs = memory.plan(made("full"))
    assert needs.trained == 0 and needs.gradients == needs.weights["unet"]


def test_a_quantised_base(made: Any) -> None:
    asked = made("lora")
    base = asked.base.model_copy(update={"quantise": "nf4"})
    train = asked.train.model_copy(update={"precision": "bf16"})
    plain, half, small = (
        memory.plan(one, 1, "cuda").weights["unet"]
        for one in (asked, asked.model_copy(update={"train": train}), asked.model_copy(update={"base": base}))
    )
    assert small < plain == 2 * half


def test_a_base_that_is_not_there(made: Any) -> None:
    with pytest.raises(UserError, match="no such folder"):
        memory.plan(made(base="nowhere/at/all"))


def test_what_would_make_it_fit(made: Any) -> None:
    asked = made(batch=4)
    needs = memory.plan(asked)
    assert memory.fits(asked, needs.peak) == []
    limit = needs.most(("training",)) - needs.activations // 4
    found = memory.fits(asked, limit, phases=("training",))
    enough = [one for one in found if one.fits]
    assert enough and all(one.peak <= limit for one in enough)
    assert found[0].overrides[0].startswith("train.accumulate=")  # costs least, of what helps here
    assert ("train.gradient_checkpointing=true",) in [one.overrides for one in found]
    small = made(batch=1, more="gradient_checkpointing: true")
    nothing = memory.fits(small, 2**20)
    told = memory.suggestion_lines(nothing, 2**20)
    assert not any(one.fits for one in nothing) and "nothing here makes it fit into 1.0 MiB" in told[-1]
    for one in (*found, *nothing):  # every key is one of the recipe's
        assert one.overrides and recipe.load(_written(asked), one.overrides) is not None


def _written(asked: Recipe) -> Path:
    path = Path(asked.base.path).parent / "suggested.yaml"
    path.write_text(asked.resolved_yaml(), encoding="utf-8")
    return path


def test_passes_are_shared(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    old = step.training
    monkeypatch.setattr(step, "training", lambda *given: runs.append(given) or old(*given))
    passes = planning.Passes()
    first = memory.plan(made(), passes=passes)
    other = memory.plan(made(more="ema: 0.9"), passes=passes)
    assert len(runs) == 1 and other.ema > first.ema == 0
    memory.plan(made(batch=2), passes=passes)
    assert len(runs) == 2


@pytest.mark.slow
def test_a_real_step_takes_what_is_planned() -> None:
    """Within 15 percent; plan and step each in a process of its own."""
    script = ROOT / "benchmarks" / "memory.py"
    command = [sys.executable, str(script), "--cases", "lora 128 px, batch 32"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    ratios = [float(line.rpartition(" ")[2]) for line in done.stdout.splitlines()]
    assert len(ratios) == 1 and all(0.85 < ratio < 1.15 for ratio in ratios), done.stdout
