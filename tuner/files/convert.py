"""`tuner convert`: the same file in another tool's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuner.errors import UserError
from tuner.export import adapter, cldm, files, metadata, rules_controlnet
from tuner.export import contents as reading
from tuner.export.component import save_component
from tuner.export.contents import Contents
from tuner.export.identify import ADAPTERS, identify
from tuner.export.places import Base
from tuner.export.rules_embedding import PAIR
from tuner.files import account, bases, write

FORMS = ("kohya", "peft", "diffusers", "comfy", "a1111", "cldm")
_EVERYWHERE = ("kohya", "comfy", "a1111")  # one file for all of them
_CONTROL_CONFIG = (  # what a ControlNetModel's configuration shares with the UNet's it was cloned from
    "act_fn",
    "addition_embed_type",
    "addition_time_embed_dim",
    "attention_head_dim",
    "block_out_channels",
    "cross_attention_dim",
    "down_block_types",
    "downsample_padding",
    "flip_sin_to_cos",
    "freq_shift",
    "in_channels",
    "layers_per_block",
    "norm_eps",
    "norm_num_groups",
    "num_attention_heads",
    "projection_class_embeddings_input_dim",
    "transformer_layers_per_block",
    "use_linear_projection",
)
_ROW = re.compile(r"(?P<word>.+)_(?P<index>[1-9]\d*)")


def convert(source: Path, to: str, out: Path, base: str | None) -> list[str]:
    """Write `source` in the names of `to`; a line for what was done.

    Args:
        source: a LoRA or kin, a file of word vectors, or a ControlNet's weights.
        to: one of FORMS.
        out: a file; for a ControlNet in diffusers' form a folder.
        base: the name or folder of the base it was made for; found by names and sizes where None.

    Raises:
        UserError: a form that there is not or that cannot hold this file, or keys that no base has.
    """
    if to not in FORMS:
        raise UserError(f"--to {to}: expected one of {', '.join(FORMS)}")
    source = reading.file_of(source)
    write.check_free(out, source)
    contents = reading.read(source)
    identity = identify(contents)
    if identity.kind in ADAPTERS:
        return _adapter(source, to, out, bases.choose(base, contents, identity), base)
    if identity.kind == "embedding":
        lines = _embedding(contents, source, to, out)
        try:
            made = bases.choose(base, contents, identity)
        except UserError:
            if base is not None:
                raise
            return lines  # of a width that no named base has
        return [*lines, account.summary(out, made)]
    if identity.kind == "ControlNet":
        return _controlnet(contents, source, to, out, bases.choose(base, contents, identity))
    raise UserError(
        f"{source.name}: {identity.kind} is not converted here; expected a LoRA or kin, word vectors, or a "
        "ControlNet"
    )


def _adapter(source: Path, to: str, out: Path, base: Base, asked: str | None) -> list[str]:
    if to == "cldm":
        raise UserError(f"--to cldm: {source.name} is an adapter; expected one of {', '.join(FORMS[:-1])}")
    tensors, told = write.load(source)
    made = adapter.read(tensors, told, base, write.ASK_BASE)
    what = f"{source.name} -> {out.name}: {len(made.modules)} modules"
    derived = _derived(to, source, told)
    if to not in _EVERYWHERE:
        write.peft(out, made, told, derived)
        return [f"{what} in peft's names", account.summary(out, base, ("diffusers",))]
    changes = {write.DERIVED: derived}
    if not made.magnitudes:
        write.kohya(out, made, base, told, changes)
        return [f"{what} in kohya's names", account.summary(out, base)]
    if asked is None or (folder := bases.folder_named(asked)) is None:
        raise UserError(
            f"{source.name} is a DoRA: only its whole effect on a base's weights is read right outside of "
            "diffusers; give the base that it was made for: --base FOLDER"
        )
    weights = weights_of(folder, made.modules)
    write.kohya(out, adapter.Adapter(dict(made.differences(weights)), {}), base, told, changes)
    return [f"{what}, as whole differences of the weights of {base.name}", account.summary(out, base)]


def _derived(to: str, source: Path, told: Mapping[str, str]) -> str:
    return write.derived(f"convert to {to} of {source.stem}", told)


def weights_of(folder: Path, paths: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of some modules of a base, by their path with the component first."""
    found: dict[str, Tensor] = {}
    for component in sorted({path.partition(".")[0] for path in paths}):
        own = bases.weights(folder / component)
        for path in paths:
            if path.startswith(f"{component}."):
                found[path] = own[f"{path.partition('.')[2]}.weight"]
    return found


