"""What happens to a trial while it runs: frozen values that stages post and the terminal, the state file and MLflow follow."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

POST_EVERY_S = 1.0


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


@contextlib.contextmanager
def reporting(stage: str, post: Post) -> Iterator[TakeRow]:
    """Say that `stage` begins, and yield its report function.

    Its rows are posted in at most one event a second, and what still waits however the block ends.
    """
    waiting: list[dict[str, Any]] = []
    posted_at = 0.0

    def post_waiting() -> None:
        nonlocal waiting, posted_at
        if waiting:
            post(RowsLogged(stage=stage, rows=waiting))
            waiting, posted_at = [], time.monotonic()

    def take(row: dict[str, Any]) -> None:
        if "notice" in row:
            post(Notice(text=row["notice"]))
        # Nobody follows checkpoints of a sweep; `python -m trainers.train` says them.
        elif "checkpoint" not in row:
            waiting.append(row)
            if time.monotonic() - posted_at >= POST_EVERY_S:
                post_waiting()

    post(StageBegan(stage=stage))
    try:
        yield take
    finally:
        post_waiting()
