"""A step computes what its layers need and nothing else; what the benchmarks count, counts right."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from tuner import loop, recipe
from tuner.data.flow import batches
from tuner.log import Log
from tuner.memory import model as sizes
from tuner.memory import step as passes

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("lora", "textual_inversion", "controlnet", "full")
FAMILIES = ("sd1", "sd2", "sdxl", "embedded")


@pytest.fixture(scope="module")
def bench() -> Iterator[Callable[[str], ModuleType]]:
    """Imports files of benchmarks/ by name, as its scripts do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module


@pytest.fixture
def begun(
    bench: Callable[[str], ModuleType], folders: dict[str, Path], tmp_path: Path
) -> Iterator[Callable[..., SimpleNamespace]]:
    """Builds a run as the benchmark does, ready for its first step."""
    logs = []

    def begin(method: str, family: str, batch: int = 2, **more: Any) -> SimpleNamespace:
        AcceleratorState._reset_state(True)
        base = None if family == "embedded" else str(folders[family])
        case = bench("steps_case").Case(method, family, batch, "fp32", 64, 1, base=base, **more)
        run = bench("steps_run").built(case, tmp_path / f"run{len(logs)}")
        logs.append(Log(run.output, False, None, True, None))
        made = loop.make(run, logs[-1].__enter__())
        coming = batches(run.data, run.plan, run.division, 0, 9, 0, False)
        return SimpleNamespace(run=run, made=made, coming=coming)

    yield begin
    for log in logs:
        log.__exit__(None, None, None)
    AcceleratorState._reset_state(True)


def count(bench: Any, one: SimpleNamespace) -> tuple[int, Any]:
    """The FLOPs of a run's next step as counted, and what its layers need."""
    with bench("steps_run").counted(one.run) as (counter, needed):
        loop.one_step(one.run, one.made, one.coming, 0)
    return counter.get_total_flops(), needed.work


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_takes_the_least_flops(bench: Any, begun: Any, method: str, family: str) -> None:
    one = begun(method, family)
    found, work = count(bench, one)
    assert found == work.expected
    assert work.idle == 0  # small attentions are plain products on the CPU
    # SDXL's first text encoder is read before its last layer, which transformers computes all the same.
    last = work.unused if (method, family) == ("textual_inversion", "sdxl") else 0
    assert found == work.least + last
    assert (last > 0) == ((method, family) == ("textual_inversion", "sdxl")) and last < work.least / 100
    reads = {"text_encoder", "text_encoder_2"} if family == "sdxl" else {"text_encoder"}
    called = {"unet"} | (reads if method == "textual_inversion" else set())
    called |= {"branch"} if method == "controlnet" else set()
    assert work.networks.keys() == called  # nothing that is cached is encoded again
    assert all(work.calls[kind] > 5 for kind in ("linear", "convolution", "attention"))
    assert all(forward > 0 and backward > 0 for forward, backward in work.networks.values())


@pytest.mark.parametrize("method", METHODS)
def test_without_a_cache_the_encoders_work_forward_only(bench: Any, begun: Any, method: str) -> None:
    found, work = count(bench, begun(method, "sd1", cached=False))
    assert found == work.expected == work.least + work.idle and work.unused == 0
    assert work.networks["vae"][0] > 0 == work.networks["vae"][1]
    assert (work.networks["text_encoder"][1] > 0) == (method == "textual_inversion")


def test_controlnet_sends_gradients_through_the_decoder_only(bench: Any, begun: Any) -> None:
    """A full step sends them through all, and to all weights: in sum less than twice the forward pass,
    as text and pictures need no gradient."""
    _, full = count(bench, begun("full", "embedded"))
    _, branch = count(bench, begun("controlnet", "embedded"))
    forward, backward = full.networks["unet"]
    assert 1.5 * forward < backward < 2 * forward
    assert branch.networks["unet"][0] == forward > branch.networks["unet"][1] > 0.4 * forward
    assert 1.5 < branch.networks["branch"][1] / branch.networks["branch"][0] < 2


