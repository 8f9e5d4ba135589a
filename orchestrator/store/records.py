"""What a sweep is doing, for `status` and for whoever comes back: <storage>/sweeps/<sweep>/state.json.

The artifacts say what is complete; this file adds what only the driver knows: what runs, what failed and why.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from orchestrator.plan.durations import Pace
from orchestrator.run.events import (
    Completed,
    Event,
    Failed,
    Replanned,
    Retried,
    RowsLogged,
    StageBegan,
    Started,
    Stopped,
)
from orchestrator.store.artifacts import Store
from trainers.disk import replace
from trainers.errors import StorageError
from trainers.objects import Location

WRITE_EVERY_S = 1.0

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class TrialNote:
    """What the driver knows of a trial. `state`: waiting, running, complete, failed or stopped."""

    state: str = "waiting"
    stage: str = ""
    step: int = 0
    total: int = 0
    loss: float | None = None
    pairs_per_s: float | None = None
    left_s: float | None = None
    cause: str = ""
    message: str = ""
    retries: list[str] = field(default_factory=list)
    replanned: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepState:
    """The last command's driver, the words that were its command line, and a note of each trial by key."""

    driver: str = ""
    command: tuple[str, ...] = ()
    trials: Mapping[str, TrialNote] = field(default_factory=dict)


def read_state(sweep: str, store: Store) -> SweepState:
    """What the last command noted; nothing where there was none or its note is unreadable."""
    try:
        loaded = json.loads(_file(sweep, store).read_text())
        trials = {key: TrialNote(**note) for key, note in loaded["trials"].items()}
        return SweepState(driver=loaded["driver"], command=tuple(loaded["command"]), trials=trials)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return SweepState()


def _begun_again(note: TrialNote) -> TrialNote:
    """A fresh note, which keeps why the trial failed before: until it is complete, that is why it is not."""
    return TrialNote(cause=note.cause, message=note.message)


class StateWriter:
    """Follows events of trials; writes at most once a second, failures at once, and at `close`. What earlier commands noted stays."""

    def __init__(
        self, sweep: str, store: Store, driver: str, command: Sequence[str], todo: Sequence[str]
    ) -> None:
        self._path = _file(sweep, store)
        self._driver, self._command = driver, tuple(command)
        earlier = read_state(sweep, store).trials
        self._trials = {**earlier, **{key: _begun_again(earlier.get(key, TrialNote())) for key in todo}}
        # Each note as it is written; at a thousand trials, writing all of them anew takes longer than the trials.
        self._texts: dict[str, str] = {}
        self._paces: dict[str, Pace] = {}
        self._written = 0.0
        self._write()

    def on_event(self, event: Event) -> None:
        """Take in one event of a trial."""
        note = self._trials.get(event.trial)
        if note is None:
            return
        self._texts.pop(event.trial, None)
        match event:
            case Started():
                note.state = "running"
            case StageBegan():
                self._begin(event.trial, event.stage)
            case RowsLogged():
                self._take(event.trial, event.stage, event.rows[-1])
            case Retried():
                note.retries.append(f"{event.cause}: {event.message}")
            case Replanned():
                note.replanned.append(event.text)
            case Completed():
                note.state, note.cause, note.message = "complete", "", ""
            case Stopped():
                note.state = "stopped"
            case Failed():
                note.state, note.cause, note.message = "failed", event.cause, event.message
        if isinstance(event, Completed | Failed | Stopped):
            note.pairs_per_s = note.left_s = None
        # Of a failure that is not noted a later command knows nothing.
        if isinstance(event, Failed) or time.monotonic() - self._written >= WRITE_EVERY_S:
            self._write()

    def _begin(self, trial: str, stage: str) -> None:
        self._paces.setdefault(trial, Pace()).begin(stage)
        self._note_pace(trial)

    def _take(self, trial: str, stage: str, row: Mapping[str, Any]) -> None:
        self._paces.setdefault(trial, Pace()).take(stage, row)
        self._note_pace(trial)

    def _note_pace(self, trial: str) -> None:
        note, pace = self._trials[trial], self._paces[trial]
        note.stage, note.step, note.total = pace.stage, pace.done, pace.total
        note.loss, note.pairs_per_s, note.left_s = pace.loss, pace.rate, pace.left_s

    def close(self) -> None:
        """Write the last word; what still ran is stopped."""
        for note in self._trials.values():
            if note.state in ("running", "waiting"):
                note.state = "stopped"
        self._texts.clear()
        self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        for key in self._trials.keys() - self._texts.keys():
            self._texts[key] = json.dumps(asdict(self._trials[key]))
        head = json.dumps({"driver": self._driver, "command": self._command})
        trials = ", ".join(f"{json.dumps(key)}: {self._texts[key]}" for key in self._trials)
        text = f'{head[:-1]}, "trials": {{{trials}}}}}'
        try:
            replace(self._path, text)
        except (OSError, StorageError) as error:
            # A full disk must not end the sweep for the sake of its note.
            logger.warning("%s cannot be written: %s", self._path, error)


def _file(sweep: str, store: Store) -> Location:
    return store.sweep_dir(sweep) / "state.json"
