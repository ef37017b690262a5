"""What every method promises, on every family: a row of the table in conftest.py each."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tuner.families
import tuner.methods
from tuner.data import assemble, encode
from tuner.data.index import Memory
from tuner.data.loader import Division, stream
from tuner.data.plan import Plan, Slot
from tuner.errors import UserError
from tuner.family import Family

Bench = Any  # of conftest.py, which cannot be imported
Case = Any


def test_every_method_and_family_has_a_row(cases: tuple[Case, ...]) -> None:
    methods = {module.name for module in pkgutil.iter_modules(tuner.methods.__path__)}
    families = {module.name for module in pkgutil.iter_modules(tuner.families.__path__)}
    assert len(methods) >= 6 and len(families) >= 3
    assert {(case.method, case.base) for case in cases} >= {(m, f) for m in methods for f in families}
    assert {case.family for case in cases} == families
    assert len({case.name for case in cases}) == len(cases)


def frozen(bench: Bench) -> dict[str, Tensor]:
    """Every tensor of the base that is not trained, by component and name."""
    trained = {id(parameter) for parameter in bench.task.trained()}
    return {
        f"{component}.{name}": tensor
        for component, module in bench.family.modules().items()
        for name, tensor in module.state_dict(keep_vars=True).items()
        if id(tensor) not in trained
    }


def test_what_is_trained_is_what_requires_a_gradient_and_what_the_optimiser_gets(bench: Bench) -> None:
    trained = bench.task.trained()
    ids = {id(parameter) for parameter in trained}
    assert len(ids) == len(trained) > 0
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in trained)
    assert {id(p) for p in bench.task.parameters() if p.requires_grad} == ids
    everywhere = [p for module in bench.family.modules().values() for p in module.parameters()]
    assert {id(p) for p in everywhere if p.requires_grad} <= ids
    grouped = [p for group in bench.method.groups(1e-3) for p in group["params"]]
    assert len(grouped) == len(trained) and {id(p) for p in grouped} == ids
    names = [name for name, _ in bench.task.named_trained()]
    assert len(set(names)) == len(names)


def test_every_trained_tensor_gets_a_gradient_and_no_frozen_one_does(bench: Bench) -> None:
    batch, made = bench.batch(), bench.optimiser()
    for _ in range(3):
        bench.step(batch, made)
        bench.gradients()  # none is absent, which would stop several processes
    bench.step(batch, made)
    gradients = bench.gradients()
    # A key's bias adds the same to all scores of a query: the softmax does not see it.
    still = [n for n, g in gradients.items() if not g.any() and not n.endswith("k_proj.bias")]
    assert not still
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    untouched = frozen(bench)
    assert all(tensor.grad is None and not tensor.requires_grad for tensor in untouched.values())
    assert len(untouched) > 20 or not bench.case.frozen


def test_trained_tensors_survive_a_round_trip_bitwise(bench: Bench, build: Callable[..., Bench]) -> None:
    bench.wake()
    batch = bench.batch()
    bench.task(batch)  # what counts along in training is part of the state
    saved = {name: tensor.clone() for name, tensor in bench.task.tensors().items()}
    other = build(bench.case, seed=1)
    other.task.load_tensors(saved)
    found = other.task.tensors()
    assert found.keys() == saved.keys() >= {name for name, _ in bench.task.named_trained()}
    assert all(
        torch.equal(found[name], saved[name]) and found[name].dtype == saved[name].dtype for name in saved
    )
    bench.method.train_mode(False)
    other.method.train_mode(False)
    assert torch.equal(bench.task.evaluate(batch), other.task.evaluate(batch))


def test_the_start_is_a_function_of_the_seed(case: Case, build: Callable[..., Bench]) -> None:
    torch.manual_seed(1)
    one = build(case).task.tensors()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    other = build(case).task.tensors()
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_one_batch_is_overfitted(bench: Bench) -> None:
    batch, made = bench.batch(), bench.optimiser()
    losses = [bench.step(batch, made) for _ in range(25)]
    assert losses[-1] < bench.case.falls * losses[0], losses[:: len(losses) // 8]


def test_the_frozen_base_stays_bitwise_under_weight_decay(
    bench: Bench, load: Callable[[Case], Family]
) -> None:
    made = bench.optimiser(weight_decay=0.5)
    before = bench.task.tensors()
    before = {name: tensor.clone() for name, tensor in before.items()}
    for _ in range(3):
        bench.step(bench.batch(), made)
    after = bench.task.tensors()
    assert all(not torch.equal(after[name], before[name]) for name in after)
    fresh = {
        f"{component}.{name}": tensor
        for component, module in load(bench.case).modules().items()
        for name, tensor in module.state_dict().items()
    }
    # An injected adapter moves a layer one name deeper.
    now = {name.replace(".base_layer.", "."): tensor for name, tensor in frozen(bench).items()}
    assert now.keys() <= fresh.keys()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in now.items())
    if bench.case.frozen:
        assert now.keys() == fresh.keys() and len(now) > 100


def test_off_is_the_base_bitwise_and_after_it_the_adapted_one_again(
    bench: Bench, load: Callable[[Case], Family]
) -> None:
    if not bench.case.frozen:
        pytest.skip("it trains the base itself")
    bench.wake()
    bench.method.train_mode(False)
    batch, t = bench.batch(), torch.tensor([0, 250, 500, 999])
    fresh = load(bench.case)
    new = getattr(bench.method, "words", ())
    words = {name: word.init for word in new for name in word.names()}
    captions = [" ".join(words.get(word, word) for word in caption.split()) for caption in batch.captions]

    def base_alone(family: Family, text: Any) -> Tensor:
        return family.predict(family.denoiser, batch.noise, t, family.condition(text))

    def adapted() -> Tensor:
        cond = bench.family.condition(bench.task.encode(batch.tokens))
        return bench.method.predict(bench.family, batch.noise, t, cond, batch)

    with torch.no_grad():
        expected = base_alone(fresh, fresh.encode_prompts(fresh.tokenize(captions)))
        before = adapted()
        with bench.method.off(bench.family):
            found = base_alone(bench.family, bench.task.encode(batch.tokens))
        after = adapted()
    assert float((found - expected).abs().max()) == 0.0
    assert torch.equal(before, after)
    assert not torch.equal(before, expected)
    assert {id(p) for p in bench.task.parameters() if p.requires_grad} == {
        id(p) for p in bench.task.trained()
    }


def test_a_bf16_step_leaves_what_is_trained_in_float32(bench: Bench) -> None:
    bench.family.cast(torch.bfloat16, bench.task.parameters())
    made = bench.optimiser()
    before = {name: p.detach().clone() for name, p in bench.task.named_trained()}
    made.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = bench.task(bench.batch())
    loss.backward()
    made.step()
    assert loss.dtype == torch.float32 and bool(loss.isfinite())
    assert {g.dtype for g in bench.gradients().values()} == {torch.float32}
    assert {p.dtype for p in bench.task.trained()} == {torch.float32}
    assert any(not torch.equal(p, before[name]) for name, p in bench.task.named_trained())
    kept = {id(parameter) for parameter in bench.task.parameters()}
    held = {name: t for name, t in frozen(bench).items() if t.is_floating_point() and id(t) not in kept}
    dtypes = {name: tensor.dtype for name, tensor in held.items()}
    assert {d for name, d in dtypes.items() if name.startswith("vae.")} <= {torch.float32}
    assert {d for name, d in dtypes.items() if not name.startswith("vae.")} <= {torch.bfloat16}


def step_gradients(bench: Bench, accumulate: int, step: int) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients of one optimiser step in so many micro-batches."""
    plan = Plan([1] * len(bench.feed.samples), 4, 0)
    total = 0.0
    bench.task.zero_grad()
    for batch in stream(bench.feed, plan, Division(accumulate), step, step + 1, 0):
        loss, _ = bench.task(batch)
        loss.backward()
        total += float(loss.detach())
    return total, bench.gradients()


