"""A base and the methods on it without the weights: networks on the meta device, files by their headers."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import Tensor, nn

from tuner import base, build, components, fits, verify
from tuner.check.findings import Findings
from tuner.data.cache import Hashes
from tuner.errors import UserError
from tuner.family import Family, Options
from tuner.method import Method
from tuner.recipe import Recipe
from tuner.stable_diffusion import StableDiffusion, tokenizer_name
from tuner.task import Task

OLD = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Names in autoencoders' files that diffusers reads as others."""


def look(recipe: Recipe, accelerator: Accelerator, hashes: Hashes, found: Findings) -> Task | None:
    """The base with the methods on it, no weights loaded; None where there is a problem.

    The text encoders' input embeddings are loaded where words are trained, which start from them.
    """
    kinds = {name: importlib.import_module(f"tuner.methods.{name}").METHOD for name in recipe.method}
    needs = sorted({need for kind in kinds.values() for need in kind.NEEDS})
    trains = {name for kind in kinds.values() for name in kind.TRAINS}
    found.attempt("base", lambda: fits.check_quantised(recipe, needs, trains))
    found.attempt("train", lambda: fits.check_rounded(recipe, accelerator))
    options = build.base_options(recipe, accelerator, kinds)
    found.attempt("base", lambda: base.check_options(options, needs))
    family = _family(recipe, needs, options, hashes, found)
    if family is None:
        found.unchecked.append("whether the methods fit the base: there is no base to look at")
        return None
    family.device = torch.device("meta")
    empty = family
    made = found.attempt("method", lambda: _methods(recipe, kinds, empty))
    if made == []:  # it begins with the base's numbers
        whole = found.attempt("method", lambda: build.adapted(recipe, accelerator, hashes))
        if whole is not None:
            family, made = cast(StableDiffusion, whole.family), whole.each()
    methods = made or None
    found.attempt("method", lambda: fits.check_size(recipe, family))
    objective = found.attempt("objective", lambda: build.make_objective(recipe, family))
    if methods is None:
        found.unchecked.append("what is trained, and captions as the method changes them: see the problems")
        return None
    found.attempt("method", lambda: fits.check_uses(recipe, methods))
    found.attempt("method", lambda: verify.check_names(recipe.name, family, methods))
    if objective is None:
        return None
    task = Task(family, methods, objective)
    found.facts["base"] |= {
        "prediction": task.objective.prediction,
        "inpainting": family.inpainting,
        "timesteps": int(family.scheduler_config.get("num_train_timesteps", 0)),
    }
    found.facts["method"] = _trained(recipe, methods)
    return task


def _family(
    recipe: Recipe, needs: Sequence[str], options: Options, hashes: Hashes, found: Findings
) -> StableDiffusion | None:
    """The family with its networks on the meta device, its files looked at."""
    asked = recipe.base
    about: dict[str, Any] = {"path": asked.path, "title": base.title_of(asked.path)}
    found.facts["base"] = about
    plain = replace(options, quantise=None)  # what it needs of the machine is another problem
    place = found.attempt(
        "base", lambda: base.find(asked.path, asked.revision, asked.new, needs, hashes, plain)
    )
    name = None if place is None else found.attempt("base", lambda: base.recognise(place[0]))
    if place is None or name is None:
        return None
    folder, how = place
    options = replace(how, quantise=options.quantise)
    kind: type[StableDiffusion] = importlib.import_module(f"tuner.families.{name}").FAMILY
    about |= {"family": name, "components": {}}
    names = [n for need in needs for n in (kind.ENCODERS if need == "text_encoder" else (need,))]
    if unused := [one for one in asked.new if one not in names]:
        told = f"{', '.join(unused)} has no effect: this run loads {', '.join(names)} only"
        found.problem("base", f"base.new: {told}")
    before = len(found.problems)
    networks: dict[str, nn.Module] = {}
    for one in dict.fromkeys(names):
        own = options.vae if one == "vae" and options.vae is not None else folder / one
        look = _component(one, own, one in asked.new, found)
        if look is not None:
            networks[one], about["components"][one] = look
    if "textual_inversion" in recipe.method:
        for one in (one for one in kind.ENCODERS if one in networks):
            found.attempt("base", lambda one=one: _embedding(networks[one], folder / one, one in asked.new))  # type: ignore[misc]
    tokenizers = {n: _tokenizer(folder / tokenizer_name(n), found) for n in kind.ENCODERS if n in networks}
    scheduler = found.attempt("base", lambda: _scheduler(folder))
    if len(found.problems) > before or scheduler is None:
        return None
    family = found.attempt("base", lambda: kind(networks, tokenizers, scheduler, options, folder))
    if family is None:
        return None
    family.title = base.title_of(asked.path)
    family.digests = base.digests(family, folder, asked.new, recipe.train.seed, hashes)
    for one, digest in family.digests.items():
        about["components"].setdefault(one, {})["sha256"] = digest
    return family


