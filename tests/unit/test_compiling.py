"""torch.compile: what is decided and why, where compiled forms are used, and what happens when they fail."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from tuner import compiled, compiling, resume
from tuner.compiled import CHECKED, TIMED, WARM, Compiling
from tuner.compiling import MOST, CompileError, Shapes, Times, verdict
from tuner.data.buckets import Assigned, Bucket
from tuner.data.loader import Division
from tuner.data.plan import Plan, Stages
from tuner.training import Train


class Net(nn.Module):
    """Stands for a denoiser."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(self.layer(x).sin(), 0.5, self.training)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    AcceleratorState._reset_state(True)
    torch._dynamo.reset()
    config: Any = torch._dynamo.config
    limits = config.recompile_limit, config.accumulated_recompile_limit
    yield
    config.recompile_limit, config.accumulated_recompile_limit = limits
    torch._dynamo.reset()
    AcceleratorState._reset_state(True)


def task_of(net: nn.Module, **method: Any) -> Any:
    about = {"WHOLE_STEP": False, "CACHES_TEXT": True, "kind": "lora", "control_branch": lambda: None}
    options = SimpleNamespace(quantise=None)
    family = SimpleNamespace(modules=lambda: {"unet": net}, text_encoders={}, options=options)
    return SimpleNamespace(family=family, each=lambda: [SimpleNamespace(**about | method)])


def batch(size: int = 2, side: int = 4) -> Any:
    return SimpleNamespace(noise=torch.zeros(size, 4, side, side), weight=torch.ones(size))


def made(
    net: nn.Module,
    backend: Any = "eager",
    steps: int = 1000,
    shapes: Shapes | None = None,
    division: Division | None = None,
    **train: Any,
) -> Compiling:
    recipe = Train(batch_size=2, learning_rate=1e-3, steps=steps, **{"compile": "on", **train})
    shapes = Shapes(1, frozenset({2}), 64) if shapes is None else shapes
    return Compiling(
        recipe, task_of(net), shapes, division or Division(), Accelerator(cpu=True), steps, backend
    )


class Counting:
    """A backend that counts the graphs it is given; `wrong`: what it adds to every output."""

    def __init__(self, wrong: float = 0.0) -> None:
        self.graphs, self.calls, self.wrong = 0, 0, wrong

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1

        def run(*given: Any) -> Any:
            self.calls += 1
            return [one + self.wrong for one in graph(*given)]

        return run


def test_what_is_compiled_is_in_place_within_a_step_alone() -> None:
    net, backend = Net().eval(), Counting()
    asked = made(net, backend)
    assert asked.start(None) is None and asked.state == "on"
    x = torch.randn(2, 4)
    expected = net(x)
    with asked.on(batch()):
        assert torch.equal(net(x), expected) and "forward" in vars(net)
    assert "forward" not in vars(net) and backend.calls == 1
    assert torch.equal(net(x), expected) and backend.calls == 1
    assert list(net.state_dict()) == ["layer.weight", "layer.bias"]
    with pytest.raises(KeyError), asked.on(batch()):
        raise KeyError
    assert "forward" not in vars(net)


def test_a_forward_of_its_own_is_put_back() -> None:
    net = Net().eval()
    own = net.forward = net.forward  # as a library that wraps it does
    asked = made(net)
    asked.start(None)
    with asked.on(batch()):
        assert net.forward is not own
    assert net.forward is own


def test_one_graph_for_each_shape_and_other_sizes_uncompiled() -> None:
    net, backend = Net().eval(), Counting()
    asked = made(net, backend, shapes=Shapes(2, frozenset({2}), 64))
    asked.start(None)
    for _ in range(3):
        for size, width, side in ((2, 3, 4), (2, 5, 6), (1, 3, 4), (2, 7, 8)):
            with asked.on(batch(size, side)):
                net(torch.randn(size, width, 4))
    # A smaller batch, as an epoch's last, and a shape beyond those that there are, go by.
    assert (backend.graphs, backend.calls) == (2, 6)
    assert torch._dynamo.config.recompile_limit >= 4


