"""Task: the one module that accelerate prepares; a batch in, a loss out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tuner import device
from tuner.batch import Batch
from tuner.export import embedding, files
from tuner.export.metadata import with_hash
from tuner.family import Cond, Family
from tuner.method import Card, Method
from tuner.objective import Objective
from tuner.text import Text, Tokens

if TYPE_CHECKING:
    from tuner.sharding import Shards


class Task(nn.Module):
    """The loss of a batch under an objective, for a base adapted by methods.

    The family stands outside of the module tree, so only what is trained is seen by DDP and by checkpoints.
    """

    def __init__(self, family: Family, methods: Sequence[Method], objective: Objective) -> None:
        super().__init__()
        self.methods = nn.ModuleList(methods)
        object.__setattr__(self, "family", family)
        self.objective = objective
        self.shards: Shards | None = None

    family: Family

    def share_out(self, accelerator: Accelerator) -> None:
        """Part the networks among the processes if the launcher says so, before an optimiser is made."""
        asked = device.sharding()
        assert self.shards is None
        if asked is not None and accelerator.num_processes > 1:
            from tuner import sharding  # torch's part of it takes long to import

            found = sharding.networks(self.family, self.each())
            self.shards = sharding.Shards(found, accelerator, asked.reshard)

    def prepared(self, accelerator: Accelerator, made: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """This module and its optimiser as they are trained: in the run's precision, or by DDP as well."""
        if self.shards is None:
            task, optimiser = accelerator.prepare(self, made)
            return task, optimiser
        task = accelerator.prepare_model(self, device_placement=False, evaluation_mode=True)
        return task, accelerator.prepare(made)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within it every process has the networks whole, to look at; all have to enter and to leave it."""
        if self.shards is None:
            yield
            return
        with self.shards.whole():
            yield

    @contextmanager
    def gathering(self, prepared: nn.Module, accelerator: Accelerator, last: bool) -> Iterator[None]:
        """Around a micro-batch's forward and backward: gradients are averaged behind the `last` of a step."""
        if self.shards is not None:
            self.shards.last(last)
            yield
            if last:
                self.shards.average(self.trained())
        elif last:
            yield
        else:
            with accelerator.no_sync(prepared):
                yield

    def clip(self, accelerator: Accelerator, most: float) -> Tensor:
        """Scale the gradients to a norm of at most `most`; the norm before, a number."""
        if self.shards is not None:
            return self.shards.clip(self.trained(), most)
        norm: Tensor = accelerator.clip_grad_norm_(self.trained(), most)
        return norm

    def anywhere(self, flags: Tensor) -> Tensor:
        """Flags [n] about the trained tensors, set where any process that holds a part of them has it."""
        return flags if self.shards is None else self.shards.anywhere(flags)

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
        loss = self.objective.loss(pred, noised)
        if batch.mask is not None:
            loss = loss * batch.mask
        return loss.mean(dim=(1, 2, 3)) * noised.weight

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
        """Captions as the adapted base reads them: with the new words and the adapters of all methods."""
        methods = self.each()
        rows = {encoder: table for method in methods for encoder, table in method.new_rows().items()}
        learns = not all(method.CACHES_TEXT for method in methods)
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            return self.family.encode_prompts(tokens, rows or None)

    def _predict(self, x_t: Tensor, t: Tensor, cond: Cond, batch: Batch) -> Tensor:
        """By the one method that has its own way of it; adapters sit in the denoiser itself."""
        own = [method for method in self.each() if type(method).predict is not Method.predict]
        assert len(own) <= 1, "methods with their own way to predict do not combine"
        return (own or self.each())[0].predict(self.family, x_t, t, cond, batch)

    def _main(self) -> Method:
        return self.each()[0]

    def export(self, folder: Path, card: Card) -> list[Path]:
        """Write every method's files, and words that were trained with a LoRA into one file with it besides.

        That file is `bundle/NAME.safetensors`: not beside the others, as diffusers refuses it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        written = {method.kind: method.export(self.family, folder, card) for method in self.each()}
        every = [path for paths in written.values() for path in paths]
        if {"lora", "textual_inversion"} <= written.keys():
            name = f"{card.name}.safetensors"
            adapter, told = files.load([path for path in written["lora"] if path.name == name][-1])
            words = {path.stem: files.load(path)[0] for path in written["textual_inversion"]}
            tensors = embedding.bundle(adapter, words)
            header = with_hash(told, tensors) if told else {}
            every.append(files.save(folder / embedding.FOLDER / name, tensors, header))
        return every

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """The loss of each sample [B], without gradients."""
        main = self._main()
        return main.loss(self.family, batch)[0] if main.WHOLE_STEP else self.losses(batch)