def _component(name: str, place: Path, new: bool, found: Findings) -> tuple[nn.Module, dict[str, Any]] | None:
    """A network without weights, and what its files hold."""
    network = found.attempt("base", lambda: _empty(name, place))
    if network is None:
        return None
    numbers = sum(p.numel() for p in network.parameters())
    about: dict[str, Any] = {"parameters": numbers, "files": [], "types": {}, "new": new}
    if new:
        return network, about
    held: dict[str, Tensor] = {}
    files = found.attempt("base", lambda: _weights(name, place))
    for path in files or ():
        header = found.attempt("base", lambda path=path: _header(path))  # type: ignore[misc]
        if header is None:
            return None
        about["files"].append({"name": path.name, "bytes": path.stat().st_size})
        for key, (shape, dtype) in header.items():
            held[key] = torch.empty(shape, device="meta")
            about["types"][dtype] = about["types"].get(dtype, 0) + 1
    if files is None:
        return None
    if (wrong := _misfit(held, network)) is not None:
        found.problem("base", f"{place}: its files do not fit its config.json: {wrong}")
    return network, about


def _empty(name: str, place: Path) -> nn.Module:
    try:
        with torch.device("meta"):
            return components.fresh(name, place, seed=0)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{place / 'config.json'}: no {name} can be made of it: {error}") from error


def _weights(name: str, place: Path) -> list[Path]:
    """The safetensors files of a component, whole or in shards.

    Raises:
        UserError: one is missing; what is there instead is told.
    """
    stem = components.WEIGHTS if components.KINDS[name][0] == "diffusers" else "model"
    files = components.weight_files(place, stem)
    if not files:
        there = sorted(
            p.name for p in place.iterdir() if p.suffix in (".bin", ".safetensors", ".ckpt", ".pt")
        )
        pickled = any(not one.endswith(".safetensors") for one in there)
        instead = "; pickles are not loaded: convert it to .safetensors" if pickled else "; download it again"
        raise UserError(
            f"{place}: expected {stem}.safetensors, found {', '.join(there) or 'no weights'}{instead}"
        )
    return files


def _header(path: Path) -> dict[str, tuple[list[int], str]]:
    """Shapes and types of a file's tensors.

    Raises:
        UserError: it is cut off, or no safetensors file.
    """
    components.check_whole(path)
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (one.get_shape(), one.get_dtype()) for name, one in slices.items()}


def _misfit(held: Mapping[str, Tensor], network: nn.Module) -> str | None:
    """What a network lacks in its files, or has there in another shape; more names do not matter."""
    wanted = {_plain(name): tensor for name, tensor in network.state_dict().items()}
    own = {_plain(name): tensor for name, tensor in held.items()}
    return components.misfit({name: own[name] for name in own.keys() & wanted.keys()}, wanted)


def _plain(name: str) -> str:
    """A tensor's name as all versions of the libraries have it."""
    name = name.removeprefix("text_model.").removeprefix("vision_model.")
    for old, now in OLD.items():
        name = name.replace(old, now) if ".attentions." in name else name
    return name


def _embedding(encoder: Any, place: Path, new: bool) -> None:
    """Load a text encoder's input embedding alone; of a new one any numbers stand for it."""
    table = encoder.get_input_embeddings()
    made = nn.Embedding(*table.weight.shape)
    if not new:
        for path in _weights("text_encoder", place):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name.endswith("token_embedding.weight"):
                        made.weight.data = file.get_tensor(name).float()
    encoder.set_input_embeddings(made)


def _tokenizer(place: Path, found: Findings) -> Any:
    from transformers import CLIPTokenizer

    wanted = "vocab.json or tokenizer.json"
    return found.attempt("base", lambda: components.without_weights(CLIPTokenizer, place, wanted))


def _scheduler(folder: Path) -> dict[str, Any]:
    from diffusers import DDPMScheduler

    place = folder / "scheduler"
    return dict(components.without_weights(DDPMScheduler, place, "scheduler_config.json").config)


def _methods(recipe: Recipe, kinds: Mapping[str, type[Method]], family: Family) -> list[Method]:
    """The methods as a run makes them; a clone of the base has no weights either.

    None of them where one cannot be made without the base's weights.
    """
    made = []
    for name, kind in kinds.items():
        with torch.device("meta") if name == "controlnet" else nullcontext():
            try:
                made.append(kind(recipe.method[name], family, recipe.train.seed))
            except (NotImplementedError, RuntimeError):  # of torch, which has no numbers to work with
                return []
    return made


def _trained(recipe: Recipe, methods: Sequence[Method]) -> dict[str, Any]:
    """How many numbers are trained, and where they lie."""
    each: dict[str, Any] = {}
    for name, method in zip(recipe.method, methods, strict=True):
        trained = method.trained()
        places: dict[str, list[int]] = {}
        for path, parameter in trained.items():
            count = places.setdefault(".".join(path.split(".")[:2]), [0, 0])
            count[0] += 1
            count[1] += parameter.numel()
        each[name] = {
            "numbers": sum(p.numel() for p in trained.values()),
            "tensors": len(trained),
            "modules": {path: {"tensors": t, "numbers": n} for path, (t, n) in sorted(places.items())},
        }
    return {"trained": sum(one["numbers"] for one in each.values()), "methods": each}
