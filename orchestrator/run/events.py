"""Events of a running trial: stages post them; the terminal, the state file and MLflow follow them."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

POST_EVERY_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to a `trial`, given by its key; a stage leaves it empty, and the backend fills it in."""

    trial: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Event):
    """The trial has started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageBegan(Event):
    """A stage began; the stage `waiting` waits for devices or for another driver.

    `key` is that of the artifact that it makes (of several evaluations the first), on so many `devices`.
    """

    stage: str
    key: str = ""
    devices: int = 1

    @property
    def name(self) -> str:
        return f"{self.stage}/{self.key}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsLogged(Event):
    """Rows that a stage reported since its last event: training steps, or progress in pairs."""

    stage: str
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice(Event):
    """A sentence that the user must see."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Replanned(Notice):
    """The training continues on fewer devices than planned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retried(Event):
    """An attempt failed and another follows; `how` says when, and with which placement."""

    cause: str
    message: str
    how: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed(Event):
    """Every stage of the trial is complete."""


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
# Takes what a stage reports: a row, {"notice": text}, or {"checkpoint": step}.
TakeRow = Callable[[dict[str, Any]], None]


def posting_for(trial: str, post: Post) -> Post:
    """Return a function that posts each event with its trial filled in."""
    return lambda event: post(replace(event, trial=trial))


@contextlib.contextmanager
def reporting(stage: str, post: Post, key: str, devices: int = 1) -> Iterator[TakeRow]:
    """Post that `stage` begins, and yield its report function.

    Rows are posted at most once a second, and the rest when the block ends.
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
        # A sweep does not show checkpoints; `python -m trainers.train` does.
        elif "checkpoint" not in row:
            waiting.append(row)
            if time.monotonic() - posted_at >= POST_EVERY_S:
                post_waiting()

    post(StageBegan(stage=stage, key=key, devices=devices))
    try:
        yield take
    finally:
        post_waiting()
