"""Runs the missing trials of a sweep on a backend, and passes their events to the terminal, state.json and MLflow."""

import contextlib
import dataclasses
import functools
import logging
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.cli.session import Session
from orchestrator.cli.terminal import Progress, late_bar, quiet
from orchestrator.plan.durations import Pace, measured_rates
from orchestrator.report.page import write_full_report
from orchestrator.report.summary import Written
from orchestrator.run.events import (
    Completed,
    Event,
    Failed,
    Notice,
    Post,
    Replanned,
    Retried,
    RowsLogged,
    StageBegan,
    Started,
    Stopped,
)
from orchestrator.run.inline import run_inline
from orchestrator.run.trial import Execution
from orchestrator.run.workers import set_ray_environment
from orchestrator.spec.redaction import redacted
from orchestrator.spec.stages import TrialPlan
from orchestrator.store.artifacts import Store
from orchestrator.store.gc import clear_up, remove_finished_checkpoints
from orchestrator.store.leases import heartbeat
from orchestrator.store.records import Declaration, SweepState, TrialNote, read_state, write_state
from trainers.errors import StorageError
from trainers.specs import Placement
from trainers.storage import remove_tree, replace
from trainers.train.stopping import StopRequest

if TYPE_CHECKING:
    from orchestrator.tracking.mlflow import Tracker


STOPPING_S = 5.0
WRITE_EVERY_S = 1.0

logger = logging.getLogger(__name__)


class StateWriter:
    """Notes what happens to trials in state.json: failures at once, other events once a second.

    Trials outside `todo` keep the notes of earlier commands.
    """

    def __init__(
        self, sweep: str, store: Store, driver: str, command: Sequence[str], todo: Sequence[str]
    ) -> None:
        self._sweep, self._store = sweep, store
        self._driver, self._command = driver, tuple(command)
        earlier = read_state(sweep, store).trials
        before = {key: earlier.get(key, TrialNote()) for key in todo}
        # A trial keeps the cause of its last failure until it is complete.
        begun = {
            key: TrialNote(cause=note.cause, message=note.message, lost_h=note.lost_h)
            for key, note in before.items()
        }
        self.notes = {**earlier, **begun}
        self._paces: dict[str, Pace] = {}
        # Stages in flight by trial and name: their devices, when they began, and the hours of their earlier attempts.
        self._flying: dict[tuple[str, str], tuple[int, float, float]] = {}
        self._written = 0.0
        self._write()

    def on_event(self, event: Event) -> None:
        note = self.notes.get(event.trial)
        if note is None:
            return
        self._count_lost(event, note)
        match event:
            case Started():
                note.state = "running"
            case StageBegan() | RowsLogged():
                pace = self._paces.setdefault(event.trial, Pace())
                if isinstance(event, StageBegan):
                    pace.begin(event.stage)
                else:
                    pace.take(event.stage, event.rows[-1])
                note.stage, note.step, note.total = pace.stage, pace.done, pace.total
                note.loss, note.pairs_per_s, note.train_s = pace.loss, pace.rate, pace.train_s
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
            note.pairs_per_s = None
        # Later commands learn of a failure only from this note.
        if isinstance(event, Failed) or time.monotonic() - self._written >= WRITE_EVERY_S:
            self._write()

    def _count_lost(self, event: Event, note: TrialNote) -> None:
        """Count the hours of stages in flight as lost, until the trial has gone on to what needs them."""
        now = time.monotonic()
        mine = [place for place in self._flying if place[0] == event.trial]
        for place in mine:
            devices, since, before = self._flying[place]
            note.lost_h[place[1]] = before + devices * (now - since) / 3600
        match event:
            case StageBegan(key=key) if key and event.stage not in ("train", "evaluate"):
                mine = []
            case StageBegan() | Completed():
                # Every rank says that its training began.
                mine = [place for place in mine if place[1] != getattr(event, "name", "")]
                for place in mine:
                    note.lost_h[place[1]] = self._flying[place][2]
                note.lost_h = {name: hours for name, hours in note.lost_h.items() if hours}
            case RowsLogged() | Notice():
                mine = []
        for place in mine:
            del self._flying[place]
        if isinstance(event, StageBegan) and event.key:
            place = event.trial, event.name
            self._flying.setdefault(place, (event.devices, now, note.lost_h.get(event.name, 0.0)))

    def close(self) -> None:
        """Write the notes, with running trials as stopped."""
        for key in {trial for trial, _ in self._flying}:
            self._count_lost(Stopped(trial=key), self.notes[key])
        for note in self.notes.values():
            if note.state in ("running", "waiting"):
                note.state = "stopped"
        self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        state = SweepState(driver=self._driver, command=self._command, trials=self.notes)
        try:
            write_state(self._sweep, self._store, state)
        except (OSError, StorageError) as error:
            # A full disk must not end the sweep.
            logger.warning("the state of %s cannot be noted: %s", self._sweep, error)


