"""The compiled forms of a run's networks: made, held against the uncompiled ones, and used in training alone.

A compiled form is in place only while a training step runs. Previews, validation, exports and everything else
find the networks as they are, and no name of a tensor changes. There is one graph for each shape of a batch
(never one for all sizes, which is slower); a batch of another number of pictures than usual, such as an
epoch's last, goes through uncompiled.

The first calls of each shape are held against the uncompiled network. Where they differ by more than rounding
(TOLERANCE), or compiling fails, the run goes on uncompiled and says so; with `train.compile: on` it ends.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tuner.batch import Batch
from tuner.compiling import MOST, CompileError, Shapes, Times, obstacle, stated, units, verdict
from tuner.data.cache import default_folder
from tuner.data.flow import Flow
from tuner.data.loader import Division
from tuner.data.plan import Plan, Stages
from tuner.recipe import Recipe
from tuner.task import Task
from tuner.training import Train

WARM, TIMED = 2, 8
"""Steps that pass before the steps are timed, and how many are."""
GRAPHS = 8 * 512 * 512
"""Pixels of a micro-batch up to which CUDA graphs are used: launches matter, and their memory, which nothing
else may use, is small."""
CHECKED = 3
"""Calls of each shape that are held against the uncompiled network: with CUDA graphs the third is the first
that is replayed."""
TOLERANCE, LOW = 1e-3, 0.05
"""Largest norm of the difference, relative to the output's, in float32 and in half precision."""


