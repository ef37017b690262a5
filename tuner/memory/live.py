"""The bytes of tensors that live while something is computed, counted on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Scratch = Callable[[Any, Sequence[Any], Any], int]
"""What an operation needs besides its arguments and results, in bytes: (operation, arguments, results)."""


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, the memory of every tensor that an operation makes counts until the tensor is gone.

    Memory is counted once however many tensors look at it, so views are free. Autograd works as ever: what
    is saved for the backward pass lives until that has used it, and gradients live from then on. So `peak` is
    the exact maximum of what a caching allocator without any waste would hold, operation by operation.

    Attributes:
        now: bytes that live, without those that `known` has.
        peak: their maximum until now, an operation's own scratch memory included.
    """

    def __init__(self, known: Iterable[Tensor], scratch: Scratch | None = None) -> None:
        """
        Args:
            known: tensors that are not counted: weights.
            scratch: what operations need besides their results.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = list(known)  # held, so that no other memory gets their keys
        self._seen: dict[int, Any] = {_key(tensor): None for tensor in self._known}
        self._scratch = scratch
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self._add(tensor)
        extra = 0 if self._scratch is None else self._scratch(func, args, out)
        self.peak = max(self.peak, self.now + extra)
        return out

    def _add(self, tensor: Tensor) -> None:
        memory, key = tensor.untyped_storage(), _key(tensor)
        if key in self._seen:
            return
        size = memory.nbytes()
        self.now += size

        def gone(_: object) -> None:
            del self._seen[key]
            self.now -= size

        self._seen[key] = weakref.ref(memory, gone)


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def _tensors(out: object) -> Iterator[Tensor]:
    """The tensors among what an operation gives."""
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, (tuple, list)):
        for part in out:
            yield from _tensors(part)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors' memory, each piece once."""
    pieces = {_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(pieces.values())


def blocked(func: Any, args: Sequence[Any], out: Any) -> int:
    """Scratch memory of oneDNN's convolutions on the CPU: results, and arguments, in the library's own order.

    It computes in blocks of channels, and reorders into and out of them.
    """
    if func not in _CONVOLUTIONS:
        return 0
    found = [*_tensors(list(args)), *_tensors(out)]
    return sum(tensor.numel() * tensor.element_size() for tensor in found)


_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)
