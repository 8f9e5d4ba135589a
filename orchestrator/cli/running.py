"""Running what is missing of a sweep: the backend, the live table, and MLflow's one writer, wired together."""

import contextlib
import dataclasses
import functools
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from orchestrator.run.trial import Execution
from orchestrator.run.workers import set_ray_environment
from orchestrator.spec.redaction import redacted
from orchestrator.spec.stages import TrialPlan
from orchestrator.spec.trials import RetryPolicy
from orchestrator.store.artifacts import Store
from orchestrator.store.gc import clear_up, remove_finished_checkpoints
from orchestrator.store.leases import Heartbeat
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

Place = Callable[[TrialPlan], Placement]
RunTrials = Callable[[Sequence[TrialPlan], Mapping[str, Placement], Post], None]


def _begun_again(note: TrialNote) -> TrialNote:
    """Return a fresh note, which keeps why the trial failed before: until it is complete, that is why it is not."""
    return TrialNote(cause=note.cause, message=note.message)


class StateWriter:
    """Follows events of trials; writes at most once a second, failures at once, and at `close`. What earlier commands noted stays."""

    def __init__(
        self, sweep: str, store: Store, driver: str, command: Sequence[str], todo: Sequence[str]
    ) -> None:
        self._sweep, self._store = sweep, store
        self._driver, self._command = driver, tuple(command)
        earlier = read_state(sweep, store).trials
        self._trials = {**earlier, **{key: _begun_again(earlier.get(key, TrialNote())) for key in todo}}
        self._paces: dict[str, Pace] = {}
        self._written = 0.0
        self._write()

    def on_event(self, event: Event) -> None:
        """Take in one event of a trial."""
        note = self._trials.get(event.trial)
        if note is None:
            return
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
        self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        state = SweepState(driver=self._driver, command=self._command, trials=self._trials)
        try:
            write_state(self._sweep, self._store, state)
        except (OSError, StorageError) as error:
            # A full disk must not end the sweep for the sake of its note.
            logger.warning("the state of %s cannot be noted: %s", self._sweep, error)


def run_missing(
    session: Session,
    declaration: Declaration,
    todo: Sequence[TrialPlan],
    complete: int,
    place: Place,
    retries: RetryPolicy,
) -> Written:
    """Run the trials, then write the report: what was written. `complete` trials are done before.

    Raises KeyboardInterrupt when stopped, all notes made.
    """
    from orchestrator.tracking.mlflow import Tracker

    store, sweep = session.store, session.sweep_name
    stop = StopRequest(session.options.grace_s)
    with (
        quiet(session.driver_log, session.console.width) as terminal,
        stop.listening(),
        Heartbeat(store.root) as heartbeat,
    ):
        clear_up(store, sweep, heartbeat.leases)
        execution = Execution(
            store=store,
            leases=heartbeat.leases,
            retries=retries,
            checkpoint_steps=session.options.checkpoint_steps,
        )
        tracker = Tracker(session.tracking_uri, store, declaration)
        try:
            with _backend(session, declaration, execution, stop) as run_trials:
                names = {item.key: item.spec.name for item in todo}
                placements = {item.key: place(item) for item in todo}
                state = StateWriter(sweep, store, heartbeat.driver, session.command, list(names))
                progress = Progress(terminal, names, complete)
                with contextlib.closing(state), progress:
                    run_trials(todo, placements, _follower(session, progress, state, tracker))
        except KeyboardInterrupt:
            # What it cannot take in that time, the next command logs.
            tracker.close(timeout_s=STOPPING_S)
            raise
        # Of a process that was killed the driver may have gone on without it.
        remove_finished_checkpoints(store)
        written = write_full_report(declaration, store, functools.partial(late_bar, terminal))
        trouble = _end_view(tracker, written)
    _warn(session, trouble)
    return written


def catch_up(session: Session, declaration: Declaration, written: Written) -> None:
    """Complete the view where it lacks anything; MLflow is not imported where it does not."""
    from orchestrator.tracking.mlflow import is_shown

    if not is_shown(session.tracking_uri, session.store, declaration.sweep, written.results):
        show_report(session, declaration, written)


def show_report(session: Session, declaration: Declaration, written: Written) -> None:
    """Log the report as it is now, and whatever else the view lacks."""
    from orchestrator.tracking.mlflow import Tracker

    with quiet(session.driver_log, session.console.width):
        tracker = Tracker(session.tracking_uri, session.store, declaration)
        trouble = _end_view(tracker, written)
    _warn(session, trouble)


def _end_view(tracker: "Tracker", written: Written) -> str | None:
    """Give the view its report, and wait for it; why it lacks something, if it does."""
    return tracker.close(written, complete=all(result.complete for result in written.results))


def _warn(session: Session, trouble: str | None) -> None:
    if trouble:
        session.console.print(
            f"warning: the MLflow view is incomplete ({redacted(trouble)}); the next run or `sync` completes it",
            style="yellow",
            markup=False,
        )


def _follower(session: Session, progress: Progress, state: StateWriter, tracker: "Tracker") -> Post:
    """Return a function that passes each event to the terminal, the state file and MLflow, and logs a failed trial."""

    def on_event(event: Event) -> None:
        if isinstance(event, Failed | Retried | Notice):
            event = _redacted(event)
        progress.on_event(event)
        state.on_event(event)
        if isinstance(event, Failed) and event.detail:
            # A full disk may be what the trial failed of; it must not end the others.
            with contextlib.suppress(OSError, StorageError):
                replace(session.driver_log.with_name(f"{event.trial}.log"), event.detail)
        if not tracker.shows(event.trial):
            return
        match event:
            case Started():
                tracker.started(event.trial)
            case RowsLogged(stage="train"):
                tracker.rows(event.trial, event.rows)
            case Completed() | Failed():
                tracker.ended(event.trial, failed=isinstance(event, Failed))

    return on_event


def _redacted(event: Failed | Retried | Notice) -> Event:
    texts = [item.name for item in dataclasses.fields(event) if item.type is str]
    clean: dict[str, Any] = {name: redacted(getattr(event, name)) for name in texts}
    return dataclasses.replace(event, **clean)


@contextlib.contextmanager
def _backend(
    session: Session, declaration: Declaration, execution: Execution, stop: StopRequest
) -> Iterator[RunTrials]:
    """Yield a function that runs trials; a Ray that it starts is up until the block ends."""
    if session.options.backend == "inline":
        from orchestrator.run.inline import run_inline

        yield functools.partial(run_inline, execution=execution, stop=stop)
        return
    set_ray_environment()
    import ray

    from orchestrator.run.ray.scaling import all_workers
    from orchestrator.run.ray.sweep import run_on_ray

    scratches = session.store.local / "scratch"
    scratches.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{session.sweep_name}-", dir=scratches))
    try:
        named = {trial.key: (trial.model, trial.reward) for trial in declaration.trials}
        yield functools.partial(
            run_on_ray,
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