def test_dropout_draws_the_same_and_the_check_leaves_no_trace() -> None:
    net = Net().train()
    asked = made(net, "aot_eager")
    asked.start(None)
    x = torch.randn(2, 4)
    for number in range(CHECKED + 2):
        torch.manual_seed(number)
        expected, after = net(x), torch.rand(3)
        torch.manual_seed(number)
        with asked.on(batch()):
            assert torch.equal(net(x), expected)
        assert torch.equal(torch.rand(3), after)


@pytest.mark.parametrize("wrong", [0.5, float("nan")])
def test_other_numbers_than_the_uncompiled_ones_are_not_used(wrong: float) -> None:
    net, backend = Net().eval(), Counting(wrong)
    asked = made(net, backend, compile="auto")
    asked.state = "on"
    asked._switch_on()
    x = torch.randn(2, 4)
    for _ in range(2):
        with asked.on(batch()):
            assert torch.equal(net(x), type(net).forward(net, x))
    assert asked.state == "off" and backend.calls == 1
    told = asked.tick(1)
    assert told is not None and "its output differs" in told and asked.tick(2) is None
    demanded = made(net, Counting(wrong))
    demanded.start(None)
    with pytest.raises(CompileError, match="expected auto or off"), demanded.on(batch()):
        net(x)


def test_rounding_is_no_difference() -> None:
    net = Net().eval()
    asked = made(net, Counting(1e-6))
    asked.start(None)
    with asked.on(batch()):
        net(torch.randn(2, 4))
    assert asked.state == "on"


def test_a_compiler_that_fails_is_told_and_the_run_goes_on() -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no such kernel\nand more")

    net = Net().eval()
    asked = made(net, broken, compile="auto")
    asked.state = "on"
    asked._switch_on()
    x = torch.randn(2, 4)
    with asked.on(batch()):
        assert torch.equal(net(x), type(net).forward(net, x))
    told = asked.tick(1)
    assert told is not None and told.startswith("goes on uncompiled") and "\n" not in told
    demanded = made(net, broken)
    demanded.start(None)
    with pytest.raises(CompileError, match="compiling failed: unet"), demanded.on(batch()):
        net(x)


def test_it_pays_or_not() -> None:
    slow, fast = Times(0.5, 0.5), Times(0.05, 0.01)
    assert verdict(10_000, slow, 700, 1)[0] and not verdict(500, slow, 700, 1)[0]
    assert verdict(10_000, fast, 700, 1)[0] and not verdict(2_000, fast, 700, 1)[0]
    # Launches promise more than a GPU that computes; each shape costs as much again.
    assert verdict(4_000, Times(0.1, 0.01), 700, 1)[0] and not verdict(4_000, Times(0.1, 0.5), 700, 1)[0]
    assert not verdict(10_000, slow, 700, 9)[0]
    assert "10000 steps of 0.5 s" in verdict(10_000, slow, 700, 1)[1]


@pytest.mark.parametrize("seconds, state", [(10.0, "on"), (0.001, "off")])
def test_auto_times_some_steps_and_decides(seconds: float, state: str) -> None:
    """As on a GPU, which is not here: what it asks of the device is the accelerator's word."""
    net = Net().eval()
    asked = made(net, compile="auto")
    assert asked.start(None) is None and asked.state == "off"  # on a CPU it is at once
    asked.state = "auto"
    now = [0.0]
    asked.clock = lambda: now[0]
    told: list[str | None] = []
    for step in range(1, WARM + TIMED + 3):
        now[0] += 100  # waiting for data, which compiling does not save
        with asked.on(batch()):
            now[0] += 7 * seconds if step <= WARM else seconds
        told.append(asked.tick(step))
    assert [number for number, line in enumerate(told, start=1) if line] == [WARM + TIMED]
    line = told[WARM + TIMED - 1]
    assert line is not None and f"{1000 - WARM - TIMED} steps of {seconds:.3g} s" in line
    assert asked.state == state and line.startswith({"on": "compiled", "off": "not"}[state])


