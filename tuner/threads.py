"""A micro-batch's parts, each computed on a CPU thread of its own.

Small networks leave a second thread little to do inside of single operations: on two cores a step of the
embedded base takes as long with two threads as with one. Its samples are independent of one another, so a
part of them goes through the network on each thread instead (benchmarks/threads.py). The sum of the parts'
gradients is taken in their order, so that it is the same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from tuner.batch import Batch
from tuner.family import Family
from tuner.method import Method

LARGEST = 32 * 32
"""Latents of a picture up to which a part on each thread is faster: 256 x 256 pixels."""


class Threads:
    """Losses and gradients of micro-batches, computed in parts."""

    def __init__(self, task: nn.Module, trained: Sequence[nn.Parameter], count: int) -> None:
        """
        Args:
            task: gives a batch's part of the loss, as accelerate prepared it.
            trained: what gets gradients.
            count: threads, at least 2.
        """
        assert count > 1
        self.task, self.trained, self.count = task, list(trained), count
        # Operations in these threads have no further threads of their own.
        self._pool = ThreadPoolExecutor(count, "part", lambda: torch.set_num_threads(1))

    @staticmethod
    def fit(batch: Batch) -> bool:
        """Whether parts of a batch are likely faster than the whole."""
        return len(batch.names) > 1 and batch.noise.shape[-2:].numel() <= LARGEST

    def backward(self, batch: Batch) -> Tensor:
        """The batch's part of the loss; its gradients are added to those of the trained parameters."""
        parts = [self._pool.submit(self._part, part) for part in batch.parts(self.count)]
        done = [part.result() for part in parts]
        with torch.no_grad():
            for i, parameter in enumerate(self.trained):
                for gradient in (gradients[i] for _, gradients in done):
                    if gradient is None:
                        continue
                    if parameter.grad is None:
                        parameter.grad = gradient.clone()  # it may be a view of another one
                    else:
                        parameter.grad += gradient
        return torch.stack([loss for loss, _ in done]).sum()

    def _part(self, batch: Batch) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        loss, _ = self.task(batch)
        return loss.detach(), torch.autograd.grad(loss, self.trained, allow_unused=True)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


def sound(family: Family, methods: Sequence[Method], device: torch.device, processes: int) -> bool:
    """Whether a run may compute in parts, on the threads that it has.

    Not where a loss is one of the whole batch, and not where something draws random numbers while it
    computes: the threads would draw them in no certain order. Several processes have a thread each.
    """
    if device.type != "cpu" or processes > 1 or torch.get_num_threads() < 2:
        return False
    if any(method.WHOLE_STEP or getattr(method.config, "dropout", 0.0) for method in methods):
        return False
    return not any(
        isinstance(module, nn.Dropout) and module.p > 0
        for network in family.modules().values()
        for module in network.modules()
    )
