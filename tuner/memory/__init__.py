"""How much memory a run will need, computed before anything is loaded, and what would make it fit."""

from __future__ import annotations

from tuner.memory.fitting import Suggestion, fits
from tuner.memory.fitting import lines as suggestion_lines
from tuner.memory.here import admit, available, place_of_proof
from tuner.memory.needs import Needs, Phase
from tuner.memory.planning import plan
from tuner.memory.recompute import switch_on
from tuner.memory.sizes import parse, show

__all__ = [
    "Needs",
    "Phase",
    "Suggestion",
    "admit",
    "available",
    "fits",
    "parse",
    "place_of_proof",
    "plan",
    "show",
    "suggestion_lines",
    "switch_on",
]
