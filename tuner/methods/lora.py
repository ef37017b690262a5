"""LoRA and kin (DoRA, LoHa, LoKr): small adapters beside chosen frozen layers, injected by peft."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from tuner.adapters import exports, layers, sources, targets
from tuner.adapters.config import Config
from tuner.adapters.exports import Form
from tuner.adapters.layers import Making
from tuner.adapters.sources import Part
from tuner.adapters.targets import Slot
from tuner.errors import UserError
from tuner.export import contents
from tuner.export.adapter import Adapter
from tuner.export.files import save
from tuner.export.metadata import Kind, with_hash
from tuner.family import Family
from tuner.method import Card, Method, Prior

__all__ = ["METHOD", "Config", "Lora"]


class Lora(Method):
    """The adapters sit in the base's layers; this module lists their weights.

    Attributes:
        base: the base's networks as file formats know them.
        how: how the adapters are made.
        slots: the adapters by their layers' paths.
        kept: what a start's file has where nothing reads it: exported as it was.
        layers: peft's layers by path.
        bases: the layers of the base that have an adapter, by path.
    """

    kind: ClassVar[Kind] = "lora"
    COMBINES: ClassVar[tuple[str, ...]] = ("textual_inversion",)
    DROP_CAPTIONS: ClassVar[float] = 0.1

    config: Config

    def __init__(self, config: Config, family: Family, seed: int) -> None:
        super().__init__(config, family, seed)
        self.base = sources.base_of(family)
        self.kept, filled = Adapter({}, {}), None
        if config.start is None:
            self.how, slots = config.making(), _chosen(config, family)
        else:
            start = sources.start(Path(config.start), "method.lora.start", self.base, family)
            _check_start(config, start, family)
            self.how = Making(start.kind, dropout=config.dropout)
            slots, filled, self.kept = start.slots, start.trained, start.kept
        self.slots = targets.plan(slots, config.wishes())
        networks = family.modules()
        self.bases: dict[str, Any] = {
            path: networks[path.partition(".")[0]].get_submodule(path.partition(".")[2])
            for path in (*self.slots, *self.kept.modules)
        }
        _check_rates(config, self.components, self.how)
        _check_quantised(config, self.how, family)
        layers.check(self.how, {path: (slot, self.bases[path]) for path, slot in self.slots.items()})
        self.CACHES_TEXT = self.components == ["unet"]
        files = enumerate(config.merge)
        parts = [Part(Path(one.file), one.weight, f"method.lora.merge.{i}.file") for i, one in files]
        sources.merge(family, parts, self.base)
        self.layers: dict[str, Any] = {}
        self._inject(family, seed, filled)
        self._check_tools()

    @property
    def prior(self) -> Prior | None:
        return self.config.prior

    @classmethod
    def exact(cls, config: Config) -> tuple[str, ...]:
        """All of what it sits on where it begins with the base's numbers (magnitudes), or adds to them."""
        reads = config.kind == "dora" or config.init == "orthogonal" or bool(config.merge)
        return ("unet", "text_encoder") if reads else ()

    @cached_property
    def components(self) -> list[str]:
        """The networks with adapters, in the base's order."""
        found = {path.partition(".")[0] for path in self.slots}
        return [name for name in ("unet", "text_encoder", "text_encoder_2") if name in found]

    def _inject(self, family: Family, seed: int, filled: Adapter | None) -> None:
        """Put the adapters in and list their weights."""
        self.places: list[str] = []  # the weights by name, as long as `weights`
        weights: list[nn.Parameter] = []
        networks = family.modules()
        for component in self.components:
            host = networks[component]
            own = {p.partition(".")[2]: s for p, s in self.slots.items() if p.startswith(f"{component}.")}
            layers.inject(host, own, self.how, seed)
            found = {f"{component}.{path}": layer for path, layer in layers.adapted(host)}
            for path, layer in found.items():
                if filled is not None:
                    layers.fill(layer, filled.modules[path], filled.magnitudes.get(path))
            self.layers |= found
            for name, parameter in host.named_parameters():
                if layers.path_of(name) is not None:
                    self.places.append(f"{component}.{name}")
                    parameter.requires_grad_(True)
                    weights.append(parameter)
        self.weights = nn.ParameterList(weights)
        if self.how.decompose_both and not any("lokr_w1_a" in name for name in self.places):
            raise UserError(
                "method.lora.decompose_both: has no effect: at this rank no first factor would be smaller"
            )

    def _check_tools(self) -> None:
        """Raises UserError, before anything is trained, where a tool would not load all of the export."""
        for form in self._outline("name"):
            if found := exports.problems(form, contents.of(form.tensors, {}, form.place), self.base):
                listed = "".join(f"\n  {line}" for line in found)
                raise UserError(f"method.lora.targets: not every tool would load these layers:{listed}")

    def labels(self) -> dict[str, Any]:
        rank, alpha = exports.shared(self.adapter().modules)
        return {"rank": rank, "alpha": alpha, "algorithm": self.how.kind}

    def depends(self) -> dict[str, Path]:
        found = {f"method.lora.merge.{i}.file": Path(one.file) for i, one in enumerate(self.config.merge)}
        return found if self.config.start is None else {"method.lora.start": Path(self.config.start), **found}

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(zip(self.places, self.weights, strict=True))

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """The adapters by their rates: of their network, by pattern, and LoRA+'s of the second factor."""
        grouped: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.trained().items():
            grouped.setdefault(self._rate(name, learning_rate), []).append(parameter)
        # The first group's rate is the one that logs show.
        rates = sorted(grouped, key=lambda rate: rate != learning_rate)
        return [{"params": grouped[rate], "lr": rate} for rate in rates]

    def _rate(self, name: str, learning_rate: float) -> float:
        config, component = self.config, name.partition(".")[0]
        path = layers.path_of(name)
        assert path is not None
        rate = self.slots[path].learning_rate
        if rate is None and component == "text_encoder_2":
            rate = config.text_encoder_2_learning_rate
        if rate is None and component != "unet":
            rate = config.text_encoder_learning_rate
        ratio = config.lora_plus_ratio if ".lora_B." in name else None
        return (learning_rate if rate is None else rate) * (1.0 if ratio is None else ratio)

    def train_mode(self, on: bool) -> None:
        """Only the adapters' dropout changes; the base stays as it is."""
        super().train_mode(on)
        for layer in self.layers.values():
            layers.train_mode(layer, on)

    @contextmanager
    def off(self, family: Family) -> Iterator[None]:
        """The base, bitwise: the adapters are passed by."""
        for layer in self.layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.enable_adapters(True)
                layer.requires_grad_(False)
            for weight in self.weights:
                weight.requires_grad_(True)

    def adapter(self) -> Adapter:
        """The adapters as file formats know them; the tensors are the weights' own memory."""
        modules = {path: layers.change_of(path, layer) for path, layer in self.layers.items()}
        magnitudes = {path: layers.magnitude_of(layer) for path, layer in self.layers.items()}
        own = {path: tensor for path, tensor in magnitudes.items() if tensor is not None}
        return Adapter({**modules, **self.kept.modules}, {**own, **self.kept.magnitudes})

    def forms(self, name: str) -> list[Form]:
        """What is exported under this name."""
        return exports.forms(self.how.kind, self.adapter(), self.base, self._weights(), name)

    def _outline(self, name: str) -> list[Form]:
        """The same without the tensors' values, which costs nothing."""
        weights = {path: weight.to("meta") for path, weight in self._weights().items()}
        return exports.forms(self.how.kind, exports.outline(self.adapter()), self.base, weights, name)

    def _weights(self) -> dict[str, Tensor]:
        """The base's weights under a DoRA, by path."""
        if self.how.kind != "dora":
            return {}
        return {path: layer.weight.detach() for path, layer in self.bases.items()}

    def export(self, family: Family, folder: Path, card: Card) -> list[Path]:
        """`NAME.safetensors` of a LoRA, which every tool loads; see `exports.forms` for the other kinds."""
        files = []
        for form in self.forms(card.name):
            tensors = card.cast(form.tensors)
            told = {**card.metadata.get(self.kind, {}), **form.metadata}
            header = {key: value for key, value in told.items() if value is not None}
            files.append(save(folder / form.place, tensors, with_hash(header, tensors) if header else {}))
        return files

    def retold(self, path: Path, card: Card) -> dict[str, str | None]:
        (told,) = [f.metadata for f in self._outline(card.name) if path.as_posix().endswith(f"/{f.place}")]
        return told


