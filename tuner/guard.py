"""The divergence guard: how a run that goes wrong is recognised; what happens then: tuner/mend.py.

Looked for are

- a loss or a gradient that is no finite number, in every step; under fp16 the gradient's overflow is a part
  of the scaler's search, and wrong only once the scale has fallen below 1;
- a loss far outside its history (`Losses`);
- an embedding row much longer than every known one (ROW_TIMES);
- a trained tensor without any gradient, or still all zeros, after WITHIN steps;
- trained tensors that are not finite, before each checkpoint.

What a step reports stays on the device until it is read in lots (meter.Meter), so a GPU is never waited for
because of the guard; the steps of a lot are judged in their order, and a bad one is found exactly. Nothing
here changes a number of a healthy run.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tuner.processes import own_part
from tuner.task import Task

RECENT, WINDOW, ENOUGH = 20, 500, 40
"""Losses that are judged together; earlier ones they are compared with, at most and at least."""
OVER, TIMES = 15, 2.0
"""So many of the recent losses must exceed all of the window, and their median this many times its median."""
FIRST, FIRST_TIMES = 10, 10.0
"""Or: the recent median exceeds the largest of the run's first losses this many times."""
AT_ONCE = 1e4
"""Or, in the beginning: the median of all losses behind the run's first one exceeds it this many times."""
WITHIN = 20
"""Optimiser steps after which every trained tensor must have had a gradient, and have moved."""
ROW_TIMES = 50.0
"""How many times as long as the longest known row of its table a new row may become."""
UNSEEN = ("k_proj.bias",)
"""What may stay without a gradient: a key's bias adds the same to all scores, which softmax does not see."""

LOWER = ("a lower train.learning_rate", "a warm-up (train.warmup)")
PRECISION = ("train.precision: fp32",)
HARMLESS = ("train.guard: off, if it is meant to be so",)
"""Advice."""


@dataclass(frozen=True)
class Fault:
    """Something that went wrong.

    Attributes:
        step: the optimiser step, counted from 1, that shows it.
        since: the first step that shows it; before `step` where it took several to be sure.
        what: in words.
        advice: what may help.
        curable: going back with a lower learning rate may help, and the step's batch is worth a look.
    """

    step: int
    since: int
    what: str
    advice: tuple[str, ...]
    curable: bool = True


class Diverged(Exception):
    """Leaves the training loop with a Fault, and what the step reported."""

    def __init__(self, fault: Fault, figures: Mapping[str, float]) -> None:
        super().__init__(fault.what)
        self.fault, self.figures = fault, dict(figures)


class Losses:
    """Whether losses stay within their history.

    A step's loss depends on the timesteps drawn, so single losses differ by factors of hundreds and no fixed
    number of deviations is safe. Judged is the rank instead, which needs no distribution: were the losses
    of a window of n and the recent m = 20 exchangeable, at least k = 15 of the recent would exceed all of the
    window with probability C(m, k) / C(n + m, k) (count the places of the k largest): 3e-10 at n = 40, 5e-25
    at n = 500. The factor on the medians (TIMES) leaves out what is real but harmless, such as a learning
    rate that rises again. Losses that explode before there is a window are compared with the run's first
    ones (FIRST_TIMES). In 35 000 steps of 21 runs of this project never more
    than 5 of 20 exceeded the window, and the recent median was at most 1.6 times the window's and 1.1 times
    the largest of the first ten.
    """

    def __init__(self) -> None:
        self.first: list[float] = []
        self.last: deque[float] = deque(maxlen=WINDOW + RECENT)

    def add(self, loss: float) -> int | None:
        """Take in a step's loss; None while all is well, else how many steps ago the losses went astray."""
        if len(self.first) < FIRST:
            self.first.append(loss)
        self.last.append(loss)
        every = list(self.last)
        window, recent = every[:-RECENT], every[-RECENT:]
        middle = median(recent)
        if FIRST < len(every) <= RECENT + FIRST:
            later, limit = every[1:][-RECENT:], AT_ONCE * self.first[0]
            if median(later) > limit > 0:
                return _since(later, limit)
        if len(window) >= FIRST and middle > (limit := FIRST_TIMES * max(self.first)) > 0:
            return _since(recent, limit)
        if len(window) < ENOUGH:
            return None
        limit = max(window)
        astray = sum(one > limit for one in recent) >= OVER and middle > TIMES * median(window) > 0
        return _since(recent, limit) if astray else None

    def state(self) -> dict[str, list[float]]:
        """What a checkpoint keeps."""
        return {"first": list(self.first), "last": list(self.last)}

    def load(self, state: Mapping[str, Sequence[float]]) -> None:
        """Take back what `state` gave."""
        self.first = list(state["first"])
        self.last = deque(state["last"], maxlen=WINDOW + RECENT)


def _since(recent: Sequence[float], limit: float) -> int:
    """How many steps ago it began: from there on the most more losses are above the limit than not."""
    signs = [1 if loss > limit else -1 for loss in recent]
    begin = max(range(len(signs)), key=lambda i: (sum(signs[i:]), -i))
    return len(recent) - 1 - begin