def run_missing(
    session: Session,
    declaration: Declaration,
    todo: Sequence[TrialPlan],
    placements: Mapping[str, Placement],
    complete: int,
) -> Written:
    """Run the trials, write the report and return it; `complete` trials were done before.

    Raises KeyboardInterrupt when stopped, once all notes are written.
    """
    from orchestrator.tracking.mlflow import Tracker

    store, sweep = session.store, session.sweep_name
    stop = StopRequest(session.options.grace_s)
    with (
        quiet(session.driver_log, session.console.width) as terminal,
        stop.listening(),
        heartbeat(store.root) as leases,
    ):
        clear_up(store, sweep, leases.driver)
        steps = session.options.checkpoint_steps
        execution = Execution(store=store, leases=leases, checkpoint_steps=steps)
        tracker = Tracker(session.tracking_uri, store, declaration)
        names = {item.key: item.spec.name for item in todo}
        state = StateWriter(sweep, store, leases.driver, session.command, list(names))
        starting = "starting Ray" if session.options.backend == "ray" else "starting"
        progress = Progress(terminal, names, state.notes, complete, starting)
        on_event = _follower(session, progress, state, tracker)
        try:
            with contextlib.closing(state), progress:
                if session.options.backend == "inline":
                    run_inline(todo, placements, on_event, execution=execution, stop=stop)
                else:
                    _run_on_ray(session, declaration, todo, placements, execution, on_event, stop)
            # The driver may have gone on without a process that was killed.
            remove_finished_checkpoints(store)
            written = write_full_report(declaration, store, functools.partial(late_bar, terminal))
        except BaseException:
            # The next command logs what MLflow does not take in that time.
            tracker.close(timeout_s=STOPPING_S)
            raise
        trouble = tracker.close(written, complete=written.complete)
    _say_view_lacks(session, trouble)
    return written


def catch_up(session: Session, declaration: Declaration, written: Written) -> None:
    """Complete the MLflow view if it lacks anything; otherwise do not import MLflow."""
    from orchestrator.tracking.mlflow import is_shown

    if not is_shown(session.tracking_uri, session.store, declaration.sweep):
        show_report(session, declaration, written, complete=written.complete)


def show_report(session: Session, declaration: Declaration, written: Written, *, complete: bool) -> None:
    """Log the report and whatever else the MLflow view lacks."""
    from orchestrator.tracking.mlflow import Tracker

    with quiet(session.driver_log, session.console.width):
        tracker = Tracker(session.tracking_uri, session.store, declaration)
        trouble = tracker.close(written, complete=complete)
    _say_view_lacks(session, trouble)


def _say_view_lacks(session: Session, trouble: str | None) -> None:
    if trouble:
        session.warn(
            f"warning: the MLflow view is incomplete ({redacted(trouble)}); the next run or `sync` completes it"
        )


def _follower(session: Session, progress: Progress, state: StateWriter, tracker: "Tracker") -> Post:
    """Return a function that passes each event to the terminal, the state file and MLflow, and logs a failed trial."""

    def on_event(event: Event) -> None:
        if isinstance(event, Failed | Retried | Notice):
            texts = [item.name for item in dataclasses.fields(event) if item.type is str]
            clean: dict[str, Any] = {name: redacted(getattr(event, name)) for name in texts}
            event = dataclasses.replace(event, **clean)
        state.on_event(event)
        progress.on_event(event)
        if isinstance(event, Failed) and event.detail:
            # A full disk, which may be why the trial failed, must not end the others.
            with contextlib.suppress(OSError, StorageError):
                replace(session.driver_log.with_name(f"{event.trial}.log"), event.detail)
        match event:
            case Started() | Completed() | Failed():
                tracker.note(event.trial)
            case RowsLogged(stage="train"):
                tracker.note(event.trial, event.rows)

    return on_event


def _run_on_ray(
    session: Session,
    declaration: Declaration,
    todo: Sequence[TrialPlan],
    placements: Mapping[str, Placement],
    execution: Execution,
    on_event: Post,
    stop: StopRequest,
) -> None:
    """Run the trials on the joined cluster, else on a Ray that is started and ended here."""
    set_ray_environment()
    import ray

    from orchestrator.run.ray.scaling import all_workers
    from orchestrator.run.ray.sweep import run_on_ray

    scratches = session.store.local / "scratch"
    scratches.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{session.sweep_name}-", dir=scratches))
    try:
        named = {trial.key: (trial.model, trial.reward, trial.train_set) for trial in declaration.trials}
        run_on_ray(
            todo,
            placements,
            on_event,
            execution=execution,
            scratch=scratch,
            stop=stop,
            workers=all_workers(session.options.cluster) if ray.is_initialized() else (),
            measured=measured_rates(named, execution.store),
        )
    finally:
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)
        remove_tree(session.store.root / "scratch" / scratch.name)
