"""Gradient checkpointing (arXiv 1604.06174): what a block computes is not kept but computed again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from tuner.compiling import passed
from tuner.errors import UserError
from tuner.family import Family
from tuner.method import Method

Again = Callable[..., Any]
"""Calls a module with arguments so that the backward pass calls it again."""

PLAIN: Again = functools.partial(checkpoint, use_reentrant=False)


def switch_on(family: Family, methods: Sequence[Method], again: Again = PLAIN) -> None:
    """Let the networks that gradients go through keep their blocks' inputs only.

    It changes no result: the same operations run on the same numbers, dropout's included.

    Args:
        again: torch's own way.

    Raises:
        UserError: a network does not offer it.
    """
    for name, network in passed(family, methods).items():
        if hasattr(network, "enable_gradient_checkpointing"):  # diffusers
            network.enable_gradient_checkpointing(again)
        elif hasattr(network, "config"):  # transformers
            _text(network, again)
        else:
            raise UserError(f"train.gradient_checkpointing: the {name} of this base does not offer it")


def _text(network: nn.Module, again: Again) -> None:
    """A network of transformers: its layers recompute in training mode only, which changes nothing else.

    CLIP's dropout is 0; and nothing puts the layers back into evaluation mode for good.
    """
    found = 0
    for module in network.modules():
        if hasattr(module, "gradient_checkpointing"):
            state: Any = module
            state.gradient_checkpointing, state._gradient_checkpointing_func = True, again
            state.training = True
            found += 1
    assert found, "a text encoder has layers"