class Small(nn.Module):
    """A trained layer between frozen ones, and a frozen one that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.unread, self.kernel = nn.Linear(5, 7), nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.requires_grad_(False)
        self.second.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.second(self.first(x))
        self.unread(seen)
        return self.kernel(self.third(seen).reshape(-1, 2, 4, 4))


def test_the_least_is_what_one_finds_by_hand(bench: Any) -> None:
    flops, network = bench("flops"), Small()
    with flops.counter() as counter:
        with flops.Needed({"small": network}) as needed:
            loss = network(torch.randn(2, 16, 3)).sum()
        needed.settle(loss)
        loss.backward()
    first, second, third, unread = 2 * 32 * 3 * 5, 2 * 32 * 5 * 5, 2 * 32 * 5 * 2, 2 * 32 * 5 * 7
    kernel = 2 * (2 * 2 * 2) * 2 * 4 * 9
    work = needed.work
    assert work.forward == first + second + third + kernel
    assert work.backward == second + third + kernel  # a weight's gradient, and two gradients of inputs
    assert (work.unused, work.idle) == (unread, 0)
    assert counter.get_total_flops() == work.expected == work.least + unread


def test_work_that_no_layer_asks_for_shows(bench: Any) -> None:
    flops, network = bench("flops"), Small()
    network.first.requires_grad_(True)
    with flops.counter() as counter:
        with flops.Needed({"small": network}) as needed:
            loss = network(torch.randn(2, 16, 3)).sum()
        network.first.weight.requires_grad_(False)  # so that its gradient is computed, but not foreseen
        torch.mm(torch.randn(2, 3), torch.randn(3, 4))
        needed.settle(loss)
        loss.backward()
    assert counter.get_total_flops() - needed.work.expected == 2 * 2 * 3 * 4


class Attention(nn.Module):
    """One head; its queries see something trained."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(8, 8) for _ in range(3))
        self.requires_grad_(False)
        self.fused = fused

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(text), self.to_v(text)
        if self.fused:
            return nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("sees", ["queries", "keys and values", "all", "none"])
def test_attention_by_hand(bench: Any, fused: bool, sees: str) -> None:
    flops, network, end = bench("flops"), Attention(fused), nn.Linear(8, 1)
    x, text = torch.randn(2, 6, 8), torch.randn(2, 5, 8)
    x.requires_grad_(sees in ("queries", "all"))
    text.requires_grad_(sees in ("keys and values", "all"))
    with flops.counter() as counter:
        with flops.Needed({"attention": network, "end": end}) as needed:
            loss = end(network(x, text)).sum()
        needed.settle(loss)
        loss.backward()
    one = 2 * 2 * 6 * 5 * 8
    products = {"queries": 2, "keys and values": 3, "all": 4, "none": 0}[sees]
    assert needed.work.kinds["attention"] == [2 * one, products * one]
    assert needed.work.idle == ((4 - products) * one if fused and products else 0)
    assert counter.get_total_flops() == needed.work.expected


FULL_SIZE = {  # TFLOP of an image: what docs and plans reckon with
    "sd15": {"lora": 1.725, "textual_inversion": 1.696, "controlnet": 2.265, "full": 2.407},
    "sd21": {"lora": 4.911, "textual_inversion": 4.754, "controlnet": 6.263, "full": 6.443},
    "sdxl": {"lora": 14.19, "textual_inversion": 14.50, "controlnet": 20.02, "full": 20.23},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FULL_SIZE)
@pytest.mark.parametrize("method", METHODS)
def test_full_size_on_the_meta_device(bench: Any, tmp_path: Path, method: str, family: str) -> None:
    """With the kernels of a GPU, which compute gradients of keys and values that nobody needs."""
    cases = bench("steps_case")
    flops, side = bench("flops"), cases.SIDES[family]
    place = tmp_path / "case.yaml"
    place.write_text(
        f"base: {ROOT / 'tuner' / 'configs' / family}\nmethod: {cases.METHODS[method]}\noutput: none\n"
        f"data: {{source: none, resolution: {side}}}\n"
        "train: {steps: 1, batch_size: 1, learning_rate: 1e-4, precision: bf16}\n"
    )
    model = sizes.build(recipe.load(place), "cuda", torch.bfloat16)
    found, work = flops.of_model(model, passes._batch(model, 1, side, side))
    assert found == work.expected
    assert work.least / 1e12 == pytest.approx(FULL_SIZE[family][method], rel=5e-4)
    assert work.unused <= 1e-4 * work.least and work.idle <= 1e-3 * work.least
    assert (work.idle > 0) == (method in ("controlnet", "textual_inversion") and work.unused == 0)


@pytest.mark.parametrize("method", METHODS)
def test_frozen_parameters_have_no_gradients(begun: Any, method: str) -> None:
    one = begun(method, "sd1")
    run = one.run
    trained = {id(parameter) for parameter in run.task.trained()}
    one.made.prepared.zero_grad = lambda: None  # so that they are there to be looked at
    loop.one_step(run, one.made, one.coming, 0)
    every = [p for network in run.family.modules().values() for p in network.parameters()]
    every += list(run.task.parameters())
    frozen = {id(p): p for p in every if id(p) not in trained}
    assert len(frozen) > 100 - 60 * (method == "full") and len(trained) > 0
    assert all(p.grad is None and not p.requires_grad for p in frozen.values())
    with_gradient = [p for p in run.task.trained() if p.grad is not None]
    assert len(with_gradient) == len(trained)