def test_what_was_decided_before_a_stop_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "stated", lambda recipe, kind: "auto")
    for earlier in ("on", "off", "auto", None):
        asked = made(Net(), compile="auto")
        told = asked.start(earlier)
        assert asked.state == (earlier or "auto") and (told is None) == (earlier in ("auto", None))


def test_auto_declines_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "stated", lambda recipe, kind: "auto")
    many = made(Net(), compile="auto", shapes=Shapes(MOST + 1, frozenset({2}), 64))
    assert f"{MOST + 1} shapes" in str(many.start(None)) and many.state == "off"
    monkeypatch.setattr(compiling, "missing", lambda kind: "no C++ compiler is here")
    lacking = made(Net(), compile="auto")
    assert "no C++ compiler" in str(lacking.start("on")) and lacking.state == "off"


def test_what_cannot_be_compiled_is_a_mistake_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: "/usr/bin/" + name)
    good = task_of(Net())
    compiling.check("on", good.family, good.each(), accelerator)
    own = task_of(Net(), WHOLE_STEP=True)
    stored = task_of(Net())
    stored.family.options.quantise = "nf4"
    for task, words in ((own, "step of its own"), (stored, "base.quantise")):
        with pytest.raises(CompileError, match=words):
            compiling.check("on", task.family, task.each(), accelerator)
        compiling.check("auto", task.family, task.each(), accelerator)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(CompileError, match=r"found on, but no C\+\+ compiler is here \(g\+\+ or clang\+\+\)"):
        compiling.check("on", good.family, good.each(), accelerator)
    assert "mps" in str(compiling.missing("mps"))


@pytest.mark.parametrize(
    "train, kind, expected",
    [
        ({"compile": "on"}, "cpu", "on"),
        ({"compile": "off"}, "cuda", "off"),
        ({}, "cpu", "off"),
        ({}, "cuda", "auto"),
        ({"deterministic": True}, "cuda", "off"),
        ({"deterministic": True, "compile": "on"}, "cuda", "on"),
    ],
)
def test_what_is_known_before_the_first_step(train: dict[str, Any], kind: str, expected: str) -> None:
    assert compiling.stated(Train(batch_size=1, learning_rate=1.0, steps=1, **train), kind) == expected


def test_the_shapes_of_plans() -> None:
    division = Division(accumulate=2, processes=2)
    plain = Plan([1] * 50, 16, 0)
    assert Shapes.of(plain, division, 64) == Shapes(1, frozenset({4}), 4 * 64**2)
    shapes = (Bucket(64, 64), Bucket(32, 96))
    zeros = np.zeros(50)
    assigned = Assigned(shapes, np.arange(50), zeros.astype(np.int64), zeros, zeros)
    bucketed = Plan([1] * 50, 16, 0, assigned=assigned)
    assert Shapes.of(bucketed, division, 64).count == 2
    stages = Stages([plain, Plan([1] * 50, 8, 0)], [3, 3])
    assert Shapes.of(stages, division, 64) == Shapes(2, frozenset({4, 2}), 4 * 64**2)
    assert Shapes.of(Stages([bucketed, bucketed], [3, 3]), division, 64).count == 2


def test_the_promise_of_a_continued_run_knows_it() -> None:
    same = {"code": "c", "device": "gpu", "deterministic": True, "processes": 1, "accumulate": 1}

    def told(old: str, new: str) -> list[str]:
        state: Any = SimpleNamespace(fingerprint={"threads": 1, "made with": {**same, "compile": old}})
        return resume.promise(state, {"threads": 1, "made with": {**same, "compile": new}})

    assert "compile was on and is off" in told("on", "off")[0]
    for both in (("on", "on"), ("off", "off"), ("on", "auto")):
        assert "will be, bit for bit" in told(*both)[0]


