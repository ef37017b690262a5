"""`tuner resize`: a LoRA of another rank, and a LoRA of what is none."""

from __future__ import annotations

from pathlib import Path

from tuner.errors import UserError
from tuner.export import adapter, lycoris
from tuner.export import contents as reading
from tuner.export.identify import ADAPTERS, identify
from tuner.export.kohya import LoraModule
from tuner.files import account, bases, write
from tuner.files.lowrank import Cut, Kept, nearest, report, shrink


def resize(source: Path, cut: Cut, out: Path, base: str | None) -> list[str]:
    """Write the LoRA that comes nearest to `source` in each module; lines that say what was kept.

    LoHa, LoKr and whole differences become LoRA.

    Raises:
        UserError: no cut or two, no LoRA or kin, or a DoRA.
    """
    cut.check()
    source = reading.file_of(source)
    write.check_free(out, source)
    contents = reading.read(source)
    identity = identify(contents)
    if identity.kind not in ADAPTERS:
        raise UserError(f"{source.name}: expected a LoRA or kin, found {identity.kind}")
    made = bases.choose(base, contents, identity)
    tensors, told = write.load(source)
    found = adapter.read(tensors, told, made, write.ASK_BASE)
    if found.magnitudes:
        raise UserError(f"{source.name} is a DoRA: its change depends on the base; `tuner convert` it first")
    layers, kept = made.layers(), dict[str, Kept]()
    for path, module in found.modules.items():
        if isinstance(module, LoraModule):
            kept[path] = shrink(module, cut)
        elif len(layers[path]) == 1 or (isinstance(module, lycoris.Difference) and module.bias is not None):
            raise UserError(f"{source.name}: {path} changes a bias or a norm, which a LoRA cannot")
        else:
            dtype = next(t.dtype for t in module if t is not None and not isinstance(t, float))
            kept[path] = nearest(lycoris.change(module, layers[path]), cut, dtype)
    modules = {path: each.module for path, each in kept.items()}
    asked = f"rank {cut.rank}" if cut.rank is not None else f"energy {cut.energy:g}"
    changes = {
        "ss_network_module": "networks.lora",
        "ss_network_args": None,
        write.DERIVED: write.derived(f"resize {asked} of {source.stem}", told),
    }
    write.kohya(out, adapter.Adapter(dict(modules), {}), made, told, changes)
    return [f"{source.name} -> {out.name}", *report(kept), *_beyond(cut, kept), account.summary(out, made)]


def _beyond(cut: Cut, kept: dict[str, Kept]) -> list[str]:
    """A line that says where there was less than the rank that was asked for."""
    ranks = {each.module.down.shape[0] for each in kept.values()}
    few = sum(each.module.down.shape[0] < (cut.rank or 0) for each in kept.values())
    if not few:
        return []
    return [
        f"--rank {cut.rank} is more than there is: {few} of {len(kept)} modules have {max(ranks)} or less"
    ]
