"""What a check has found: facts, problems, and what could not be looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from tuner.errors import UserError, of_system

Result = TypeVar("Result")


class Problem(NamedTuple):
    """Something that keeps a run from starting.

    Attributes:
        about: the section that it belongs to: recipe, machine, base, method, data ...
        text: as a run would say it.
    """

    about: str
    text: str


@dataclass
class Findings:
    """Grows while a check goes on.

    Attributes:
        facts: of each section, as plain values that JSON can hold.
        problems: all that there are.
        unchecked: what could not be looked at, and why.
        notes: what is worth knowing and keeps nothing from starting.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def attempt(self, about: str, look: Callable[[], Result]) -> Result | None:
        """What `look` gives; None, and a problem more, where it raises UserError, or the system refuses."""
        try:
            return look()
        except UserError as error:
            self.problem(about, str(error))
        except OSError as error:
            if (told := of_system(error)) is None:
                raise
            self.problem(about, told)
        return None

    def problem(self, about: str, text: str) -> None:
        """Add a problem; the same is told once."""
        if (one := Problem(about, text)) not in self.problems:
            self.problems.append(one)

    def problems_of(self, about: str, texts: Iterable[str]) -> None:
        """Add several."""
        known = set(self.problems)
        fresh = dict.fromkeys(Problem(about, text) for text in texts)
        self.problems += [one for one in fresh if one not in known]

    def note(self, text: str) -> None:
        """Add a note; the same is told once."""
        if text not in self.notes:
            self.notes.append(text)

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values: `ok`, `problems`, `not_checked`, `notes`, and the sections' facts."""
        return {
            "ok": not self.problems,
            "problems": [one._asdict() for one in self.problems],
            "not_checked": self.unchecked,
            "notes": self.notes,
            **self.facts,
        }
