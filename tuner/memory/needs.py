"""What a run needs, in bytes, and how it is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tuner.memory.sizes import show


class Phase(NamedTuple):
    """A part of a run: loading, caching, training, validation, previews or export."""

    name: str
    peak: int  # bytes, all of the process on the device


@dataclass(frozen=True)
class Needs:
    """The memory of one process of a run, in bytes, on its device.

    Attributes:
        device: cpu or cuda.
        precision: what is computed in: fp32, bf16 or fp16.
        pictures: in one forward pass.
        weights: of each network as it is held in training, trained weights of its own included.
        trained: what is trained beside the networks' own weights: adapters, branches, rows.
        gradients: of all that is trained; with several processes once more, as DDP's buckets.
        optimiser: its state.
        ema: the average of trained weights.
        activations: what a step holds besides all these at its peak.
        encoding: what is held at most while pictures and captions are encoded beforehand.
        libraries: the process before the base is loaded (CPU), or the CUDA context (estimated).
        phases: in their order. Of an export's proof only where it cannot go elsewhere: a GPU without the
            room for it leaves it to the CPU, but for a quantised base, which stays.
        proof: of the export, on the device.
        host: on a GPU, what the process needs at most of the machine's own memory.
        aside: of the weights, what waits in the machine's own memory while a GPU trains and validates, as
        what
            it encodes is cached. (More captions than the cache keeps are known only when the data is.)
    """

    device: str
    precision: str
    pictures: int
    weights: Mapping[str, int]
    trained: int
    gradients: int
    optimiser: int
    ema: int
    activations: int
    encoding: int
    libraries: int
    phases: tuple[Phase, ...]
    proof: int
    host: int = 0
    aside: int = 0

    @property
    def peak(self) -> int:
        """The most that any phase needs."""
        return self.at.peak

    @property
    def at(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.peak)

    def most(self, phases: Sequence[str]) -> int:
        """The most that some of the phases need."""
        return max(phase.peak for phase in self.phases if phase.name in phases)

    def lines(self) -> list[str]:
        """A table: the parts, the phases, the peak."""
        parts = {
            **{f"weights: {name}": size for name, size in self.weights.items()},
            "trained beside them": self.trained,
            "gradients": self.gradients,
            "optimiser": self.optimiser,
            "average (ema)": self.ema,
            f"activations, {self.pictures} a pass": self.activations,
            "libraries": self.libraries,
        }
        table = [(name, size) for name, size in parts.items() if size]
        phases = [(f"while {_DOING[phase.name]}", phase.peak) for phase in self.phases]
        host = [("of the weights, not on it while training", self.aside)] if self.aside else []
        host += [("of the host's memory", self.host)] if self.host else []
        if all(phase.name != "export" for phase in self.phases):
            host.append(("for proving the export; or on the CPU", self.proof))
        wide = max(len(name) for name, _ in (*table, *phases, *host))

        def row(name: str, size: int) -> str:
            return f"{name.ljust(wide)}  {show(size).rjust(9)}"

        return [
            f"memory of a process on {self.device}, {self.precision}:",
            *(f"  {row(*each)}" for each in table),
            *(f"{'* ' if each[1] == self.peak else '  '}{row(*each)}" for each in phases),
            *(f"  {row(*each)}" for each in host),
        ]

    def told(self) -> str:
        """The peak, and when: `3.1 GiB, while training`."""
        return f"{show(self.peak)}, while {_DOING[self.at.name]}"

    def as_json(self) -> dict[str, Any]:
        """All numbers, in bytes, for a file."""
        plain = {name: value for name, value in vars(self).items() if name not in ("phases", "weights")}
        phases = {phase.name: phase.peak for phase in self.phases}
        return {
            **plain,
            "weights": dict(self.weights),
            "phases": phases,
            "peak": self.peak,
            "at": self.at.name,
        }


_DOING = {
    "loading": "loading",
    "caching": "encoding beforehand",
    "training": "training",
    "validation": "validating",
    "previews": "drawing pictures",
    "export": "proving the export",
}

ALL = tuple(_DOING)
UNTIL_TRAINED = ("loading", "caching", "training")
"""Without looks at what is learned, and without the proof of the export."""