def test_controlnets_frozen_encoder_keeps_nothing_for_a_backward_pass(begun: Any) -> None:
    one = begun("controlnet", "sd1")
    unet, within, kept = one.run.family.denoiser, [], {"encoder": 0, "decoder": 0, "elsewhere": 0}

    def pack(tensor: Tensor) -> Tensor:
        kept[within[-1] if within else "elsewhere"] += 1
        return tensor

    parts = {"conv_in": "encoder", "down_blocks": "encoder", "mid_block": "encoder", "up_blocks": "decoder"}
    watched = 0
    for name, where in parts.items():
        module = unet.get_submodule(name)
        for block in module if isinstance(module, nn.ModuleList) else [module]:
            block.register_forward_pre_hook(lambda *_, where=where: within.append(where))
            block.register_forward_hook(lambda *_: within.pop() and None)
            watched += 1
    assert watched == 1 + 2 + 1 + 2
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loop.one_step(one.run, one.made, one.coming, 0)
    assert kept["encoder"] == 0 and kept["decoder"] > 50 and kept["elsewhere"] > 50, kept


def test_textual_inversion_trains_rows_only(begun: Any) -> None:
    one = begun("textual_inversion", "sdxl")
    names = [name for name, _ in one.run.task.named_trained()]
    assert names == ["0.rows.text_encoder", "0.rows.text_encoder_2"]
    held = [p for group in one.made.prepared.param_groups for p in group["params"]]
    assert [tuple(p.shape) for p in held] == [(1, 32), (1, 64)]
    tables = {n: one.run.family.embedding(n).weight.clone() for n in ("text_encoder", "text_encoder_2")}
    loop.one_step(one.run, one.made, one.coming, 0)
    states = list(one.made.prepared.state.values())
    assert len(states) == 2 and all(s["exp_avg"].numel() in (32, 64) for s in states)
    assert len(tables) == 2
    for name, table in tables.items():
        assert torch.equal(one.run.family.embedding(name).weight, table)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("method", METHODS)
def test_the_bare_loop_does_the_same_work(bench: Any, begun: Any, method: str, family: str) -> None:
    one = begun(method, family)
    bare = bench("steps_bare").Bare(one.run, one.made)
    before = [p.detach().clone() for p in one.run.task.trained()]
    with bench("flops").counter() as counter:
        theirs = bare.step()
    assert all(torch.equal(p, old) for p, old in zip(one.run.task.trained(), before, strict=True))
    with bench("steps_run").counted(one.run) as (ours, _):
        loss, _ = loop.one_step(one.run, one.made, one.coming, 0)
    assert counter.get_total_flops() == ours.get_total_flops() > 0
    assert torch.equal(loss, theirs)


def test_a_row_of_the_benchmark(bench: Any, folders: dict[str, Path], monkeypatch: Any) -> None:
    steps, run = bench("steps"), bench("steps_run")
    monkeypatch.setattr("steps_run.matrix_rate", lambda *_: 1e11)
    AcceleratorState._reset_state(True)
    case = bench("steps_case").Case("lora", "sd1", 2, "fp32", 64, 1, base=str(folders["sd1"]))
    row = json.loads(json.dumps(run.measure(case, run.Length(2, 2))))
    AcceleratorState._reset_state(True)
    assert row["exact"] and row["tflop"]["counted"] == row["tflop"]["least"] > 0
    assert sum(row["shares"].values()) == pytest.approx(1)
    assert all(row["shares"][part] > 0 for part in ("data", "unet", "backward", "optimiser", "host"))
    assert row["shares"]["autoencoder"] == row["shares"]["text"] == row["shares"]["branch"] == 0
    for name in ("seconds_per_step", "bare_seconds_per_step", "overhead"):
        assert 0 < row[name]["min"] <= row[name]["median"] <= row[name]["max"]
    assert row["images_per_second"] == pytest.approx(2 * row["steps_per_second"])
    assert row["peak_mib"] > 100 and row["percent_of_790"] is None
    assert "overhead" in steps.line(case.title(), row)


def test_the_envelope_tells_no_place(bench: Any, tmp_path: Path) -> None:
    path = tmp_path / "results" / "what.json"
    bench("envelope").write(path, "what", {"json": path, "threads": 1}, [{"a": 1}])
    found = json.loads(path.read_text())
    assert list(found) == ["what", "machine", "versions", "date", "arguments", "rows"]
    assert found["machine"].keys() == {"processor", "cores", "threads", "memory_gib", "gpu"}
    assert found["arguments"] == {"json": "what.json", "threads": 1} and found["rows"] == [{"a": 1}]
    assert str(tmp_path) not in path.read_text() and found["versions"]["torch"] == torch.__version__
    assert [one.name for one in path.parent.iterdir()] == ["what.json"]
