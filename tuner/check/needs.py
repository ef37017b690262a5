"""Memory: what the run needs at its peak, and what would make it fit a given size."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from tuner import memory
from tuner.check.findings import Findings
from tuner.errors import UserError
from tuner.memory.needs import UNTIL_TRAINED
from tuner.recipe import Recipe

FAULTS = (ArithmeticError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError)
"""Of a plan that fails by itself; a run starts all the same."""


def needs(
    recipe: Recipe, accelerator: Accelerator, device: str | None, limit: str | None, found: Findings
) -> None:
    """The plan of memory, and with a limit settings that keep below it; more than there is is a problem.

    Args:
        device: cpu or cuda; None: this machine's.
        limit: an amount such as `12GiB`; None: what this machine has.
    """
    here, processes = accelerator.device.type, accelerator.num_processes
    kind = here if device is None else device
    about: dict[str, Any] = {"device": kind}
    try:
        planned = memory.plan(recipe, processes, kind)
        about |= {"needs": planned.as_json(), "peak": planned.peak, "lines": planned.lines()}
        found.facts["memory"] = about
        room = memory.available(here) if kind == here else None
        if room is not None:
            about |= {"free": room.free, "total": room.total}
            local = processes if here == "cpu" else 1  # that share the machine's memory
            most = room.free if here == "cuda" else room.total
            if planned.most(UNTIL_TRAINED) * local > most:
                what = f"the run needs about {planned.told()}, {memory.show(most)} are there"
                found.problem("memory", f"{what}; --memory says what would make it fit")
        if limit is None:
            return
        about["limit"] = bound = memory.parse(limit)
        suggestions = memory.fits(recipe, bound, processes, kind)
    except UserError as error:
        found.problem("memory", str(error))
        return
    except FAULTS as error:
        found.unchecked.append(f"memory: not planned: {' '.join(str(error).split()) or type(error).__name__}")
        return
    about["suggestions"] = [dict(vars(one)) for one in suggestions]
    if planned.peak > bound:
        about["suggested"] = memory.suggestion_lines(suggestions, bound)
        told = "".join(f"\n{line}" for line in about["suggested"])
        found.problem("memory", f"the run needs about {planned.told()}, more than --memory {limit}:{told}")
