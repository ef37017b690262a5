"""Runs recipes from end to end as one of so many processes; run by test_sharded.py.

    python sharded.py PROCESSES PROVED OUT RECIPE...

With PROVED 0 the exports are not proved, which takes longer than the training. Writes OUT/NAME.json for each
recipe: what this run shared out, as the main process saw it after training.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])  # also where the package is not installed

import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

from tuner import loop, memory, recipe, run  # noqa: E402


def main(processes: int, proved: bool, out: Path, places: list[Path]) -> None:
    """Train each recipe, and write down what was shared out."""
    train = loop.train
    if not proved:
        run._proved = lambda *_: []  # type: ignore[assignment]
    memory.admit = lambda *_: None  # type: ignore[assignment]  # planning takes as long as a tiny run

    def looked(made: Any, *more: Any) -> bool:
        for network in made.family.modules().values():
            for parameter in network.parameters():
                parameter.data = (
                    parameter.data.clone()
                )  # files are mapped at any address, which kernels notice
        done = train(made, *more)
        assert made.accelerator.num_processes == processes
        assert torch.distributed.is_initialized() == (processes > 1)
        found = facts(made)  # all processes together
        if made.accelerator.is_main_process:
            (out / f"{made.recipe.name}.json").write_text(json.dumps(found))
        return done

    loop.train = looked
    for place in places:
        AcceleratorState._reset_state()  # it keeps the precision of the run before
        assert run.train(recipe.load(place)) == 0


def facts(made: loop.Run) -> dict[str, Any]:
    """By network, and of what is trained: numbers, those of them that are here, parted tensors, tensors."""
    shards = made.task.shards
    found: dict[str, Any] = {"processes": made.accelerator.num_processes, "shared": shards is not None}
    for name, network in ({} if shards is None else shards.networks).items():
        found[name] = counted(list(network.parameters()))
    return found | {"trained": counted(made.task.trained()), "kinds": kinds(made)}


def counted(parameters: list[torch.nn.Parameter]) -> list[int]:
    here = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    parted = sum(isinstance(p, DTensor) for p in parameters)
    return [sum(p.numel() for p in parameters), sum(p.numel() for p in here), parted, len(parameters)]


def kinds(made: loop.Run) -> list[str]:
    """The classes' names within `whole`, where nothing may show that the networks are shared out."""
    with made.task.whole():
        return sorted({type(m).__name__ for n in made.family.modules().values() for m in n.modules()})


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] == "1", Path(sys.argv[3]), [Path(name) for name in sys.argv[4:]])
