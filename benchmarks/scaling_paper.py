"""Bytes that a step moves between GPUs, from the product's networks on the meta device; and their time."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import flops
import torch
from steps_case import METHODS, SIDES
from torch import nn

GPUS = (8, 64, 512)
LINKS = {"NVLink": (450e9, 3e-6), "InfiniBand 400 Gb/s": (50e9, 6e-6), "Ethernet 25 Gb/s": (3.125e9, 3e-5)}
"""Bytes a second in one direction, and seconds from one to the next for a message."""
BUCKET = 25 * 2**20
"""Bytes that DDP sends together (torch.nn.parallel.DistributedDataParallel, bucket_cap_mb)."""


@dataclass(frozen=True)
class Moved:
    """What a step of a method moves, for all of which a share (N - 1) / N goes over a GPU's link.

    Attributes:
        trained: numbers that are trained.
        gradients: their bytes as gradients, which are float32.
        gathered: bytes of parameters that FSDP2 puts together, forward and backward.
        parted: bytes of gradients that FSDP2 adds up and parts; the rest of `gradients` is added up whole.
        messages: gatherings and partings of a step.
        forward, backward: TFLOP of one picture, latents and text cached where they can be.
    """

    family: str
    method: str
    side: int
    trained: int
    gradients: int
    gathered: int
    parted: int
    messages: int
    forward: float
    backward: float

    def ddp(self, gpus: int, link: str) -> float:
        """Seconds: the gradients are added up in rings, bucket by bucket."""
        buckets = math.ceil(self.gradients / BUCKET)
        return _seconds(2 * self.gradients, 2 * buckets, gpus, link)

    def fsdp(self, gpus: int, link: str) -> float:
        """Seconds: parameters are put together; gradients are parted, those of small tensors added up."""
        whole = self.gradients - self.parted
        sent = self.gathered + self.parted + 2 * whole
        return _seconds(sent, self.messages + 2 * math.ceil(whole / BUCKET), gpus, link)

    def picture(self, rate: float) -> float:
        """Seconds of one picture at so many TFLOP/s."""
        return (self.forward + self.backward) / rate


def _seconds(sent: int, messages: int, gpus: int, link: str) -> float:
    speed, hop = LINKS[link]
    return sent * (gpus - 1) / gpus / speed + messages * math.log2(gpus) * hop


def rows(families: list[str], methods: list[str]) -> Iterator[dict[str, Any]]:
    """Of each family and method what a step moves."""
    for family in families:
        for method in methods:
            yield asdict(moved(family, method))


def moved(family: str, method: str) -> Moved:
    """What a step of a method moves, found by a pass on the meta device in bf16."""
    from tuner import recipe, single_file
    from tuner.memory import model as models
    from tuner.memory import step

    side = SIDES[family]
    base = "embedded" if family == "embedded" else single_file.CONFIGS / family
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "case.yaml"
        place.write_text(
            f"base: {base}\nmethod: {METHODS[method]}\noutput: none\n"
            f"data: {{source: none, resolution: {side}}}\n"
            "train: {steps: 1, batch_size: 1, learning_rate: 1e-4, precision: bf16}\n"
        )
        model = models.build(recipe.load(place), "cuda", torch.bfloat16)
    blocks = _Blocks(model)
    _, work = flops.of_model(model, step._batch(model, 1, side, side))
    trained = model.trained()
    assert all(parameter.dtype == torch.float32 for parameter in trained)
    numbers = sum(parameter.numel() for parameter in trained)
    forward, backward = work.forward / 1e12, work.backward / 1e12
    gathered, parted, messages = blocks.found()
    return Moved(family, method, side, numbers, 4 * numbers, gathered, parted, messages, forward, backward)


class _Blocks:
    """The parts that tuner.sharding puts together, and whether a backward pass comes through each."""

    def __init__(self, model: Any) -> None:
        from tuner import sharding
        from tuner.adapters.layers import path_of

        self._called: dict[nn.Module, bool] = {}
        self._own: dict[nn.Module, list[nn.Parameter]] = {}  # of a block, without those of blocks within it
        self._roots: set[nn.Module] = set()
        for network in sharding.networks(model.family, model.methods).values():
            self._roots.add(network)
            kept = {p for name, p in network.named_parameters() if path_of(name) is not None}
            paths = [path for path, _ in network.named_modules() if sharding.BLOCK.fullmatch(path)]
            seen = set(kept)
            for block in [*(network.get_submodule(path) for path in reversed(paths)), network]:
                self._own[block] = [p for p in dict.fromkeys(block.parameters()) if p not in seen]
                seen |= set(self._own[block])
                block.register_forward_hook(self._seen)

    def _seen(self, block: nn.Module, _: Any, output: Any) -> None:
        self._called[block] = any(one.requires_grad for one in _tensors(output))

    def found(self) -> tuple[int, int, int]:
        """Bytes put together; bytes of gradients parted; messages.

        What is left over of a network stays whole between forward and backward, and is put together once.
        """
        gathered = parted = messages = 0
        for block, own in self._own.items():
            if block not in self._called or not own:
                continue
            times = 2 if self._called[block] and block not in self._roots else 1
            trained = sum(4 * p.numel() for p in own if p.requires_grad)
            gathered += times * sum(p.numel() * p.element_size() for p in own)
            parted += trained
            messages += times + (trained > 0)
        assert messages > 0
        return gathered, parted, messages


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict):
        for one in output.values():
            yield from _tensors(one)
    elif isinstance(output, (tuple, list)):
        for one in output:
            yield from _tensors(one)
