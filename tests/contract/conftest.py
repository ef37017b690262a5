"""One table of method x family: a new method or family is tested by adding a row."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from tuner import base, optimiser
from tuner.batch import Batch
from tuner.data.blob import File
from tuner.data.cache import Hashes
from tuner.data.captions import CaptionRule
from tuner.data.loader import Feed, Latents, Texts
from tuner.data.plan import Slot
from tuner.data.samples import Sample
from tuner.data.views import Views
from tuner.family import Family
from tuner.method import Method
from tuner.objective import Objective
from tuner.task import Task

SIZE = 32  # pixels of a side
COUNT = 6  # samples
CANNY = {"kind": "canny"}


WITHOUT_UNET = ("autoencoder", "contrastive")  # to them an inpainting base is one as any other


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        base: which of the tiny bases (`folders` of tests/conftest.py); its family's name, or that and more.
        frozen: the base is left as it is, and `off` gives it back.
        divides: a step may be divided into micro-batches and processes.
        learning_rate, falls: in 25 steps at this rate on one batch the loss falls below this share.
        slow: left out unless asked for: its method is tested on this base by another row, and what it has
            besides on another base.
    """

    method: str
    config: dict[str, Any] = field(default_factory=dict)
    base: str = "sd1"
    frozen: bool = True
    divides: bool = True
    learning_rate: float = 1e-3
    falls: float = 0.5
    slow: bool = False

    @property
    def name(self) -> str:
        own = ("arch", "unlock_decoder_at", *(["rank"] if self.method == "controlnet" else []))
        told = {k: v for k, v in self.config.items() if isinstance(v, bool | list) or k in own}
        more = (f"no_{key}" if value is False else key for key, value in told.items())
        return "-".join([self.config.get("kind", self.method), *more, self.base])

    @property
    def family(self) -> str:
        return self.base.partition("_")[0]


SD1 = (
    Case("controlnet", {"condition": CANNY}),
    Case(
        "textual_inversion",
        {"token": "<new>", "init": "red", "vectors": 2, "replace": "toy"},
        learning_rate=0.1,
        falls=0.98,  # a random UNet hardly listens to its text; but each step is the same step
    ),
    Case(
        "lora",
        {"rank": 4, "alpha": 8.0, "targets": "attention+feed-forward", "text_encoder": True},
        learning_rate=1e-2,
    ),
    Case("full", frozen=False),
    Case("autoencoder", frozen=False),
    Case("contrastive", frozen=False, divides=False),
    Case("contrastive", {"text_encoder": False}, frozen=False, divides=False),
)
TWO_WORDS = {
    "tokens": [
        {"token": "<new>", "init": "red", "vectors": 2, "replace": "toy"},
        {"token": "<by>", "init": "toy", "replace": "in"},
    ]
}
SLOWER = {"lora": 0.7, "textual_inversion": 0.999}
PATTERNS = [
    {"match": r"unet\..*conv.*", "rank": 2, "alpha": 1.0},
    {"match": r"text_encoder.*", "rank": 3, "learning_rate": 2e-3},
]
KINDS: tuple[dict[str, Any], ...] = (
    {"targets": "all", "patterns": PATTERNS, "rslora": True, "text_encoder": True},
    {"kind": "dora", "targets": "all", "text_encoder": True},
    {"kind": "loha", "targets": "all", "tucker": True, "text_encoder": True},
    {"kind": "lokr", "targets": "all", "tucker": True, "decompose_both": True, "text_encoder": True},
)
INPAINT = tuple(replace(case, base="sd1_inpaint") for case in SD1 if case.method not in WITHOUT_UNET)
CASES = (
    *SD1,
    Case("lora", {"rank": 4}, learning_rate=1e-2),
    Case("textual_inversion", TWO_WORDS, learning_rate=0.1, falls=0.98),
    Case("controlnet", {"condition": CANNY, "unlock_decoder_at": 1}, frozen=False),
    *(
        Case("controlnet", {"condition": CANNY, "arch": "lite"}, base=base, slow=base != "sd1")
        for base in ("sd1", "sdxl")
    ),
    *(
        Case("controlnet", {"condition": CANNY, "rank": 4}, base=base, slow=base in ("sd2", "sd1_inpaint"))
        for base in ("sd1", "sd2", "sdxl", "sd1_inpaint")
    ),
    *(
        Case("full", {"text_encoder": True}, base=base, frozen=False, slow=base != "sdxl")
        for base in ("sd1", "sd2", "sdxl")
    ),
    *(replace(case, base="sd2", slow=case.method in WITHOUT_UNET) for case in SD1),
    # One of the tiny SDXL's two levels has no attention, and its UNet hears its text hardly at all.
    *(
        replace(
            case,
            base="sdxl",
            falls=SLOWER.get(case.method, case.falls),
            slow=case.method in WITHOUT_UNET,
        )
        for case in SD1
    ),
    *INPAINT,
    *(
        Case("lora", {"rank": 4, **kind}, base=base, learning_rate=1e-2, falls=0.8, slow=base != "sd1")
        for kind in KINDS
        for base in ("sd1", "sdxl")
    ),
    Case("lora", {"rank": 4}, base="sdxl_inpaint", learning_rate=1e-2, falls=0.7),
)


