"""Low-rank products that come nearest to a given change, by singular values (Eckart and Young, 1936)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tuner.errors import UserError
from tuner.export.kohya import LoraModule


class Cut(NamedTuple):
    """How much is kept: a rank, or the least rank that keeps this share of the energy of each module."""

    rank: int | None = None
    energy: float | None = None

    def check(self) -> Cut:
        """Itself.

        Raises:
            UserError: not exactly one of the two is given, or it is out of range.
        """
        if (self.rank is None) == (self.energy is None):
            raise UserError("expected either --rank or --energy")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"--rank {self.rank}: expected at least 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UserError(f"--energy {self.energy}: expected a share, above 0 and at most 1")
        return self

    def of(self, values: Tensor) -> int:
        """How many of these singular values (largest first) are kept, at least 1."""
        if self.rank is not None:
            return min(self.rank, len(values))
        assert self.energy is not None
        total = float((values**2).sum())
        kept = (values**2).cumsum(0) / total if total else torch.ones(len(values))
        # Rounding may leave the last sum just below 1.
        return min(int((kept < self.energy * (1 - 1e-12)).sum()) + 1, len(values))


class Kept(NamedTuple):
    """A module after the cut."""

    module: LoraModule
    energy: float  # the share of the change's squared norm that is left, in [0, 1]
    size: float  # the squared norm of the whole change


def shrink(lora: LoraModule, cut: Cut) -> Kept:
    """The product of lower rank that comes nearest to `scale * up @ down`.

    The factors are orthogonalised first, so that the singular values are those of a matrix r by r.
    """
    up, down = lora.up.double().flatten(1) * lora.scale, lora.down.double().flatten(1)
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T)
    return _kept(q_up @ left, values, right @ q_down.T, tuple(lora.down.shape[1:]), cut, lora.up.dtype)


def nearest(change: Tensor, cut: Cut, dtype: torch.dtype) -> Kept:
    """The low-rank product that comes nearest to a whole change [out, in] or [out, in, kh, kw]."""
    left, values, right = torch.linalg.svd(change.double().flatten(1), full_matrices=False)
    return _kept(left, values, right, tuple(change.shape[1:]), cut, dtype)


def _kept(
    left: Tensor, values: Tensor, right: Tensor, rest: tuple[int, ...], cut: Cut, dtype: torch.dtype
) -> Kept:
    """The first singular vectors as factors of equal norm, which half precision holds best."""
    rank, total = cut.of(values), float((values**2).sum())
    roots = values[:rank].sqrt()
    up, down = left[:, :rank] * roots, roots[:, None] * right[:rank]
    module = LoraModule(
        down.reshape(rank, *rest).to(dtype).contiguous(),
        up.reshape(-1, rank, *[1] * (len(rest) - 1)).to(dtype).contiguous(),
        1.0,
    )
    kept = float((values[:rank] ** 2).sum())
    return Kept(module, kept / total if total else 1.0, total)


def report(kept: dict[str, Kept]) -> list[str]:
    """Lines that say what was kept, in all and of the modules that lost most."""
    total = sum(each.size for each in kept.values())
    share = sum(each.energy * each.size for each in kept.values()) / total if total else 1.0
    ranks = sorted({each.module.down.shape[0] for each in kept.values()})
    span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    worst = sorted(kept, key=lambda path: kept[path].energy)[:3]
    lost = ", ".join(f"{path} {kept[path].energy:.2%}" for path in worst)
    return [f"{len(kept)} modules, {span}: {share:.2%} of the energy kept; least of {lost}"]