class Unit:
    """A network's or a layer's forward pass, compiled."""

    def __init__(self, owner: Compiling, name: str, module: nn.Module, graphs: bool) -> None:
        self.owner, self.name, self.module = owner, name, module
        self.plain: Callable[..., Any] = module.forward
        # Dropout draws as it does otherwise.
        options: dict[str, Any] = {"fallback_random": True, "triton.cudagraphs": graphs}
        self.compiled: Callable[..., Any] = torch.compile(
            self.plain,
            backend=owner.backend,
            dynamic=False,
            options=options if owner.backend == "inductor" else None,
        )
        self._calls: Counter[object] = Counter()

    def __call__(self, *given: Any, **named: Any) -> Any:
        owner = self.owner
        if owner.state != "on":  # it failed
            return self.plain(*given, **named)
        self._calls[owner.shape] += 1
        if self._calls[owner.shape] > CHECKED:
            return self.compiled(*given, **named)
        expected = self._expected(*given, **named)
        try:
            made = self.compiled(*given, **named)
        except Exception as error:  # noqa: BLE001 - of dynamo, inductor, triton, a compiler: each has its own
            owner.fail(f"{self.name}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
            return self.plain(*given, **named)
        if (found := _distance(made, expected)) > 1:
            owner.fail(f"{self.name}: its output differs {found:.3g} times as much as rounding may make it")
            return self.plain(*given, **named)
        return made

    def _expected(self, *given: Any, **named: Any) -> Any:
        """The uncompiled output, without a trace in random state or in autocast's memory of weights."""
        here = self.owner.accelerator.device
        with torch.no_grad(), torch.random.fork_rng([here] if here.type == "cuda" else []):
            expected = self.plain(*given, **named)
        torch.clear_autocast_cache()  # it would hold weights without a gradient
        return expected


def _distance(made: Any, expected: Any) -> float:
    """The largest relative difference of outputs, in units of the tolerance; waits for the device."""
    worst = 0.0
    with torch.no_grad():
        for one, other in zip(_tensors(made), _tensors(expected), strict=True):
            size = float(other.float().norm())
            if not math.isfinite(size):
                continue  # the guard looks at that
            away = float((one.float() - other.float()).norm())
            share = TOLERANCE if other.dtype == torch.float32 else LOW
            allowed = share * max(size, 1e-6 * other.numel() ** 0.5)
            worst = max(worst, away / allowed if math.isfinite(away) else math.inf)
    return worst


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Compiling:
    """A run's compiled forms.

    Attributes:
        state: on, off, or auto as long as it is not decided.
        shape: of the batch under way.
    """

    def __init__(
        self,
        recipe: Train,
        task: Task,
        shapes: Shapes,
        division: Division,
        accelerator: Accelerator,
        steps: int,
        backend: str = "inductor",
    ) -> None:
        """
        Args:
            steps: of the whole run.
            backend: of torch.compile; another one only in tests.
        """
        self.recipe, self.task, self.shapes, self.steps = recipe, task, shapes, steps
        self.accelerator, self.backend = accelerator, backend
        self.state, self.shape = "off", ()  # type: tuple[str, tuple[int, ...]]
        cuda = accelerator.device.type == "cuda"
        # A graph's outputs are written over by its next run: gradients that are added up over several runs,
        # or that DDP holds, would be lost, and recomputing is not recorded.
        alone = accelerator.num_processes == 1 and division.accumulate == 1
        self.graphs = cuda and alone and not recipe.gradient_checkpointing and shapes.pixels <= GRAPHS
        self._units: list[Unit] = []
        self._seen: set[tuple[int, ...]] = set()
        self._told: str | None = None
        self._began = 0.0
        self._ticks = 0
        self._times: list[Times] = []
        self.clock: Callable[[], float] = time.perf_counter

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        task: Task,
        plan: Plan | Stages | Flow,
        division: Division,
        accelerator: Accelerator,
        steps: int,
    ) -> Compiling:
        """A run's, of its parts."""
        shapes = Shapes.of(plan, division, max(side for sides in recipe.data.sizes for side in sides))
        return cls(recipe.train, task, shapes, division, accelerator, steps)

    def start(self, earlier: str | None) -> str | None:
        """Before the first step: decide as far as it can be; a line to say, or None.

        Args:
            earlier: what the run that is continued had: on, off, or auto; None: nothing is known.
        """
        self.state = stated(self.recipe, self.accelerator.device.type)
        if self.recipe.compile != "auto":
            if self.state == "on":
                self._switch_on()
            return None
        if self.state == "off":
            return None
        why = obstacle(self.task.family, self.task.each(), self.accelerator)
        if why is None and self.shapes.count > MOST:
            why = f"batches have {self.shapes.count} shapes, and each is compiled by itself (at most {MOST})"
        if why is not None:
            self.state = "off"
            return f"not compiled (train.compile: auto): {why}"
        if earlier in ("on", "off"):
            self.state = earlier
            if earlier == "on":
                self._switch_on()
            return f"{'compiled' if earlier == 'on' else 'not compiled'} (train.compile: auto), as before"
        return None

    @contextmanager
    def on(self, batch: Batch) -> Iterator[None]:
        """Within it, if it is so decided, a micro-batch goes forward and back through what is compiled."""
        if self.state == "auto" and not self._began:
            self._began = self.clock()
        if self.state != "on" or not self._known(batch):
            yield
            return
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        before = [vars(unit.module).get("forward") for unit in self._units]
        try:
            for unit in self._units:
                unit.module.forward = unit
            yield
        finally:
            for unit, own in zip(self._units, before, strict=True):
                if own is None:
                    del unit.module.forward  # the class's own is back
                else:
                    unit.module.forward = own

    def tick(self, done: int) -> str | None:
        """After a step: decide if it is time, or tell that something failed; a line to say, or None."""
        told, self._told = self._told, None
        if self.state != "auto":
            return told
        launched = self.clock()
        self._wait()
        whole = self.clock() - self._began
        self._ticks += 1
        if self._ticks > WARM:
            self._times.append(Times(whole, 1 - (launched - self._began) / max(whole, 1e-9)))
        self._began = 0.0
        if len(self._times) < TIMED:
            return None
        times = self._agreed()
        count = sum(1 for unit in self._found().values() for m in unit.modules() if not any(m.children()))
        pays, why = verdict(self.steps - done, times, count, self.shapes.count)
        self.state = "on" if pays else "off"
        if pays:
            self._switch_on()
        return f"{'compiled from here on' if pays else 'not compiled'} (train.compile: auto): {why}"

    def fail(self, why: str) -> None:
        """Go on uncompiled, and tell it after the step.

        Raises:
            CompileError: compiling was asked for.
        """
        if self.recipe.compile == "on":
            raise CompileError(f"train.compile: compiling failed: {why}; expected auto or off")
        self.state = "off"
        self._told = f"goes on uncompiled (train.compile: auto): {why}"

    def _found(self) -> dict[str, nn.Module]:
        return units(self.task.family, self.task.each())

    def _known(self, batch: Batch) -> bool:
        """Whether a batch has one of the shapes that are compiled; keeps it in mind."""
        self.shape = tuple(batch.noise.shape)
        if len(batch.weight) not in self.shapes.sizes:
            return False
        if self.shape not in self._seen and len(self._seen) >= self.shapes.count:
            return False
        self._seen.add(self.shape)
        return True

    def _switch_on(self) -> None:
        keep_cache()
        whole = ("unet", "branch")
        config: Any = torch._dynamo.config
        # Above its limits dynamo would quietly go on uncompiled. Layers of a text encoder share their code.
        wanted = 2 * self.shapes.count * len(self._found())
        config.recompile_limit = max(config.recompile_limit, wanted)
        config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, wanted)
        self._units = [
            Unit(self, name, module, self.graphs and name in whole) for name, module in self._found().items()
        ]

    def _wait(self) -> None:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)

    def _agreed(self) -> Times:
        """The middle of what was measured, the mean over processes: all decide alike."""
        both = [median(t.step for t in self._times), median(t.tail for t in self._times)]
        table = torch.tensor(both, device=self.accelerator.device)
        step, tail = self.accelerator.reduce(table, "mean").tolist()
        return Times(step, tail)


def keep_cache() -> None:
    """Let what is compiled be kept for later runs, in the user's cache folder, unless a place is set.

    Not in `data.cache`, which others may write to: what lies there would be run.
    """
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return
    place = default_folder() / "compiled"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # torch has a place of its own
    if os.access(place, os.W_OK):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(place)