def _embedding(contents: Contents, source: Path, to: str, out: Path) -> list[str]:
    """One tensor with all vectors, or one for each of two text encoders."""
    if to in ("peft", "cldm"):
        raise UserError(
            f"--to {to}: {source.name} holds word vectors; expected diffusers, comfy, a1111 or kohya"
        )
    tensors, told = write.load(source)
    if not set(tensors) >= set(PAIR):
        rows = _rows(tensors, source)
        word = next(iter(rows))
        if word in ("emb_params", "clip_l", "clip_h"):
            word = f"<{out.stem}>"
        tensors = {word: torch.cat([rows[key].reshape(-1, rows[key].shape[-1]) for key in rows])}
    elif others := sorted(set(tensors) - set(PAIR)):
        raise UserError(f"{source.name}: {', '.join(others)} beside clip_l and clip_g")
    changes = write.renamed(out, told, _derived(to, source, told))
    files.save(write.out_file(out), tensors, metadata.derived(told, tensors, changes))
    vectors = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in tensors.items())
    return [f"{source.name} -> {out.name}: {vectors}; ComfyUI, A1111 and kohya call it {out.stem}"]


def _rows(tensors: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The vectors of one word in their order: `<x>`, `<x>_1`, `<x>_2` ..."""
    heads = [key for key in tensors if not ((m := _ROW.fullmatch(key)) and m["word"] in tensors)]
    if len(heads) != 1:
        raise UserError(f"{source.name} holds several words ({', '.join(sorted(heads))}); one file holds one")
    order = [heads[0], *(f"{heads[0]}_{index}" for index in range(1, len(tensors)))]
    if sorted(order) != sorted(tensors):
        raise UserError(f"{source.name}: expected the keys {', '.join(order)}, found {', '.join(tensors)}")
    return {key: tensors[key] for key in order}


def _controlnet(contents: Contents, source: Path, to: str, out: Path, base: Base) -> list[str]:
    if to in ("kohya", "peft"):
        raise UserError(f"--to {to}: {source.name} is a ControlNet; expected diffusers, cldm, comfy or a1111")
    tensors, told = write.load(source)
    config = _control_config(contents, base)
    found = rules_controlnet.layout(contents)
    plain = cldm.from_cldm(tensors, config) if found == "cldm" else tensors
    changes = write.renamed(out, told, _derived(to, source, told))
    if to == "diffusers":
        if out.suffix == ".safetensors":
            raise UserError(
                f"--out {out}: expected a folder's name; diffusers reads config.json beside the weights"
            )
        save_component(out, config, plain, metadata.derived(told, plain, changes))
        done = f"{source.name} -> {out.name}: {len(plain)} tensors and config.json, in diffusers' names"
        return [done, account.summary(bases.weights_files(out)[0], base, ("diffusers",))]
    named = cldm.to_cldm(plain, config)
    files.save(write.out_file(out), named, metadata.derived(told, named, changes))
    done = f"{source.name} -> {out.name}: {len(named)} tensors in the original code's names"
    return [done, account.summary(out, base)]


def _control_config(contents: Contents, base: Base) -> dict[str, Any]:
    """The configuration of a ControlNetModel of this base."""
    shape = next(
        shape for key, shape in contents.shapes.items() if key.endswith(tuple(rules_controlnet.HINT.values()))
    )
    return {
        "_class_name": "ControlNetModel",
        **{key: base.unet[key] for key in _CONTROL_CONFIG if key in base.unet},
        "conditioning_channels": shape[1],
        "conditioning_embedding_out_channels": [16, 32, 96, 256],
    }
