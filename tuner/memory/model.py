"""A run's networks and methods on the meta device: every shape and type, no number and no memory."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tuner import base, components, hub, rounding, single_file
from tuner.adapters.layers import path_of
from tuner.errors import UserError
from tuner.family import Family, Options
from tuner.memory import recompute
from tuner.memory.rules import Rules, choose_attention
from tuner.method import Method
from tuner.methods.controlnet import DECODER
from tuner.recipe import METHODS, Recipe

META = torch.device("meta")
_ASIDE: Mapping[str, Mapping[str, Any]] = {  # keys of methods that need numbers or files, and change no size
    "lora": {"merge": [], "init": "default"},
    "controlnet": {"start": None, "unlock_decoder_at": None},
    "full": {"checkpoint_file": False},
}


@dataclass(frozen=True)
class Model:
    """What a run holds.

    Attributes:
        recipe: what it is made from.
        family: its networks are as they are held in training.
        methods: as they train.
        device: cpu or cuda.
        dtype: what is computed in.
        rules: the types and the attention of a step.
        loaded: bytes of each network as it is loaded, before it is cast.
    """

    recipe: Recipe
    family: Family
    methods: tuple[Method, ...]
    device: str
    dtype: torch.dtype
    rules: Rules
    loaded: dict[str, int]

    def tensors(self) -> list[Tensor]:
        """All parameters and buffers."""
        modules = [*self.family.modules().values(), *self.methods]
        return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]

    def trained(self) -> list[nn.Parameter]:
        """What is trained."""
        found = {id(p): p for method in self.methods for p in method.trained().values()}
        return list(found.values())


def build(recipe: Recipe, device: str, dtype: torch.dtype) -> Model:
    """A recipe's networks and methods.

    Of a base at the Hub the configurations are downloaded where they are not here yet, no weights.

    Raises:
        UserError: there is no such base, or the methods do not fit it.
    """
    kinds = {name: importlib.import_module(f"{METHODS}.{name}").METHOD for name in recipe.method}
    needs = sorted({need for kind in kinds.values() for need in kind.NEEDS})
    options = Options(clip_skip=recipe.base.clip_skip, windows=recipe.base.windows, hold=dtype)
    options = Options(**{**vars(options), "exact": _exact(recipe, kinds)})
    family = _family(recipe, needs, options)
    if "textual_inversion" in kinds:
        _give_tables(family)
    methods = tuple(_method(kind, name, recipe, family) for name, kind in kinds.items())
    for module in (*family.modules().values(), *methods):
        module.to(META)
    networks = {**family.modules(), "branch": getattr(methods[0], "branch", None)}
    for network in (networks.get("unet"), networks["branch"]):
        if network is not None:
            choose_attention(network, device)
    trained = [p for method in methods for p in method.trained().values()]
    loaded = {
        name: _held(network, torch.float32 if name in recipe.base.new else options.dtype(name))
        for name, network in family.modules().items()
    }
    if recipe.train.trained_precision == "bf16":
        rounding.narrow(trained)
    if dtype != torch.float32:
        family.cast(dtype, trained if recipe.train.trained_precision == "fp32" else ())
    rules = Rules(device, dtype)
    if recipe.train.gradient_checkpointing:
        within = functools.partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), rules))
        recompute.switch_on(family, methods, within)
    for method in methods:
        method.train_mode(True)
    return Model(recipe, family, methods, device, dtype, rules, loaded)


def _exact(recipe: Recipe, kinds: dict[str, type[Method]]) -> tuple[str, ...]:
    """The networks that are loaded in float32 whatever is computed in; as tuner.build asks for them."""
    narrow = {"full"} if recipe.train.trained_precision == "bf16" else set()
    own = {name: kind for name, kind in kinds.items() if name not in narrow}
    exact = {part for name, kind in own.items() for part in kind.exact(recipe.method[name])}
    branch = recipe.method.get("controlnet")
    if any(getattr(branch, key, None) is not None for key in ("unlock_decoder_at", "rank")):
        exact.add("unet")
    return tuple(sorted(exact))


def _held(network: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of a network as it is loaded, without the adapters that a method put into it."""
    own = [t for name, t in network.named_parameters() if path_of(name) is None]
    both = (*own, *network.buffers())
    return sum(t.numel() * (dtype.itemsize if t.is_floating_point() else t.element_size()) for t in both)


