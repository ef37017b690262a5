"""What a run writes down: metrics.jsonl, and TensorBoard and Weights & Biases where they are asked for.

metrics.jsonl holds one JSON object a line, of three kinds:

    {"step": 12, "loss": 0.1, "learning_rate": 0.0001, "images_per_second": 33.1}
    {"step": 640, "event": "edges followed from step 640"}
    {"measure": "edge F1", "values": {"verdict": "...", "columns": [...], "rows": {...}}}

JSON has no word for a value that is not finite, so these stand as the strings "nan", "inf" and "-inf".
"""

from __future__ import annotations

import importlib
import json
import math
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

from tuner.disk import writing
from tuner.errors import UserError

FILE = "metrics.jsonl"
FINISHED = "finished"  # the event that ends a run which came to its end
RESERVED = frozenset({"step", "event", "measure", "values"})


class LogError(UserError):
    """The log cannot be written as asked, or metrics.jsonl cannot be read."""


@dataclass
class Records:
    """What metrics.jsonl says, in the order of its lines."""

    scalars: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """Values by name, as (optimiser step, value)."""
    measures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Final figures by name; where a name stands twice, the later one."""
    events: list[tuple[int, str]] = field(default_factory=list)
    """(optimiser step, text), without the final "finished"."""
    finished: bool = False
    """Whether the run came to its end: no values follow its "finished"."""

    @property
    def last_step(self) -> int:
        """The highest optimiser step any line names; 0 where there is none."""
        steps = [step for values in self.scalars.values() for step, _ in values[-1:]]
        return max(steps + [step for step, _ in self.events], default=0)


class Log:
    """Writes a run's figures. On processes other than the main one every method does nothing.

    A run that continues writes the checkpoint of step k after the lines of step k: then its file
    equals, byte for byte, the file of a run that was never interrupted (as far as the values do).
    """

    def __init__(
        self,
        output: Path,
        tensorboard: bool,
        wandb: str | None,
        main: bool,
        resume_step: int | None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the log in the folder `output`.

        Args:
            wandb: name of the Weights & Biases project; None leaves it out.
            resume_step: the last step that the continued run has done: lines after it are cut.
                None starts a new file in place of any there is.
            config: the resolved recipe, for Weights & Biases.

        Raises:
            LogError: Weights & Biases is asked for and not installed, or the lines to continue from
                cannot be read.
        """
        self._file: TextIO | None = None
        self._board: Any = None
        self._wandb: Any = None
        if not main:
            return
        wandb_module = _import_wandb() if wandb is not None else None
        path = output / FILE
        kept = _cut(path, resume_step) if resume_step is not None and path.exists() else b""
        with writing(path):
            output.mkdir(parents=True, exist_ok=True)
            _replace(path, kept)
            self._file = path.open("a", encoding="utf-8", newline="\n")
        if tensorboard:
            # here, because it takes a second to import and not every run asks for it
            from torch.utils.tensorboard import SummaryWriter

            first = 0 if resume_step is None else resume_step + 1
            make: Any = SummaryWriter
            # It puts the machine's name into its file's, which is nobody's business whom the folder is given.
            with mock.patch.object(socket, "gethostname", return_value="host"):
                self._board = make(str(output / "tensorboard"), purge_step=first, flush_secs=30)
        if wandb_module is not None:
            self._wandb = _start_wandb(wandb_module, output, wandb, resume_step, config)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write values by name as they stand after optimiser step `step`."""
        clash = RESERVED & values.keys()
        assert not clash, f"a scalar cannot be named {', '.join(sorted(clash))}"
        if self._file is None:
            return
        numbers = {name: float(value) for name, value in values.items()}
        self._line({"step": step, **numbers})
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def measures(self, name: str, values: Mapping[str, Any]) -> None:
        """Write final figures: numbers, strings, lists and dictionaries of them.

        Tables are `{"verdict": "...", "columns": ["strict", ...], "rows": {"floor": [0.1, ...], ...}}`;
        `"picture": "evaluation/edges.png"` names a picture in the output folder.
        """
        if self._file is None:
            return
        self._line({"measure": name, "values": values})
        if self._board is not None:
            self._board.add_text(f"measures/{name}", json.dumps(_finite(values), indent=2))
        if self._wandb is not None:
            self._wandb.summary.update({name: _finite(values)})

    def event(self, step: int, text: str) -> None:
        """Write something worth marking in the curves; the event `FINISHED` ends the run."""
        if self._file is None:
            return
        self._line({"step": step, "event": text})
        if self._board is not None:
            self._board.add_text("events", text, step)
        if self._wandb is not None:
            self._wandb.log({"event": text}, step=step)

    def back(self, step: int, text: str) -> None:
        """Go back to an earlier step, where the run goes on: the lines after it are cut; `text` says why."""
        if self._file is None:
            return
        path = Path(self._file.name)
        self._file.close()
        _replace(path, _cut(path, step))
        self._file = path.open("a", encoding="utf-8", newline="\n")
        # A run that is stopped right after this line, before its checkpoint, comes here again.
        if (step, text) not in read(path).events:
            self.event(step, text)

    def close(self) -> None:
        """Flush and close everything. Closing twice is allowed."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What was not written because the disk is full is written here again, and fails again.
        with suppress(OSError) if kind is not None else nullcontext():
            self.close()

    def _line(self, record: Mapping[str, Any]) -> None:
        assert self._file is not None
        with writing(Path(self._file.name)):
            self._file.write(_dump(record))
            self._file.flush()