def _chosen(config: Config, family: Family) -> dict[str, Slot]:
    """The layers that the recipe asks for."""
    encoders = list(family.text_encoders)
    if isinstance(config.text_encoder, list):
        if unknown := [name for name in config.text_encoder if name not in encoders]:
            raise UserError(
                f"method.lora.text_encoder: {unknown[0]}: this base has {' and '.join(encoders)} only"
            )
        encoders = [name for name in encoders if name in config.text_encoder]
    components = ["unet"] * config.unet + encoders * bool(config.text_encoder)
    found = targets.layers(family, components)
    paths = targets.select(config.targets, found)
    for component in components:
        if not any(path.startswith(f"{component}.") for path in paths):
            key = "unet" if component == "unet" else "text_encoder"
            raise UserError(f"method.lora.{key}: has no effect: targets fits no layer of {component}")
    alpha = float(config.rank) if config.alpha is None else config.alpha
    return dict.fromkeys(paths, Slot(config.rank, alpha))


def _check_start(config: Config, start: sources.Start, family: Family) -> None:
    """Raises UserError where the recipe and the file that it starts from say different things."""
    given, slots = config.model_fields_set, start.slots
    has = {path.partition(".")[0] for path in slots}
    encoders = sorted(has - {"unet"})
    wanted: bool | list[str] = sorted(config.text_encoder) if isinstance(config.text_encoder, list) else False
    if config.text_encoder is True:
        wanted = sorted(family.text_encoders)
    different = {
        "kind": (config.kind, start.kind),
        "unet": (config.unet, "unet" in has),
        "text_encoder": (wanted or "false", encoders or "false"),
        "rank": (config.rank, _one(slot.rank for slot in slots.values())),
        "alpha": (config.alpha, _one(slot.alpha for slot in slots.values())),
    }
    for key, (asked, found) in different.items():
        if key in given and asked != found:
            raise UserError(f"method.lora.{key}: found {asked}, but {config.start} has {found}")
    if "targets" in given:
        chosen = set(targets.select(config.targets, targets.layers(family, sorted(has))))
        for paths, what in ((chosen - slots.keys(), "lacks"), (slots.keys() - chosen, "has, besides,")):
            if paths:
                shown = ", ".join(sorted(paths)[:3])
                raise UserError(
                    f"method.lora.targets: {config.start} {what} {len(paths)} of the layers ({shown})"
                )