@pytest.mark.parametrize("step", [0, 1])  # the second is an epoch's last: two samples and two of weight 0
def test_a_step_in_micro_batches_is_the_same_step(bench: Bench, step: int) -> None:
    bench.wake()
    loss, whole = step_gradients(bench, 1, step)
    for accumulate in (2, 4):
        if not bench.case.divides:
            with pytest.raises(UserError, match="accumulate: 1"):
                step_gradients(bench, accumulate, step)
            continue
        again, parts = step_gradients(bench, accumulate, step)
        assert again == pytest.approx(loss, rel=1e-5)
        assert parts.keys() == whole.keys()
        for name, gradient in whole.items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=2e-5 * scale + 1e-8)


def test_places_of_weight_0_count_for_nothing(bench: Bench) -> None:
    if not bench.case.divides:
        pytest.skip("its loss compares all samples of a batch")
    bench.wake()
    loss, filled = step_gradients(bench, 1, 1)
    plan = Plan([1] * len(bench.feed.samples), 4, 0)
    real = [slot for slot in plan.step(1) if slot.weight]
    assert len(real) == 2
    bench.task.zero_grad()
    alone, _ = bench.task(bench.feed.batch(real, 2.0))
    alone.backward()
    assert loss == pytest.approx(float(alone.detach()), rel=1e-5)
    for name, gradient in bench.gradients().items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(filled[name], gradient, rtol=1e-4, atol=2e-5 * scale + 1e-8)


def test_a_cached_step_is_the_same_step(bench: Bench, tmp_path: Path) -> None:
    method, feed = bench.method, bench.feed
    wanted = assemble.Wanted(
        size=feed.size,
        seed=feed.views.seed,
        crop="center",
        flip=True,
        captions=feed.captions,
        condition=method.condition,
        cache=tmp_path / "cache",
        latents=method.CACHES_LATENTS,
        text=method.CACHES_TEXT,
    )
    memory = Memory(tmp_path / "memory")
    bench.wake()
    method.train_mode(False)
    losses = []
    for about in (wanted, replace(wanted, cache=None)):
        opened = assemble.look_at(feed.samples, np.ones(6), about, memory)
        made = encode.feed(opened, about, bench.family)
        cached = about.cache is not None
        stays = method.CACHES_LATENTS and not bench.family.inpainting
        assert (made.latents.store is not None) == (cached and stays)
        assert made.texts.pooled == (made.texts.store is not None and bench.case.family == "sdxl")
        assert (made.texts.store is not None) == (
            cached and method.CACHES_TEXT and "text_encoder" in method.NEEDS
        )
        batch = made.batch([Slot(i, 0, i, 1.0) for i in range(6)], 6.0)
        losses.append(bench.task.evaluate(batch))
    assert losses[0].shape == (6,)
    # Not bitwise: encoding another number of samples at once adds up in another order.
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


def test_cached_captions_are_claimed_only_where_no_trained_tensor_acts_on_them(bench: Bench) -> None:
    batch = bench.batch()
    if batch.tokens is None or bench.method.WHOLE_STEP:
        pytest.skip("it reads no captions through the base")
    before = bench.task.encode(batch.tokens).hidden
    bench.wake()
    after = bench.task.encode(batch.tokens).hidden
    assert torch.equal(before, after) == bench.method.CACHES_TEXT
    assert after.requires_grad != bench.method.CACHES_TEXT