def _family(recipe: Recipe, needs: Sequence[str], options: Options) -> Family:
    folder, vae = configs(recipe)
    kind = importlib.import_module(f"tuner.families.{base.recognise(folder)}").FAMILY
    names = [name for need in needs for name in (kind.ENCODERS if need == "text_encoder" else (need,))]
    with META:
        networks = {
            name: components.fresh(name, vae if name == "vae" else folder / name, seed=0)
            for name in dict.fromkeys(names)
        }
    words = {name: _Words(networks[name]) for name in kind.ENCODERS if name in networks}
    scheduler = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text(encoding="utf-8")) if scheduler.is_file() else {}
    family: Family = kind(networks, words, config, options, folder)
    family.device = META
    return family


def configs(recipe: Recipe) -> tuple[Path, Path]:
    """The folder with a base's configurations, and the one with its autoencoder's.

    Raises:
        UserError: there is no such base.
    """
    about = recipe.base
    place = Path(about.path)
    if about.path == "embedded":
        folder = base.EMBEDDED
    elif place.is_dir():
        folder = place
    elif place.is_file():
        folder = single_file.CONFIGS / single_file.describe(place, about.prediction).config
    elif about.path.count("/") != 1 or about.path.startswith((".", "/", "~")):
        raise UserError(
            f"base.path: {about.path}: no such folder or file "
            "(expected embedded, a diffusers folder, a .safetensors checkpoint, or a Hub id)"
        )
    else:
        folder = hub.fetch(about.path, about.revision, hub.patterns([]))
    own = folder / "vae"
    return folder, Path(about.vae) if about.vae is not None and Path(about.vae).is_dir() else own


def _give_tables(family: Family) -> None:
    """Text encoders' embeddings get memory that is never written, for the new words' rows to start from."""
    for name in family.text_encoders:
        table = family.embedding(name)
        table.weight = nn.Parameter(torch.empty(table.weight.shape), requires_grad=False)


def _method(kind: type[Method], name: str, recipe: Recipe, family: Family) -> Method:
    config: Any = recipe.method[name]
    aside = {k: v for k, v in _ASIDE.get(name, {}).items() if getattr(config, k) != v}
    # A clone of the denoiser is drawn; adapters go where their layers are by themselves.
    with META if name == "controlnet" else nullcontext():
        made = kind(config.model_copy(update=aside), family, recipe.train.seed)
    if name == "controlnet" and config.unlock_decoder_at is not None:
        decoder = {part: family.denoiser.get_submodule(part) for part in DECODER}
        made.get_submodule("decoder").update(decoder)  # type: ignore[operator]
        made.get_submodule("decoder").requires_grad_(True)
    return made


class _Words:
    """A tokeniser for counting: each word is one token."""

    bos_token_id, eos_token_id, pad_token_id = 0, 1, 1

    def __init__(self, encoder: Any) -> None:
        self.size = int(encoder.config.vocab_size)
        self.added: dict[str, int] = {}

    def __call__(self, caption: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [2 for _ in caption.split()]}

    def __len__(self) -> int:
        return self.size + len(self.added)

    def get_vocab(self) -> dict[str, int]:
        return self.added

    def add_tokens(self, names: Sequence[str]) -> None:
        self.added |= {name: self.size + len(self.added) + i for i, name in enumerate(names)}

    def convert_tokens_to_ids(self, name: str) -> int:
        return self.added[name]