def read(path: Path) -> Records:
    """Read a metrics.jsonl. A last line without its end is one being written, and is left out.

    Raises:
        LogError: a line is not one of the three kinds, naming file and line.
        FileNotFoundError: there is no such file.
    """
    records = Records()
    for _, record in _lines(path):
        if "measure" in record:
            records.measures[record["measure"]] = record["values"]
            continue
        step = record["step"]
        if record.get("event") == FINISHED:
            records.finished = True
        elif "event" in record:
            records.events.append((step, record["event"]))
        else:
            records.finished = False
            for name, value in record.items():
                if name != "step":
                    records.scalars.setdefault(name, []).append((step, float(value)))
    return records


def replace_measures(output: Path, measures: Mapping[str, Mapping[str, Any]]) -> None:
    """Put these final figures into a metrics.jsonl that exists, in place of those with the same names.

    For measuring a finished run again: everything else in the file stays as it is, byte for byte.

    Raises:
        LogError: a line of the file cannot be read.
        FileNotFoundError: there is no such file.
    """
    path = output / FILE
    kept: list[bytes] = []
    waiting = {name: _dump({"measure": name, "values": values}).encode() for name, values in measures.items()}
    for line, record in _lines(path):
        if record.get("measure") in measures:
            kept.append(waiting.pop(record["measure"], b""))
        else:
            kept.append(line)
    _replace(path, b"".join([*kept, *waiting.values()]))


def _cut(path: Path, step: int) -> bytes:
    """The lines that a run at `step` had written.

    Final figures and "finished" come after the last step, and the continued run makes them again.
    """
    return b"".join(
        line
        for line, record in _lines(path)
        if "measure" not in record and record["step"] <= step and record.get("event") != FINISHED
    )


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each complete line with what it says."""
    *complete, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(complete, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise LogError(f"{path}:{number}: not JSON: {error}") from error
        if not _is_record(record):
            raise LogError(f"{path}:{number}: neither values, an event nor a measure: {line[:80]!r}")
        yield line + b"\n", record


def _is_record(record: object) -> bool:
    if not isinstance(record, dict):
        return False
    if "measure" in record:
        return isinstance(record["measure"], str) and isinstance(record.get("values"), dict)
    if not isinstance(record.get("step"), int):
        return False
    if "event" in record:
        return isinstance(record["event"], str)
    values = (value for name, value in record.items() if name != "step")
    return all(isinstance(value, int | float) or value in ("nan", "inf", "-inf") for value in values)


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole."""
    beside = path.with_name(path.name + ".part")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _dump(record: Mapping[str, Any]) -> str:
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """The value in JSON's types; numbers of NumPy's are numbers too."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        return number if math.isfinite(number) else str(number)
    raise TypeError(f"cannot be written as JSON: {value!r} of type {type(value).__name__}")


def _import_wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise LogError(
            "Weights & Biases is asked for, but it cannot be imported: install it with `pip install wandb`, "
            f"or leave it out of the recipe ({error})"
        ) from error


def _start_wandb(
    module: Any, output: Path, project: str | None, resume_step: int | None, config: Mapping[str, Any] | None
) -> Any:
    """Start a run there, or continue the one this output folder belongs to."""
    remembered = output / "wandb-run"
    known = remembered.read_text().strip() if resume_step is not None and remembered.exists() else None
    run = module.init(
        project=project,
        name=output.resolve().name,
        dir=str(output),
        config=dict(config or {}),
        id=known,
        resume="allow" if known else None,
    )
    _replace(remembered, f"{run.id}\n".encode())
    return run
