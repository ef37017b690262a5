"""LoHa, LoKr and full differences in LyCORIS' names, which ComfyUI, A1111 and Forge read.

diffusers and kohya's sd-scripts refuse them. LoHa: arXiv 2108.06098; LoKr: arXiv 2309.14859; the formulas are
those of peft's layers, which cite LyCORIS.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tuner.export.kohya import SD1, LoraError, LoraModule, Naming, kohya_name

_PEFT_KEY = re.compile(r"(?P<path>.+)\.(?P<kind>hada|lokr)_(?P<role>[wt]\d(_[ab])?)(\.(?P<adapter>[^.]+))?")


class LohaModule(NamedTuple):
    """`scale * (w1_a @ w1_b) * (w2_a @ w2_b)`, elementwise between the products.

    The factors are [out, r] and [r, in * kh * kw]; with t1 and t2 (both or none, [r, r, kh, kw]) they are
    [r, out] and [r, in].
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    scale: float  # alpha / r
    t1: Tensor | None = None
    t2: Tensor | None = None


class LokrModule(NamedTuple):
    """`scale * kron(w1, w2)`, where either may be the product of two factors, and w2 one of three with t2."""

    scale: float  # alpha / r
    w1: Tensor | None = None  # [out1, in1]
    w1_a: Tensor | None = None  # [out1, r]
    w1_b: Tensor | None = None  # [r, in1]
    w2: Tensor | None = None  # [out2, in2] or [out2, in2, kh, kw]
    w2_a: Tensor | None = None  # [out2, r], with t2 [r, out2]
    w2_b: Tensor | None = None  # [r, in2] or [r, in2 * kh * kw], with t2 [r, in2]
    t2: Tensor | None = None  # [r, r, kh, kw]

    @property
    def rank(self) -> int | None:
        """By which readers divide alpha; None where both factors are whole, and alpha is not read."""
        factor = self.w2_b if self.w2_b is not None else self.w1_b
        return None if factor is None else int(factor.shape[0])


class Difference(NamedTuple):
    """A layer's whole change."""

    weight: Tensor  # as the layer's own
    bias: Tensor | None = None


Change = LoraModule | LohaModule | LokrModule | Difference


def change(module: Change, shape: tuple[int, ...]) -> Tensor:
    """What a module adds to a weight of this shape, computed and given in float64.

    Raises:
        LoraError: the factors do not make that shape.
    """
    if isinstance(module, LoraModule):
        whole = module.up.double().flatten(1) @ module.down.double().flatten(1) * module.scale
    elif isinstance(module, LohaModule):
        first = _product(module.w1_a, module.w1_b, module.t1)
        whole = first * _product(module.w2_a, module.w2_b, module.t2) * module.scale
    elif isinstance(module, LokrModule):
        whole = _kron(module) * module.scale
    else:
        whole = module.weight.double()
    if whole.numel() != torch.Size(shape).numel() or whole.shape[0] != shape[0]:
        raise LoraError(f"the factors make {list(whole.shape)}, the layer is {list(shape)}")
    return whole.reshape(shape)


def to_lycoris(modules: Mapping[str, Change], names: Naming = SD1) -> dict[str, Tensor]:
    """LoHa, LoKr and differences by module path -> tensors by LyCORIS' names.

    alpha = scale * rank. Readers ignore it where a LoKr has no factored part (ComfyUI, A1111, Forge, and
    LyCORIS itself), so the scale is multiplied into `lokr_w2` there.

    Raises:
        LoraError: no modules, two paths with one name, or a plain LoRA (kohya.to_kohya writes these).
    """
    if not modules:
        raise LoraError("there is no module to export")
    tensors: dict[str, Tensor] = {}
    for path in sorted(modules):
        name, module = kohya_name(path, names), modules[path]
        own = {f"{name}.{part}": tensor for part, tensor in _parts(path, module).items()}
        if own.keys() & tensors.keys():
            raise LoraError(f"{path}: another module has the same name, {name}")
        tensors |= own
    return tensors


def from_peft(state: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, Change]:
    """peft's tensors (`<path>.hada_w1_a`, `<path>.lokr_w2.default` ...) -> modules by path.

    `scales` gives each path the factor that peft multiplies with (`layer.scaling[adapter]`).

    Raises:
        LoraError: a key of another kind, a module that lacks a factor, or scales that do not name exactly the
            modules found.
    """
    found: dict[str, dict[str, Tensor]] = {}
    kinds: dict[str, str] = {}
    for key, tensor in state.items():
        match = _PEFT_KEY.fullmatch(key)
        if match is None:
            raise LoraError(f"{key}: not a factor of a LoHa or LoKr (hada_ or lokr_)")
        path = match["path"].removeprefix("base_model.model.")
        if kinds.setdefault(path, match["kind"]) != match["kind"]:
            raise LoraError(f"{path}: LoHa and LoKr at once")
        found.setdefault(path, {})[match["role"]] = tensor
    if wrong := sorted(set(found) ^ set(scales)):
        raise LoraError(f"{wrong[0]}: has {'tensors but no scale' if wrong[0] in found else 'no tensors'}")
    return {path: module(path, kinds[path], parts, scales[path]) for path, parts in found.items()}


