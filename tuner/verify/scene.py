"""The surroundings of a check: exact arithmetic, inputs that are always the same, copies of the bare base."""

from __future__ import annotations

import copy
import json
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tuner import quantised
from tuner.batch import Batch
from tuner.family import Cond, Family
from tuner.method import Method
from tuner.text import Text

PROMPTS = ("a photo of a red star on a blue ground", "")
SIDE = 16  # cells of the latent: a multiple of what four-level UNets need
SEED = 20240229


@dataclass(frozen=True)
class Scene:
    """Fixed random inputs for a family's denoiser, two samples at two times."""

    family: Family
    x_t: Tensor  # [2, C, SIDE, SIDE]
    t: Tensor  # [2]
    picture: Tensor  # [2, 3, SIDE * factor, SIDE * factor] in [0, 1]

    @classmethod
    def of(cls, family: Family) -> Scene:
        """The scene on the family's device."""
        generator = torch.Generator().manual_seed(SEED)
        pixels = SIDE * family.factor
        x_t = torch.randn(2, family.latent_channels, SIDE, SIDE, generator=generator)
        picture = torch.rand(2, 3, pixels, pixels, generator=generator)
        t = torch.tensor([501, 101])
        return cls(family, *(tensor.to(family.device) for tensor in (x_t, t, picture)))

    def text(self, method: Method, prompts: Sequence[str] = PROMPTS) -> Text:
        """Prompts as the trainer encodes them."""
        return method.encode(self.family, self.family.tokenize(prompts).to(self.family.device))

    def own(self, method: Method, text: Text) -> Tensor:
        """The trainer's own prediction [2, C, SIDE, SIDE]."""
        zero, one = torch.zeros_like(self.x_t), torch.ones(2, device=self.x_t.device)
        batch = Batch(("a", "b"), PROMPTS, one, 2.0, one / 2, zero, zero, text=text, condition=self.picture)
        return method.predict(self.family, self.x_t, self.t, self.cond(text), batch)

    def cond(self, text: Text) -> Cond:
        """What a denoiser is told."""
        return self.family.condition(text)

    def with_denoiser(self, denoiser: nn.Module, text: Text) -> Tensor:
        """The prediction [2, C, SIDE, SIDE] of another denoiser."""
        return self.family.predict(denoiser, self.x_t, self.t, self.cond(text))

    @contextmanager
    def without(self, methods: Sequence[Method]) -> Iterator[None]:
        """Other methods of the run are off."""
        with ExitStack() as stack:
            for method in methods:
                stack.enter_context(method.off(self.family))
            yield

    def bare_pipeline(self, without_tokens: Sequence[str] = ()) -> Any:
        """The family's diffusers pipeline around copies of denoiser and text encoders, without any adapter.

        Args:
            without_tokens: words that the run added to the tokenisers and the copies shall not know.
        """
        pipe = self.family.pipeline()
        found = {name: part for name, part in pipe.components.items() if part is not None}
        adapted = [self.family.denoiser, *self.family.text_encoders.values()]
        parts = {n: bare_copy(part) for n, part in found.items() if any(part is module for module in adapted)}
        assert len(parts) == len(adapted), "the pipeline is made of the family's own networks"
        if without_tokens:
            words = {name: part for name, part in found.items() if name.startswith("tokenizer")}
            parts |= {name: forgetful_copy(part, without_tokens) for name, part in words.items()}
        pipe.register_modules(**parts)
        return pipe


def bare_copy(module: nn.Module) -> nn.Module:
    """A network's deep copy with peft's adapters taken out."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    made = copy.deepcopy(module)
    layers = [(name, layer) for name, layer in made.named_modules() if isinstance(layer, BaseTunerLayer)]
    for name, layer in layers:
        parent, _, last = name.rpartition(".")
        setattr(made.get_submodule(parent), last, layer.get_base_layer())
    for mark in ("peft_config", "_hf_peft_config_loaded"):
        if mark in vars(made):
            delattr(made, mark)
    return made.eval().requires_grad_(False)


def forgetful_copy(tokenizer: Any, words: Sequence[str]) -> Any:
    """A tokeniser as it was before `words` were added to it."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in Path(folder).glob("*.json"):
            content = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(listed := content.get("added_tokens"), list):
                content["added_tokens"] = [token for token in listed if token["content"] not in words]
            if isinstance(table := content.get("added_tokens_decoder"), dict):
                kept = {number: token for number, token in table.items() if token["content"] not in words}
                content["added_tokens_decoder"] = kept
            file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        made = type(tokenizer).from_pretrained(folder)
    assert len(made) == len(tokenizer) - len(words), "exactly the added words are forgotten"
    return made


@contextmanager
def exact(family: Family, methods: Sequence[Method]) -> Iterator[None]:
    """Within it: float32 throughout, no autocast, no gradients, no dropout, quiet libraries.

    Afterwards tensors, modes, gradients' flags and random states are as before, bitwise.
    """
    networks = [*family.modules().values(), *methods]
    modes = [(module, module.training) for network in networks for module in network.modules()]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(family.device.type, enabled=False))
        stack.enter_context(_random_kept(family.device))
        stack.enter_context(quiet())
        stack.enter_context(_float32(networks))
        stack.enter_context(quantised.exact(networks))
        try:
            for network in networks:
                network.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def _float32(networks: Sequence[nn.Module]) -> Iterator[None]:
    """What is held in half precision is held in float32; the original memory is put back afterwards."""
    unique = {id(t): t for network in networks for t in [*network.parameters(), *network.buffers()]}
    half = [t for t in unique.values() if t.dtype in (torch.float16, torch.bfloat16)]
    kept = [tensor.data for tensor in half]
    try:
        for tensor in half:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in zip(half, kept, strict=True):
            tensor.data = data


@contextmanager
def rounded(tensors: Iterable[Tensor], dtype: torch.dtype) -> Iterator[None]:
    """Within it the tensors have the values that a file of `dtype` would give them."""
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    kept = [tensor.data for tensor in floating]
    try:
        for tensor in floating:
            tensor.data = tensor.data.to(dtype).to(tensor.dtype)
        yield
    finally:
        for tensor, data in zip(floating, kept, strict=True):
            tensor.data = data


@contextmanager
def _random_kept(device: torch.device) -> Iterator[None]:
    """The random states of torch, numpy and Python are put back."""
    python, numbers = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and warnings of the loaders: what they warn of is checked here."""
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    logs = (diffusers_log, transformers_log)
    levels, bars = [log.get_verbosity() for log in logs], [log.is_progress_bar_enabled() for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, level, bar in zip(logs, levels, bars, strict=True):
            log.set_verbosity(level)
            if bar:
                log.enable_progress_bar()
