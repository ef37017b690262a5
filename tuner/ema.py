"""An exponential moving average of the trained parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from tuner.errors import UserError


class EmaError(UserError):
    """A decay out of range, or a saved average that belongs to other parameters."""


class Ema:
    """Float32 averages of named parameters, each on the device that its parameter was on at the start.

    average <- d average + (1 - d) parameter, with d = min(decay, (1 + step) / (10 + step)), so that early
    averages forget the start (the warm-up of TensorFlow's ExponentialMovingAverage with `num_updates`).
    """

    def __init__(self, parameters: Iterable[tuple[str, Parameter]], decay: float) -> None:
        """The averages start as the parameters' present values. `decay` is in [0, 1).

        Raises:
            EmaError: for a decay out of range.
        """
        if not 0.0 <= decay < 1.0:
            raise EmaError(f"the decay of an average must be in [0, 1), found {decay}")
        named = list(parameters)
        self.decay = decay
        self.parameters = dict(named)
        assert len(self.parameters) == len(named) > 0, "names must differ, and there must be one"
        self._averages = {name: p.detach().float().clone() for name, p in named}
        self._swapped = False

    def decay_at(self, step: int) -> float:
        """The decay that `update(step)` uses."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the parameters as they are; `step` is the number of optimiser steps done, from 1."""
        assert step >= 1, step
        assert not self._swapped, "the averages are swapped in: there is nothing trained to take in"
        for name, parameter in self.parameters.items():
            self._averages[name].lerp_(parameter.detach().float(), 1.0 - self.decay_at(step))

    def keep(self) -> None:
        """Put the averages into the parameters for good, at the end of training."""
        assert not self._swapped
        self._write(self._averages)

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Within it the parameters hold the averages, in their own precision.

        After it they hold bitwise what they held before, also when an exception leaves it.
        """
        assert not self._swapped, "the averages are swapped in already"
        trained = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._swapped = True
        try:
            self._write(self._averages)
            yield
        finally:
            self._write(trained)
            self._swapped = False

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the averages, float32, by the parameters' names."""
        return {name: average.clone() for name, average in self._averages.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state_dict` gave; all or nothing.

        Raises:
            EmaError: when names, shapes or precision differ from these parameters'.
        """
        missing, extra = (self._averages.keys() - state.keys(), state.keys() - self._averages.keys())
        if missing or extra:
            raise EmaError(f"saved averages lack {sorted(missing)} and have unknown {sorted(extra)}")
        for name, average in self._averages.items():
            saved = state[name]
            if saved.shape != average.shape or saved.dtype != average.dtype:
                raise EmaError(
                    f"saved average {name!r} is {tuple(saved.shape)} {saved.dtype}, "
                    f"expected {tuple(average.shape)} {average.dtype}"
                )
        for name, average in self._averages.items():
            average.copy_(state[name])

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        # In place, so that wrappers and optimisers that hold the parameters go on holding them.
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