@dataclass(frozen=True)
class Bench:
    """A method on a base, with data."""

    case: Case
    family: Family
    method: Method
    task: Task
    feed: Feed

    def batch(self, samples: Sequence[int] = range(4)) -> Batch:
        return self.feed.batch([Slot(i, 0, i, 1.0) for i in samples], float(len(samples)))

    def optimiser(self, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        rate = self.case.learning_rate
        return optimiser.build(self.method.groups(rate), "adamw", rate, weight_decay)

    def step(self, batch: Batch, made: torch.optim.Optimizer) -> float:
        """One training step; the loss before it."""
        made.zero_grad()
        loss, _ = self.task(batch)
        loss.backward()
        made.step()
        return float(loss.detach())

    def wake(self) -> None:
        """Move every trained tensor off its start, so that nothing is zero."""
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.task.trained():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)

    def gradients(self) -> dict[str, Tensor]:
        found = {name: p.grad for name, p in self.task.named_trained()}
        assert found and all(g is not None for g in found.values()), [
            n for n, g in found.items() if g is None
        ]
        return {name: g.clone() for name, g in found.items() if g is not None}


Build = Callable[..., Bench]


@pytest.fixture(scope="session")
def cases() -> tuple[Case, ...]:
    """The whole table."""
    return CASES


ROWS = [pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow else []) for case in CASES]


@pytest.fixture(params=ROWS)
def case(request: pytest.FixtureRequest) -> Case:
    """Each row."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """A few pictures of a coloured disc, with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    made = []
    for number in range(COUNT):
        picture = Image.new("RGB", (SIZE + 4 * number, SIZE), (40 * number, 90, 200 - 30 * number))
        ImageDraw.Draw(picture).ellipse((6 + number, 5, 20 + number, 24), (250, 255 - 40 * number, 20))
        place = folder / f"{number}.png"
        picture.save(place)
        made.append(Sample(File(place), (f"a toy {number} in {'abcdef'[number]}",)))
    return made


@pytest.fixture(scope="session")
def hashes(tmp_path_factory: pytest.TempPathFactory) -> Hashes:
    return Hashes(tmp_path_factory.mktemp("hashes"))


@pytest.fixture
def load(folders: dict[str, Path], hashes: Hashes) -> Callable[[Case], Family]:
    """A fresh base of a row's family, no method on it."""

    def fresh(case: Case) -> Family:
        needs = importlib.import_module(f"tuner.methods.{case.method}").METHOD.NEEDS
        return base.load(str(folders[case.base]), None, (), needs, 0, hashes)

    return fresh


@pytest.fixture
def build(load: Callable[[Case], Family], samples: list[Sample]) -> Build:
    """A row's method on a fresh base; `seed` of the method."""

    def made(case: Case, seed: int = 0) -> Bench:
        family = load(case)
        file = importlib.import_module(f"tuner.methods.{case.method}")
        method = file.METHOD(file.Config(**case.config), family, seed)
        method.train_mode(True)
        task = Task(family, [method], Objective.from_scheduler_config(family.scheduler_config))
        feed = Feed(
            Views(samples, SIZE, 11, condition=method.condition),
            CaptionRule(replace=method.replacements()),
            Latents(family.latent_channels, family.factor),
            Texts(family.tokenize if family.text_encoders else None),
            told=np.array([(SIZE, SIZE + 4 * n) for n in range(COUNT)]) if family.told_sizes else None,
            holes=family.inpainting,
        )
        return Bench(case, family, method, task, feed)

    return made


@pytest.fixture
def bench(case: Case, build: Build) -> Bench:
    """Each row, built."""
    return build(case)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Sums in one order, so that equal work gives equal bits."""
    torch.set_num_threads(1)
