"""The divergence guard: what it finds, when, and what it leaves alone."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tuner import checkpoint, guard, mend, optimiser
from tuner.checkpoint import State
from tuner.guard import ENOUGH, FIRST, OVER, RECENT, ROW_TIMES, TIMES, WINDOW, WITHIN, Fault, Losses, Watch
from tuner.objective import Objective
from tuner.task import Task


def alarms(losses: Any) -> list[tuple[int, int]]:
    """(step, since) of each alarm over losses of steps 1, 2 ..."""
    judge = Losses()
    found = [(step, judge.add(float(loss))) for step, loss in enumerate(losses, start=1)]
    return [(step, step - ago) for step, ago in found if ago is not None]


# Single losses: narrow; as of batches of one over all timesteps; wider than any weighting makes them.
@pytest.mark.parametrize("sigma, steps", [(0.05, 4000), (1.0, 4000), (3.0, 12_000)])
def test_noise_alone_is_no_alarm(sigma: float, steps: int) -> None:
    drawn = np.random.default_rng(0)
    assert alarms(np.exp(drawn.normal(-3, sigma, steps))) == []


@pytest.mark.parametrize(
    "curve",
    [
        lambda step: 1.0 / (1 + step / 50),  # it falls
        lambda step: 0.1 + 0.05 * math.sin(step / 100),  # as with rates that fall and rise again
        lambda step: 0.1 * 1.002**step,  # it creeps: in a thousand steps by a factor of seven
        lambda step: 0.0,
    ],
)
def test_slow_changes_are_no_alarm(curve: Any) -> None:
    drawn = np.random.default_rng(1)
    assert alarms(curve(step) * np.exp(drawn.normal(0, 0.1)) for step in range(1000)) == []


@pytest.mark.parametrize("bad", [61, 100, 700])
@pytest.mark.parametrize("times", [30.0, 1e6])
def test_a_jump_is_found_at_the_step_that_began_it(bad: int, times: float) -> None:
    drawn = np.random.default_rng(2)
    losses = np.exp(drawn.normal(-3, 0.7, bad + 40))
    losses[bad - 1 :] *= times
    step, since = alarms(losses)[0]
    assert bad + RECENT // 2 - 1 <= step < bad + RECENT + 5
    assert bad <= since <= bad + 2  # within the noise the first ones may still look like before


def test_a_single_outlier_is_no_alarm() -> None:
    losses = np.full(300, 0.1)
    losses[150:155] = 1e9
    assert alarms(losses) == []


def test_an_explosion_before_there_is_a_window_is_found() -> None:
    losses = [0.1] * FIRST + [1e4] * 40
    (step, since), *_ = alarms(losses)
    assert since == FIRST + 1 and step <= FIRST + RECENT < ENOUGH
    assert alarms([0.1] * FIRST + [0.9] * 15) == []


@pytest.mark.parametrize("bad", [2, 3, 6, FIRST])
def test_an_explosion_among_the_first_losses_is_found(bad: int) -> None:
    """Later ones are compared with them, so that they need a measure of their own: the very first."""
    (step, since), *_ = alarms([0.1] * (bad - 1) + [1e4] * 40)
    assert since == bad and FIRST < step <= FIRST + RECENT
    assert step == max(FIRST + 1, 2 * bad - 3)  # as soon as half of those behind the first are so


def test_a_lucky_first_loss_is_no_alarm() -> None:
    """A single picture that is nearly all noise is easy: the next ones are thousands of times it."""
    drawn = np.random.default_rng(5)
    for first in (5e-4, 2e-4):
        assert alarms([first, *np.exp(drawn.uniform(-7.5, 0, 300))]) == []
    assert alarms([0.0] + [1.0] * 60) == []


def test_a_new_run_clears_the_bad_batches_of_the_one_before(tmp_path: Path) -> None:
    names = ("bad-step-7.json", "bad-step-12.json", "bad-step-notes.json", "bad-step-7.json.txt")
    for name in names:
        (tmp_path / name).write_text("{}")
    mend.clear(tmp_path)
    assert sorted(place.name for place in tmp_path.iterdir()) == sorted(names[2:])


def test_twice_the_level_is_needed() -> None:
    flat = [1.0] * (ENOUGH + 5)
    assert alarms(flat + [TIMES - 0.01] * RECENT) == []
    assert alarms(flat + [TIMES + 0.01] * RECENT)[0][1] == len(flat) + 1


def test_the_chance_of_a_false_alarm_is_what_the_docstring_says() -> None:
    def chance(window: int) -> float:
        return math.comb(RECENT, OVER) / math.comb(window + RECENT, OVER)

    assert chance(ENOUGH) == pytest.approx(2.9e-10, rel=0.02) and chance(WINDOW) == pytest.approx(
        4.5e-25, rel=0.02
    )
    # And the formula itself, where it can be counted: 2 of 3 recent ones above a window of 4.
    drawn = np.random.default_rng(3).random((40_000, 7))
    above = (drawn[:, 4:] > drawn[:, :4].max(axis=1, keepdims=True)).sum(axis=1) >= 2
    assert above.mean() == pytest.approx(math.comb(3, 2) / math.comb(7, 2), abs=0.01)


def test_a_continued_history_judges_as_an_unbroken_one() -> None:
    drawn = np.random.default_rng(4)
    losses = np.exp(drawn.normal(-3, 1.0, 900)).tolist() + [5.0] * 40
    whole, parts = Losses(), Losses()
    for number, loss in enumerate(losses):
        if number in (3, 200, 910):
            again = Losses()
            again.load(parts.state())
            parts = again
        assert parts.add(loss) == whole.add(loss)
    assert len(whole.last) == WINDOW + RECENT and whole.state() == parts.state()


@pytest.fixture
def task(models: ModuleType, sd1_folder: Path) -> Task:
    family = models.family_of(sd1_folder, "textual_inversion")
    method = models.method_of("textual_inversion", family)
    objective: Any = Objective.__new__(Objective)
    return Task(family, [method], objective)


def watch(task: Task, scaler: Any = None, everything: bool = True) -> Watch:
    return Watch(task, scaler, everything)


def found(fault: Fault | None) -> Fault:
    assert fault is not None
    return fault


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize(
    "name, value", [("loss", math.nan), ("gradient_norm", math.inf), ("row_norm", -math.inf)]
)
def test_what_is_not_finite_is_found_whatever_the_policy(
    task: Task, name: str, value: float, everything: bool
) -> None:
    made, good = watch(task, everything=everything), {"loss": 0.1, "gradient_norm": 1.0, "row_norm": 1.0}
    assert made.row(1, good, 1e-3) is None
    fault = found(made.row(2, good | {name: value}, 1e-3))
    assert fault.step == fault.since == 2 and fault.curable
    assert f"{name.replace('_', ' ')} is {value}" in fault.what


def test_a_gradient_that_overflows_fp16_is_a_part_of_the_search(task: Task) -> None:
    scale = [65536.0]
    made = watch(task, SimpleNamespace(get_scale=lambda: scale[0]))
    skipped = {"loss": 0.1, "gradient_norm": math.inf}
    for step in range(1, 17):
        scale[0] /= 2
        assert made.row(step, skipped, 1e-3) is None and made.lot(step) is None
    assert scale == [1.0]
    scale[0] /= 2
    assert made.row(17, skipped, 1e-3) is None
    assert "overflows fp16 at every scale (now 0.5)" in found(made.lot(17)).what
    assert "loss is nan" in found(made.row(18, {"loss": math.nan, "gradient_norm": 1.0}, 1e-3)).what


def test_a_small_scale_without_an_overflow_is_well(task: Task) -> None:
    made = watch(task, SimpleNamespace(get_scale=lambda: 0.5))
    assert made.row(1, {"loss": 0.1, "gradient_norm": 1.0}, 1e-3) is None and made.lot(1) is None


def test_weights_that_are_not_finite_are_named(task: Task) -> None:
    made = watch(task, everything=False)
    assert made.weights(4) is None
    with torch.no_grad():
        task.trained()[0][1, 2] = torch.nan
    fault = found(made.weights(4))
    assert fault.step == 4 and fault.what == "trained tensors are not finite: 0.rows.text_encoder"


def test_a_row_is_compared_with_the_longest_known_one(task: Task) -> None:
    made, rows = watch(task), task.trained()[0]
    longest = float(task.family.embedding("text_encoder").weight.norm(dim=1).max())
    with torch.no_grad():
        rows[0] *= (ROW_TIMES - 0.1) * longest / rows[0].norm()
        assert made.lot(3) is None
        rows[0] *= (ROW_TIMES + 0.1) / (ROW_TIMES - 0.1)
    fault = found(made.lot(3))
    assert "a new row of text_encoder has norm" in fault.what and fault.curable
    assert watch(task, everything=False).lot(3) is None


@pytest.mark.parametrize("gradient", ["none", "zero", "some"])
def test_a_tensor_must_have_a_gradient_once(task: Task, gradient: str) -> None:
    made, rows = watch(task), task.trained()[0]
    for step in range(1, WITHIN + 1):
        rows.grad = None if gradient == "none" else torch.zeros_like(rows)
        if gradient == "some" and step == 5:
            rows.grad = torch.full_like(rows, 1e-30)
        made.gradients()
        made.kept()
        assert made.row(step, {"loss": 0.1}, 1e-3) is None
        fault = made.lot(step)
        assert fault is None or step == WITHIN
    assert (fault is None) == (gradient == "some")
    if fault is not None:
        assert "1 trained tensors never had a gradient: 0.rows.text_encoder" in fault.what
        assert not fault.curable


def test_steps_that_move_nothing_do_not_count(task: Task) -> None:
    """In a warm-up's first step the rate is 0, and fp16 skips steps: what is behind zeros has to wait."""
    made, rows = watch(task, SimpleNamespace(get_scale=lambda: 2.0)), task.trained()[0]
    for step in range(1, WITHIN + 10):
        rows.grad = torch.zeros_like(rows)
        made.gradients()
        still = {"loss": 0.1, "gradient_norm": math.inf if step % 2 else 1.0}
        assert made.row(step, still, 0.0 if step < 4 else 1e-3) is None and made.lot(step) is None