def _one(values: Iterable[float]) -> float | str:
    """The one value, or the several as text."""
    several = sorted(set(values))
    return several[0] if len(several) == 1 else ", ".join(f"{value:g}" for value in several)


def _check_rates(config: Config, components: list[str], how: Making) -> None:
    """Raises UserError for learning rates of what is not trained, which only base and files show."""
    for key, encoder in (
        ("text_encoder_learning_rate", "text_encoder"),
        ("text_encoder_2_learning_rate", "text_encoder_2"),
    ):
        if getattr(config, key) is not None and not any(name.startswith(encoder) for name in components):
            raise UserError(f"method.lora.{key}: has no effect: no adapter sits in {encoder}")
    if config.lora_plus_ratio is not None and not how.plain:
        raise UserError(f"method.lora.lora_plus_ratio: has no effect on kind {how.kind}")


def _check_quantised(config: Config, how: Making, family: Family) -> None:
    """Raises UserError for what needs the weights of the base as numbers."""
    if family.options.quantise is None:
        return
    needs = {f"kind {how.kind}": how.kind != "lora", "init orthogonal": how.init == "orthogonal"}
    needs["merge"] = bool(config.merge)
    if found := [name for name, is_so in needs.items() if is_so]:
        raise UserError(
            f"base.quantise: {family.options.quantise} does not go with method.lora: {', '.join(found)}"
        )


METHOD = Lora