def test_the_cache_is_the_users_own_unless_a_place_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    compiled.keep_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    compiled.keep_cache()
    place = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert place == tmp_path / "home" / "tuner" / "compiled" and place.is_dir()
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compiled.keep_cache()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_graphs_are_for_small_batches_of_one_process() -> None:
    """On a CPU there are none; the conditions beside it are these."""
    net = Net()
    assert not made(net).graphs
    small, large = Shapes(1, frozenset({2}), 64), Shapes(1, frozenset({2}), compiled.GRAPHS + 1)
    gpu: Any = SimpleNamespace(device=torch.device("cuda"), num_processes=1)
    both: Any = SimpleNamespace(device=torch.device("cuda"), num_processes=2)

    def has(accelerator: Any, shapes: Shapes, division: Division, **train: Any) -> bool:
        recipe = Train(batch_size=2, learning_rate=1.0, steps=1, **train)
        return Compiling(recipe, task_of(net), shapes, division, accelerator, 1).graphs

    assert has(gpu, small, Division())
    assert not has(gpu, large, Division()) and not has(both, small, Division())
    assert not has(gpu, small, Division(accumulate=2))
    assert not has(gpu, small, Division(), gradient_checkpointing=True)


def test_what_gradients_go_through(models: ModuleType, sd1_folder: Path) -> None:
    names = {
        "lora": ["text_encoder.encoder.layers.0", "text_encoder.encoder.layers.1", "unet"],
        "textual_inversion": ["text_encoder.encoder.layers.0", "text_encoder.encoder.layers.1", "unet"],
        "controlnet": ["branch", "unet"],
    }
    for name, expected in names.items():
        family = models.family_of(sd1_folder, name)
        method = models.method_of(name, family)
        assert sorted(compiling.units(family, [method])) == expected


def test_channels_last_changes_no_number_and_no_file(
    models: ModuleType, sd1_folder: Path, tmp_path: Path
) -> None:
    family = models.family_of(sd1_folder, "controlnet")
    method = models.move(models.method_of("controlnet", family))
    parameters = dict(method.named_parameters())
    files = method.export(family, tmp_path / "before", models.card_of(torch.float32, method))
    x, t, condition = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.rand(2, 3, 64, 64)
    text = SimpleNamespace(hidden=torch.randn(2, 77, 32))
    told: Any = SimpleNamespace(text=text, time_ids=None, concat=None)

    def outputs() -> list[torch.Tensor]:
        seen: Any = SimpleNamespace(condition=condition)
        with torch.no_grad():
            latent = family.encode_images(condition * 2 - 1).mean
            return [method.predict(family, x, t, told, seen), latent]

    expected = outputs()
    assert compiling.layout(family, [method], "cpu") == []
    changed = compiling.layout(family, [method], "cuda")
    assert {path.partition(".")[0] for path in changed} == {"unet", "vae", "branch"} and len(changed) > 50
    weight = parameters["branch.down_blocks.0.resnets.0.conv1.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert all(parameters[name] is p for name, p in method.named_parameters())
    for one, other in zip(outputs(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    again = method.export(family, tmp_path / "after", models.card_of(torch.float32, method))
    assert len(files) == len(again) >= 2
    for one, other in zip(files, again, strict=True):
        inside = [one] if one.is_file() else sorted(one.iterdir())
        for before in inside:
            after = other if one.is_file() else other / before.name
            assert before.read_bytes() == after.read_bytes()


def test_an_optimisers_state_is_laid_out_as_its_parameters() -> None:
    first = nn.Conv2d(4, 8, 3)
    made = torch.optim.AdamW(first.parameters())
    first(torch.randn(1, 4, 5, 5)).sum().backward()
    made.step()
    state = made.state_dict()
    second = nn.Conv2d(4, 8, 3)
    second.weight.data = second.weight.data.contiguous(memory_format=torch.channels_last)
    other = torch.optim.AdamW(second.parameters())
    other.load_state_dict(state)
    compiling.align(other)
    moment, kept = other.state[second.weight]["exp_avg"], made.state[first.weight]["exp_avg"]
    assert moment.stride() == second.weight.stride() != kept.stride() and torch.equal(moment, kept)
    bias = other.state[second.bias]
    assert bias["exp_avg"].stride() == (1,) and float(bias["step"]) == 1
