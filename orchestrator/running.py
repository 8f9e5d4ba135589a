"""Running what is missing of a sweep: the backend, the live table, and MLflow's one writer, wired together."""

import contextlib
import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.claims import Claims, Heartbeat, forget_dead_drivers, is_alone
from orchestrator.cli import Session
from orchestrator.declaration import Declaration
from orchestrator.durations import measured_rates
from orchestrator.full_report import write_full_report
from orchestrator.progress import Progress, quiet
from orchestrator.redaction import redacted, redacted_fields
from orchestrator.report import Written
from orchestrator.spec import RetryPolicy
from orchestrator.state import StateWriter
from orchestrator.trial import Execution, Post
from orchestrator.trial_plan import TrialPlan
from orchestrator.workers import set_ray_environment
from trainers.disk import replace
from trainers.errors import StorageError
from trainers.specs import Placement
from trainers.stopping import StopRequest
from trainers.transfer import remove_tree

if TYPE_CHECKING:
    from orchestrator.tracking import Tracker


STOPPING_S = 5.0


@dataclasses.dataclass(slots=True)
class Phases:
    """Wall seconds of a run, phase by phase, for benchmarks/demo_phases.py."""

    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    _since: float = dataclasses.field(default_factory=time.perf_counter)

    def end(self, phase: str) -> None:
        """Everything since the last end was `phase`."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now


def run_missing(
    session: Session,
    declaration: Declaration,
    todo: Sequence[TrialPlan],
    placements: dict[str, Placement],
    retries: RetryPolicy,
    phases: Phases,
) -> Written:
    """Run `todo`, then write the report: what was written. Raises KeyboardInterrupt when stopped, all notes made."""
    from orchestrator.tracking import Tracker

    store, sweep = session.store, session.sweep_name
    stop = StopRequest(session.options.grace_s)
    with (
        quiet(session.driver_log, session.console.width) as terminal,
        stop.listening(),
        Heartbeat(store.root, sweep) as heartbeat,
    ):
        forget_dead_drivers(store.root)
        if is_alone(store.root, heartbeat.driver):
            store.remove_drafts(sweep)
        execution = Execution(
            store=store,
            claims=Claims(store.root, heartbeat.driver),
            retries=retries,
            checkpoint_steps=session.options.checkpoint_steps,
            stages=session.stages,
        )
        names = {item.key: item.spec.name for item in todo}
        state = StateWriter(sweep, store, heartbeat.driver, session.command, list(names))
        tracker = Tracker(session.tracking_uri, store, declaration)
        with Progress(terminal, names, len(declaration.trials) - len(todo)) as progress:
            follow = _follower(session, progress, state, tracker)
            try:
                _execute(session, declaration, todo, placements, execution, follow, stop, phases)
            except KeyboardInterrupt:
                # What it cannot take in that time, the next command logs.
                tracker.close(STOPPING_S)
                raise
            finally:
                state.close()
        written = write_full_report(declaration, store, terminal)
        trouble = _end_view(tracker, written)
        phases.end("mlflow")
    _warn(session, trouble)
    return written


def catch_up(session: Session, declaration: Declaration, written: Written) -> None:
    """Log what an earlier command could not; MLflow is not imported where nothing is pending."""
    from orchestrator.tracking import is_pending

    if is_pending(session.tracking_uri, session.store, declaration.sweep):
        show_report(session, declaration, written)


def show_report(session: Session, declaration: Declaration, written: Written) -> None:
    """Log the report as it is now, and whatever is pending."""
    from orchestrator.tracking import Tracker

    with quiet(session.driver_log, session.console.width):
        tracker = Tracker(session.tracking_uri, session.store, declaration)
        trouble = _end_view(tracker, written)
    _warn(session, trouble)


def _end_view(tracker: "Tracker", written: Written) -> str | None:
    """Give the view its report, and wait for it; why it lacks something, if it does."""
    tracker.report(written.folder, complete=all(result.complete for result in written.results))
    return tracker.close()


def _warn(session: Session, trouble: str | None) -> None:
    if trouble:
        session.console.print(
            f"warning: the MLflow view is incomplete ({redacted(trouble)}); the next run or `sync` completes it",
            style="yellow",
            markup=False,
        )


def _follower(session: Session, progress: Progress, state: StateWriter, tracker: "Tracker") -> Post:
    """Who is told of each event: the terminal, the state file, MLflow, and a log for each failed trial."""

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] in ("failed", "retry", "notice", "replanned"):
            event = redacted_fields(event)
        progress.on_event(event)
        state.on_event(event)
        if event["event"] == "started":
            tracker.started(event["trial"])
        elif event["event"] == "checkpoint":
            tracker.checkpointed(event["trial"])
        elif event["event"] in ("complete", "failed"):
            tracker.ended(event["trial"], failed=event["event"] == "failed")
        if "detail" in event:
            # A full disk may be what the trial failed of; it must not end the others.
            with contextlib.suppress(OSError, StorageError):
                replace(session.driver_log.with_name(f"{event['trial']}.log"), event["detail"])

    return on_event


def _execute(
    session: Session,
    declaration: Declaration,
    todo: Sequence[TrialPlan],
    placements: dict[str, Placement],
    execution: Execution,
    on_event: Post,
    stop: StopRequest,
    phases: Phases,
) -> None:
    if session.options.backend == "inline":
        from orchestrator.inline import run_inline

        run_inline(todo, placements, execution, on_event, stop)
        phases.end("trials")
        return
    set_ray_environment()
    import ray

    from orchestrator.cluster import start_ray
    from orchestrator.fanout import run_on_ray
    from orchestrator.scaling import all_workers

    scratches = session.store.local / "scratch"
    scratches.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{session.sweep_name}-", dir=scratches))
    try:
        workers = all_workers(session.options.cluster) if ray.is_initialized() else ()
        start_ray(len(os.sched_getaffinity(0)))
        named = {trial.key: (trial.model, trial.reward) for trial in declaration.trials}
        measured = measured_rates(named, execution.store)
        phases.end("start ray")
        # Ray's own handler would end the process with the signal's number.
        with stop.listening():
            run_on_ray(todo, placements, execution, on_event, scratch, stop, workers, measured)
        phases.end("trials")
    finally:
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)
        remove_tree(session.store.root / "scratch" / scratch.name)
    phases.end("stop ray")