def module(path: str, kind: str, parts: Mapping[str, Tensor], scale: float) -> LohaModule | LokrModule:
    """A LoHa (`hada`) or LoKr (`lokr`) of its parts by role (`w1_a`, `t2` ...).

    Raises:
        LoraError: a factor is missing or one too many.
    """
    made = LohaModule if kind == "hada" else LokrModule
    try:
        whole = made(scale=scale, **parts)
    except TypeError as error:
        raise LoraError(f"{path}: {sorted(parts)} are not the factors of a {made.__name__[:4]}") from error
    if isinstance(whole, LohaModule):
        complete = (whole.t1 is None) == (whole.t2 is None)
    else:
        pairs = [(whole.w1, whole.w1_a, whole.w1_b), (whole.w2, whole.w2_a, whole.w2_b)]
        complete = all((w is None) == (a is not None) == (b is not None) for w, a, b in pairs)
    if not complete:
        raise LoraError(f"{path}: {sorted(parts)} are not the factors of a {made.__name__[:4]}")
    return whole


def from_dora(weight: Tensor, lora: LoraModule, magnitude: Tensor) -> Difference:
    """The whole change of a DoRA: m * (W + sBA) / |W + sBA| - W, norms over each output (arXiv 2402.09353).

    Args:
        weight: W [out, in] or [out, in, kh, kw].
        magnitude: m, as peft keeps it: [out], or [1, out, 1, 1] for a convolution.

    Raises:
        LoraError: there is not one magnitude for each output.
    """
    if magnitude.numel() != weight.shape[0]:
        raise LoraError(f"{magnitude.numel()} magnitudes for {weight.shape[0]} outputs")
    adapted = weight.double() + change(lora, tuple(weight.shape))
    norms = adapted.flatten(1).norm(dim=1)
    factors = (magnitude.double().flatten() / norms).reshape(-1, *[1] * (weight.ndim - 1))
    kept = torch.promote_types(lora.up.dtype, torch.float32)
    return Difference((factors * adapted - weight.double()).to(kept))


def _parts(path: str, module: Change) -> dict[str, Tensor]:
    """What a file holds of a module, by the ending of its key."""
    if isinstance(module, Difference):
        return {"diff": module.weight} | ({} if module.bias is None else {"diff_b": module.bias})
    if isinstance(module, LoraModule):
        raise LoraError(f"{path}: a plain LoRA has no LyCORIS names")
    kind, parts = ("hada" if isinstance(module, LohaModule) else "lokr"), module._asdict()
    scale = float(parts.pop("scale"))
    rank = module.w1_b.shape[0] if isinstance(module, LohaModule) else module.rank
    if rank is None:
        # The product in float32 at least, so that factors of half precision are rounded once.
        wide = torch.promote_types(parts["w2"].dtype, torch.float32)
        parts["w2"] = (parts["w2"].to(wide) * scale).to(parts["w2"].dtype)
        scale, rank = 1.0, 1
    own = {f"{kind}_{role}": tensor for role, tensor in parts.items() if tensor is not None}
    return own | {"alpha": torch.tensor(scale * rank, dtype=torch.float32)}


def _product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """a @ b, or with a core tensor the Tucker product [out, in, kh, kw] of a [r, out] and b [r, in]."""
    if core is None:
        return a.double() @ b.double()
    return torch.einsum("ijkl,jr,ip->prkl", core.double(), b.double(), a.double())


def _kron(module: LokrModule) -> Tensor:
    """kron(w1, w2) [out1 * out2, in1 * in2, ...]."""
    w1 = module.w1.double() if module.w1 is not None else None
    if w1 is None:
        assert module.w1_a is not None and module.w1_b is not None
        w1 = _product(module.w1_a, module.w1_b, None)
    w2 = module.w2.double() if module.w2 is not None else None
    if w2 is None:
        assert module.w2_a is not None and module.w2_b is not None
        w2 = _product(module.w2_a, module.w2_b, module.t2)
    # torch.kron wants w2 contiguous, and einsum may give it otherwise.
    return torch.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - 2)), w2.contiguous())
