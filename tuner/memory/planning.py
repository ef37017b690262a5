"""The plan: parts and phases of a run put together."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from tuner import device as machine
from tuner import gather, quantised, rounding
from tuner.adapters.layers import path_of
from tuner.components import GROUP
from tuner.memory import model, state, step
from tuner.memory.live import nbytes
from tuner.memory.model import Model
from tuner.memory.needs import Needs, Phase
from tuner.memory.step import Pass
from tuner.recipe import Recipe, micro_batch

CONTEXT = 600 * 2**20
"""Bytes of a CUDA context with torch's kernels and cuBLAS' workspace: an estimate, not measured."""
SLACK = 0.1
"""Of what a pass holds on a GPU, for workspaces and the allocator's gaps: an estimate, not measured."""

LOOKED_AT = 64
"""Held-out samples that tuner.loop validates together, at most."""


@dataclass
class Passes:
    """What was found by running passes, so that plans that differ in other things share it."""

    models: dict[str, Model] = field(default_factory=dict)
    found: dict[str, Pass] = field(default_factory=dict)

    def model(self, recipe: Recipe, device: str, dtype: torch.dtype) -> Model:
        """The networks of a recipe; the recipe's other keys are this one's."""
        key = _key(recipe, device, dtype)
        if key not in self.models:
            self.models.clear()  # one at a time: they are large in number, if not in memory
            self.models[key] = model.build(recipe, device, dtype)
        made = self.models[key]
        return Model(recipe, made.family, made.methods, device, dtype, made.rules, made.loaded)

    def run(self, name: str, made: Model, go: Callable[[], Pass], *more: object) -> Pass:
        """A pass, once for all plans in which it is the same."""
        wide = [made.recipe.data.side, *gather.every_side(made.recipe)]
        key = repr((name, _key(made.recipe, made.device, made.dtype), wide, step.cached(made), *more))
        if key not in self.found:
            self.found[key] = go()
        return self.found[key]


def _key(recipe: Recipe, device: str, dtype: torch.dtype) -> str:
    tree = recipe.resolved()
    base = {key: value for key, value in tree["base"].items() if key != "quantise"}
    about = recipe.train
    return json.dumps(
        [base, tree["method"], about.gradient_checkpointing, about.trained_precision, device, str(dtype)]
    )


def plan(recipe: Recipe, processes: int = 1, device: str = "cpu", passes: Passes | None = None) -> Needs:
    """The memory that each process of a run will need, before anything is loaded.

    Networks and methods are built without memory (torch's meta device), one micro-batch of the largest shape
    (of stages that which holds most) goes forward and backward through them, and what lives is counted at
    every operation (live.py).

    Args:
        recipe: the run's.
        processes: how many share each batch.
        device: cpu or cuda; no GPU is needed for a GPU's plan.
        passes: of plans before, to share what is equal.

    Raises:
        UserError: there is no such base, the methods do not fit it, or the batch cannot be shared.
    """
    passes = Passes() if passes is None else passes
    libraries = baseline() if device == "cpu" else CONTEXT
    chosen = precision(recipe, device)
    trained = (made := passes.model(recipe, device, machine.DTYPES[chosen])).trained()
    pictures, one = _largest(passes, made, processes)
    kept, paged = state.state(recipe.train.optimiser, trained)
    buckets = nbytes(trained) if processes > 1 else 0
    ema = 4 * sum(p.numel() for p in trained) if recipe.train.ema is not None else 0
    caches = any(step.cached(made))
    before = passes.run("encoding", made, lambda: step.encoding(made)) if caches else Pass(0)
    held = sum((weights := _weights(made)).values()) + (beside := _beside(made)) + kept + ema + buckets
    aside = sum(weights[name] for name in _aside(made))
    slack = 1.0 if device == "cpu" else 1.0 + SLACK
    loaded, update = _stored(made, made.loaded), one.gradients + _scratch(recipe, device, trained)
    reading = _reading(chosen, loaded)

    def phase(name: str, holds: int, peak: int) -> Phase:
        return Phase(name, libraries + holds + round(peak * slack))

    phases = [phase("loading", sum(loaded.values()), 0 if device == "cuda" else reading)]
    phases += [phase("caching", sum(loaded.values()) + beside, before.peak)] * caches
    phases.append(phase("training", held - aside, max(one.peak, update)))
    for name, more, peak in _looks(passes, made):
        phases.append(phase(name, held + more - aside * (name == "validation"), peak))
    proof = phase("export", held, _proof(made))
    phases += [proof] * (device == "cpu" or recipe.base.quantise is not None)
    return Needs(
        device,
        chosen,
        pictures,
        weights,
        beside,
        one.gradients + buckets,
        kept,
        ema,
        round(max(one.peak - one.gradients, 0) * slack),
        round(before.peak * slack),
        libraries,
        tuple(phases),
        proof.peak,
        0 if device == "cpu" else baseline() + sum(loaded.values()) + paged + reading,
        aside,
    )