class Watch:
    """Looks at a run's steps.

    Attributes:
        times: how often the run went back.
        slowed: what the recipe's learning rates are multiplied by since.
    """

    def __init__(self, task: Task, scaler: Any, everything: bool) -> None:
        """
        Args:
            scaler: the gradient scaler under fp16, else None.
            everything: False: only numbers that are not finite are looked for.
        """
        self.task, self.scaler, self.everything = task, scaler, everything
        self.losses, self.times, self.slowed = Losses(), 0, 1.0
        self._names = [name for name, _ in task.named_trained()]
        self._seen: Tensor | None = None  # bool [tensors]: it had a gradient, on the device
        self._locked: set[str] = set()  # whose gradient a method takes away
        self._counted = 0  # steps that moved something, until they are enough
        self._overflows = 0  # since the last lot
        self._longest = self._known() if everything else {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a continued run judges as one that was never stopped."""
        return {"times": self.times, "slowed": self.slowed, **self.losses.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.times, self.slowed = int(state["times"]), float(state["slowed"])
        self.losses.load(state)

    @torch.no_grad()
    def gradients(self) -> None:
        """Look at the gradients as they came, once a step; only as long as tensors are missing some."""
        if not self.everything or self._counted >= WITHIN:
            return
        each = self.task.trained()
        none = torch.zeros((), dtype=torch.bool, device=each[0].device)
        seen = torch.stack([none if p.grad is None else (own_part(p.grad) != 0).any() for p in each])
        self._seen = seen if self._seen is None else self._seen | seen

    def kept(self) -> None:
        """Look at which gradients the methods left, once a step, before they are used."""
        if self.everything and self._counted < WITHIN:
            self._locked |= {name for name, p in self.task.named_trained() if p.grad is None}

    def row(self, step: int, figures: Mapping[str, float], learning_rate: float) -> Fault | None:
        """Judge what a step reported."""
        loss, norm = figures["loss"], figures.get("gradient_norm", 0.0)
        overflowed = self.scaler is not None and math.isfinite(loss) and not math.isfinite(norm)
        self._overflows += overflowed
        wrong = {n: v for n, v in figures.items() if not (math.isfinite(v) or overflowed)}
        if wrong:
            listed = ", ".join(f"{_words(name)} is {value}" for name, value in wrong.items())
            return Fault(step, step, f"no finite number: {listed}", LOWER + PRECISION)
        self._counted += learning_rate > 0 and not overflowed
        ago = self.losses.add(loss) if self.everything else None
        if ago is None:
            return None
        recent = median(list(self.losses.last)[-RECENT:])
        usual = median(list(self.losses.last)[:-RECENT])
        what = f"the loss left its history: {recent:.4g} over {RECENT} steps, {usual:.4g} before"
        return Fault(step, step - ago, what, LOWER + HARMLESS)

    @torch.no_grad()
    def lot(self, step: int) -> Fault | None:
        """Judge what can be seen after `step` without a step of its own; called after each lot's rows."""
        if self._overflows and self.scaler.get_scale() < 1.0:
            what = f"the gradient overflows fp16 at every scale (now {self.scaler.get_scale():g})"
            return Fault(step, step, what, LOWER + PRECISION)
        self._overflows = 0
        if not self.everything:
            return None
        return self._rows(step) or self._still(step)

    @torch.no_grad()
    def weights(self, step: int) -> Fault | None:
        """Judge the trained tensors, before they are written."""
        tensors = self.task.tensors()
        bad = torch.stack([~own_part(tensor).isfinite().all() for tensor in tensors.values()])
        found = self.task.anywhere(bad).tolist()
        wrong = [name for name, is_so in zip(tensors, found, strict=True) if is_so]
        if not wrong:
            return None
        return Fault(step, step, f"trained tensors are not finite: {_few(wrong)}", LOWER + PRECISION)

    def _known(self) -> dict[str, float]:
        """The longest known row of each table that new rows are learned for, by text encoder."""
        learned = {
            encoder: self.task.family.embedding(encoder).weight.detach()
            for method in self.task.each()
            for encoder, rows in method.new_rows().items()
            if rows.requires_grad
        }
        return {encoder: float(table.float().norm(dim=1).max()) for encoder, table in learned.items()}

    def _rows(self, step: int) -> Fault | None:
        """A new row that is far longer than every known one."""
        for method in self.task.each() if self._longest else []:
            for encoder, rows in method.new_rows().items():
                found = float(rows.norm(dim=1).max()) if encoder in self._longest else 0.0
                if found > ROW_TIMES * self._longest.get(encoder, math.inf):
                    known = self._longest[encoder]
                    what = f"a new row of {encoder} has norm {found:.4g}; the longest known one {known:.4g}"
                    advice = (*LOWER, "method.textual_inversion.norm: kept", *HARMLESS)
                    return Fault(step, step, what, advice)
        return None

    def _still(self, step: int) -> Fault | None:
        """Tensors that did not leave zero, or had no gradient, once the first steps are done.

        Both are told: what lies behind a convolution that stays zero has no gradient because of it.
        """
        if self._seen is None or self._counted < WITHIN:
            return None
        seen, self._seen = self.task.anywhere(self._seen).tolist(), None
        judged = [name for name in self._names if not name.endswith(UNSEEN)]
        dead = [n for n, had in zip(self._names, seen, strict=True) if not had and n in judged]
        free = {n: p for n, p in self.task.named_trained() if n in judged and n not in self._locked}
        moves = [own_part(p).any() for p in free.values()]
        moved = self.task.anywhere(torch.stack(moves)).tolist() if free else []
        still = [name for name, has in zip(free, moved, strict=True) if not has]
        told = [f"{len(still)} trained tensors began as zeros and never moved: {_few(still)}"] * bool(still)
        told += [f"{len(dead)} trained tensors never had a gradient: {_few(dead)}"] * bool(dead)
        if not told:
            return None
        what = f"after {WITHIN} steps {' and '.join(told)}"
        return Fault(step, step, what, HARMLESS, curable=False)


def _words(figure: str) -> str:
    return figure.replace("_", " ")


def _few(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
