"""`tuner resize`: a LoRA of another rank, and a LoRA of what is none."""

from __future__ import annotations

from pathlib import Path

from tuner.errors import UserError
from tuner.export import adapter, lycoris
from tuner.export import contents as reading
from tuner.export.identify import ADAPTERS, identify
from tuner.export.kohya import LoraModule
from tuner.files import bases, write
from tuner.files.lowrank import Cut, Kept, nearest, report, shrink


def resize(source: Path, cut: Cut, out: Path, base: str | None) -> list[str]:
    """Write the LoRA that comes nearest to `source` in each module; lines that say what was kept.

    LoHa, LoKr and whole differences become LoRA.

    Raises:
        UserError: no cut or two, no LoRA or kin, or a DoRA.
    """
    cut.check()
    contents = reading.read(source)
    identity = identify(contents)
    if identity.kind not in ADAPTERS:
        raise UserError(f"{source.name}: expected a LoRA or kin, found {identity.kind}")
    made = bases.choose(base, contents, identity)
    tensors, told = write.load(source)
    found = adapter.read(tensors, told, made)
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
    told = {key: value for key, value in told.items() if key != "ss_network_args"}
    write.kohya(out, adapter.Adapter(dict(modules), {}), made, told, {"ss_network_module": "networks.lora"})
    return [f"{source.name} -> {out.name}", *report(kept)]
