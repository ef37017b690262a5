"""The same tensor work as a training step's, by hand: what benchmarks/steps.py compares our loop with.

No data, no log, no guard, no meter: latents, noise, times and text are there before, and the loop is the
calls of the networks, the loss, the backward pass, the clipping and the optimiser.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from tuner import device, loop
from tuner.method import Method


class Bare:
    """Steps over the first batch of a run, on the run's own networks, with an optimiser of its own.

    The learning rate is 0, so that the run trains on as if these steps were not: the work is the same.
    """

    def __init__(self, run: loop.Run, made: loop.Made) -> None:
        task, about = run.task, run.recipe.train
        assert about.accumulate == 1 and len(run.methods) == 1 and run.accelerator.scaler is None
        self.family: Any = run.family
        self.method: Any = run.methods[0]
        self.unet: Any = run.family.denoiser
        self.trained = task.trained()
        self.clip, self.compiled = about.clip, made.compiled
        self.optimiser = loop.build_optimiser(run.methods, about)
        for group in self.optimiser.param_groups:
            group["lr"] = 0.0
        self.where = run.accelerator.device
        self.lower = device.DTYPES.get(run.accelerator.mixed_precision)
        slots = run.plan.step(0)  # type: ignore[union-attr]
        batch = run.data.batch(slots, sum(slot.weight for slot in slots)).to(self.where)
        with torch.no_grad():
            t = task.objective.sample_t(batch.u)
            self.noised = task.objective.noise(task.latents(batch), batch.noise, t, batch.input_noise)
            self.text = task._text(batch) if self._reads_before() else None
        self.share = batch.weight / batch.total * self.noised.weight
        self.batch, self.objective = batch, task.objective
        held = next(p.dtype for p in self.unet.parameters() if p.is_floating_point())
        self.x_t = self.noised.x_t.to(held)

    def _reads_before(self) -> bool:
        """Whether no text encoder is a part of the step."""
        return bool(self.method.CACHES_TEXT)

    def step(self) -> Tensor:
        """One step; its loss, left on the device."""
        lower = self.lower
        with self.compiled.on(self.batch):  # what the product has compiled is compiled here, too
            with nullcontext() if lower is None else torch.autocast(self.where.type, lower):
                pred = self._predict()
            each = self.objective.loss(pred.float(), self.noised).mean(dim=(1, 2, 3))
            loss = (each * self.share).sum()
            loss.backward()
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.trained, self.clip)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.detach()

    def _predict(self) -> Tensor:
        """The networks' calls."""
        text = self.text
        if text is None:
            assert self.batch.tokens is not None
            text = self.family.encode_prompts(self.batch.tokens, self.method.new_rows() or None)
        x_t, t = self.x_t, self.noised.t
        hidden = text.hidden.to(x_t.dtype)
        told = self.family._told(x_t, self.family.condition(text, self.batch.sizes), x_t.dtype)
        more: dict[str, Any] = {}
        if type(self.method).predict is not Method.predict:
            branch = self.method.branch
            held = next(branch.parameters()).dtype
            down, middle = branch(
                x_t.to(held),
                t,
                encoder_hidden_states=hidden.to(held),
                controlnet_cond=self.batch.condition.to(held),
                return_dict=False,
                **told,
            )
            more["down_block_additional_residuals"] = [one.to(x_t.dtype) for one in down]
            more["mid_block_additional_residual"] = middle.to(x_t.dtype)
        pred: Tensor = self.unet(x_t, t, encoder_hidden_states=hidden, return_dict=False, **more, **told)[0]
        return pred