def _aside(made: Model) -> list[str]:
    """The networks that wait in main memory while a GPU trains; see data.encode.unneeded."""
    if made.device == "cpu":
        return []
    latents, text = step.cached(made)
    names = ["vae"] * latents + list(made.family.text_encoders) * text
    networks, trained = made.family.modules(), {id(p) for p in made.trained()}
    held = [name for name in names if name in networks]
    return [name for name in held if not any(id(p) in trained for p in networks[name].parameters())]


def _largest(passes: Passes, made: Model, processes: int) -> tuple[int, Pass]:
    """Of the stages the micro-batch that holds most, in pictures, and what it holds."""
    recipe, several = made.recipe, made.recipe.train.accumulate > 1
    micro_batch(recipe, processes)  # raises where a stage's cannot be shared
    shared = processes * recipe.train.accumulate
    each = {
        (size // shared, side) for size, side in zip(gather.batch_sizes(recipe), sides(recipe), strict=True)
    }
    # One that has no more pictures than another, and no larger ones, holds no more.
    most = [one for one in each if not any(one != other and _within(one, other) for other in each)]
    found = []
    for pictures, side in sorted(most):
        go = functools.partial(step.training, made, pictures, side)
        found.append((pictures, passes.run("training", made, go, pictures, side, several)))
    return max(found, key=lambda one: one[1].peak)


def _within(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] <= other[0] and one[1] <= other[1]


def sides(recipe: Recipe) -> list[int]:
    """The largest side that pictures are trained at, stage after stage."""
    own = [gather.sides(source.resolution) for source in recipe.data.source if source.resolution is not None]
    return [max(side for one in (wide, *own) for side in one) for wide in recipe.data.sizes]


def precision(recipe: Recipe, device: str) -> str:
    """What is computed in on a device; on a GPU that is not here `auto` is bf16."""
    asked = recipe.train.precision
    if asked == "auto" and device == "cuda" and not torch.cuda.is_available():
        return "bf16"
    if asked == "auto" and device == "cpu":
        return "bf16" if machine.cpu_has_bf16() else "fp32"
    return machine.precision(asked)


@functools.cache
def baseline() -> int:
    """Bytes that this process has with the libraries imported, before there are networks (resident set)."""
    from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel  # noqa: F401
    from peft import inject_adapter_in_model  # noqa: F401
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer  # noqa: F401

    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _reading(chosen: str, loaded: dict[str, int]) -> int:
    """What converting a file's tensors takes beside them; as they are, they stay where the file is mapped."""
    return 0 if chosen == "fp32" else min(GROUP, 2 * max(loaded.values()))


def _beside(made: Model) -> int:
    """Bytes of what is trained beside the networks' own parameters: adapters, branches, rows."""
    networks = made.family.modules().values()
    own = {id(p) for network in networks for name, p in network.named_parameters() if path_of(name) is None}
    return nbytes(p for p in made.trained() if id(p) not in own)


def _weights(made: Model) -> dict[str, int]:
    """Bytes of each network in training, without adapters."""
    held = {}
    for name, network in made.family.modules().items():
        own = [t for path, t in network.named_parameters() if path_of(path) is None]
        held[name] = nbytes([*own, *network.buffers()])
    return _stored(made, held)


def _stored(made: Model, held: dict[str, int]) -> dict[str, int]:
    """The same with base.quantise."""
    scheme = made.recipe.base.quantise
    if scheme is None:
        return held
    stored = dict(held)
    for name, network in made.family.modules().items():
        if name != "unet" and not name.startswith("text_encoder"):
            continue
        wide = made.family.options.dtype(name).itemsize
        for _, layer in quantised.layers(network):
            rows, columns = layer.weight.shape
            stored[name] -= wide * rows * columns - quantised.nbytes(rows, columns, scheme)
    return stored


def _scratch(recipe: Recipe, device: str, trained: list[nn.Parameter]) -> int:
    """What an update needs besides gradients and state: nothing where one kernel does it all."""
    name, numbers = recipe.train.optimiser.name.lower(), [parameter.numel() for parameter in trained]
    rounds = rounding.scratch(numbers) if recipe.train.trained_precision == "bf16" else 0
    if "8bit" in name and device == "cpu":  # of the largest both states, gradient, root and quotient
        return rounds + 20 * max(numbers)
    if name == "adamw" or "8bit" in name:
        return rounds
    return rounds + (8 * max(numbers) if device == "cpu" else 4 * sum(numbers))


def _looks(passes: Passes, made: Model) -> list[tuple[str, int, int]]:
    """Validation and pictures: the name, what is held besides, what a pass holds."""
    recipe, found = made.recipe, []

    def look() -> Pass:
        return step.looking(made)

    swapped = 4 * sum(p.numel() for p in made.trained()) if recipe.train.ema is not None else 0
    if recipe.validation.every:
        count = min(gather.batch_sizes(recipe)[-1], LOOKED_AT, recipe.validation.samples)
        found.append(("validation", swapped, count * passes.run("looking", made, look).peak))
    counts = [(recipe.preview.count, recipe.preview.guidance)] if recipe.preview.every else []
    if recipe.evaluate.samples:
        counts.append((recipe.evaluate.samples, recipe.evaluate.guidance))
    priors = [method.prior for method in made.methods if method.prior is not None]
    counts += [(prior.count, prior.guidance) for prior in priors if prior.source is None]
    if counts and not made.methods[0].WHOLE_STEP:
        one = passes.run("looking", made, look).peak
        back = passes.run("decoding", made, lambda: step.decoding(made)).peak
        drawn = max(step.drawn_together(made, count) * (1 if scale == 1 else 2) for count, scale in counts)
        decoded = max(step.decoded_together(made, count) for count, _ in counts)
        found.append(("previews", swapped, max(drawn * one, decoded * back)))
    return found


def _proof(made: Model) -> int:
    """What tuner.verify holds besides at most: everything in float32, and a copy of what it compares with.

    For adapters and words that is a copy of denoiser and text encoders without them, else a network that is
    read from the export. On the CPU the tensors that are written lie there too.
    """
    networks = made.family.modules()
    quantised = made.recipe.base.quantise is not None
    half = [t for t in made.tensors() if t.dtype in (torch.float16, torch.bfloat16)]
    linear = {id(m.weight) for n in networks.values() for m in n.modules() if isinstance(m, nn.Linear)}
    widened = 4 * sum(t.numel() for t in half if not (quantised and id(t) in linear))
    names = ["unet", *made.family.text_encoders] if _adapts(made) else []
    whole = {name: 4 * sum(t.numel() for t in networks[name].parameters()) for name in networks}
    if quantised:
        whole = _weights(made)
    copied = sum(whole[name] for name in names)
    if not names:
        copied = 4 * sum(p.numel() for p in made.trained())
    wide = machine.DTYPES[made.recipe.export.dtype].itemsize
    written = wide * sum(p.numel() for p in made.trained()) if made.device == "cpu" else 0
    return widened + copied + written


def _adapts(made: Model) -> bool:
    return bool({"lora", "textual_inversion"} & made.recipe.method.keys())