def test_the_last_good_checkpoint_is_older_than_the_fault(tmp_path: Path, monkeypatch: Any) -> None:
    kept = [0, 10, 20, 29, 30, 40]
    damaged: set[int] = set()

    def at(folder: Path) -> State | None:
        step = int(folder.name[5:])
        return None if step in damaged else State(folder, step, {}, {})

    monkeypatch.setattr(checkpoint, "steps", lambda output: kept)
    monkeypatch.setattr(checkpoint, "at", at)

    def good(since: int) -> int | None:
        state = mend.last_good(tmp_path, Fault(since + 5, since, "", ()))
        return None if state is None else state.step

    assert good(31) == 29  # the weights of step 30 gave the first bad loss
    assert good(25) == 20 and good(2) == 0 and good(1) == 0 and good(100) == 40
    damaged |= {20, 10, 0}
    assert good(30) == 29 and good(25) is None


def test_rates_are_slowed_together_and_stay_so_when_continued() -> None:
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]

    def make() -> tuple[torch.optim.Optimizer, Any]:
        groups = [{"params": [weights[0]]}, {"params": [weights[1]], "lr": 0.5}]
        made = optimiser.build(groups, "sgd", 0.1)
        return made, optimiser.schedule(made, "linear", 2, 10)

    made, schedule = make()
    plain = []
    for _ in range(8):
        made.step()
        schedule.step()
        plain.append(schedule.get_last_lr())
    made, schedule = make()
    rates = list(schedule.base_lrs)
    for _ in range(3):
        made.step()
        schedule.step()
    mend.slow_down(schedule, rates, 0.5)
    mend.slow_down(schedule, rates, 0.25)  # of the full rates, not of the last
    assert [group["lr"] for group in made.param_groups] == pytest.approx([rate / 4 for rate in plain[2]])
    other, continued = make()
    other.load_state_dict(made.state_dict())
    continued.load_state_dict(schedule.state_dict())
    for step in range(3, 8):
        for one, its in ((made, schedule), (other, continued)):
            one.step()
            its.step()
            assert its.get_last_lr() == pytest.approx([rate / 4 for rate in plain[step]])
        assert schedule.get_last_lr() == continued.get_last_lr()


def test_what_the_user_reads() -> None:
    fault = Fault(7, 7, "no finite number: loss is nan", guard.LOWER + guard.PRECISION)
    good = State(Path("out/checkpoints/step-0000004"), 4, {}, {})
    told = mend.ending(fault, "stop", False, 0, good, "Names: out/bad-step-7.json.")
    assert told == (
        "step 7: no finite number: loss is nan. Training stopped; the last good checkpoint is "
        "out/checkpoints/step-0000004.\nNames: out/bad-step-7.json.\nWhat may help: a lower "
        "train.learning_rate; a warm-up (train.warmup); train.precision: fp32; train.guard: back, which goes "
        "back and lowers the rate by itself."
    )
    again = mend.ending(fault, "back", True, 1, None, "")
    assert "after going back 1 time; there is no checkpoint before it" in again
    assert "fp32" not in again and "train.guard" not in again and "\n\n" not in again
