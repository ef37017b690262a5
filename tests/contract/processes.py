"""Trains recipes through the real build and loop, as one of so many processes; run by test_processes.py.

    python processes.py PROCESSES OUT RECIPE...

Writes OUT/NAME.safetensors (the trained tensors) and OUT/NAME.json (what was divided how, and how many of
the base's tensors are what they were) for each recipe.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # also where the package is not installed

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from tuner import build, device, loop, recipe  # noqa: E402
from tuner.log import Log  # noqa: E402
from tuner.signals import Stop  # noqa: E402


def main(processes: int, out: Path, places: list[Path]) -> None:
    """Train each recipe and write what came out."""
    for place in places:
        about = recipe.load(place)
        accelerator = device.start(about.train.precision, about.train.threads)
        assert accelerator.num_processes == processes, accelerator.num_processes
        assert torch.distributed.is_initialized() == (processes > 1)
        torch.manual_seed(accelerator.process_index)  # processes need not agree in what they do not use
        made = build.build(about, accelerator)
        assert made.division.processes == processes and made.division.rank == accelerator.process_index
        trained = {id(parameter) for parameter in made.task.trained()}
        modules = made.family.modules().values()
        frozen = [t for m in modules for t in m.state_dict(keep_vars=True).values() if id(t) not in trained]
        before = [tensor.detach().clone() for tensor in frozen]
        with Log(made.output, False, None, accelerator.is_main_process, None, {}) as log, Stop() as stop:
            assert loop.train(made, log, None, stop)
        assert torch.distributed.get_world_size() == processes if processes > 1 else True
        if accelerator.is_main_process:
            save_file(
                {n: t.contiguous() for n, t in made.task.tensors().items()}, out / f"{about.name}.safetensors"
            )
            same = sum(torch.equal(now, then) for now, then in zip(frozen, before, strict=True))
            facts = {
                "processes": accelerator.num_processes,
                "accumulate": made.division.accumulate,
                "frozen": len(before),
                "as before": same,
            }
            (out / f"{about.name}.json").write_text(json.dumps(facts))
        accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
