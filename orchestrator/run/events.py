"""What happens to a trial while it runs: frozen values that stages post and the terminal, the state file and MLflow follow."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to a trial, named by its key; who computes a stage leaves it to others to name the trial."""

    trial: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Event):
    """The trial runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageBegan(Event):
    """A stage of the trial is computed or, as `waiting`, waits for devices or for another driver."""

    stage: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsLogged(Event):
    """Rows that a stage has reported since the last event: steps of a training, or pairs done elsewhere."""

    stage: str
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice(Event):
    """A sentence that must not pass unseen."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Replanned(Notice):
    """The training goes on with fewer devices than planned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retried(Event):
    """An attempt failed, and another follows; `how` says when and with what."""

    cause: str
    message: str
    how: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed(Event):
    """Every stage of the trial is in the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Event):
    """The trial is given up; `detail` is its traceback."""

    cause: str
    message: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped(Event):
    """The trial ended because the sweep was asked to stop."""


Post = Callable[[Event], None]
# What a stage reports while it is computed: rows, {"notice": text}, or {"checkpoint": step}.
TakeRow = Callable[[dict[str, Any]], None]


def posting_for(trial: str, post: Post) -> Post:
    """Return a function that names the trial in each event before it posts it."""
    return lambda event: post(replace(event, trial=trial))


@dataclass(slots=True)
class RowBuffer:
    """Collects rows of a stage, so that the driver hears of them in at most one event a second."""

    post: Post
    stage: str
    every_s: float = 1.0
    _waiting: list[dict[str, Any]] = field(default_factory=list)
    _sent: float = 0.0

    def take(self, row: dict[str, Any]) -> None:
        """Take a row, or post at once what else a stage has to say."""
        if "notice" in row:
            self.post(Notice(text=row["notice"]))
        # Nobody follows checkpoints of a sweep; `python -m trainers.train` says them.
        elif "checkpoint" not in row:
            self._waiting.append(row)
            if time.monotonic() - self._sent >= self.every_s:
                self.flush()

    def flush(self) -> None:
        """Post the rows that wait."""
        if self._waiting:
            self.post(RowsLogged(stage=self.stage, rows=self._waiting))
            self._waiting, self._sent = [], time.monotonic()


@contextlib.contextmanager
def reporting(stage: str, post: Post) -> Iterator[TakeRow]:
    """Say that `stage` begins, and yield its report function; rows that still wait are posted however the block ends."""
    buffer = RowBuffer(post=post, stage=stage)
    post(StageBegan(stage=stage))
    try:
        yield buffer.take
    finally:
        buffer.flush()
