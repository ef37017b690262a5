"""Task: the one module that accelerate prepares; a batch in, a loss out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from tuner.batch import Batch
from tuner.family import Cond, Family
from tuner.method import Method
from tuner.objective import Objective
from tuner.text import Text, Tokens


class Task(nn.Module):
    """The loss of a batch under an objective, for a base adapted by methods.

    The family stands outside of the module tree, so only what is trained is seen by DDP and by checkpoints.
    """

    def __init__(self, family: Family, methods: Sequence[Method], objective: Objective) -> None:
        super().__init__()
        self.methods = nn.ModuleList(methods)
        object.__setattr__(self, "family", family)
        self.objective = objective

    family: Family

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch's part of the optimiser step's loss, and figures to log.

        The loss is the weighted sum over the batch's samples divided by the whole step's sum of weights, so
        that adding up over micro-batches and processes gives the mean over the step's batch.
        """
        main = self._main()
        if main.WHOLE_STEP:
            each, figures = main.loss(self.family, batch)
        else:
            each, figures = self.losses(batch), {}
        return (each * batch.weight).sum() / batch.total, figures

    def each(self) -> list[Method]:
        """The methods."""
        return [cast(Method, method) for method in self.methods]

    def named_trained(self) -> list[tuple[str, nn.Parameter]]:
        """What is trained, by name, in a fixed order."""
        return [
            (f"{number}.{name}", parameter)
            for number, method in enumerate(self.each())
            for name, parameter in method.trained().items()
        ]

    def trained(self) -> list[nn.Parameter]:
        """What is trained."""
        return [parameter for _, parameter in self.named_trained()]

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the methods."""
        return {
            f"{number}.{name}": tensor
            for number, method in enumerate(self.each())
            for name, tensor in method.tensors().items()
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put tensors() of an earlier run back."""
        for number, method in enumerate(self.each()):
            mine = {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{number}.")}
            method.load_tensors(mine)

    def losses(self, batch: Batch) -> Tensor:
        """The weighted loss of each sample [B] in float32."""
        x0 = self.latents(batch)
        t = self.objective.sample_t(batch.u)
        noised = self.objective.noise(x0, batch.noise, t, batch.input_noise)
        cond = self._condition(batch)
        pred = self._predict(noised.x_t, noised.t, cond, batch)
        return self.objective.loss(pred, noised).mean(dim=(1, 2, 3)) * noised.weight

    def _condition(self, batch: Batch) -> Cond:
        """What the denoiser is told of a batch."""
        family, concat = self.family, None
        assert not family.told_sizes or batch.sizes is not None
        if family.inpainting:
            assert batch.pixels is not None and batch.hole is not None
            concat = family.inpaint(batch.pixels, batch.hole)
        return family.condition(self._text(batch), batch.sizes, concat)

    def latents(self, batch: Batch) -> Tensor:
        """The clean latents [B, C, h, w] of a batch: a draw from the autoencoder's posterior."""
        moments = batch.moments
        if moments is None:
            assert batch.pixels is not None
            moments = self.family.encode_images(batch.pixels)
        return moments.sample(batch.posterior)

    def _text(self, batch: Batch) -> Text:
        """The encoded captions; the cached encoding where there is one."""
        if batch.text is not None:
            return batch.text
        assert batch.tokens is not None
        return self.encode(batch.tokens)

    def encode(self, tokens: Tokens) -> Text:
        """Captions as the adapted base reads them."""
        return self._chosen("encode").encode(self.family, tokens)

    def _predict(self, x_t: Tensor, t: Tensor, cond: Cond, batch: Batch) -> Tensor:
        return self._chosen("predict").predict(self.family, x_t, t, cond, batch)

    def _main(self) -> Method:
        return self.each()[0]

    def _chosen(self, step: str) -> Method:
        """The method that has its own way of a step, else the first."""
        own = [m for m in self.each() if getattr(type(m), step) is not getattr(Method, step)]
        return own[0] if own else self._main()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """The loss of each sample [B], without gradients."""
        main = self._main()
        return main.loss(self.family, batch)[0] if main.WHOLE_STEP else self.losses(batch)
